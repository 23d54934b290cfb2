"""What do other implementations cost? Entering and leaving a perturbed pass: flatops, pytorch_optimizer, loops by hand.

All contenders have the same weights and gradients and a base optimizer that does nothing: only the method is left.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor

import flatops
from flatops.benchmarks import foreach, papers
from flatops.benchmarks.bench import Buffers, parameter_shapes
from flatops.benchmarks.measure import best_of_processes, best_times, count, provenance

RHO, SIGMA = 0.05, 0.01
PLAIN = "a plain step"  # of a base optimizer, for comparison
# Rounds and processes: a tiny model shows Python's overhead, which varies more between processes.
MODELS = {"resnet50": (12, 3), "cnn": (180, 6)}


class Idle(torch.optim.Optimizer):
    """A base optimizer that leaves the weights unchanged."""

    def __init__(self, params: Any, lr: float = 0.0, **kwargs: Any) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: None = None) -> None:
        """Does nothing."""


def contenders(b: Buffers) -> dict[tuple[str, str], Callable[[], Any]]:
    """(method, implementation) to one pass: set gradients, perturb, set gradients again, restore."""
    params, grads = [p.requires_grad_() for p in b.params], b.grads

    def given() -> None:
        for p, g in zip(params, grads):
            p.grad = g

    def two_steps(optimizer: Any) -> Callable[[], None]:
        def run() -> None:
            given()
            optimizer.first_step()
            given()
            optimizer.second_step()

        return run

    def plain(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def run() -> None:
            given()
            optimizer.step()

        return run

    def theirs(name: str, *leading: Any, **options: Any) -> Callable[[], None]:
        return two_steps(getattr(pytorch_optimizer, name)(*leading, params, Idle, rho=RHO, **options))

    def sparse() -> Callable[[], None]:
        optimizer = flatops.SSAM(params, Idle, rho=RHO, sparsity=0.5, mask="dynamic")
        given()
        optimizer.update_mask()
        return two_steps(optimizer)

    def foreach_sam() -> None:
        kept = [torch.empty_like(p) for p in params]  # as in pytorch_optimizer: allocated and freed in every pass
        foreach.ascend(params, grads, RHO, foreach.grad_norm(grads), kept)
        foreach.copy_back(params, kept)

    def foreach_rwp() -> None:
        kept = [torch.empty_like(p) for p in params]
        foreach.perturb(params, SIGMA, kept)
        foreach.copy_back(params, kept)

    masks = [(g > 0).float() for g in grads]

    @torch.no_grad()
    def papers_asam() -> None:
        norm = papers.grad_norm([p.abs() * g for p, g in zip(params, grads)])
        papers.copy_back(params, papers.ascend(params, [p.square() * g for p, g in zip(params, grads)], RHO, norm))

    def papers_sam() -> None:
        papers.copy_back(params, papers.ascend(params, grads, RHO, papers.grad_norm(grads)))

    def papers_ssam() -> None:
        sparse = [g * m for g, m in zip(grads, masks)]
        papers.copy_back(params, papers.ascend(params, sparse, RHO, papers.grad_norm(grads)))

    def papers_rwp() -> None:
        papers.remove(params, papers.perturb(params, SIGMA))

    library = "pytorch_optimizer"
    return {
        ("SAM", "flatops"): two_steps(flatops.SAM(params, Idle, rho=RHO)),
        ("SAM", library): theirs("SAM"),
        ("SAM", f"{library}, foreach"): theirs("SAM", foreach=True),
        ("SAM", "torch's foreach"): foreach_sam,
        ("SAM", "the papers' code"): papers_sam,
        ("SAM", f"{library}'s LookSAM"): theirs("LookSAM", k=1),
        ("SAM", f"{library}'s FriendlySAM"): theirs("FriendlySAM"),
        ("SAM", f"{library}'s WSAM"): theirs("WSAM", None, lr=0.0),
        ("ASAM", "flatops"): two_steps(flatops.SAM(params, Idle, rho=RHO, adaptive=True)),
        ("ASAM", library): theirs("SAM", adaptive=True),
        ("ASAM", f"{library}, foreach"): theirs("SAM", adaptive=True, foreach=True),
        ("ASAM", "the papers' code"): papers_asam,
        ("SSAM", "flatops"): sparse(),
        ("SSAM", "the papers' code"): papers_ssam,
        ("RWP", "flatops"): two_steps(flatops.RWP(params, Idle, sigma=SIGMA)),
        ("RWP", "torch's foreach"): foreach_rwp,
        ("RWP", "the papers' code"): papers_rwp,
        (PLAIN, "SGD, fused"): plain(torch.optim.SGD(params, lr=0.0, momentum=0.9, fused=True)),
        (PLAIN, "AdamW, fused"): plain(torch.optim.AdamW(params, lr=0.0, fused=True)),
        (PLAIN, "AdamW, foreach"): plain(torch.optim.AdamW(params, lr=0.0, foreach=True)),
    }


def measure(models: dict[str, tuple[int, int]] = MODELS) -> dict[str, Any]:
    """Floors of every contender, the ratio to ours, dispatched operations, and whether weights are restored exactly."""
    rows = []
    for model, (rounds, processes) in models.items():
        floor, *measured = best_of_processes(_rows, model, rounds, processes=processes)
        ours = {row["method"]: row["ms"] for row in measured if row["name"] == "flatops"}
        for row in measured:
            times = row["ms"] / ours[row["method"]] if row["method"] != PLAIN else None
            rows.append(row | {"floors": row["ms"] / floor["ms"], "times_ours": times})
    version = importlib.metadata.version("pytorch_optimizer")
    rounds, processes = (dict(zip(models, each)) for each in zip(*models.values()))
    return {**provenance(), "pytorch_optimizer": version, "rounds": rounds, "processes": processes, "rows": rows}


def _rows(model: str, rounds: int) -> list[dict[str, Any]]:
    """What one process measures: the floor first."""
    torch.set_num_threads(1)
    b = Buffers(parameter_shapes(model), torch.device("cpu"), torch.float32)
    calls = {("", "floor"): lambda: b.flat.add_(1e-9)} | contenders(b)
    names = {" ".join(key): call for key, call in calls.items()}
    times = best_times(names, rounds)
    about = {"model": model, "weights": b.weights, "tensors": len(b.params)}
    return [
        about
        | {"method": method, "name": name, "ms": times[f"{method} {name}"] * 1e3, "exact": _exact(call, b.params)}
        | dict(zip(("operations", "host_reads"), count(call)))
        for (method, name), call in calls.items()
    ]


def _exact(call: Callable[[], Any], params: list[Tensor]) -> bool:
    before = [p.detach().clone() for p in params]
    call()
    return all(map(torch.equal, before, params))
