"""GradScalers, of which an optimizer is told nothing: which have unscaled its gradients too early, or not at all."""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from collections.abc import Iterator
from typing import Any

from torch.amp.grad_scaler import GradScaler, OptState

_found: list[weakref.ref[GradScaler]] = []
_references = 0  # to the classes, when their instances were looked for


def _classes(cls: type) -> list[type]:
    subclasses: list[type] = cls.__subclasses__()
    return [cls, *itertools.chain(*map(_classes, subclasses))]


def _scalers() -> Iterator[GradScaler]:
    """Every enabled GradScaler in this process. Looking through all objects takes 0.1 s, so that is done only where there may
    be new ones: an instance holds a reference to its class."""
    global _found, _references
    classes = _classes(GradScaler)
    if (references := sum(map(sys.getrefcount, classes))) != _references:
        # Many things refer to a class. isinstance would ask them what they are, and a proxy may answer with an error.
        _found = [weakref.ref(o) for o in gc.get_referrers(*classes) if issubclass(type(o), GradScaler)]
        _references = references
    for reference in _found:
        scaler = reference()
        if scaler is not None and scaler.is_enabled():
            yield scaler


def has_unscaled(optimizer: Any) -> bool:
    """Whether a GradScaler has unscaled the gradients of this optimizer since its last step."""
    return any(_stage(scaler, optimizer) is OptState.UNSCALED for scaler in _scalers())


def has_left_scaled(optimizer: Any) -> bool:
    """Whether the caller has a GradScaler in use that has not unscaled the gradients of this optimizer.

    Who it belongs to is told by the variables of the calling functions and the attributes of what they hold: a scaler that
    something else in this process uses does not count.
    """
    scalers = [s for s in _scalers() if s._scale is not None and _stage(s, optimizer) is not OptState.UNSCALED]
    frame = sys._getframe() if scalers else None
    while frame is not None:
        held = [*frame.f_locals.values(), *frame.f_globals.values()]
        held += [value for owner in frame.f_locals.values() for value in getattr(owner, "__dict__", {}).values()]
        if any(scaler is value for scaler in scalers for value in held):
            return True
        frame = frame.f_back
    return False


def forget(optimizer: Any) -> None:
    """Drops what scalers know of an optimizer that is gone and was where this new one is: they know them by address."""
    for scaler in _scalers():
        scaler._per_optimizer_states.pop(id(optimizer), None)


def _stage(scaler: GradScaler, optimizer: Any) -> Any:
    return scaler._per_optimizer_states.get(id(optimizer), {}).get("stage")
