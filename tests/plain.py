"""The plain loop: the passes of every micro-batch, with gradients weighted and added by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import flatops


def plain_loop(
    model: nn.Module,
    optimizer: Any,
    backward: Callable[[int], float],
    count: int,
    scaler: GradScaler,
    accumulate: int = 1,
    clip: float | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Trains on `count` micro-batches and returns the losses of the first passes.

    backward(i) runs forward and scaled backward of micro-batch i and returns its loss.
    """
    losses: list[float] = []
    total: dict[Tensor, Tensor] = {}
    sam = isinstance(optimizer, flatops.SAM)
    single = not sam and optimizer.param_groups[0]["lam"] == 1

    def take(weight: float) -> None:
        for p in model.parameters():
            total[p] = weight * p.grad if p not in total else total[p] + weight * p.grad
            p.grad = None

    for i in range(count):
        options = {}
        if not single:
            losses.append(backward(i))
        if not (sam or single):
            take(optimizer.clean_weight)
            options = {"loss_scale": scaler.get_scale() / accumulate}
        with optimizer.perturbed(**options), flatops.freeze_batchnorm_stats(model, not single):
            loss = backward(i)
        take(1.0 if sam else optimizer.perturbed_weight)
        if single:
            losses.append(loss)
        if (i + 1) % accumulate == 0:
            for p in model.parameters():
                p.grad = total.pop(p)
            scaler.unscale_(optimizer)
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            after_step()
    return losses
