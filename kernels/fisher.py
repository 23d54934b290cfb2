"""filter_fisher_: ARWP's running Fisher, one number a filter (an element, for one-dimensional tensors)."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import widen
from .sum import sum_filters, sums_of_pieces, total
from .tensor_list import (
    FIELDS,
    FILTERS,
    FISHER,
    LANES,
    LENGTH,
    ONE_DIM,
    ROWS,
    TILE,
    TensorList,
    operator,
    rows_of,
)


@triton.jit
def update(tensor, entry, square, beta, scale, mask):
    """F <- beta F + scale^2 square, where that is finite."""
    fisher = tl.load(tensor + FISHER).to(tl.pointer_type(tl.float32)) + entry
    added = tl.load(scale) * tl.load(scale) * square
    new = beta * tl.load(fisher, mask, other=0.0).to(tl.float64) + added
    tl.store(fisher, new.to(tl.float32), mask & (tl.abs(added) < float("inf")))


@triton.jit
def long_fisher_kernel(tensors, folds, sums, beta: tl.float64, scale):
    """Filters that are in pieces."""
    fold = folds + 4 * tl.program_id(0)
    tensor = tensors + tl.load(fold) * FIELDS
    square = total(sums + tl.load(fold + 2), tl.load(fold + 3))
    update(tensor, tl.load(fold + 1), square, beta, scale, tl.load(tensor + ONE_DIM) == 0)


@triton.jit(do_not_specialize=["first"])
def fisher_kernel(tensors, blocks, first, beta: tl.float64, scale, dtype: tl.constexpr):
    """Filters that are in one piece, and all elements of tensors of one dimension."""
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
        # The first row of a filter alone: the others would add to what it has written.
        mask = (row >> shift << shift == row) & (filter < tl.load(tensor + FILTERS))
        update(tensor, filter, sum_filters(tensor, block, dtype), beta, scale, mask)


@operator
def filter_fisher_(fisher, grads, beta, scale):
    tensors = TensorList(grads, fisher=fisher)
    tensors.fold(long_fisher_kernel, "long", sums_of_pieces(tensors, "long"), beta, scale)
    tensors.run(fisher_kernel, "all", beta, scale)
    tensors.wrote(*fisher)
