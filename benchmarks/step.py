"""What share of a training step is flatops' own? The small CNN on digits, batch 64: the worst case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import flatops
from flatops.benchmarks.measure import best_times
from flatops.train import models


def rows(rounds: int) -> list[dict[str, Any]]:
    """ms of a whole step of SGD, RWP and SAM, and of flatops' part of it.

    flatops' part is everything that the optimizer adds to the base: entering and leaving an empty perturbed pass.
    """
    torch.set_num_threads(1)
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,))
    steps: dict[str, Callable[[], Any]] = {}
    for name in ("SGD", "RWP", "SAM"):
        torch.manual_seed(0)
        model = models.create("cnn", classes=10, channels=1)
        base = {"lr": 1e-3, "momentum": 0.9}
        if name == "SGD":
            optimizer = torch.optim.SGD(model.parameters(), **base)
        elif name == "RWP":
            optimizer = flatops.RWP(model.parameters(), torch.optim.SGD, sigma=1e-6, **base)
        else:
            optimizer = flatops.SAM(model.parameters(), torch.optim.SGD, rho=1e-6, **base)
        steps[name], steps[f"{name}, own"] = _step(name, model, optimizer, x, y)
    del steps["SGD, own"]
    return [{"step": name, "ms": seconds * 1e3} for name, seconds in best_times(steps, rounds).items()]


def _step(name: str, model, optimizer, x, y) -> tuple[Callable[[], Any], Callable[[], Any]]:
    def backward() -> None:
        cross_entropy(model(x), y).backward()

    def step() -> None:
        if name != "RWP":
            backward()
        if name != "SGD":
            with optimizer.perturbed():
                backward()
        optimizer.step()
        optimizer.zero_grad()

    backward()
    grads = [p.grad for p in model.parameters()]

    def own() -> None:
        for p, g in zip(model.parameters(), grads):
            p.grad = g
        with optimizer.perturbed():
            pass

    return step, own
