"""Checks of operators' arguments, before anything is changed; errors name the argument."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatops import reference
from flatops.schemas import filters, mask_size

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> None:
    """Raises unless a kernel can take these tensors and they match `like`, a list that has passed this check."""
    if isinstance(tensors, Tensor) or len(tensors) == 0:
        raise ValueError(f"{name} must be a list of at least one tensor")
    if like is None:
        for i, t in enumerate(tensors):
            if t.dtype not in DTYPES:
                raise TypeError(f"{name}[{i}] is {t.dtype}: expected float32, bfloat16, float16 or float64")
    else:
        if len(tensors) != len(like):
            raise ValueError(f"{name} has {len(tensors)} tensors and params has {len(like)}: they must match")
        for i, (t, p) in enumerate(zip(tensors, like)):
            if t.shape != p.shape or t.dtype != p.dtype:
                raise ValueError(
                    f"{name}[{i}] is {tuple(t.shape)} {t.dtype} and params[{i}] is {tuple(p.shape)} {p.dtype}: "
                    "they must match"
                )
    device = (tensors if like is None else like)[0].device
    for i, t in enumerate(tensors):
        if t.layout != torch.strided:
            raise TypeError(f"{name}[{i}] is {t.layout}: expected a dense tensor")
        if t.device != device:
            raise ValueError(f"{name}[{i}] is on {t.device} and others are on {device}: pass tensors on one device")


def check_writable(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises if two elements share memory: they would be changed twice, and no backup could undo that."""
    # Under torch.compile intermediate tensors may have no id; the kernels compare addresses anyway.
    if not torch.compiler.is_compiling() and len({id(t) for t in tensors}) != len(tensors):
        raise ValueError(f"{name} holds the same tensor twice")
    for i, t in enumerate(tensors):
        if not t.is_contiguous() and any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape)):
            raise ValueError(f"{name}[{i}] is an expanded tensor: its elements share memory")


def check_fisher(fisher: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(fisher) != len(params):
        raise ValueError(f"fisher has {len(fisher)} tensors and there are {len(params)} parameters: they must match")
    for i, (f, p) in enumerate(zip(fisher, params)):
        if (
            f.dtype != torch.float32
            or f.numel() != (p.shape[0] if p.dim() else 1)
            or not f.is_contiguous()
            or f.device != p.device
        ):
            raise ValueError(
                f"fisher[{i}] must be a contiguous float32 tensor on {p.device} with one entry per slice along dim 0"
            )


def check_first_row(first_row: Sequence[int], params: Sequence[Tensor]) -> None:
    if len(first_row) != len(params):
        raise ValueError(f"first_row has {len(first_row)} entries and params has {len(params)}: they must match")
    for i, (row, p) in enumerate(zip(first_row, params)):
        if not is_integer(row) or not 0 <= row < 2**31:
            raise ValueError(f"first_row[{i}] must be an integer in [0, 2**31), not {row!r}")
        if row and p.dim() <= 1:
            raise ValueError(
                f"first_row[{i}] must be 0, not {row}: params[{i}] has {p.dim()} dimensions, and a tensor with at most "
                "one dimension is one filter"
            )


def check_scales(scales: Any, params: Sequence[Tensor]) -> None:
    count = sum(map(filters, params))
    device = params[0].device
    if scales.shape != (count,) or scales.dtype != torch.float32 or scales.device != device:
        raise ValueError(
            f"scales must be float32 of shape ({count},) on {device}, "
            f"not {scales.dtype} {tuple(scales.shape)} on {scales.device}"
        )


def check_mask(mask: Tensor, params: Sequence[Tensor]) -> None:
    size, device = mask_size(params), params[0].device
    if mask.shape != (size,) or mask.dtype != torch.int32 or mask.device != device or not mask.is_contiguous():
        raise ValueError(
            f"mask must be contiguous int32 of shape ({size},) on {device}, not {mask.dtype} {tuple(mask.shape)} on "
            f"{mask.device}: pass the tensors that it was made for"
        )


def check_backup(backup: Sequence[Tensor], mask: Tensor | None, params: Sequence[Tensor]) -> None:
    if mask is None:
        return check_tensors("backup", backup, params)
    check_mask(mask, params)
    wide = max((p.dtype for p in params), key=lambda dtype: dtype.itemsize)
    if len(backup) != 1 or backup[0].dim() != 1 or backup[0].dtype != wide or backup[0].device != mask.device:
        raise ValueError("backup must come from new_backup(params, mask): one row for all selected weights")
    # Not on a GPU, where counting is a host sync: there, a weight without a slot is neither changed nor restored.
    if mask.device.type == "cpu" and (count := reference.count(mask, params)) > len(backup[0]):
        raise ValueError(f"backup has room for {len(backup[0])} weights and the mask selects {count}")


def raise_bad(bad: Tensor, name: str) -> None:
    if (i := int(bad)) >= 0:
        raise ValueError(f"{name}[{i}] holds a NaN or a negative number: scores must be comparable")


def check_non_negative(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor) and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number >= 0, not {value}")


def check_one_order(name: str, scores: Sequence[Tensor]) -> None:
    if len({t.dtype == torch.float64 for t in scores}) > 1:
        raise TypeError(f"{name} mixes float64 with other dtypes: convert them to one")


# --- numbers ----------------------------------------------------------------------------------------------------------


def is_integer(value: Any) -> bool:
    """Whether it is a Python or numpy integer."""
    return isinstance(value, int) or (hasattr(value, "__index__") and not isinstance(value, Tensor))


def scalar(name: str, value: float | Tensor, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """`value` as kernels read it: one element of `dtype` on `device`. Such a tensor is returned as is."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} has {value.numel()} elements: expected one")
        if value.device != device:
            raise ValueError(
                f"{name} is on {value.device} and the parameters are on {device}: move it there once, or pass a number"
            )
        if dtype == torch.int64 and value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}: expected an integer")
        return value.to(dtype)
    if dtype == torch.int64 and not is_integer(value):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not isinstance(value, (int, float)):  # numpy
        value = int(value) if dtype == torch.int64 else float(value)
    if (  # a tensor that belongs to a graph or a mode must not be cached
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()  # such as FakeTensorMode
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    ):
        return torch.full((), value, dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return _constant(value or 0, device, dtype, stream)  # `or 0`: -0.0 == 0.0 would share an entry of the cache


@functools.lru_cache(maxsize=256)
def _constant(value: float, device: torch.device, dtype: torch.dtype, stream: int | None) -> Tensor:
    """A read-only number on a device, cached per CUDA stream: work on another stream could run before the fill."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)


def key_of(seed: int | Tensor, stream: int, device: torch.device) -> Tensor:
    if not 0 <= stream < 2**31:
        raise ValueError(f"stream must be an integer in [0, 2**31), not {stream}")
    if isinstance(seed, Tensor):
        key = scalar("seed", seed, device, torch.int64)
        return key ^ (stream << 32) if stream else key
    if not is_integer(seed):
        raise TypeError(f"seed must be an integer, not {seed!r}")
    seed = int(seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), not {seed}")
    return scalar("seed", signed(seed ^ (stream << 32)), device, torch.int64)


def noise_of(
    seed: int | Tensor, stream: int, draw: int | Tensor, index: Sequence[int] | None, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Sequence[int]]:
    """The key, the draw and each parameter's position (default: 0, 1, 2, ...), as the kernels take them."""
    if index is not None and len(index) != len(params):
        raise ValueError(f"index has {len(index)} entries and params has {len(params)}: they must match")
    device = params[0].device
    positions = list(range(len(params))) if index is None else index
    return key_of(seed, stream, device), scalar("draw", draw, device, torch.int64), positions


def signed(x: int) -> int:
    """The int64 with the bits of an integer in [0, 2**64)."""
    return x - 2**64 if x >= 2**63 else x
