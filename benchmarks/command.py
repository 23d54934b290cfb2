"""What `flatops bench` runs: the table for a CPU or a GPU, the full suite, or a comparison of two results."""

from __future__ import annotations

from dataclasses import fields

import torch

from flatops.backend import _C
from flatops.benchmarks import bench, bench_gpu, compare


def main(config: bench.Config) -> int:
    """Measures and prints; writes JSON if asked to. Returns 1 if the compared results differ.

    Raises:
        ValueError: options that do not go together, no GPU, or no compiled core.
    """
    check_options(config)
    if config.compare:
        return compare.main(*config.compare)
    if config.device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("there is no GPU that torch can use: see nvidia-smi, and torch.version.cuda")
        return bench_gpu.main(config)
    if _C is None:
        raise ValueError("there is no compiled core to measure: see flatops info")
    if config.suite == "full":
        from flatops.benchmarks import suite  # needs Pillow, which is optional

        return suite.main(config)
    result = bench.measure(config, processes=1)
    bench.show(result)
    if config.json:
        bench.write(result, config.json)
    return 0


def check_options(config: bench.Config) -> None:
    """Raises ValueError for an option that would be ignored."""
    mode = "compare" if config.compare else "suite full" if config.suite == "full" else None
    allowed = {"compare": {"compare"}, "suite full": {"suite", "results"}, None: {"model", "rounds", "device", "json"}}[
        mode
    ]
    given = {each.name for each in fields(config) if getattr(config, each.name) != each.default}
    if foreign := sorted(given - allowed):
        raise ValueError(
            f"{', '.join(foreign)}: means nothing {f'with {mode}' if mode else 'without suite full'}; leave it out"
        )
