"""perturb_, subtract_noise_, restore_, normal_. After its norm, a filter is read a second time, from the cache."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import narrow, widen
from .ascend import restore_masked
from .gaussian import normals
from .sum import long_norms, sum_filters
from .tensor_list import (
    ALIGNED,
    FIELDS,
    FIRST_ROW,
    FISHER,
    INDEX,
    LANES,
    LENGTH,
    ONE_DIM,
    ROWS,
    TILE,
    TensorList,
    by_filter,
    operator,
    rows_of,
)


@triton.jit
def adapted(scale, eta, fisher):
    return tl.div_rn(scale, tl.sqrt_rn(tl.fma(eta, fisher, 1.0)))


@triton.jit
def add_noise(
    vector: tl.constexpr,
    tensor,
    block,
    scale,
    key,
    draw,
    eta,
    dtype: tl.constexpr,
    backup: tl.constexpr,
    fisher: tl.constexpr,
):
    """w += scale z over a block, scale [ROWS]; w = z if scale is None."""
    data, _, saved, place, count, filter, offset, steps = rows_of(tensor, block, dtype, False, False, vector)
    fishers = tl.load(tensor + FISHER).to(tl.pointer_type(tl.float32))
    one_dim = tl.load(tensor + ONE_DIM) != 0
    if scale is not None:
        scale = tl.broadcast_to(scale[:, None], [ROWS, LANES])
        if fisher:
            if not one_dim:
                scale = adapted(scale, eta, tl.load(fishers + filter, count > 0, other=0.0))
    index, draw = tl.load(tensor + INDEX).to(tl.uint32), tl.load(draw).to(tl.uint32)
    key = key.to(tl.pointer_type(tl.uint32))
    k0, k1 = tl.load(key), tl.load(key + 1)
    row = filter.to(tl.uint32) + tl.load(tensor + FIRST_ROW).to(tl.uint32)
    counter = (offset // 4).to(tl.uint32) + tl.arange(0, LANES // 4)[None, :]
    step = 0
    while step < steps:
        z = normals(counter + step * (LANES // 4), row, index, draw, k0, k1)
        i = step * LANES + tl.arange(0, LANES)[None, :]
        if scale is None:
            x = z
        else:
            x = tl.load(data + (place + i), i < count, other=0.0)
            if backup:
                tl.store(saved + (place + i), x, i < count)
            by = scale
            if fisher:
                if one_dim:
                    by = adapted(scale, eta, tl.load(fishers + offset + i, i < count, other=0.0))
            if dtype == tl.float64:
                x += by.to(tl.float64) * z.to(tl.float64)
            else:
                x = narrow(tl.fma(by, z, widen(x)), dtype)
        tl.store(data + (place + i), x, i < count)
        step += 1


@triton.jit(do_not_specialize=["first"])
def perturb_kernel(
    tensors,
    blocks,
    first,
    scales,
    sigma,
    key,
    draw,
    eta: tl.float32,
    dtype: tl.constexpr,
    backup: tl.constexpr,
    fisher: tl.constexpr,
):
    """Adds noise times `scales`; for filters in one piece, first computes their scales, sigma times the norm.

    Without sigma it subtracts the noise times the given scales; without scales it writes the noise itself.
    """
    block = blocks + 4 * (first + tl.program_id(0))
    tensor = tensors + tl.load(block) * FIELDS
    scale = None
    if scales is not None:
        at, there = by_filter(tensor, block, scales)
        scale = tl.load(at, there, other=0.0)
        if sigma is None:
            scale = -scale
        elif tl.load(tensor + LENGTH) <= TILE:
            scale = tl.load(sigma).to(tl.float32) * tl.sqrt_rn(sum_filters(tensor, block, dtype).to(tl.float32))
            tl.store(at, scale, there)
    if tl.load(tensor + ALIGNED) != 0:
        add_noise(True, tensor, block, scale, key, draw, eta, dtype, backup, fisher)
    else:
        add_noise(False, tensor, block, scale, key, draw, eta, dtype, backup, fisher)


@triton.jit
def copy(vector: tl.constexpr, tensor, block, dtype: tl.constexpr):
    data, _, saved, place, count, _, _, steps = rows_of(tensor, block, dtype, True, False, vector)
    step = 0
    while step < steps:
        i = step * LANES + tl.arange(0, LANES)[None, :]
        tl.store(data + (place + i), tl.load(saved + (place + i), i < count), i < count)
        step += 1


@triton.jit(do_not_specialize=["first"])
def copy_kernel(tensors, blocks, first, dtype: tl.constexpr):
    """Copies the backup back."""
    block = blocks + 4 * (first + tl.program_id(0))
    tensor = tensors + tl.load(block) * FIELDS
    if tl.load(tensor + ALIGNED + 1) != 0:
        copy(True, tensor, block, dtype)
    else:
        copy(False, tensor, block, dtype)


# --- operators --------------------------------------------------------------------------------------------------------


@operator
def perturb_(params, scales, backup, sigma, key, draw, index, first_row, fisher, eta):
    tensors = TensorList(params, backup=backup, fisher=fisher, index=index, first_row=first_row, changed=True)
    tensors.check_scales(scales)
    long_norms(tensors, scales, sigma)
    noise = (scales, sigma, key, draw, eta)
    tensors.run(perturb_kernel, "all", *noise, backup=len(backup) > 0, fisher=len(fisher) > 0)
    tensors.wrote(*params, *backup, scales)


@operator
def subtract_noise_(params, scales, key, draw, index, first_row, fisher, eta):
    tensors = TensorList(params, fisher=fisher, index=index, first_row=first_row)
    tensors.check_scales(scales)
    noise = (scales, None, key, draw, eta)
    tensors.run(perturb_kernel, "all", *noise, backup=False, fisher=len(fisher) > 0)
    tensors.wrote(*params)


@operator
def restore_(params, backup, mask):
    tensors = TensorList(params, backup=backup if mask is None else ())
    if mask is None:
        tensors.run(copy_kernel, "whole")
    else:
        restore_masked(tensors, params, backup, mask)
    tensors.wrote(*params)


@operator
def normal_(out, key, draw, index):
    tensors = TensorList([out], index=[index])
    tensors.run(perturb_kernel, "all", None, None, key, draw, 0.0, backup=False, fisher=False)
    tensors.wrote(out)
