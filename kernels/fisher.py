"""filter_fisher_: ARWP's running Fisher, one number per filter (per element, for one-dimensional tensors).

fisher_: sparse SAM's Fisher, one number per element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .arithmetic import narrow, widen
from .sum import sum_filters, sums_of_pieces, total
from .tensor_list import (
    ALIGNED,
    FIELDS,
    FILTERS,
    FISHER,
    LANES,
    LENGTH,
    ONE_DIM,
    OTHER,
    REDUCE,
    ROWS,
    TILE,
    TensorList,
    operator,
    rows_of,
)


@triton.jit
def update(tensor, entry, square, beta, scale, mask):
    """F <- beta F + scale^2 square, unless the added term is not finite."""
    fisher = tl.load(tensor + FISHER).to(tl.pointer_type(tl.float32)) + entry
    added = tl.load(scale) * tl.load(scale) * square
    new = beta * tl.load(fisher, mask, other=0.0).to(tl.float64) + added
    tl.store(fisher, new.to(tl.float32), mask & (tl.abs(added) < float("inf")))


@triton.jit
def long_fisher_kernel(tensors, folds, sums, beta: tl.float64, scale):
    """The Fisher of filters cut into pieces."""
    fold = folds + 4 * tl.program_id(0)
    tensor = tensors + tl.load(fold) * FIELDS
    square = total(sums + tl.load(fold + 2), tl.load(fold + 3))
    update(tensor, tl.load(fold + 1), square, beta, scale, tl.load(tensor + ONE_DIM) == 0)


@triton.jit(do_not_specialize=["first"])
def fisher_kernel(tensors, blocks, first, beta: tl.float64, scale, dtype: tl.constexpr):
    """The Fisher of filters in one piece, and of the elements of one-dimensional tensors."""
    block = blocks + 4 * (first + tl.program_id(0))
    tensor = tensors + tl.load(block) * FIELDS
    if tl.load(tensor + ONE_DIM) != 0:
        data, _, _, place, count, _, offset, steps = rows_of(tensor, block, dtype, False, False, False)
        step = 0
        while step < steps:
            i = step * LANES + tl.arange(0, LANES)[None, :]
            g = widen(tl.load(data + (place + i), i < count, other=0.0)).to(tl.float64)
            update(tensor, offset + i, g * g, beta, scale, i < count)
            step += 1
    elif tl.load(tensor + LENGTH) <= TILE:
        row, shift = tl.arange(0, ROWS), tl.load(block + 3)
        filter = tl.load(block + 1) + (row >> shift)
        # Only the first row of a filter: another would update what this one has written.
        mask = (row >> shift << shift == row) & (filter < tl.load(tensor + FILTERS))
        update(tensor, filter, sum_filters(tensor, block, dtype), beta, scale, mask)


@triton.jit
def add_squares(vector: tl.constexpr, tensor, block, scale, dtype: tl.constexpr):
    """F += (scale g)^2 over a block."""
    grad, _, _, place, count, _, _, steps = rows_of(tensor, block, dtype, True, False, vector)
    fisher = tl.load(tensor + OTHER).to(tl.pointer_type(tl.float32))
    if vector:
        fisher = tl.multiple_of(fisher, 16)
    fisher += tl.load(block + 2).to(tl.int64) * REDUCE
    step = 0
    while step < steps:
        i = step * LANES + tl.arange(0, LANES)[None, :]
        g = widen(tl.load(grad + (place + i), i < count, other=0.0))
        if dtype == tl.float64:
            g = narrow(g, tl.float32)
        d = scale * g
        at = fisher + (place + i)
        tl.store(at, tl.fma(d, d, tl.load(at, i < count, other=0.0)), i < count)
        step += 1


@triton.jit(do_not_specialize=["first"])
def squares_kernel(tensors, blocks, first, scale, dtype: tl.constexpr):
    block = blocks + 4 * (first + tl.program_id(0))
    tensor = tensors + tl.load(block) * FIELDS
    scale = tl.load(scale).to(tl.float32)
    if tl.load(tensor + ALIGNED + 1) != 0:
        add_squares(True, tensor, block, scale, dtype)
    else:
        add_squares(False, tensor, block, scale, dtype)


# --- operators --------------------------------------------------------------------------------------------------------


@operator
def filter_fisher_(fisher, grads, beta, scale):
    tensors = TensorList(grads, fisher=fisher)
    tensors.fold(long_fisher_kernel, "long", sums_of_pieces(tensors, "long"), beta, scale)
    tensors.run(fisher_kernel, "all", beta, scale)
    tensors.wrote(*fisher)


@operator
def fisher_(fisher, grads, scale):
    tensors = TensorList(grads, fisher, other_dtype=torch.float32)
    tensors.run(squares_kernel, "whole", scale)
    tensors.wrote(*fisher)
