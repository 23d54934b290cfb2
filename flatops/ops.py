"""The functional layer: multi-tensor operators on lists of parameters, in place, one kernel launch each, no host sync.

Every function takes `backend=None`: 'reference', 'cpp', 'cuda', 'triton', or None for the fastest available on the
tensors' device. All tensors of a call are on one device; float32, bfloat16, float16 and float64 may be mixed. A
**filter** is a slice along dim 0; a tensor with at most one dimension is one filter.

Numbers that change from step to step (sigma, rho, seed, draw) are Python numbers or one-element tensors on the
parameters' device (not on another: moving them could be a host sync). Under torch.compile and in CUDA graphs only
tensors can change without a new graph. float64 (int64 for seed and draw) saves a conversion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatops import reference
from flatops.backend import operators
from flatops.checks import (
    check_backup,
    check_first_row,
    check_fisher,
    check_mask,
    check_non_negative,
    check_one_order,
    check_scales,
    check_tensors,
    check_writable,
    is_integer,
    key_of,
    noise_of,
    raise_bad,
    scalar,
)
from flatops.schemas import filters

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
    Box-Muller on pairs of its words. The same bits on every backend, machine and launch configuration.

    Args:
        shape: of the result; with two or more dimensions, dim 0 is the filter.
        seed: integer in [0, 2**64).
        draw: the number of perturbations so far, modulo 2**32.
        tensor: the parameter's position in the optimizer.
        stream: the replica, in [0, 2**31).

    Returns:
        float32 tensor of `shape`, contiguous; |z| <= 6.56.
    """
    out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    key = key_of(seed, stream, out.device)
    operators(out.device, backend).normal_(out, key, scalar("draw", draw, out.device, torch.int64), tensor)
    return out


def filter_norms(params: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The Euclidean norm of every filter, ||w_f||_2 = sqrt(float32(sum of w^2)).

    Squares are summed in float32 (float64 for float64 weights), 1,024 at a time, and these sums in float64.

    Args:
        params: tensors on one device.

    Returns:
        float32 [filters], for the filters of all tensors in order.
    """
    check_tensors("params", params)
    return operators(params[0].device, backend).filter_norms(params)


def new_backup(params: Sequence[Tensor], mask: Tensor | None = None) -> list[Tensor]:
    """An uninitialised backup: `perturb_` and `ascend_` fill it, `restore_` reads it.

    With a mask, only for the selected weights: one row for the whole list. Counting them is a host sync.
    """
    if mask is None:
        return [torch.empty_like(p, requires_grad=False) for p in params]
    check_mask(mask, params)
    wide = max((p.dtype for p in params), key=lambda dtype: dtype.itemsize)
    return [torch.empty(count_mask(mask, params), dtype=wide, device=mask.device)]


def new_scales(params: Sequence[Tensor]) -> Tensor:
    """Uninitialised scales, float32 [filters]: `perturb_` fills them, `restore_` without a backup reads them."""
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
    """Random weight perturbation: adds Gaussian noise in place, scaled by each filter's norm.

    w_f <- w_f + s_f z_f,  s_f = sigma ||w_f||_2,  z = `normal(...)`; with `fisher` (ARWP) s_f is divided by
    sqrt(1 + eta F_f).

    Args:
        params: tensors on one device, changed in place.
        sigma: the noise's standard deviation relative to the filter's norm, >= 0; typically 0.005 to 0.05.
        seed, draw, stream: select the noise; see `normal`.
        eta: ARWP's strength, typically 0.1 to 1; used only with `fisher`.
        fisher: one float32 tensor per parameter, with one entry per slice along dim 0; see `filter_fisher_`.
        backup: from `new_backup`; filled with the weights before the noise.
        scales: float32 [filters], filled with s_f (before ARWP's factor); default: a new tensor.
        index: each parameter's position in the optimizer, `tensor` in `normal`; default 0, 1, 2, ...
        first_row: for each shard, the index of its first filter in the whole parameter; default 0. A shard gets the
            noise of its rows of the whole. Must be 0 for a tensor with at most one dimension.

    Returns:
        scales, for `restore_` without a backup.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.

    References:
        Li et al.: Efficient Generalization Improvement Guided by Random Weight Perturbation. arXiv 2211.11489.
        Li et al.: Revisiting Random Weight Perturbation for Efficiently Improving Generalization. arXiv 2404.00357.
    """
    check_tensors("params", params)
    check_writable("params", params)
    check_non_negative("sigma", sigma)
    check_non_negative("eta", eta)
    if backup is not None:
        check_tensors("backup", backup, params)
    if fisher is not None:
        check_fisher(fisher, params)
    if first_row is not None:
        check_first_row(first_row, params)
    device = params[0].device
    if scales is None:
        scales = new_scales(params)
    else:
        check_scales(scales, params)
    sigma, noise = scalar("sigma", sigma, device), noise_of(seed, stream, draw, index, params)
    operators(device, backend).perturb_(params, scales, backup or [], sigma, *noise, first_row or [], fisher or [], eta)
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
    """Undoes `perturb_` or `ascend_` in place, bit for bit from a backup; or `perturb_` by drawing the noise again.

    Drawing again needs one stored scale per filter and drifts: by about 1.5e-8, relative, times the square root of the
    number of cycles. It is refused for bfloat16 and float16, where the drift would be 1e-2.

    Args:
        params: the perturbed tensors, changed in place.
        backup, mask: the backup that `perturb_` or `ascend_` filled, and the mask passed to `ascend_`; or
        scales, seed, draw, stream, eta, fisher, index, first_row: what `perturb_` returned and was passed.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.
    """
    check_tensors("params", params)
    check_writable("params", params)
    device = params[0].device
    if (backup is None) == (scales is None):
        raise ValueError("restore_ takes either backup, or scales, seed and draw")
    if backup is not None:
        check_backup(backup, mask, params)
        operators(device, backend).restore_(params, backup, mask)
        return
    if mask is not None:
        raise ValueError("mask needs backup: noise is never masked")
    if seed is None or draw is None:
        raise ValueError("restore_ from scales needs the seed and draw that perturb_ was given")
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in params):
        raise TypeError("bfloat16 and float16 weights cannot be restored from scales: pass backup to perturb_")
    if fisher is not None:
        check_fisher(fisher, params)
    if first_row is not None:
        check_first_row(first_row, params)
    check_scales(scales, params)
    noise = noise_of(seed, stream, draw, index, params)
    operators(device, backend).subtract_noise_(params, scales, *noise, first_row or [], fisher or [], eta)


def filter_fisher_(
    fisher: Sequence[Tensor],
    grads: Sequence[Tensor],
    beta: float,
    *,
    scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> None:
    """ARWP's running Fisher, one number per filter: F_f <- beta F_f + scale^2 sum(g_f^2), in place.

    A decayed sum, not an average: there is no factor 1 - beta. For tensors of one dimension F is per element. Where the
    sum is not finite, F_f does not change.

    Args:
        fisher: one contiguous float32 tensor per gradient, with one entry per slice along dim 0.
        grads: gradients at the perturbed weights, on one device.
        beta: decay in [0, 1], typically 0.99.
        scale: factor for the gradients, such as one over the loss scale.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.

    References:
        Li et al.: arXiv 2404.00357.
    """
    check_tensors("grads", grads)
    check_fisher(fisher, grads)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], not {beta}")
    device = grads[0].device
    operators(device, backend).filter_fisher_(fisher, grads, beta, scalar("scale", scale, device))


def grad_norm(grads: Sequence[Tensor], params: Sequence[Tensor] | None = None, *, backend: str | None = None) -> Tensor:
    """The Euclidean norm of all gradients together, ||g||_2; with `params` that of w g, for ASAM.

    Args:
        grads: gradients on one device.
        params: the weights they belong to, in the same order.

    Returns:
        float64 scalar on the gradients' device; not finite if a gradient is not. Except for float64 gradients, squares
        are float32: 0 for gradients below 1e-23, infinite above 1e19.
    """
    if params is not None:
        check_tensors("params", params)
    check_tensors("grads", grads, params)
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
    """The ascent of sharpness-aware minimisation, in place.

    w <- w + rho g / norm; adaptive (ASAM): w <- w + rho w^2 g / norm. Nothing changes if the norm is 0 or not finite.
    With a mask (sparse SAM), only the selected weights change.

    Args:
        params: tensors on one device, changed in place.
        grads: their gradients, in the same order.
        rho: the radius, typically 0.05 to 0.2, ten times that for ASAM; a negative one descends.
        norm: from `grad_norm`, over all gradients that share the radius.
        mask: from `topk_mask`, over tensors with the parameters' memory layout.
        backup: from `new_backup`, with the mask if there is one; filled with the weights before the ascent.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.

    References:
        Foret et al.: Sharpness-Aware Minimization for Efficiently Improving Generalization. arXiv 2010.01412.
        Kwon et al.: ASAM. arXiv 2102.11600.
        Mi et al.: Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach. arXiv 2210.05177.
    """
    check_tensors("params", params)
    check_writable("params", params)
    check_tensors("grads", grads, params)
    if not isinstance(rho, Tensor) and not math.isfinite(rho):
        raise ValueError(f"rho must be a finite number, not {rho}")
    if backup is not None:
        check_backup(backup, mask, params)
    elif mask is not None:
        check_mask(mask, params)
    device = params[0].device
    rho, norm = scalar("rho", rho, device), scalar("norm", norm, device)
    operators(device, backend).ascend_(params, grads, backup or [], mask, rho, norm, adaptive)


# --- masks ------------------------------------------------------------------------------------------------------------


def fisher_(
    fisher: Sequence[Tensor], grads: Sequence[Tensor], *, scale: float | Tensor = 1.0, backend: str | None = None
) -> None:
    """The empirical Fisher, summed up: F <- F + (scale g)^2, in place, in float32.

    Args:
        fisher: one float32 tensor per gradient, of its shape.
        grads: of one sample, on one device.
        scale: factor for the gradients, such as one over the loss scale.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.
    """
    check_tensors("grads", grads)
    check_writable("fisher", fisher)
    if len(fisher) != len(grads):
        raise ValueError(f"fisher has {len(fisher)} tensors and grads has {len(grads)}: they must match")
    device = grads[0].device
    for i, (f, g) in enumerate(zip(fisher, grads)):
        if f.shape != g.shape or f.dtype != torch.float32 or f.device != device:
            raise ValueError(
                f"fisher[{i}] is {tuple(f.shape)} {f.dtype} on {f.device}: expected {tuple(g.shape)} float32, {device}"
            )
    operators(device, backend).fisher_(fisher, grads, scalar("scale", scale, device))


def topk_mask(scores: Sequence[Tensor], k: int, *, check: bool = True, backend: str | None = None) -> Tensor:
    """A mask of the k largest scores of a whole list: one bit per element, exactly k ones, ties to the first.

    Bit j of a tensor's word i is its element 32 i + j in storage order (dim 0 first, then as it lies in memory). After
    the words of all tensors come ranks: for every 1,024 elements the number of ones before them.

    Args:
        scores: tensors on one device, not negative; infinity is the largest. All float64, or none.
        k: how many, in [0, elements of the list].
        check: raise for a NaN or a negative score, at the cost of a host sync. Without it such scores give some mask.

    Returns:
        int32 [words + ranks], for `ascend_`, `unpack_mask` and `count_mask`.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_tensors("scores", scores)
    check_one_order("scores", scores)
    elements = sum(t.numel() for t in scores)
    if not is_integer(k) or not 0 <= k <= elements:
        raise ValueError(f"k must be an integer in [0, {elements}], the number of scores, not {k!r}")
    mask, bad = operators(scores[0].device, backend).topk_mask(scores, int(k))
    if check:
        raise_bad(bad, "scores")
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
    """Moves `count` ones of a mask in place: drops ones with the lowest |drop|, grows zeros with the largest |grow|.

    Both are chosen from the mask as it was, ties to the first; fewer are moved if it has fewer ones or zeros. A random
    score is the upper 24 bits of a Philox word at (offset // 4, 2**32 - 2 (drop) or 2**32 - 1 (grow), tensor, draw).

    Args:
        mask: from `topk_mask`, over tensors with the parameters' memory layout.
        params: the tensors that it is for.
        drop, grow: gradients, weights or other scores, of the parameters' shapes and dtypes; None: random.
        seed, draw, stream, index: as for `perturb_`.
        check: raise for a NaN score, which leaves the mask unchanged; costs a host sync.

    Raises:
        ValueError, TypeError: naming the argument.

    References:
        Mi et al.: arXiv 2210.05177, algorithm 3.
    """
    check_tensors("params", params)
    check_mask(mask, params)
    for name, scores in (("drop", drop), ("grow", grow)):
        if scores is not None:
            check_tensors(name, scores, params)
            check_one_order(name, scores)
    if not is_integer(count) or count < 0:
        raise ValueError(f"count must be an integer >= 0, not {count!r}")
    noise = noise_of(seed, stream, draw, index, params)
    bad = operators(params[0].device, backend).regrow_mask_(mask, params, drop or [], grow or [], *noise, int(count))
    if check:
        raise_bad(bad, "drop or grow")


def unpack_mask(mask: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A mask as boolean tensors, of the shapes of `like`.

    Raises:
        ValueError: for a mask of another list.
    """
    check_mask(mask, like)
    return reference.unpack(mask, like)


def pack_mask(live: Sequence[Tensor]) -> Tensor:
    """The mask of boolean tensors with the parameters' memory layout: the inverse of `unpack_mask`.

    Raises:
        TypeError: for tensors that are not boolean.
    """
    if any(t.dtype != torch.bool for t in live):
        raise TypeError("live must be a list of boolean tensors")
    return reference.pack([reference.rows(t).reshape(-1) for t in live])


def count_mask(mask: Tensor, like: Sequence[Tensor]) -> int:
    """How many elements a mask selects. A host sync.

    Raises:
        ValueError: for a mask of another list.
    """
    check_mask(mask, like)
    return reference.count(mask, like)
