"""How many floors does each operator cost? The table of `flatops bench`.

A floor is one read and one write of every weight, by torch's own in-place add on one flat tensor, there and then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flatops.benchmarks import seeds, step
from flatops.benchmarks.measure import best_times, count, provenance

from flatops import ops
from flatops.backend import _C
from flatops.train import models


@dataclass(kw_only=True)
class Config:
    """Measure the operators on this machine, in floors, beside the research scripts' way of doing the same."""

    model: str = "resnet50"
    """Whose list of parameters: any name of timm's."""
    rounds: int = 25
    """How often each contender runs; the fastest counts."""
    json: Path | None = None
    """Also write the rows to this file."""


@dataclass
class Row:
    """One line of the table."""

    name: str
    call: Callable[[], Any]
    bytes: int | None = None  # per float32 weight, at best
    must: float | None = None  # floors, at most
    level: str | None = None  # the SIMD level, if not the machine's best
    peer: bool = False  # not ours: what the row above is to be compared with


@contextmanager
def simd(level: str | None):
    """Runs within at another SIMD level."""
    best = _C.simd()
    _C.set_simd(level or best)
    try:
        yield
    finally:
        _C.set_simd(best)


def parameter_shapes(model: str) -> list[tuple[int, ...]]:
    """The shapes of a model's parameters; nothing is allocated for them."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in models.create(model, classes=1000, channels=3).parameters()]


def operator_rows(shapes: list[tuple[int, ...]]) -> list[Row]:
    """Every operator on tensors of these shapes, the floor first; nothing that they do adds up over rounds."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator) * 0.05 for s in shapes]
    grads = [torch.randn(s, generator=generator) * 1e-3 for s in shapes]
    weights = sum(p.numel() for p in params)
    flat, noise = torch.ones(weights), torch.empty(weights // 512, 512)
    backup, scales = ops.new_backup(params), ops.new_scales(params)
    fisher = [torch.zeros(p.shape[0]) for p in params]
    norm, sigma, rho = ops.grad_norm(grads), 1e-7, 1e-7
    key, draw = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)

    def perturb(backup=None):
        ops.perturb_(params, sigma, seed=0, draw=1, backup=backup, scales=scales)

    def perturb_restore():
        perturb(backup)
        ops.restore_(params, backup=backup)

    def ascend():
        ops.ascend_(params, grads, rho, norm=norm, backup=backup)

    def ascend_restore():
        ascend()
        ops.restore_(params, backup=backup)

    avx512 = _C.simd() == "avx512"
    rows = [
        Row("floor", lambda: flat.add_(1e-9), 8),
        Row("perturb_", perturb, 8, 3.0 if avx512 else 6.5),
    ]
    if avx512:
        rows.append(Row("perturb_", perturb, 8, 6.5, level="avx2"))
    return rows + [
        Row("perturb_, backup, restore_", perturb_restore, 20, 4.5 if avx512 else None),
        Row("the seeds' way", lambda: seeds.remove(params, seeds.perturb(params, sigma)), peer=True),
        Row("restore_, regenerating", lambda: ops.restore_(params, scales=scales, seed=0, draw=1), 8),
        Row("filter_norms", lambda: ops.filter_norms(params), 4),
        Row("filter_fisher_", lambda: ops.filter_fisher_(fisher, grads, 0.99), 4),
        Row("grad_norm", lambda: ops.grad_norm(grads), 4, 0.9),
        Row("torch._foreach_norm", lambda: torch.stack(torch._foreach_norm(grads)).norm(), peer=True),
        Row("the seeds' way", lambda: seeds.grad_norm(grads), peer=True),
        Row("ascend_, backup", ascend, 16, 3.3),
        Row("ascend_, backup, restore_", ascend_restore, 24),
        Row(
            "the seeds' way",
            lambda: seeds.copy_back(params, seeds.ascend(params, grads, rho, norm.float())),
            peer=True,
        ),
        Row("normals alone", lambda: torch.ops.flatops.normal_(noise, key, draw, 0), 4),
        Row("torch.Tensor.normal_", lambda: noise.normal_(), peer=True),
    ]


def measure(config: Config) -> dict[str, Any]:
    """Everything that the table shows."""
    from rich.progress import Progress

    shapes = parameter_shapes(config.model)
    weights = sum(torch.Size(s).numel() for s in shapes)
    rows = operator_rows(shapes)

    def call_of(row: Row) -> Callable[[], Any]:
        def call() -> None:
            with simd(row.level):
                row.call()

        return call

    threads = torch.get_num_threads()
    calls = {f"{i}": call_of(row) for i, row in enumerate(rows)}
    torch.set_num_threads(1)
    try:
        with Progress(transient=True) as bar:
            task = bar.add_task("measuring", total=config.rounds + 1)
            times = list(best_times(calls, config.rounds, progress=lambda: bar.advance(task)).values())
        share = step.shares(20 * config.rounds)
        scaling = _scaling(rows[1].call, config.rounds) if threads > 1 else None
        counts = [count(row.call) for row in rows]
    finally:
        torch.set_num_threads(threads)
    floor = times[0]
    table = [
        {
            "name": row.name,
            "peer": row.peer,
            "simd": row.level or _C.simd(),
            "ms": seconds * 1e3,
            "floors": seconds / floor,
            "must": row.must,
            "bytes_per_weight": row.bytes,
            "floors_by_bytes": row.bytes / 8 if row.bytes else None,
            "operations": operations,
            "host_reads": reads,
        }
        for row, seconds, (operations, reads) in zip(rows, times, counts)
    ]
    by_name = {row["name"]: row for row in table if row["simd"] == _C.simd()}
    checks = [
        ("normals, times faster than torch.Tensor.normal_", "≥", 6.0,
         by_name["torch.Tensor.normal_"]["ms"] / by_name["normals alone"]["ms"]),
        *[(f"{name}: flatops' share of a step, digits CNN", "≤", 0.10, s["share"]) for name, s in share.items()],
    ]  # fmt: skip
    if scaling is not None:
        checks.insert(1, ("perturb_, two threads against one", "≥", 1.7, scaling))
    return {
        **provenance(),
        "model": config.model,
        "tensors": len(shapes),
        "weights": weights,
        "threads": 1,
        "rows": table,
        "steps": share,
        "checks": [
            {
                "name": n,
                "sign": sign,
                "must": must,
                "value": v,
                "met": v >= must if sign == "≥" else v <= must,
            }
            for n, sign, must, v in checks
        ],
    }


def _scaling(call: Callable[[], Any], rounds: int) -> float:
    """How much faster two threads are than one, by the wall clock."""

    def on(threads: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(threads)
            call()

        return run

    times = best_times({"1": on(1), "2": on(2)}, 2 * rounds, clock=time.perf_counter)
    torch.set_num_threads(1)
    return times["1"] / times["2"]


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        title=f"{result['model']}: {result['tensors']} tensors, {result['weights']:,} weights\n"
        f"one thread of {result['machine']}, {result['simd']}, torch {result['torch']}",
        caption="floor: one read and one write of every weight by torch, here and now. by bytes: floors, if nothing "
        "but the bytes that must move cost time. must: at most. ops, reads: what PyTorch dispatches, numbers that the host waits for.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("operator", no_wrap=True)
    for column in ("ms", "floors", "must", "by bytes", "ops", "reads"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["rows"]:
        met = row["must"] is None or row["floors"] <= row["must"]
        level = f" ({row['simd']})" if row["simd"] != result["simd"] else ""
        table.add_row(
            f"  {row['name']}" if row["peer"] else row["name"] + level,
            f"{row['ms']:.2f}",
            f"{row['floors']:.2f}" if met else f"[red]{row['floors']:.2f}[/red]",
            f"{row['must']:.1f}" if row["must"] else "",
            f"{row['floors_by_bytes']:.2f}" if row["floors_by_bytes"] else "",
            str(row["operations"]),
            str(row["host_reads"]),
            style="dim" if row["peer"] else None,
        )
    console.print(table)
    for check in result["checks"]:
        mark = "[green]met[/green]" if check["met"] else "[red]missed[/red]"
        console.print(
            f"{check['name']}: {check['value']:.2f}, must be {check['sign']} {check['must']:g}: {mark}",
            highlight=False,
        )


def main(config: Config) -> int:
    """Measures and prints; writes JSON if asked."""
    if _C is None:
        raise ValueError("there is no compiled core to measure: see flatops info")
    result = measure(config)
    show(result)
    if config.json:
        config.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"rows written to {config.json}")
    return 0
