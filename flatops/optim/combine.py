"""Classes that inherit from both a flatops optimizer and its base optimizer, made on demand."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch


@functools.cache
def combine(flat: type, base: type) -> Any:
    """The class that inherits from both: isinstance, fused steps, GradScaler's attributes and schedulers work."""
    members = {"base": base, "flat": flat, "__module__": flat.__module__}
    return type(flat.__name__ + base.__name__, (flat, base), members)


def rebuild(flat: type, base: type) -> Any:
    """For pickle, which cannot find the class by its name."""
    return object.__new__(combine(flat, base))


def check_base(base: Any, flat: type, others: dict[str, Any]) -> None:
    """Raises TypeError unless `base` is an optimizer class that can be wrapped; `others` are its keyword arguments."""
    if base is None and (misnamed := next((name for name, value in others.items() if inspect.isclass(value)), None)):
        raise TypeError(
            f"the optimizer class is the argument base, not {misnamed}: write base={others[misnamed].__name__}"
        )
    if not (inspect.isclass(base) and issubclass(base, torch.optim.Optimizer)):
        raise TypeError(f"base must be an optimizer class such as torch.optim.SGD, not {base!r}")
    if issubclass(base, (flat, torch.optim.LBFGS)):
        raise TypeError(f"base must be an optimizer that steps once from p.grad; {base.__name__} does not")
