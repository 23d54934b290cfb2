"""ascend_: sharpness-aware minimisation's step along the gradient, one pass over weights and gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import narrow, widen
from .tensor_list import ALIGNED, FIELDS, LANES, TensorList, operator, rows_of


@triton.jit
def climb(
    vector: tl.constexpr,
    tensor,
    block,
    scale,
    dtype: tl.constexpr,
    adaptive: tl.constexpr,
    backup: tl.constexpr,
):
    """w += scale g, or scale w^2 g, over a block."""
    data, grad, saved, place, count, _, _, steps = rows_of(tensor, block, dtype, True, False, vector)
    step = 0
    while step < steps:
        i = step * LANES + tl.arange(0, LANES)[None, :]
        x = tl.load(data + (place + i), i < count, other=0.0)
        if backup:
            tl.store(saved + (place + i), x, i < count)
        if scale != 0:  # not even 0 times an infinite gradient
            w, g = widen(x), widen(tl.load(grad + (place + i), i < count, other=0.0))
            if adaptive:
                g = w * w * g
            if dtype == tl.float64:
                w += scale * g
            else:
                w = narrow(tl.fma(scale.to(tl.float32), g, w), dtype)
            tl.store(data + (place + i), w, i < count)
        step += 1


@triton.jit(do_not_specialize=["first"])
def ascend_kernel(
    tensors,
    blocks,
    first,
    rho,
    norm,
    dtype: tl.constexpr,
    adaptive: tl.constexpr,
    backup: tl.constexpr,
):
    block = blocks + 4 * (first + tl.program_id(0))
    tensor = tensors + tl.load(block) * FIELDS
    norm = tl.load(norm)
    good = (norm > 0) & (norm < float("inf"))
    scale = tl.where(good, tl.load(rho) / tl.where(good, norm, 1.0), 0.0)
    if tl.load(tensor + ALIGNED + 1) != 0:
        climb(True, tensor, block, scale, dtype, adaptive, backup)
    else:
        climb(False, tensor, block, scale, dtype, adaptive, backup)


@operator
def ascend_(params, grads, backup, rho, norm, adaptive):
    tensors = TensorList(params, grads, backup, changed=True)
    tensors.run(ascend_kernel, "whole", rho, norm, adaptive=adaptive, backup=len(backup) > 0)
    tensors.wrote(*params, *backup)
