"""topk_mask and regrow_mask_: the elements with the k largest scores of a whole list, exactly k, ties to the first.

A radix select. Scores become unsigned keys of the same order. A histogram of the keys' first digits gives the
threshold's first digit; a histogram of the second digits, over keys with this first digit, gives the next; and so on.
Then one pass writes two bits per element, whether its key is above the threshold and whether it equals it, and their
counts for every REDUCE elements. From the prefix sums of the counts, a pass over these words chooses the first of the
equal keys and writes the ranks.

Each digit takes one kernel launch, in which every program computes the previous digit from the counts on the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, widen
from .bits import WORDS, first_ones, is_set, ones, reduces_of
from .philox import philox
from .tensor_list import DATA, DROP, FIELDS, FIRST_RANK, GROW, INDEX, ROWS, TensorList, operator

# How many leading bits of a key can differ between scores of a dtype: bfloat16 and float16 are widened to float32, and
# the sign bit is left out. Random scores are 24 bits of a word.
KEY_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 18, torch.float64: 64}
RANDOM, RANDOM_BITS = tl.constexpr(0xFFFFFF00), 24
DIGIT = tl.constexpr(16 if INTERPRETED.value else 8)  # the interpreter wants few programs
BINS = tl.constexpr(1 << DIGIT.value)
# A row of int64 for each digit: the threshold's digits before it (the prefix), how many keys with this prefix are to be
# chosen, and the histogram of their next digit.
STATE = tl.constexpr(2 + BINS.value)

# Elements of a row at a time; more would take too many registers.
SPAN = tl.constexpr(1024 if INTERPRETED.value else 256)

# In the counter instead of a filter; larger than any filter. As in csrc/cpu/mask.cpp.
TO_DROP, TO_GROW = tl.constexpr(0xFFFFFFFE), tl.constexpr(0xFFFFFFFF)


# --- keys -------------------------------------------------------------------------------------------------------------


@triton.jit
def keys_of(
    tensor,
    offset,
    i,
    count,
    words,
    key,
    draw,
    dtype: tl.constexpr,
    column: tl.constexpr,
    place: tl.constexpr,
    live: tl.constexpr,
    lowest: tl.constexpr,
    bits: tl.constexpr,
):
    """The keys of elements i to i + SPAN of each row: unsigned numbers of `bits` bits; the largest are chosen.

    They are scores from `column` of the table, or if it is None Philox words with `place` in the counter. Under a mask
    (`words`), their absolute values.

    Returns:
        [ROWS, SPAN] each: keys; which of them to choose from (all, or those whose bit is `live`); which are bad scores.
    """
    at = i + tl.arange(0, SPAN)[None, :]
    there = at < count
    if words is not None:
        there = there & (is_set(words, at, there) == live)
    if column is None:
        index, draw = tl.load(tensor + INDEX).to(tl.uint32), tl.load(draw).to(tl.uint32)
        key = key.to(tl.pointer_type(tl.uint32))
        k0, k1 = tl.load(key), tl.load(key + 1)
        counter = ((offset + i) // 4).to(tl.uint32) + tl.arange(0, SPAN // 4)[None, :]
        x0, x1, x2, x3 = philox(counter, tl.full([], place, tl.uint32), index, draw, k0, k1)
        keys = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [ROWS, SPAN]) & RANDOM
        bad = there & False
    else:
        data = tl.load(tensor + column).to(tl.pointer_type(dtype)) + offset
        x = widen(tl.load(data + at, there, other=0.0))
        bad = (x != x) | (x < 0) if words is None else x != x
        keys = x.to(tl.int64 if dtype == tl.float64 else tl.int32, bitcast=True)
        if lowest:
            keys = ~keys
        keys = keys.to(tl.uint64 if dtype == tl.float64 else tl.uint32, bitcast=True) << 1  # and -0 is 0
    return keys >> (keys.dtype.primitive_bitwidth - bits), there, bad


# --- the threshold ----------------------------------------------------------------------------------------------------


@triton.jit
def threshold(state, digits, k, elements, mask):
    """The threshold's first `digits` digits, and how many keys with this prefix are to be chosen: int64.

    Computed from the state of one digit less; program 0 stores the result for the next launch.
    """
    prefix, wanted = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if digits > 0:
        row = state + (digits - 1) * STATE
        bins = tl.load(row + (STATE - 1) - tl.arange(0, BINS))  # from the largest digit down
        wanted = tl.load(row + 1)
        if digits == 1:
            wanted += k
            if mask is not None:  # as many are dropped as grown
                total = tl.sum(bins, axis=0)
                wanted = tl.minimum(wanted, tl.minimum(total, elements - total))
        # A bin is chosen whole if the keys in it and in larger bins are too few. How many such bins, and their keys:
        larger = tl.sum(tl.where(tl.cumsum(bins, axis=0) < wanted, (bins << DIGIT) + 1, 0), axis=0)
        wanted -= larger >> DIGIT
        prefix = (tl.load(row) << DIGIT) | (BINS - 1 - (larger & (BINS - 1)))
        if tl.program_id(0) == 0:
            tl.store(row + STATE, prefix)
            tl.store(row + STATE + 1, wanted)
    return prefix, wanted


@triton.jit(do_not_specialize=["first", "digits"])
def histogram_kernel(
    tensors,
    blocks,
    first,
    mask,
    key,
    draw,
    state,
    k: tl.int64,
    elements: tl.int64,
    digits,
    dtype: tl.constexpr,
    column: tl.constexpr,
    place: tl.constexpr,
    live: tl.constexpr,
    lowest: tl.constexpr,
    bits: tl.constexpr,
):
    """Counts the next digit of the keys with the threshold's first `digits` digits."""
    block = blocks + 4 * (first + tl.program_id(0))
    tensor = tensors + tl.load(block) * FIELDS
    prefix, wanted = threshold(state, digits, k, elements, mask)
    offset, length, longest, word, rank = reduces_of(tensor, block)
    words = None if mask is None else mask + word
    bins = tl.full([BINS], 0, tl.int32)
    i = 0
    while i < longest:
        keys, there, bad = keys_of(
            tensor, offset, i, length, words, key, draw, dtype, column, place, live, lowest, bits
        )
        keys = keys >> (bits - DIGIT * (digits + 1))
        there = there & (keys >> DIGIT == prefix.to(keys.dtype))
        digit = (keys & (BINS - 1)).to(tl.int32)
        bins += tl.histogram(tl.reshape(digit, [ROWS * SPAN]), BINS, tl.reshape(there, [ROWS * SPAN]))
        i += SPAN
    at = state + digits * STATE + 2 + tl.arange(0, BINS)
    tl.atomic_add(at, bins.to(tl.int64), bins > 0, sem="relaxed")


@triton.jit
def write(words, i, count, chosen):
    """Booleans [ROWS, SPAN] as words."""
    bit = (tl.arange(0, SPAN) % 32)[None, :]
    x = tl.sum(tl.reshape(chosen.to(tl.int32) << bit, [ROWS, SPAN // 32, 32]), axis=2)
    word = i // 32 + tl.arange(0, SPAN // 32)[None, :]
    tl.store(words + word, x, word * 32 < count)


@triton.jit(do_not_specialize=["first", "digits", "size"])
def compare_kernel(
    tensors,
    blocks,
    first,
    mask,
    key,
    draw,
    state,
    k: tl.int64,
    elements: tl.int64,
    digits,
    found,
    size: tl.int64,
    result,
    dtype: tl.constexpr,
    column: tl.constexpr,
    place: tl.constexpr,
    live: tl.constexpr,
    lowest: tl.constexpr,
    bits: tl.constexpr,
):
    """Writes which keys are above the threshold and, `size` further, which equal it, as masks with counts for ranks.

    Also how many of the equal ones are to be chosen, and the first bad tensor.
    """
    block = blocks + 4 * (first + tl.program_id(0))
    number = tl.load(block)
    tensor = tensors + number * FIELDS
    prefix, wanted = threshold(state, digits, k, elements, mask)
    offset, length, longest, word, rank = reduces_of(tensor, block)
    words = None if mask is None else mask + word
    found += word
    sums = tl.full([ROWS, SPAN], 0, tl.int32)
    i = 0
    while i < longest:
        keys, there, bad = keys_of(
            tensor, offset, i, length, words, key, draw, dtype, column, place, live, lowest, bits
        )
        limit = prefix.to(keys.dtype)
        above, equal = there & (keys > limit), there & (keys == limit)
        write(found, i, length, above)
        write(found + size, i, length, equal)
        # Three counts in one number: sums are slow in the interpreter.
        sums += above.to(tl.int32) + (equal.to(tl.int32) << 12) + (bad.to(tl.int32) << 24)
        i += SPAN
    sums = tl.sum(sums.to(tl.int64), axis=1, keep_dims=True)
    # One position after the rank, so that inclusive prefix sums put the count of all before at the rank.
    tl.store(found - word + rank + 1, (sums & 0xFFF).to(tl.int32), length > 0)
    tl.store(found - word + size + rank + 1, ((sums >> 12) & 0xFFF).to(tl.int32), length > 0)
    if tl.program_id(0) == 0:
        tl.store(result + 1, wanted)
    # Unsigned, so that the initial -1 is the largest.
    first_bad = result.to(tl.pointer_type(tl.uint64)) + tl.full([ROWS, 1], 0, tl.int32)
    numbers = tl.full([ROWS, 1], 0, tl.uint64) + number.to(tl.uint64)
    tl.atomic_min(first_bad, numbers, sums >> 24 != 0, sem="relaxed")


# --- the mask ---------------------------------------------------------------------------------------------------------


@triton.jit
def chosen_of(word, rank, there, found, size, wanted):
    """The words of the chosen, all above and the first `wanted` equal ones; how many are chosen before each row."""
    above = tl.load(found + word, there, other=0)
    equal = tl.load(found + size + word, there, other=0)
    above_before = tl.load(found + rank).to(tl.uint32, bitcast=True).to(tl.int64)
    equal_before = tl.load(found + size + rank).to(tl.uint32, bitcast=True).to(tl.int64)
    number = ones(equal)
    left = wanted - equal_before - (tl.cumsum(number, axis=1) - number)
    kept = first_ones(equal, number, left)
    return above | kept, above_before + tl.minimum(equal_before, wanted)


@triton.jit(do_not_specialize=["first", "size"])
def mask_kernel(tensors, blocks, first, mask, found, size: tl.int64, result, regrow: tl.constexpr, dtype: tl.constexpr):
    """Writes the chosen; with `regrow`, drops them from the mask and grows the second choice, unless a score is bad."""
    block = blocks + 4 * (first + tl.program_id(0))
    tensor = tensors + tl.load(block) * FIELDS
    _, count, _, word, rank = reduces_of(tensor, block)
    rank = tl.where(count > 0, rank, tl.load(tensor + FIRST_RANK))  # an empty row must not read out of bounds
    if regrow:
        count = tl.where(tl.maximum(tl.load(result), tl.load(result + 2)) < 0, count, 0)
    i = tl.arange(0, WORDS)[None, :]
    word, there = word + i, i * 32 < count
    new, before = chosen_of(word, rank, there, found, size, tl.load(result + 1))
    if regrow:
        grown, grown_before = chosen_of(word, rank, there, found + 2 * size, size, tl.load(result + 3))
        new = tl.load(mask + word, there, other=0) ^ new ^ grown
        before = tl.load(mask + rank).to(tl.uint32, bitcast=True).to(tl.int64) - before + grown_before
    tl.store(mask + word, new, there)
    tl.store(mask + rank, before.to(tl.int32), count > 0)


# --- operators --------------------------------------------------------------------------------------------------------


class Selections:
    """One or two choices from a list, and the mask made from them.

    Attributes:
        found: int32, for each choice two rows like a mask, one entry longer: what is above its threshold, what equals
            it.
        result: int64, for each choice the first bad tensor or -1, and how many of the equal ones are chosen.
    """

    def __init__(self, tensors: TensorList, choices: int) -> None:
        self.tensors = tensors
        self.size = tensors.shapes.mask_size + 1
        self.found = torch.empty(2 * choices, self.size, dtype=torch.int32, device=tensors.device)
        self.result = torch.full((choices, 2), -1, dtype=torch.int64, device=tensors.device)

    def choose(self, choice: int, k: int, column=None, mask=None, key=None, draw=None, place=None, **constants) -> None:
        """Finds the `k` largest; under a mask fewer, if fewer can be exchanged."""
        tensors = self.tensors
        bits = RANDOM_BITS if column is None else max(KEY_BITS[d] for d in tensors.shapes.dtypes)
        digits = triton.cdiv(bits, DIGIT.value)
        state = torch.zeros(digits + 1, STATE.value, dtype=torch.int64, device=tensors.device)
        args = (mask, key, draw, state, k, tensors.shapes.elements)
        constants |= {"column": column, "place": place, "bits": digits * DIGIT.value, "by_dtype": column is not None}
        for i in range(digits):
            tensors.run(histogram_kernel, "whole", *args, i, **constants)
        args += (digits, self.found[2 * choice], self.size, self.result[choice])
        tensors.run(compare_kernel, "whole", *args, **constants)

    def write(self, mask: Tensor, regrow: bool) -> None:
        """Fills the mask."""
        counts = self.found[:, self.tensors.shapes.words :]
        counts[:, 0] = 0
        for row in counts:  # PyTorch scans one row fast, but not a matrix
            row.cumsum_(0)
        args = (mask, self.found, self.size, self.result)
        self.tensors.run(mask_kernel, "whole", *args, regrow=regrow, by_dtype=False)
        self.tensors.wrote(mask)


@operator
def topk_mask(scores, k):
    selections = Selections(TensorList(scores), 1)
    selections.choose(0, k, DATA, live=True, lowest=False)
    mask = torch.empty_like(selections.found[0, 1:])
    selections.write(mask, False)
    return mask, selections.result[0, 0]


@operator
def regrow_mask_(mask, params, drop, grow, key, draw, index, count):
    tensors = TensorList(params, drop=drop, grow=grow, index=index)
    tensors.check_mask(mask)
    selections = Selections(tensors, 2)
    given = (mask, key, draw)
    selections.choose(0, count, DROP if drop else None, *given, TO_DROP, live=True, lowest=len(drop) > 0)
    selections.choose(1, count, GROW if grow else None, *given, TO_GROW, live=False, lowest=False)
    selections.write(mask, True)
    bad_drop, bad_grow = selections.result[:, 0]
    return torch.where(bad_drop < 0, bad_grow, bad_drop)
