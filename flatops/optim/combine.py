"""The class of a flatops optimizer over a base: made when it is asked for, so that it is both."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch


@functools.cache
def combine(flat: type, base: type) -> Any:
    """The class whose instances are both: isinstance, fused steps, GradScaler's attributes and schedulers all work."""
    members = {"base": base, "flat": flat, "__module__": flat.__module__}
    return type(flat.__name__ + base.__name__, (flat, base), members)


def rebuild(flat: type, base: type) -> Any:
    """For pickle: the class cannot be found by its name."""
    return object.__new__(combine(flat, base))


def check_base(base: Any, flat: type, others: dict[str, Any]) -> None:
    """Raises unless `base` is an optimizer class that can step for a flatops optimizer; `others` are its keyword arguments.

    Raises:
        TypeError: naming what to write.
    """
    if base is None and (misnamed := [name for name, value in others.items() if inspect.isclass(value)]):
        written = f"{misnamed[0]}: write base={others[misnamed[0]].__name__}"
        raise TypeError(f"the optimizer class that steps is the argument base, not {written}")
    if not (inspect.isclass(base) and issubclass(base, torch.optim.Optimizer)):
        raise TypeError(f"base must be an optimizer class such as torch.optim.SGD, not {base!r}")
    if issubclass(base, (flat, torch.optim.LBFGS)):
        raise TypeError(f"base must be an optimizer that steps once from p.grad; {base.__name__} does not")
