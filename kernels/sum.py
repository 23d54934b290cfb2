"""Sums of squares per filter and over the whole list, in the order of reference.sum_squares and reference.total."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import widen
from .tensor_list import (
    ALIGNED,
    FIELDS,
    FIRST_FILTER,
    FOLD_OPTIONS,
    LANES,
    LENGTH,
    LOG_ROWS,
    REDUCE,
    ROWS,
    TILE,
    TensorList,
    by_filter,
    operator,
    rows_of,
)


@triton.jit
def fold(x):
    """Lanes folded by halves, [n, LANES] -> [n]: sums of two numbers, whose order does not matter."""
    for i in tl.static_range(7):
        x = tl.sum(tl.reshape(x, [x.shape[0], 2, LANES >> (i + 1)]), axis=1)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def sum_by(vector: tl.constexpr, tensor, block, dtype: tl.constexpr, product: tl.constexpr, whole: tl.constexpr):
    data, other, _, place, count, _, _, steps = rows_of(tensor, block, dtype, whole, True, vector)
    lanes = tl.zeros([ROWS, LANES], tl.float64 if dtype == tl.float64 else tl.float32)
    step = 0
    while step < steps:
        i = step * LANES + tl.arange(0, LANES)[None, :]
        x = widen(tl.load(data + (place + i), i < count, other=0.0))
        if product:
            x *= widen(tl.load(other + (place + i), i < count, other=0.0))
        if dtype == tl.float64:
            lanes += x * x
        else:
            lanes = tl.fma(x, x, lanes)
        step += 1
    return fold(lanes).to(tl.float64)


@triton.jit
def sum_reduces(tensor, block, dtype: tl.constexpr, product: tl.constexpr, whole: tl.constexpr):
    """A block's sums of REDUCE squares, with `product` of products with the other tensor: float64 [ROWS]."""
    if tl.load(tensor + ALIGNED + whole) != 0:
        x = sum_by(True, tensor, block, dtype, product, whole)
    else:
        x = sum_by(False, tensor, block, dtype, product, whole)
    return x


@triton.jit
def sum_filters(tensor, block, dtype: tl.constexpr):
    """The sums of squares of a block's filters in one piece: float64 [ROWS], in every row of a filter."""
    x = sum_reduces(tensor, block, dtype, False, False)
    for i in tl.static_range(LOG_ROWS):  # the fold of LANES, of which only the first few are not zero
        if tl.load(block + 3) >= LOG_ROWS - i:
            pairs = tl.sum(tl.reshape(x, [1 << i, 2, ROWS >> (i + 1)]), axis=1)[:, None, :]
            x = tl.reshape(tl.broadcast_to(pairs, [1 << i, 2, ROWS >> (i + 1)]), [ROWS])
    return x


@triton.jit
def total(sums, count):
    """The float64 sum of `count` sums in the order of reference.total; three levels, enough for 2^40 weights."""
    lane = tl.arange(0, LANES)[None, :]
    k, groups = tl.zeros([], tl.int32), tl.cdiv(count, REDUCE)
    middle = tl.zeros([1, LANES], tl.float64)  # over the sums of REDUCE
    upper = tl.zeros([1, LANES], tl.float64)  # over the sums of REDUCE of those
    while k < groups:
        x = tl.zeros([1, LANES], tl.float64)
        for step in tl.static_range(REDUCE // LANES):
            i = k * REDUCE + (step * LANES + lane)
            x += tl.load(sums + i, i < count, other=0.0)
        middle += tl.where(lane == k % LANES, fold(x)[:, None], 0.0)
        if (k % REDUCE == REDUCE - 1) | (k == groups - 1):
            upper += tl.where(lane == k // REDUCE % LANES, fold(middle)[:, None], 0.0)
            middle = tl.zeros([1, LANES], tl.float64)
        k += 1
    return tl.sum(fold(upper), axis=0)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first"])
def sum_kernel(tensors, blocks, first, sums, dtype: tl.constexpr, product: tl.constexpr, whole: tl.constexpr):
    number = first + tl.program_id(0)
    block = blocks + 4 * number
    x = sum_reduces(tensors + tl.load(block) * FIELDS, block, dtype, product, whole)
    tl.store(sums + number.to(tl.int64) * ROWS + tl.arange(0, ROWS), x)


@triton.jit
def long_norms_kernel(tensors, folds, sums, norms, sigma):
    """Norms of filters cut into pieces, times sigma if given."""
    fold = folds + 4 * tl.program_id(0)
    x = tl.sqrt_rn(total(sums + tl.load(fold + 2), tl.load(fold + 3)).to(tl.float32))
    if sigma is not None:
        x *= tl.load(sigma).to(tl.float32)
    tl.store(norms + tl.load(tensors + tl.load(fold) * FIELDS + FIRST_FILTER) + tl.load(fold + 1), x)


@triton.jit(do_not_specialize=["first"])
def norms_kernel(tensors, blocks, first, norms, dtype: tl.constexpr):
    """Norms of filters in one piece."""
    block = blocks + 4 * (first + tl.program_id(0))
    tensor = tensors + tl.load(block) * FIELDS
    if tl.load(tensor + LENGTH) <= TILE:
        at, there = by_filter(tensor, block, norms)
        tl.store(at, tl.sqrt_rn(sum_filters(tensor, block, dtype).to(tl.float32)), there)


@triton.jit
def whole_sums_kernel(tensors, folds, sums, out):
    fold = folds + 4 * tl.program_id(0)
    tl.store(out + tl.load(fold), total(sums + tl.load(fold + 2), tl.load(fold + 3)))


@triton.jit(do_not_specialize=["count"])
def whole_norm_kernel(sums, count, out):
    tl.store(out, tl.sqrt(total(sums, count)))


# --- operators --------------------------------------------------------------------------------------------------------


def sums_of_pieces(tensors: TensorList, kind: str, product: bool = False) -> Tensor:
    """The sums of REDUCE squares of the filters that `kind` cuts into pieces: float64, ROWS per piece."""
    count = len(tensors.shapes.cut(kind).blocks) * ROWS.value
    sums = torch.empty(count, dtype=torch.float64, device=tensors.device)
    tensors.run(sum_kernel, kind, sums, product=product, whole=kind == "whole")
    return sums


def long_norms(tensors: TensorList, out: Tensor, sigma: Tensor | None) -> None:
    """Writes the norms of long filters, times sigma if given, to an array over the filters of the list."""
    tensors.fold(long_norms_kernel, "long", sums_of_pieces(tensors, "long"), out, sigma)


@operator
def filter_norms(params):
    tensors = TensorList(params)
    out = torch.empty(tensors.shapes.first_filters[-1], dtype=torch.float32, device=tensors.device)
    long_norms(tensors, out, None)
    tensors.run(norms_kernel, "all", out)
    return out


@operator
def grad_norm(grads, params):
    tensors = TensorList(params or grads, grads if params else ())
    sums = torch.empty(len(grads), dtype=torch.float64, device=tensors.device)
    tensors.fold(whole_sums_kernel, "whole", sums_of_pieces(tensors, "whole", bool(params)), sums)
    out = torch.empty((), dtype=torch.float64, device=tensors.device)
    whole_norm_kernel[(1,)](sums, len(grads), out, **FOLD_OPTIONS)
    return out
