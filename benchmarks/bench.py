"""How many floors does each operator cost? The table of `flatops bench`.

A floor is one read and one write of every weight, by torch's own in-place add on one flat tensor, measured in the
same run. This file has the operators and the table for a CPU, `bench_gpu.py` the table for a GPU, `suite.py` the full
suite; `command.py` chooses between them.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flatops import ops, terminal
from flatops.backend import _C, operators
from flatops.benchmarks import foreach, papers, step
from flatops.benchmarks.measure import best_of_processes, best_times, count, provenance
from flatops.train import models


@dataclass(kw_only=True)
class Config:
    """Measure the operators on this machine in floors, next to the papers' code."""

    model: str = "resnet50"
    """The model whose parameter shapes are used: any timm name."""
    rounds: int = 25
    """Calls per contender. On a CPU the fastest counts, on a GPU the median."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to measure on; on a GPU every available backend is measured."""
    json: Path | None = None
    """Also write the rows to this JSON file."""
    suite: Literal["quick", "full"] = "quick"
    """full: run all CPU benchmarks and regenerate the tables and pictures of README and docs."""
    results: Path | None = None
    """Folder for the rows of the full suite; README and docs are then left alone. Default: benchmarks/results."""
    compare: tuple[Path, Path] | None = None
    """Measure nothing; show which ratios differ between two files of rows, or between two folders of them."""


# Limits in floors. A CPU's depend on the width of its registers.
MUST = {
    "avx512": {
        "perturb_": 3.0,
        "perturb_, backup, restore_": 4.5,
        "grad_norm": 0.9,
        "ascend_, backup": 3.3,
        "topk_mask, half": 3.0,
        "topk_mask, 5 %": 2.5,
        "topk_mask, 80 % zeros": 3.0,
        "topk_mask, all equal": 3.0,
        "ascend_, half masked, backup": 3.5,
        "regrow_mask_, a tenth": 8.0,
    },
    "avx2": {"perturb_": 6.5, "grad_norm": 0.9, "ascend_, backup": 3.3},
    "cuda": {
        "perturb_": 1.25,
        "perturb_, backup, restore_": 2.9,
        "grad_norm": 0.6,
        "ascend_, backup": 2.3,
        "topk_mask, half": 1.5,
    },
}


@dataclass
class Row:
    """One row of the table. A peer (code that is not ours) is compared with the nearest row of ours above it."""

    name: str
    call: Callable[[], Any]
    bytes: int | None = None  # per weight, at least
    level: str | None = None  # the SIMD level, where not the machine's best
    peer: bool = False  # code that is not ours
    slow: bool = False  # takes about a second: measured in two rounds only


class Buffers:
    """Parameters of these shapes with values as in the middle of training; other tensors are allocated at first use."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> None:
        self.shapes, self.device, self.dtype = shapes, device, dtype
        self.params, self.grads = (
            [
                ops.normal(s, seed=1, draw=draw, tensor=i, device=device).mul_(scale).to(dtype)
                for i, s in enumerate(shapes)
            ]
            for draw, scale in enumerate((0.05, 1e-3))
        )
        self.weights = sum(p.numel() for p in self.params)

    @cached_property
    def backup(self) -> list[Tensor]:
        return ops.new_backup(self.params)

    @cached_property
    def scales(self) -> Tensor:
        return ops.new_scales(self.params).zero_()

    @cached_property
    def fisher(self) -> list[Tensor]:
        return [torch.zeros(p.shape[0], device=self.device) for p in self.params]

    @cached_property
    def scores(self) -> dict[str, list[Tensor]]:
        """float32 scores of several kinds."""
        squares = [g.float().square() for g in self.grads]
        generator = torch.Generator(self.device).manual_seed(0)
        zeros = [
            s.masked_fill(torch.rand(s.shape, generator=generator, device=self.device) < 0.8, 0.0) for s in squares
        ]
        return {"some": squares, "zeros": zeros, "equal": [torch.ones_like(s) for s in squares]}

    @cached_property
    def flat(self) -> Tensor:
        """As many weights as the parameters, in one tensor."""
        return torch.ones(self.weights, dtype=self.dtype, device=self.device)

    @cached_property
    def noise(self) -> Tensor:
        """About as many float32 normals."""
        return torch.empty(self.weights // 512, 512, device=self.device)


@contextmanager
def simd(level: str | None):
    """Runs its body at another SIMD level."""
    best = _C.simd()
    _C.set_simd(level or best)
    try:
        yield
    finally:
        _C.set_simd(best)


def parameter_shapes(model: str) -> list[tuple[int, ...]]:
    """The shapes of a model's parameters; nothing is allocated."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in models.create(model, classes=1000, channels=3).parameters()]


def operator_rows(
    shapes: list[tuple[int, ...]],
    device: torch.device,
    backend: str,
    dtype: torch.dtype = torch.float32,
    copies: int = 1,
) -> list[Row]:
    """All operators on tensors of these shapes, the floor first. Repeated calls do not accumulate changes.

    With several copies, each call uses the next one, so that it finds none of its data in a cache.
    """
    turn = itertools.cycle([Buffers(shapes, device, dtype) for _ in range(copies)])
    namespace = operators(device, backend)
    norm, sigma, rho = torch.ones((), dtype=torch.float64, device=device), 1e-7, 1e-7
    peer_norm = norm.float()
    key, draw = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    count = itertools.count()
    first = next(turn)
    weights = first.weights

    @cache
    def masked() -> tuple[Tensor, Tensor, list[Tensor]]:
        """A mask of half the weights, a copy of it for regrowing, and a backup for the mask."""
        mask = ops.topk_mask(first.scores["some"], weights // 2, backend=backend)
        return mask, mask.clone(), ops.new_backup(first.params, mask)

    def floor():
        next(turn).flat.add_(1e-9)

    def perturb():
        b = next(turn)
        ops.perturb_(b.params, sigma, seed=0, draw=draw, scales=b.scales, backend=backend)

    def perturb_restore():
        b = next(turn)
        ops.perturb_(b.params, sigma, seed=0, draw=draw, backup=b.backup, scales=b.scales, backend=backend)
        ops.restore_(b.params, backup=b.backup, backend=backend)

    def papers_perturb_restore():
        b = next(turn)
        papers.remove(b.params, papers.perturb(b.params, sigma))

    def foreach_perturb_restore():
        b = next(turn)
        foreach.perturb(b.params, sigma, b.backup)
        foreach.copy_back(b.params, b.backup)

    def regenerate():
        b = next(turn)
        ops.restore_(b.params, scales=b.scales, seed=0, draw=draw, backend=backend)

    def ascend():
        b = next(turn)
        ops.ascend_(b.params, b.grads, rho, norm=norm, backup=b.backup, backend=backend)

    def ascend_restore():
        b = next(turn)
        ops.ascend_(b.params, b.grads, rho, norm=norm, backup=b.backup, backend=backend)
        ops.restore_(b.params, backup=b.backup, backend=backend)

    def papers_ascend_restore():
        b = next(turn)
        papers.copy_back(b.params, papers.ascend(b.params, b.grads, rho, peer_norm))

    def foreach_ascend_restore():
        b = next(turn)
        foreach.ascend(b.params, b.grads, rho, peer_norm, b.backup)
        foreach.copy_back(b.params, b.backup)

    def filter_fisher():
        b = next(turn)
        ops.filter_fisher_(b.fisher, b.grads, 0.99, backend=backend)

    def topk(kind, k):
        return lambda: ops.topk_mask(next(turn).scores[kind], k, check=False, backend=backend)

    def ascend_masked():
        b, (mask, _, backup) = next(turn), masked()
        ops.ascend_(b.params, b.grads, rho, norm=norm, mask=mask, backup=backup, backend=backend)

    def restore_masked():
        mask, _, backup = masked()
        ops.restore_(next(turn).params, backup=backup, mask=mask, backend=backend)

    def regrow():
        b, (_, moving, _) = next(turn), masked()
        how = {"seed": 0, "draw": next(count), "check": False, "backend": backend}
        ops.regrow_mask_(moving, b.params, weights // 10, drop=b.grads, **how)

    def fisher():
        b = next(turn)
        ops.fisher_(b.scores["some"], b.grads, scale=0.0, backend=backend)

    size = dtype.itemsize
    rows = [
        Row("floor", floor, 2 * size),
        Row("perturb_", perturb, 2 * size),
        Row("perturb_, backup, restore_", perturb_restore, 5 * size),
        Row("the papers' code", papers_perturb_restore, peer=True),
        Row("torch's foreach", foreach_perturb_restore, peer=True),
        Row("restore_, regenerating", regenerate, 2 * size),
        Row("filter_norms", lambda: ops.filter_norms(next(turn).params, backend=backend), size),
        Row("filter_fisher_", filter_fisher, size),
        Row("grad_norm", lambda: ops.grad_norm(next(turn).grads, backend=backend), size),
        Row("torch's foreach", lambda: foreach.grad_norm(next(turn).grads), peer=True),
        Row("the papers' code", lambda: papers.grad_norm(next(turn).grads), peer=True),
        Row("ascend_, backup", ascend, 4 * size),
        Row("ascend_, backup, restore_", ascend_restore, 6 * size),
        Row("the papers' code", papers_ascend_restore, peer=True),
        Row("torch's foreach", foreach_ascend_restore, peer=True),
        Row("normals alone", lambda: namespace.normal_(next(turn).noise, key, draw, 0), 4),
        Row("torch.Tensor.normal_", lambda: next(turn).noise.normal_(), peer=True),
        Row("topk_mask, half", topk("some", weights // 2), 4),
        Row("the papers' code", lambda: papers.mask(next(turn).scores["some"], weights // 2), peer=True, slow=True),
        Row("topk_mask, 5 %", topk("some", weights // 20), 4),
        Row("topk_mask, 80 % zeros", topk("zeros", weights // 2), 4),
        Row("topk_mask, all equal", topk("equal", weights // 2), 4),
        Row("ascend_, half masked, backup", ascend_masked, 4 * size),
        Row("restore_, half masked", restore_masked, 3 * size),
        Row("regrow_mask_, a tenth", regrow, size),
        Row("fisher_", fisher, 8 + size),
    ]
    if dtype != torch.float32:  # noise is float32, and regenerating is not exact in 16 bits
        return [
            row
            for row in rows
            if row.name not in ("restore_, regenerating", "normals alone", "torch.Tensor.normal_")
            and not row.name.startswith("topk_mask")
            and not row.slow
        ]
    return rows


def compared_with(rows: list[Row]) -> list[str]:
    """For every row the name of the row of ours that does the same: itself, or for a peer the nearest one above."""
    return list(itertools.accumulate((row.name if not row.peer else "" for row in rows), lambda a, b: b or a))


def measure(config: Config = Config(), processes: int = 2) -> dict[str, Any]:
    """Everything that the table shows; the lowest times of several processes."""
    found = best_of_processes(_rows, config.model, -(-config.rounds // processes), processes=processes)
    table = [row for row in found if "of" in row]
    # These are short and mostly Python, and their speed varies between processes: more processes are measured.
    steps = {row["step"]: row["ms"] for row in best_of_processes(step.rows, 2 * config.rounds, processes=2 * processes)}
    wall = {row["threads"]: row["ms"] for row in found if "threads" in row}
    for row in table:
        row["floors"] = row["ms"] / table[0]["ms"]
        row["must"] = MUST.get(row["simd"], MUST["avx2"]).get(row["name"])
        row["floors_by_bytes"] = row["bytes_per_weight"] / 8 if row["bytes_per_weight"] else None
    by_name = {row["name"]: row["ms"] for row in table if row["simd"] == _C.simd()}
    papers_mask = next(row["ms"] for row in reversed(table) if row["name"] == "the papers' code")
    gain = [("perturb_, two threads against one", "≥", 1.7, wall[1] / wall[2])] if wall else []
    checks = [
        (
            "normals, times faster than torch.Tensor.normal_",
            "≥",
            6.0,
            by_name["torch.Tensor.normal_"] / by_name["normals alone"],
        ),
        ("topk_mask, half, times faster than the papers' code", "≥", 150.0, papers_mask / by_name["topk_mask, half"]),
        *[
            (f"{name}: flatops' share of a step, digits CNN", "≤", 0.10, steps[f"{name}, own"] / steps[name])
            for name in ("RWP", "SAM")
        ],
    ]
    return {
        **provenance(),
        "model": config.model,
        "tensors": table[0]["tensors"],
        "weights": table[0]["weights"],
        "rounds": config.rounds,
        "processes": processes,
        "threads": 1,
        "rows": table,
        "checks": [
            {
                "name": name,
                "threads": threads,
                "sign": sign,
                "must": must,
                "value": value,
                "met": value >= must if sign == "≥" else value <= must,
            }
            for threads, some in ((1, checks), (2, gain))
            for name, sign, must, value in some
        ],
    }


def _rows(model: str, rounds: int) -> list[dict[str, Any]]:
    """What one process measures: every operator, and one of them with two threads."""
    from rich.progress import Progress

    shapes = parameter_shapes(model)
    rows = operator_rows(shapes, torch.device("cpu"), "cpp")
    if _C.simd() == "avx512":
        rows.insert(2, replace(rows[1], level="avx2"))

    def call_of(row: Row) -> Callable[[], Any]:
        def call() -> None:
            with simd(row.level):
                row.call()

        return call

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calls = {f"{i}": call_of(row) for i, row in enumerate(rows)}
    with Progress(transient=True) as bar:
        task = bar.add_task("measuring", total=rounds + 1)
        quick = {i: call for i, call in calls.items() if not rows[int(i)].slow}
        best = best_times(quick, rounds, progress=lambda: bar.advance(task))
        best |= best_times({i: call for i, call in calls.items() if i not in quick}, min(rounds, 2))
    about = {"tensors": len(shapes), "weights": sum(map(math.prod, shapes))}
    table = [
        about
        | {
            "name": row.name,
            "of": of,
            "peer": row.peer,
            "simd": row.level or _C.simd(),
            "ms": best[i] * 1e3,
            "bytes_per_weight": row.bytes,
        }
        | dict(zip(("operations", "host_reads"), count(row.call)))
        for i, row, of in zip(calls, rows, compared_with(rows))
    ]
    return table + (threaded_rows([rows[1]], 2, 8 * rounds) if threads > 1 else [])


def threaded_rows(rows: list[Row], threads: int, rounds: int) -> list[dict[str, Any]]:
    """Times with one and with several threads, by wall clock: CPU time would count all threads."""

    def on(number: int, call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(number)
            call()

        return run

    calls = {f"{number} {row.name}": on(number, row.call) for row in rows for number in (1, threads)}
    times = best_times(calls, rounds, clock=time.perf_counter)
    torch.set_num_threads(1)
    return [
        {"name": row.name, "threads": number, "ms": times[f"{number} {row.name}"] * 1e3}
        for row in rows
        for number in (1, threads)
    ]


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{result['model']}: {result['tensors']} tensors, {result['weights']:,} weights\n"
        f"one thread of {result['machine']}, {result['simd']}, torch {result['torch']}",
        caption="floor: one read and one write of every weight by torch, measured in the same run. by bytes: floors "
        "if only the required memory traffic took time. limit: floors allowed. ops: dispatched. syncs: host syncs.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("operator", no_wrap=True)
    for column in ("ms", "floors", "limit", "by bytes", "ops", "syncs"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["rows"]:
        met = row["must"] is None or row["floors"] <= row["must"]
        level = f" ({row['simd']})" if row["simd"] != result["simd"] else ""
        table.add_row(
            f"  {row['name']}" if row["peer"] else row["name"] + level,
            f"{row['ms']:.2f}",
            f"{row['floors']:.2f}" if met else Text(f"{row['floors']:.2f}", "red"),
            f"{row['must']:.1f}" if row["must"] else "",
            f"{row['floors_by_bytes']:.2f}" if row["floors_by_bytes"] else "",
            str(row["operations"]),
            str(row["host_reads"]),
            style="dim" if row["peer"] else None,
        )
    console = terminal.console()
    terminal.say(console, table)
    for check in result["checks"]:
        line = f"{check['name']}: {check['value']:.2f}, limit {check['sign']} {check['must']:g}: "
        terminal.say(console, Text.assemble(line, ("met", "green") if check["met"] else ("missed", "red")))


def write(result: dict[str, Any], path: Path) -> None:
    """Writes a result as JSON."""
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"rows written to {path}")
