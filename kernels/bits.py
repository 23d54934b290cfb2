"""Masks: one bit per element, and for every REDUCE elements their rank, the number of ones before them in the list."""

from __future__ import annotations

import triton
import triton.language as tl

from .tensor_list import FILTERS, FIRST_RANK, FIRST_WORD, LENGTH, REDUCE, ROWS

WORDS = tl.constexpr(REDUCE.value // 32)  # in a row


@triton.jit
def reduces_of(tensor, block):
    """The rows, of REDUCE elements each, of a block that was cut as 'whole'.

    Returns:
        offset, count: a row's first element in the tensor and its number of elements, [ROWS, 1].
        longest: the largest count.
        word, rank: the positions of a row's first word and of its rank in a mask, [ROWS, 1].
    """
    start, row = tl.load(block + 2).to(tl.int64), tl.arange(0, ROWS)[:, None]
    left = tl.load(tensor + FILTERS) * tl.load(tensor + LENGTH) - start * REDUCE
    count = tl.minimum(tl.maximum(left - row * REDUCE, 0), REDUCE).to(tl.int32)
    reduce = start + row
    word, rank = tl.load(tensor + FIRST_WORD) + reduce * WORDS, tl.load(tensor + FIRST_RANK) + reduce
    return reduce * REDUCE, count, tl.minimum(left, REDUCE).to(tl.int32), word, rank


@triton.jit
def is_set(words, i, there):
    """Whether the bits of elements `i`, counted from the word at `words`, are set."""
    return (tl.load(words + i // 32, there, other=0) >> (i % 32)) & 1 != 0


@triton.jit
def ones(x):
    """How many bits of a 32-bit number are set. Compilers turn this into one instruction."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def first_ones(x, number, count):
    """The lowest `count` of the `number` bits that are set in each int32."""
    cut = tl.where(count < number, tl.maximum(count, 0), 0)
    rest, i, most = x, 0, tl.max(cut)
    while i < most:  # rare: few words keep only some of their bits
        rest = tl.where(i < cut, rest & (rest - 1), rest)
        i += 1
    return tl.where(count < number, x ^ rest, x)
