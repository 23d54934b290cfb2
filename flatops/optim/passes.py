"""The passes of a step in loops that do not know the method, accumulate gradients, or leave the backward to others."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from flatops.optim.batchnorm import freeze_batchnorm_stats
from flatops.optim.flat import Flat, Pass, own, unwrap
from flatops.optim.rwp import RWP


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
    flat = unwrap(optimizer)
    if loss_scale is None:
        loss_scale = functools.partial(_accelerates_scale, optimizer)
    earlier: dict[Tensor, Tensor] = {}
    if two_passes(flat):
        yield _clean(flat, earlier)
    yield Pass(flat, _perturbed(flat, model, earlier, loss_scale))


def _accelerates_scale(optimizer: Any) -> float:
    """What accelerate's backward multiplies a loss by: its optimizers know. Other optimizers know of nothing."""
    scaler, state = (getattr(optimizer, name, None) for name in ("scaler", "gradient_state"))
    return (scaler.get_scale() if scaler else 1.0) / getattr(state, "num_steps", 1)


def two_passes(flat: Flat) -> bool:
    """Whether a step needs a clean pass before the perturbed one."""
    return not isinstance(flat, RWP) or (flat.param_groups[0]["lam"] < 1 and not flat.parallel)


@contextlib.contextmanager
def _clean(flat: Any, earlier: dict[Tensor, Tensor]) -> Iterator[None]:
    if isinstance(flat, RWP):
        with flat.weighted(flat.clean_weight):
            yield
        return
    # SAM climbs along p.grad: earlier micro-batches are to have no part in it.
    for group in flat.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                earlier[p], p.grad = own(p.grad), None
    try:
        with flat.ascent_pass():
            yield
    except BaseException:  # the micro-batch is lost, and nothing else
        for p, g in earlier.items():
            p.grad = g
        raise


@contextlib.contextmanager
def _perturbed(
    flat: Any, model: nn.Module | None, earlier: dict[Tensor, Tensor], loss_scale: Any
) -> Iterator[None]:
    options: dict[str, Any] = {}
    weigh: AbstractContextManager[None] = contextlib.nullcontext()
    freeze: AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(flat, RWP):
        weight = flat.perturbed_weight
        weigh = flat.weighted(weight)
        if flat.mixes_fisher():
            options["loss_scale"] = weight * (loss_scale() if callable(loss_scale) else loss_scale)
    if model is not None and (two_passes(flat) or (flat.parallel and flat.perturbs)):
        freeze = freeze_batchnorm_stats(model)
    with flat.perturbed(**options), weigh, freeze:
        for p, g in earlier.items():  # now, so that DistributedDataParallel reduces all of it
            p.grad = g
        yield
