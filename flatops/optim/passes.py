"""The passes of a step, for loops that work with every method, accumulate gradients, or do not run the backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from flatops.optim.base import Flat


def passes(
    optimizer: Any, model: nn.Module | None = None, *, loss_scale: float | Tensor | Callable[[], float] | None = None
) -> Iterator[AbstractContextManager[None]]:
    """The passes over a micro-batch, each a context for a forward and backward: two for SAM, SSAM, m-RWP, one for RWP.

    Gradients are added to those in p.grad: with gradient accumulation, SAM has one ascent per micro-batch
    (m-sharpness). The weights of m-RWP's two losses are applied to the gradients.

    Args:
        optimizer: a flatops optimizer, or a wrapper of accelerate or Lightning around one.
        model: to freeze its BatchNorm running statistics in all but the clean pass.
        loss_scale: factor of the losses, or a function such as `scaler.get_scale`, called only if the factor matters:
            for ARWP with lam < 1. Default: that of accelerate if it has wrapped the optimizer, else 1.

    Example:
        >>> for one_pass in flatops.passes(optimizer, model):
        ...     with one_pass:
        ...         loss_fn(model(x), y).backward()
        >>> optimizer.step(); optimizer.zero_grad()

    Raises:
        TypeError: for any other optimizer.
        RuntimeError: for m-RWP under fully_shard, whose gradients cannot be weighted: multiply the losses by
            clean_weight and perturbed_weight instead.
    """
    scale = functools.partial(_scale_of, optimizer) if loss_scale is None else loss_scale
    yield from unwrap(optimizer)._passes(model, scale)


def _scale_of(optimizer: Any) -> float:
    """The factor that accelerate's backward applies to a loss; 1 without accelerate."""
    scaler, state = (getattr(optimizer, name, None) for name in ("scaler", "gradient_state"))
    return (scaler.get_scale() if scaler else 1.0) / getattr(state, "num_steps", 1)


def unwrap(optimizer: Any) -> Flat:
    """The flatops optimizer inside the wrappers of Lightning, accelerate, timm and others.

    Raises:
        TypeError: if there is none.
    """
    seen: set[int] = set()
    inner = optimizer
    while not isinstance(inner, Flat) or not hasattr(inner, "run"):
        seen.add(id(inner))
        wrapped = (getattr(inner, name, None) for name in ("optimizer", "_optimizer", "_base_optimizer"))
        inner = next((o for o in wrapped if o is not None and id(o) not in seen), None)
        if inner is None:
            raise TypeError(f"{type(optimizer).__name__} holds no flatops optimizer")
    return inner
