"""Checks and conversions of the numbers that users pass."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor


def plain(value: Any) -> Any:
    """A numpy number as a Python number, so that checkpoints load without numpy; anything else as is."""
    if isinstance(value, (bool, Tensor)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def on(device: torch.device, value: Any) -> Any:
    """A tensor moved to a device, without a host sync; anything else as is."""
    return value.to(device, non_blocking=device.type != "cpu") if isinstance(value, Tensor) else value


def number(value: Tensor) -> int | float:
    """The value of a tensor of one element; an int64 is read as unsigned, because it is a seed in [0, 2**64)."""
    return value.item() if value.is_floating_point() else value.item() % 2**64


def check_tensor(name: str, value: Tensor, floating: bool = True) -> None:
    """Raises unless a tensor holds one number of the right kind. Its value is not read, which would be a host sync."""
    right = value.is_floating_point() if floating else value.dtype == torch.int64
    if not (value.numel() == 1 and right):
        kind = "floating-point" if floating else "int64"
        raise ValueError(
            f"{name} must be one {kind} number, not a tensor of shape {tuple(value.shape)} and {value.dtype}"
        )


def check_range(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> None:
    """Raises unless `value` is a finite number in [low, high]."""
    valid = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (valid and low <= value <= high):
        what = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f">= {low:g}"
        raise ValueError(f"{name} must be a finite number {what}, not {value!r}")


def check_integer(name: str, value: Any, bits: int = 64) -> None:
    """Raises unless `value` is an integer in [0, 2**bits)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) < 2**bits:
        raise ValueError(f"{name} must be an integer in [0, 2**{bits}), not {value!r}")
