"""BatchNorm in the perturbed pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextlib.contextmanager
def freeze_batchnorm_stats(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Keeps the running statistics of normalisation layers as they are; batches are still normalised by their own.

    For the perturbed pass of SAM and m-RWP, whose statistics come from the clean pass alone. Not for RWP with lam = 1, which
    has no other pass.

    Args:
        model: its BatchNorm and InstanceNorm layers, also those that inherit from them.
        enabled: False does nothing; in a closure, which runs in both passes, pass `optimizer.is_perturbed`.

    Example:
        >>> with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
        ...     loss_fn(model(x), y).backward()
    """
    # Momentum 0 would still count batches, and mix NaN into the statistics: 0 times NaN is NaN.
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats] if enabled else []
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
