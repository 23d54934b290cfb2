"""Finds the GradScalers that use an optimizer, to tell whether they have unscaled its gradients."""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from collections.abc import Iterator
from typing import Any

from torch.amp.grad_scaler import GradScaler, OptState

_found: list[weakref.ref[GradScaler]] = []
_references = 0  # to the classes, at the last search for instances


def _classes(cls: type) -> list[type]:
    subclasses: list[type] = cls.__subclasses__()
    return [cls, *itertools.chain(*map(_classes, subclasses))]


def _scalers() -> Iterator[GradScaler]:
    """Every enabled GradScaler in this process.

    The search takes 0.1 s, so it is repeated only when the classes' reference counts, to which instances add, change.
    """
    global _found, _references
    classes = _classes(GradScaler)
    if (references := sum(map(sys.getrefcount, classes))) != _references:
        # Not isinstance, which reads __class__: a proxy among the referrers may raise an error.
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
    """Whether the caller uses a GradScaler that has not unscaled the gradients of this optimizer.

    A scaler counts if it is a variable of a calling function, or an attribute of such a variable: others in this
    process belong to other training loops.
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
    """Drops the state that scalers keep for a deleted optimizer at this new one's address, which is their key."""
    for scaler in _scalers():
        scaler._per_optimizer_states.pop(id(optimizer), None)


def _stage(scaler: GradScaler, optimizer: Any) -> Any:
    return scaler._per_optimizer_states.get(id(optimizer), {}).get("stage")
