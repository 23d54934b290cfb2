"""The passes of a step in loops that do not know the method, accumulate gradients, or leave the backward to others."""

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
    """The passes over one micro-batch, each a context for one forward and backward: two for SAM, SSAM and m-RWP, one for RWP.

    What the backwards leave is added to what p.grad holds, so that micro-batches accumulate: SAM then climbs for each by itself
    (m-sharpness). The weights of m-RWP's two losses are applied to their gradients.

    Args:
        optimizer: a flatops optimizer, or what accelerate or Lightning have wrapped around it.
        model: whose BatchNorm statistics are to come from the clean pass alone.
        loss_scale: what the losses are multiplied by, or a function that tells, such as `scaler.get_scale`, which is asked where
            it matters alone: for ARWP with lam < 1. Default: what accelerate multiplies by where it has wrapped the optimizer,
            otherwise 1.

    Example:
        >>> for one_pass in flatops.passes(optimizer, model):
        ...     with one_pass:
        ...         loss_fn(model(x), y).backward()
        >>> optimizer.step(); optimizer.zero_grad()

    Raises:
        TypeError: for any other optimizer.
        RuntimeError: for m-RWP under fully_shard, whose gradients cannot be weighed: multiply its losses by clean_weight and
            perturbed_weight instead.
    """
    scale = functools.partial(_scale_of, optimizer) if loss_scale is None else loss_scale
    yield from unwrap(optimizer)._passes(model, scale)


def _scale_of(optimizer: Any) -> float:
    """What accelerate's backward multiplies a loss by; 1 if accelerate did not wrap the optimizer."""
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
        inner = next(
            (
                o
                for o in (getattr(inner, name, None) for name in ("optimizer", "_optimizer", "_base_optimizer"))
                if o is not None and id(o) not in seen
            ),
            None,
        )
        if inner is None:
            raise TypeError(f"{type(optimizer).__name__} holds no flatops optimizer")
    return inner
