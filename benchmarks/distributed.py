"""What does a data-parallel step cost relative to SGD's? Several processes on one machine share each batch equally.

Every method has its own model, all in the same processes. Their steps take turns, as long as the slowest process takes,
and the result is the median over rounds of the ratio to the SGD step of the same round.

    python -m flatops.benchmarks.distributed
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

import flatops
from flatops import terminal
from flatops.benchmarks.measure import in_turn, provenance, quantile
from flatops.train import models


@dataclass(kw_only=True)
class Config:
    """Time the steps of each method on several processes of this machine."""

    model: str = "resnet18"
    """Any timm name, or cnn."""
    batch: int = 32
    """Images per step, over all processes."""
    image: int = 32
    """Width and height of the images."""
    processes: int = 2
    """Number of processes, of one thread each."""
    parallel: tuple[Literal["ddp", "fsdp"], ...] = ("ddp", "fsdp")
    """Any of ddp (DistributedDataParallel) and fsdp (fully_shard)."""
    rounds: int = 10
    """Rounds; the median counts."""
    json: Path | None = None
    """Also write the rows to this JSON file."""


Step = Callable[[Tensor, Tensor], None]


def sgd(model: nn.Module, optimizer: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        cross_entropy(model(x), y).backward()

    return step


def rwp(model: nn.Module, optimizer: Any) -> Step:
    """Serial m-RWP takes each of its two gradients over the whole batch, as on one process."""

    def step(x: Tensor, y: Tensor) -> None:
        if optimizer.clean_weight:
            (optimizer.clean_weight * cross_entropy(model(x), y)).backward()
        with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model, optimizer.is_perturbed):
            (optimizer.perturbed_weight * cross_entropy(model(x), y)).backward()

    return step


def sam(model: nn.Module, optimizer: Any, local: bool = False) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        with optimizer.ascent_pass(model if local else None):
            cross_entropy(model(x), y).backward()
        with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
            cross_entropy(model(x), y).backward()

    return step


def sam_local(model: nn.Module, optimizer: Any) -> Step:
    return sam(model, optimizer, local=True)


FORMS: dict[str, tuple[type | None, dict[str, Any], Callable[[nn.Module, Any], Step]]] = {
    "SGD": (None, {}, sgd),
    "RWP": (flatops.RWP, {"sigma": 1e-3}, rwp),
    "m-RWP, serial": (flatops.RWP, {"sigma": 1e-3, "lam": 0.5}, rwp),
    "m-RWP, parallel": (flatops.RWP, {"sigma": 1e-3, "lam": 0.5, "parallel": True}, rwp),
    "SAM, synced ascent": (flatops.SAM, {"rho": 1e-3}, sam),
    "SAM, local ascent": (flatops.SAM, {"rho": 1e-3}, sam_local),
}
SHARDED = {name: FORMS[name] for name in ("SGD", "RWP", "m-RWP, serial", "SAM, synced ascent")}


def make(config: Config, parallel: str, name: str) -> tuple[Callable[[], None], Any]:
    """A contender's whole step, and its optimizer."""
    torch.manual_seed(0)
    model = models.create(config.model, classes=10, channels=3)
    if parallel == "fsdp":
        for child in [child for child in model.children() if next(child.parameters(), None) is not None]:
            fully_shard(child)
        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    flat, options, of = FORMS[name]
    base = {"lr": 1e-3, "momentum": 0.9}
    if flat is None:
        optimizer = torch.optim.SGD(model.parameters(), **base)
    else:
        optimizer = flat(model.parameters(), torch.optim.SGD, **options, **base)
    passes = of(model, optimizer)
    generator = torch.Generator().manual_seed(dist.get_rank())
    share = config.batch // config.processes
    x = torch.randn(share, 3, config.image, config.image, generator=generator)
    y = torch.randint(10, (share,), generator=generator)

    def step() -> None:
        passes(x, y)
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def collectives(step: Callable[[], None]) -> int:
    """How many collectives a step calls."""
    kinds = ("allreduce", "allgather", "_allgather", "reduce_scatter", "_reduce_scatter", "broadcast", "alltoall")
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    names = [event.name.partition("c10d::")[2] for event in trace.events()]
    return sum(name.startswith(kinds) for name in names)


def work(rank: int, config: Config, parallel: str, store: str, report: str) -> None:
    """Runs in each process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=config.processes)
    try:
        chosen = FORMS if parallel == "ddp" else SHARDED
        contenders = {name: make(config, parallel, name) for name in chosen}

        def turn(step: Callable[[], None]) -> Callable[[], float]:
            def call() -> float:
                dist.barrier()
                start = time.perf_counter()
                step()
                dist.barrier()
                return time.perf_counter() - start

            return call

        times = in_turn({name: turn(step) for name, (step, _) in contenders.items()}, config.rounds)
        rows = []
        for name, (step, optimizer) in contenders.items():
            ratios = [t / s for t, s in zip(times[name], times["SGD"])]
            weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
            backup = sum(b.nbytes for b in optimizer.run.weights.backups.values()) if name != "SGD" else 0
            shares: list[Any] = [None] * config.processes
            dist.all_gather_object(shares, backup)
            rows.append(
                {
                    "parallel": parallel,
                    "method": name,
                    "to_sgd": quantile(ratios, 0.5),
                    "low": quantile(ratios, 0.25),
                    "high": quantile(ratios, 0.75),
                    "ms": quantile(times[name], 0.5) * 1e3,
                    "collectives": collectives(step),
                    "backup_bytes_per_weight": max(shares) / weights,
                }
            )
        if rank == 0:
            Path(report).write_text(json.dumps(rows))
    finally:
        dist.destroy_process_group()


def measure(config: Config = Config()) -> dict[str, Any]:
    """Starts the processes for each kind of parallelism; returns their rows, the machine and the versions."""
    if config.batch % config.processes:
        raise ValueError(f"batch {config.batch} must be divisible by processes {config.processes}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or every profile reports its start and end
    rows = []
    for parallel in config.parallel:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report")
            args = (config, parallel, str(Path(folder, "store")), str(report))
            torch.multiprocessing.spawn(work, args, nprocs=config.processes)
            rows += json.loads(report.read_text())
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    return {**provenance(), "config": options, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    from rich import box
    from rich.table import Table

    config = result["config"]
    table = Table(
        title=f"{config['model']}, batch {config['batch']} of {config['image']}x{config['image']}, "
        f"{config['processes']} processes",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("")
    table.add_column("method", no_wrap=True)
    for title in ("SGD = 1", "quartiles", "ms", "collectives", "backup"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["parallel"],
            row["method"],
            f"{row['to_sgd']:.2f}",
            f"{row['low']:.2f}–{row['high']:.2f}",
            f"{row['ms']:.0f}",
            str(row["collectives"]),
            f"{row['backup_bytes_per_weight']:.1f} B/w",
        )
    terminal.say(terminal.console(), table)


def main(config: Config) -> int:
    """Measures and prints; writes JSON if asked to."""
    result = measure(config)
    show(result)
    if config.json:
        config.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    import tyro

    raise SystemExit(main(tyro.cli(Config)))
