"""The functional layer: multi-tensor operators on lists of parameters, in place, one launch a list, no host sync.

Every function takes `backend=None`: 'reference', 'cpp', 'cuda', 'triton', or None for the best that serves the tensors'
device. All tensors of a call lie on one device; dtypes may be mixed among float32, bfloat16, float16 and float64. A
**filter** is a slice along dim 0 of a tensor of two or more dimensions; a tensor of one dimension or none is one filter.

Numbers that change from step to step (sigma, rho, seed, draw) may be Python numbers, or tensors of one element on the
parameters' device: on any other they are refused, since moving them could stop the host. Under torch.compile and in CUDA
graphs only tensors can change without a new graph. float64 (int64 for seed and draw) saves a conversion.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatops import reference
from flatops.backend import operators
from flatops.schemas import filters, mask_size, mask_words

__all__ = [
    "ascend_",
    "count_mask",
    "filter_fisher_",
    "filter_norms",
    "fisher_",
    "grad_norm",
    "new_backup",
    "new_scales",
    "normal",
    "pack_mask",
    "perturb_",
    "regrow_mask_",
    "restore_",
    "topk_mask",
    "unpack_mask",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# --- checks: one set for all backends, before anything changes -------------------------------------------------------------


def _check(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> None:
    """Raises unless `tensors` is a list that a kernel can take, and matches `like`, itself checked, where that is given."""
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
                    f"{name}[{i}] is {tuple(t.shape)} {t.dtype} and params[{i}] is {tuple(p.shape)} {p.dtype}: they must match"
                )
    device = (tensors if like is None else like)[0].device
    for i, t in enumerate(tensors):
        if t.layout != torch.strided:
            raise TypeError(f"{name}[{i}] is {t.layout}: expected a dense tensor")
        if t.device != device:
            raise ValueError(
                f"{name}[{i}] is on {t.device} and others are on {device}: one call serves one device"
            )


def _check_writable(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises where two elements share memory: changing one would change the other, and no backup could undo it."""
    # While compiling, tensors made on the way may have no id to compare; the kernels look at their memory.
    if not torch.compiler.is_compiling() and len({id(t) for t in tensors}) != len(tensors):
        raise ValueError(f"{name} holds the same tensor twice")
    for i, t in enumerate(tensors):
        if not t.is_contiguous() and any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape)):
            raise ValueError(f"{name}[{i}] is an expanded tensor: its elements share memory")


def _check_fisher(fisher: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(fisher) != len(params):
        raise ValueError(
            f"fisher has {len(fisher)} tensors and there are {len(params)} parameters: they must match"
        )
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


def _check_first_row(first_row: Sequence[int], params: Sequence[Tensor]) -> None:
    if len(first_row) != len(params):
        raise ValueError(
            f"first_row has {len(first_row)} entries and params has {len(params)}: they must match"
        )
    for i, (row, p) in enumerate(zip(first_row, params)):
        if not _is_integer(row) or not 0 <= row < 2**31:
            raise ValueError(f"first_row[{i}] must be an integer in [0, 2**31), not {row!r}")
        if row and p.dim() <= 1:
            raise ValueError(
                f"first_row[{i}] is {row} and params[{i}] has {p.dim()} dimensions: a tensor of one or none is one filter, "
                "so its first_row must be 0"
            )


def _check_scales(scales: Any, params: Sequence[Tensor]) -> None:
    count = sum(map(filters, params))
    device = params[0].device
    if scales.shape != (count,) or scales.dtype != torch.float32 or scales.device != device:
        raise ValueError(
            f"scales must be float32 of shape ({count},) on {device}, "
            f"not {scales.dtype} {tuple(scales.shape)} on {scales.device}"
        )


def _check_mask(mask: Tensor, params: Sequence[Tensor]) -> None:
    size, device = mask_size(params), params[0].device
    if (
        mask.shape != (size,)
        or mask.dtype != torch.int32
        or mask.device != device
        or not mask.is_contiguous()
    ):
        raise ValueError(
            f"mask must be int32 of shape ({size},) on {device}, not {mask.dtype} {tuple(mask.shape)} on {mask.device}: "
            "a mask is for the list that it was made for"
        )


def _check_masked_backup(backup: Sequence[Tensor], mask: Tensor, params: Sequence[Tensor]) -> None:
    wide = max((p.dtype for p in params), key=lambda dtype: dtype.itemsize)
    if len(backup) != 1 or backup[0].dim() != 1 or backup[0].dtype != wide or backup[0].device != mask.device:
        raise ValueError(
            "backup must come from new_backup(params, mask): one row for all that the mask lets through"
        )
    # Where looking costs nothing. On a GPU what has no slot is neither changed nor restored.
    if mask.device.type == "cpu" and (count := _count_mask(mask, params)) > len(backup[0]):
        raise ValueError(f"backup has room for {len(backup[0])} weights and the mask lets {count} through")


def _check_backup(backup: Sequence[Tensor], mask: Tensor | None, params: Sequence[Tensor]) -> None:
    if mask is None:
        _check("backup", backup, params)
    else:
        _check_mask(mask, params)
        _check_masked_backup(backup, mask, params)


def _raise_bad(bad: Tensor, name: str) -> None:
    if (i := int(bad)) >= 0:
        raise ValueError(f"{name}[{i}] holds a NaN or a negative number: it cannot be put in order")


def _non_negative(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor) and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number >= 0, not {value}")


def _is_integer(value: Any) -> bool:
    """Whether it is an integer, Python's or numpy's."""
    return isinstance(value, int) or (hasattr(value, "__index__") and not isinstance(value, Tensor))


def _scalar(
    name: str, value: float | Tensor, device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor:
    """`value` as kernels read it: one element of `dtype` on `device`. A tensor that is one already goes through as it is."""
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
    if dtype == torch.int64 and not _is_integer(value):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not isinstance(value, (int, float)):  # numpy's
        value = int(value) if dtype == torch.int64 else float(value)
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()  # a mode such as FakeTensorMode, whose tensors are its own
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())  # its memory is the graph's
    ):
        return torch.full((), value, dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return _constant(value or 0, device, dtype, stream)  # or -0.0 would be taken for the 0.0 in the cache


@functools.lru_cache(maxsize=256)
def _constant(value: float, device: torch.device, dtype: torch.dtype, stream: int | None) -> Tensor:
    """A number on a device, made once: nobody writes to it. `stream` because only its own work is sure to come after."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)


def _key(seed: int | Tensor, stream: int, device: torch.device) -> Tensor:
    if not 0 <= stream < 2**31:
        raise ValueError(f"stream must be an integer in [0, 2**31), not {stream}")
    if isinstance(seed, Tensor):
        key = _scalar("seed", seed, device, torch.int64)
        return key ^ (stream << 32) if stream else key
    if not _is_integer(seed):
        raise TypeError(f"seed must be an integer, not {seed!r}")
    seed = int(seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), not {seed}")
    return _scalar("seed", signed(seed ^ (stream << 32)), device, torch.int64)


def signed(x: int) -> int:
    """An integer in [0, 2**64) as the int64 of the same bits."""
    return x - 2**64 if x >= 2**63 else x


# --- operators ---------------------------------------------------------------------------------------------------------


def normal(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    draw: int | Tensor,
    tensor: int = 0,
    stream: int = 0,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Tensor:
    """The noise itself: standard normals, a pure function of (seed, draw, tensor, filter, offset).

    Philox4x32-10 with key (seed low, seed high xor stream) and counter (offset // 4, filter, tensor, draw), then
    Box-Muller on its words by pairs. The same bits on every backend, machine and launch shape.

    Args:
        shape: of the result; dim 0 counts the filters if there are two dimensions or more.
        seed: integer in [0, 2**64).
        draw: the count of perturbations so far, modulo 2**32.
        tensor: the parameter's position in the optimizer.
        stream: the replica, in [0, 2**31).

    Returns:
        float32 tensor of `shape`, contiguous; |z| <= 6.56.
    """
    out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    key = _key(seed, stream, out.device)
    operators(out.device, backend).normal_(out, key, _scalar("draw", draw, out.device, torch.int64), tensor)
    return out


def filter_norms(params: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The Euclidean norm of every filter, ||w_f||_2 = sqrt(float32(sum of w^2)).

    Squares are summed in float32, 1,024 at a time (in float64 for float64 weights), and those sums in float64.

    Args:
        params: tensors on one device.

    Returns:
        float32 [filters], the filters of all tensors one after the other.
    """
    _check("params", params)
    return operators(params[0].device, backend).filter_norms(params)


def new_backup(params: Sequence[Tensor], mask: Tensor | None = None) -> list[Tensor]:
    """Room for the weights that `perturb_` and `ascend_` are about to change: pass it to them and to `restore_`.

    With a mask, for those that it lets through alone: one row for the whole list, and a wait for the GPU to count them.
    """
    if mask is None:
        return [torch.empty_like(p, requires_grad=False) for p in params]
    _check_mask(mask, params)
    wide = max((p.dtype for p in params), key=lambda dtype: dtype.itemsize)
    return [torch.empty(count_mask(mask, params), dtype=wide, device=mask.device)]


def new_scales(params: Sequence[Tensor]) -> Tensor:
    """Room for one scale a filter, which `perturb_` writes and `restore_` without a backup reads: float32 [filters]."""
    return torch.empty(sum(map(filters, params)), dtype=torch.float32, device=params[0].device)


def perturb_(
    params: Sequence[Tensor],
    sigma: float | Tensor,
    *,
    seed: int | Tensor,
    draw: int | Tensor,
    stream: int = 0,
    eta: float = 0.0,
    fisher: Sequence[Tensor] | None = None,
    backup: Sequence[Tensor] | None = None,
    scales: Tensor | None = None,
    index: Sequence[int] | None = None,
    first_row: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Adds filter-norm-scaled Gaussian noise in place: random weight perturbation.

    w_f <- w_f + s_f z_f,  s_f = sigma ||w_f||_2,  z = `normal(...)`; with `fisher` (ARWP) s_f is divided by
    sqrt(1 + eta F_f).

    Args:
        params: tensors on one device, changed in place.
        sigma: the noise's standard deviation as a share of the filter's norm, >= 0; typically 0.005 to 0.05.
        seed, draw, stream: which noise; see `normal`.
        eta: ARWP's strength, typically 0.1 to 1; used with `fisher` only.
        fisher: one float32 tensor a parameter, with one entry per slice along dim 0; see `filter_fisher_`.
        backup: from `new_backup`; filled with the weights as they were.
        scales: float32 [filters] to write s_f (before ARWP's factor) to; made if left out.
        index: each parameter's position in the optimizer, the noise's `tensor`; default 0, 1, 2, ...
        first_row: the number of each tensor's first filter in the whole parameter of which it is a shard; default 0. The noise
            is then that of those rows of the whole; a tensor of one dimension or none cannot be such a shard.

    Returns:
        scales, for `restore_` without a backup.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.

    References:
        Li et al.: Efficient Generalization Improvement Guided by Random Weight Perturbation. arXiv 2211.11489.
        Li et al.: Revisiting Random Weight Perturbation for Efficiently Improving Generalization. arXiv 2404.00357.
    """
    _check("params", params)
    _check_writable("params", params)
    _non_negative("sigma", sigma)
    _non_negative("eta", eta)
    if backup is not None:
        _check("backup", backup, params)
    if fisher is not None:
        _check_fisher(fisher, params)
    if index is not None and len(index) != len(params):
        raise ValueError(f"index has {len(index)} entries and params has {len(params)}: they must match")
    if first_row is not None:
        _check_first_row(first_row, params)
    device = params[0].device
    if scales is None:
        scales = new_scales(params)
    else:
        _check_scales(scales, params)
    operators(device, backend).perturb_(
        params,
        scales,
        backup or [],
        _scalar("sigma", sigma, device),
        _key(seed, stream, device),
        _scalar("draw", draw, device, torch.int64),
        index if index is not None else list(range(len(params))),
        first_row or [],
        fisher or [],
        eta,
    )
    return scales


def restore_(
    params: Sequence[Tensor],
    *,
    backup: Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    scales: Tensor | None = None,
    seed: int | Tensor | None = None,
    draw: int | Tensor | None = None,
    stream: int = 0,
    eta: float = 0.0,
    fisher: Sequence[Tensor] | None = None,
    index: Sequence[int] | None = None,
    first_row: Sequence[int] | None = None,
    backend: str | None = None,
) -> None:
    """Undoes `perturb_` or `ascend_` in place: bit for bit from a backup, or `perturb_` alone by drawing the noise again.

    Drawing again stores nothing but one scale a filter, and drifts: about 1.5e-8 relative after one cycle, growing with
    the square root of their number. It is refused for bfloat16 and float16, where the drift would be 1e-2.

    Args:
        params: the perturbed tensors, changed in place.
        backup, mask: what `perturb_` or `ascend_` filled, and the mask that `ascend_` was given; or
        scales, seed, draw, stream, eta, fisher, index, first_row: what `perturb_` returned and was given.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.
    """
    _check("params", params)
    _check_writable("params", params)
    device = params[0].device
    if (backup is None) == (scales is None):
        raise ValueError("restore_ takes either a backup or scales, seed and draw")
    if backup is not None:
        _check_backup(backup, mask, params)
        operators(device, backend).restore_(params, backup, mask)
        return
    if mask is not None:
        raise ValueError("a mask is for a backup: noise is never masked")
    if seed is None or draw is None:
        raise ValueError("restore_ by scales needs the seed and the draw that perturb_ had")
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in params):
        raise TypeError(
            "bfloat16 and float16 weights cannot be restored by drawing again: give perturb_ a backup"
        )
    if fisher is not None:
        _check_fisher(fisher, params)
    if first_row is not None:
        _check_first_row(first_row, params)
    _check_scales(scales, params)
    operators(device, backend).subtract_noise_(
        params,
        scales,
        _key(seed, stream, device),
        _scalar("draw", draw, device, torch.int64),
        index if index is not None else list(range(len(params))),
        first_row or [],
        fisher or [],
        eta,
    )


def filter_fisher_(
    fisher: Sequence[Tensor],
    grads: Sequence[Tensor],
    beta: float,
    *,
    scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> None:
    """ARWP's running Fisher, one number a filter: F_f <- beta F_f + scale^2 sum(g_f^2), in place.

    A decayed sum, not an average: there is no 1 - beta. For tensors of one dimension F is per element. A sum that is not
    finite leaves F_f as it was.

    Args:
        fisher: one contiguous float32 tensor a gradient, with one entry per slice along dim 0.
        grads: gradients at the perturbed weights, on one device.
        beta: decay in [0, 1], typically 0.99.
        scale: what the gradients are to be multiplied by, such as one over the loss scale.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.

    References:
        Li et al.: arXiv 2404.00357.
    """
    _check("grads", grads)
    _check_fisher(fisher, grads)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], not {beta}")
    device = grads[0].device
    operators(device, backend).filter_fisher_(fisher, grads, beta, _scalar("scale", scale, device))


def grad_norm(
    grads: Sequence[Tensor], params: Sequence[Tensor] | None = None, *, backend: str | None = None
) -> Tensor:
    """The Euclidean norm over all gradients together, ||g||_2; with `params` that of w g, for ASAM.

    Args:
        grads: gradients on one device.
        params: the weights they belong to, in the same order.

    Returns:
        float64 scalar on the gradients' device; not finite where a gradient is not. Squares are float32: 0 for gradients below
        1e-23, infinite above 1e19.
    """
    if params is not None:
        _check("params", params)
    _check("grads", grads, params)
    return operators(grads[0].device, backend).grad_norm(grads, params if params is not None else [])


def ascend_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: float | Tensor,
    *,
    norm: Tensor,
    mask: Tensor | None = None,
    adaptive: bool = False,
    backup: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> None:
    """Climbs along the gradient in place: sharpness-aware minimisation's first step.

    w <- w + rho g / norm; adaptive (ASAM): w <- w + rho w^2 g / norm. Nothing changes where the norm is 0 or not finite.
    With a mask (sparse SAM), only the weights that it lets through climb.

    Args:
        params: tensors on one device, changed in place.
        grads: their gradients, in the same order.
        rho: the radius, typically 0.05 to 0.2, ten times that for ASAM; a negative one descends.
        norm: from `grad_norm`, over all the gradients that the radius is meant for.
        mask: from `topk_mask`, over tensors that lie in memory as the parameters do.
        backup: from `new_backup`, with the mask if there is one; filled with the weights as they were.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.

    References:
        Foret et al.: Sharpness-Aware Minimization for Efficiently Improving Generalization. arXiv 2010.01412.
        Kwon et al.: ASAM. arXiv 2102.11600.
        Mi et al.: Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach. arXiv 2210.05177.
    """
    _check("params", params)
    _check_writable("params", params)
    _check("grads", grads, params)
    if not isinstance(rho, Tensor) and not math.isfinite(rho):
        raise ValueError(f"rho must be a finite number, not {rho}")
    if backup is not None:
        _check_backup(backup, mask, params)
    elif mask is not None:
        _check_mask(mask, params)
    device = params[0].device
    operators(device, backend).ascend_(
        params,
        grads,
        backup or [],
        mask,
        _scalar("rho", rho, device),
        _scalar("norm", norm, device),
        adaptive,
    )


# --- masks -------------------------------------------------------------------------------------------------------------


def fisher_(
    fisher: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> None:
    """The empirical Fisher, summed up: F <- F + (scale g)^2, in place, in float32.

    Args:
        fisher: one float32 tensor a gradient, of its shape.
        grads: of one sample, on one device.
        scale: what the gradients are to be multiplied by, such as one over the loss scale.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.
    """
    _check("grads", grads)
    _check_writable("fisher", fisher)
    if len(fisher) != len(grads):
        raise ValueError(f"fisher has {len(fisher)} tensors and grads has {len(grads)}: they must match")
    device = grads[0].device
    for i, (f, g) in enumerate(zip(fisher, grads)):
        if f.shape != g.shape or f.dtype != torch.float32 or f.device != device:
            raise ValueError(
                f"fisher[{i}] is {tuple(f.shape)} {f.dtype} on {f.device}: expected {tuple(g.shape)} float32 on {device}"
            )
    operators(device, backend).fisher_(fisher, grads, _scalar("scale", scale, device))


def topk_mask(scores: Sequence[Tensor], k: int, *, check: bool = True, backend: str | None = None) -> Tensor:
    """The k largest scores of a whole list as a mask, exactly k bits, ties to the first; a bit an element.

    Bit j of a tensor's word i is its element 32 i + j in storage order (dim 0 first, then as it lies in memory). After the
    words of all tensors come ranks: for every 1,024 elements how many ones lie before them.

    Args:
        scores: tensors on one device, not negative; infinity is the largest. float64 or other dtypes, not both.
        k: how many, in [0, elements of the list].
        check: raise for a NaN or a negative score. It waits for a GPU; without it such scores give any mask of their list.

    Returns:
        int32 [words + ranks], for `ascend_`, `unpack_mask` and `count_mask`.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    _check("scores", scores)
    _check_one_order("scores", scores)
    elements = sum(t.numel() for t in scores)
    if not _is_integer(k) or not 0 <= k <= elements:
        raise ValueError(f"k must be an integer in [0, {elements}], the number of scores, not {k!r}")
    mask, bad = operators(scores[0].device, backend).topk_mask(scores, int(k))
    if check:
        _raise_bad(bad, "scores")
    return mask


def regrow_mask_(
    mask: Tensor,
    params: Sequence[Tensor],
    count: int,
    *,
    drop: Sequence[Tensor] | None = None,
    grow: Sequence[Tensor] | None = None,
    seed: int | Tensor,
    draw: int | Tensor,
    stream: int = 0,
    index: Sequence[int] | None = None,
    check: bool = True,
    backend: str | None = None,
) -> None:
    """Moves `count` ones of a mask in place: those with the lowest |drop| go, as many others with the largest |grow| come.

    Both are chosen from the mask as it was, ties to the first; less are moved where there are not so many ones, or zeros. A random
    score is the upper 24 bits of a Philox word at (offset // 4, 2**32 - 2 to drop or 2**32 - 1 to grow, tensor, draw).

    Args:
        mask: from `topk_mask`, over tensors that lie in memory as the parameters do.
        params: the tensors that it is for.
        drop, grow: gradients, weights or other scores, of the parameters' shapes and dtypes; None: at random.
        seed, draw, stream, index: as for `perturb_`.
        check: raise for a NaN score; the mask is then as it was. It waits for a GPU.

    Raises:
        ValueError, TypeError: naming the argument.

    References:
        Mi et al.: arXiv 2210.05177, algorithm 3.
    """
    _check("params", params)
    _check_mask(mask, params)
    for name, scores in (("drop", drop), ("grow", grow)):
        if scores is not None:
            _check(name, scores, params)
            _check_one_order(name, scores)
    if not _is_integer(count) or count < 0:
        raise ValueError(f"count must be an integer >= 0, not {count!r}")
    device = params[0].device
    bad = operators(device, backend).regrow_mask_(
        mask,
        params,
        drop or [],
        grow or [],
        _key(seed, stream, device),
        _scalar("draw", draw, device, torch.int64),
        index if index is not None else list(range(len(params))),
        int(count),
    )
    if check:
        _raise_bad(bad, "drop or grow")


def _check_one_order(name: str, scores: Sequence[Tensor]) -> None:
    if len({t.dtype == torch.float64 for t in scores}) > 1:
        raise TypeError(f"{name} mixes float64 with other dtypes: convert them to one")


def unpack_mask(mask: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A mask as booleans: one tensor for each of `like`, of its shape.

    Raises:
        ValueError: for a mask of another list.
    """
    _check_mask(mask, like)
    return reference.unpack(mask, like)


def pack_mask(live: Sequence[Tensor]) -> Tensor:
    """One mask from boolean tensors that lie in memory as the parameters do: `unpack_mask` undone.

    Raises:
        TypeError: for tensors that are not boolean.
    """
    if any(t.dtype != torch.bool for t in live):
        raise TypeError("live must be a list of boolean tensors")
    return reference.pack([reference.rows(t).reshape(-1) for t in live])


def count_mask(mask: Tensor, like: Sequence[Tensor]) -> int:
    """How many elements a mask lets through. It waits for a GPU.

    Raises:
        ValueError: for a mask of another list.
    """
    _check_mask(mask, like)
    return _count_mask(mask, like)


def _count_mask(mask: Tensor, like: Sequence[Tensor]) -> int:
    last = next((t for t in reversed(like) if t.numel()), None)
    if last is None:
        return 0
    # The last rank, and the ones of the words behind it.
    words = sum(map(mask_words, like))
    tail = (mask_words(last) - 1) % 32 + 1
    ones = sum((word & 0xFFFFFFFF).bit_count() for word in mask[words - tail : words].tolist())
    return (int(mask[-1]) & 0xFFFFFFFF) + ones
