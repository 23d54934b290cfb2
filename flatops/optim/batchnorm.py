"""BatchNorm in the perturbed pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm


@contextlib.contextmanager
def freeze_batchnorm_stats(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Context manager that freezes running statistics; layers still normalise by the statistics of the batch.

    For the perturbed pass of SAM and m-RWP, so that only the clean pass updates them. Not for RWP with lam = 1, which
    has no clean pass.

    Args:
        model: a module with BatchNorm or InstanceNorm layers, or subclasses of them.
        enabled: False does nothing; in a closure, which runs in both passes, pass `optimizer.is_perturbed`.

    Example:
        >>> with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
        ...     loss_fn(model(x), y).backward()
    """
    # Not by momentum 0, which would still count batches, and let a NaN in: 0 times NaN is NaN.
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats] if enabled else []
    # InstanceNorm updates its statistics in training mode whatever the flag says, so they are removed meanwhile; torch
    # 2.10 rounds them in evaluation mode too, so it gets copies.
    hidden = [(m, m.running_mean, m.running_var) for m in layers if isinstance(m, _InstanceNorm)]
    layers = [m for m in layers if not isinstance(m, _InstanceNorm)]
    try:
        for layer in layers:
            layer.track_running_stats = False
        for layer, mean, var in hidden:
            copies = [None if layer.training or t is None else t.clone() for t in (mean, var)]
            layer.running_mean, layer.running_var = copies
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        for layer, mean, var in hidden:
            layer.running_mean, layer.running_var = mean, var
