"""How does cost grow with the model? Time from ten thousand to a billion weights, and from one to a thousand tensors.

t = a + b·n is fitted to sizes that exceed the caches, by least squares on relative errors: b is the cost per weight in
memory. The fixed cost per call and per tensor is measured separately, with tensors of sixteen weights. Together they
predict the cost of sizes in between, some of which caches make cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flatops import ops
from flatops.benchmarks.measure import available_memory, best_of_processes, best_times, provenance

# A filter fills whole registers, as in most networks: perturb_ costs a fifth more per weight with filters of 625.
TENSORS, FILTER = 16, 640
SIZES = tuple(m * 10**e for e in range(4, 9) for m in (1, 3)) + (10**9,)
LINEAR = 10**5  # weights from which the cost is compared with the line
MEMORY = 10**7  # weights from which no cache holds them
COUNTS = (1, 3, 10, 30, 100, 300, 1000)
BYTES = 13  # per weight: parameters, gradients, backup, mask and some spare


def fit(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Fits a + b·x by least squares of relative errors: returns a, b and the largest relative error."""
    x, y = torch.tensor(points, dtype=torch.float64).T
    a, b = torch.linalg.lstsq(torch.stack([1 / y, x / y], 1), torch.ones_like(y)[:, None]).solution.flatten()
    return a.item(), b.item(), ((a + b * x) / y - 1).abs().max().item()


def measure(
    sizes: tuple[int, ...] = SIZES, counts: tuple[int, ...] = COUNTS, calls: int = 1000, processes: int = 3
) -> dict[str, Any]:
    """Times of every operator at every size, at least `calls` of each short one, and the fitted lines.

    Short ones are measured in several processes, because each process gets a different share of the caches.
    """
    able = [n for n in sizes if BYTES * n < 0.75 * available_memory()]
    short, long = ([n for n in able if (n >= MEMORY) is large] for large in (False, True))
    found = best_of_processes(_rows, short, counts, -(-calls // processes), processes=processes)
    found += best_of_processes(_rows, long, (), calls, processes=1)
    by_weights, by_tensors = (_by_number(found, kind) for kind in ("weights", "tensors"))
    names = list(next(iter(by_weights.values())))
    lines = {name: fit([(n, t[name]) for n, t in by_weights.items() if n >= MEMORY]) for name in names}
    fixed = {name: fit([(t, times[name]) for t, times in by_tensors.items()]) for name in names}

    def between(name: str) -> list[float]:
        call, tensor, _ = fixed[name]
        line = lambda n: call + TENSORS * tensor + lines[name][1] * n
        return [t[name] / line(n) for n, t in by_weights.items() if LINEAR <= n < MEMORY]

    return {
        **provenance(),
        "sizes": list(by_weights),
        "skipped": [n for n in sizes if n not in able],
        "rows": [
            {
                "name": name,
                "us": a * 1e6,
                "ns_per_weight": b * 1e9,
                "floors": b / lines["floor"][1],
                "worst": worst,  # largest relative deviation from the line, from MEMORY on
                "between": [min(between(name)), max(between(name))],  # relative to fixed + b·n, from LINEAR to MEMORY
                "us_per_call": fixed[name][0] * 1e6,
                "us_per_tensor": fixed[name][1] * 1e6,
            }
            for name, (a, b, worst) in lines.items()
        ],
        "points": [{"name": m, "weights": n, "us": t[m] * 1e6} for n, t in by_weights.items() for m in names],
        "tensors": [{"name": m, "tensors": n, "us": t[m] * 1e6} for n, t in by_tensors.items() for m in names],
    }


def _rows(sizes: Sequence[int], counts: Sequence[int], calls: int) -> list[dict[str, Any]]:
    """What one process measures: every operator at these sizes, and with these numbers of tensors."""
    torch.set_num_threads(1)
    found = [("weights", *_times(_split(n), min(calls, max(8, 10**9 // n)))) for n in sizes]
    found += [("tensors", n, _times(_many(n), calls)[1]) for n in counts]
    return [
        {"kind": kind, "n": n, "name": name, "ms": seconds * 1e3}
        for kind, n, times in found
        for name, seconds in times.items()
    ]


def _by_number(rows: list[dict[str, Any]], kind: str) -> dict[int, dict[str, float]]:
    """Number of weights or tensors to every operator's seconds."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(row["n"], {})[row["name"]] = row["ms"] / 1e3
    return found


def _split(weights: int) -> list[list[torch.Tensor]]:
    """Parameters and gradients of at least this many weights: views of one tensor each, which the floor reads whole."""
    rows = math.ceil(weights / (TENSORS * FILTER))
    return [list(ops.normal((TENSORS, rows, FILTER), seed=1, draw=draw).abs_()) for draw in range(2)]


def _many(tensors: int) -> list[list[torch.Tensor]]:
    """This many tensors with few weights each."""
    return [list(torch.rand(tensors, 1, 16)) for _ in range(2)]


def _times(lists: list[list[torch.Tensor]], rounds: int) -> tuple[int, dict[str, float]]:
    """The number of weights, and every operator's seconds."""
    params, grads = lists
    whole = params[0]._base
    backup, scales = ops.new_backup(params), ops.new_scales(params)
    norm = torch.ones((), dtype=torch.float64)
    half = whole.numel() // 2

    def perturb() -> None:
        ops.perturb_(params, 1e-7, seed=0, draw=0, backup=backup, scales=scales)

    def ascend() -> None:
        ops.ascend_(params, grads, 1e-7, norm=norm, backup=backup)

    contenders: dict[str, Callable[[], Any]] = {
        "floor": lambda: whole.add_(1e-9),
        "perturb_": lambda: ops.perturb_(params, 1e-7, seed=0, draw=0, scales=scales),
        "perturb_, backup, restore_": lambda: (perturb(), ops.restore_(params, backup=backup)),
        "grad_norm": lambda: ops.grad_norm(grads),
        "ascend_, backup, restore_": lambda: (ascend(), ops.restore_(params, backup=backup)),
        "topk_mask, half": lambda: ops.topk_mask(grads, half, check=False),
    }
    return whole.numel(), best_times(contenders, rounds)
