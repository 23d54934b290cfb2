"""ascend_: the ascent of sharpness-aware minimisation, one pass over weights and gradients.

Under a mask only selected elements are read, backed up and changed; `restore_masked` restores them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow, widen
from .bits import WORDS, is_set, ones, reduces_of
from .tensor_list import ALIGNED, DATA, FIELDS, LANES, OTHER, TensorList, operator, rows_of


@triton.jit
def ascended(x, g, scale, dtype: tl.constexpr, adaptive: tl.constexpr):
    """w + scale g, or w + scale w^2 g, in the weight's dtype."""
    w, g = widen(x), widen(g)
    if adaptive:
        g = w * w * g
    if dtype == tl.float64:
        w += scale * g
    else:
        w = narrow(tl.fma(scale.to(tl.float32), g, w), dtype)
    return w


@triton.jit
def scale_of(rho, norm):
    """rho / norm; 0 if the norm is 0 or not finite."""
    norm = tl.load(norm)
    good = (norm > 0) & (norm < float("inf"))
    return tl.where(good, tl.load(rho) / tl.where(good, norm, 1.0), 0.0)


@triton.jit
def ascend(
    vector: tl.constexpr, tensor, block, scale, dtype: tl.constexpr, adaptive: tl.constexpr, backup: tl.constexpr
):
    data, grad, saved, place, count, _, _, steps = rows_of(tensor, block, dtype, True, False, vector)
    step = 0
    while step < steps:
        i = step * LANES + tl.arange(0, LANES)[None, :]
        x = tl.load(data + (place + i), i < count, other=0.0)
        if backup:
            tl.store(saved + (place + i), x, i < count)
        if scale != 0:  # not even 0 times an infinite gradient
            g = tl.load(grad + (place + i), i < count, other=0.0)
            tl.store(data + (place + i), ascended(x, g, scale, dtype, adaptive), i < count)
        step += 1


@triton.jit(do_not_specialize=["first"])
def ascend_kernel(tensors, blocks, first, rho, norm, dtype: tl.constexpr, adaptive: tl.constexpr, backup: tl.constexpr):
    block = blocks + 4 * (first + tl.program_id(0))
    tensor = tensors + tl.load(block) * FIELDS
    scale = scale_of(rho, norm)
    if tl.load(tensor + ALIGNED + 1) != 0:
        ascend(True, tensor, block, scale, dtype, adaptive, backup)
    else:
        ascend(False, tensor, block, scale, dtype, adaptive, backup)


# --- under a mask -----------------------------------------------------------------------------------------------------


@triton.jit
def selected(tensor, block, mask, slots):
    """The selected elements of a block's rows.

    Returns:
        words: pointers to the rows' words of the mask, [ROWS, 1].
        slot: the slot of a row's first selected element, [ROWS, 1].
        count: how many elements a row has; 0 if its selected ones do not all have a slot, [ROWS, 1].
        offset: of a row's first element in the tensor, [ROWS, 1].
        steps: how many times LANES the longest row is; 0 if none is selected.
    """
    offset, count, longest, word, rank = reduces_of(tensor, block)
    words, i = mask + word, tl.arange(0, WORDS)[None, :]
    number = tl.sum(ones(tl.load(words + i, i * 32 < count, other=0)), axis=1, keep_dims=True)
    slot = tl.load(mask + rank, count > 0, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    if slots is not None:
        number = tl.where(slot + number <= slots, number, 0)
    count = tl.where(number > 0, count, 0)
    return words, slot, count, offset, tl.cdiv(tl.max(count), LANES)


@triton.jit
def number_in_row(chosen, before):
    """How many elements of a row are chosen before each, counted from `before`, and up to the end of this step."""
    chosen = chosen.to(tl.int32)
    return before + (tl.cumsum(chosen, axis=1) - chosen), before + tl.sum(chosen, axis=1, keep_dims=True)


@triton.jit(do_not_specialize=["first"])
def ascend_masked_kernel(
    tensors,
    blocks,
    first,
    mask,
    rho,
    norm,
    backup,
    slots: tl.int64,
    dtype: tl.constexpr,
    adaptive: tl.constexpr,
    width: tl.constexpr,
):
    """`width` is the number of bytes of a slot; 0 without a backup."""
    block = blocks + 4 * (first + tl.program_id(0))
    tensor = tensors + tl.load(block) * FIELDS
    scale = scale_of(rho, norm)
    words, slot, count, offset, steps = selected(tensor, block, mask, None if backup is None else slots)
    data = tl.load(tensor + DATA).to(tl.pointer_type(dtype)) + offset
    grad = tl.load(tensor + OTHER).to(tl.pointer_type(dtype)) + offset
    step = 0
    while step < steps:
        i = step * LANES + tl.arange(0, LANES)[None, :]
        chosen = is_set(words, i, i < count)
        x = tl.load(data + i, chosen, other=0.0)
        if backup is not None:
            here, slot = number_in_row(chosen, slot)
            saved = backup.to(tl.pointer_type(dtype)) + here * (width // dtype.itemsize)
            tl.store(saved, x, chosen)
        if scale != 0:  # not even 0 times an infinite gradient
            g = tl.load(grad + i, chosen, other=0.0)
            tl.store(data + i, ascended(x, g, scale, dtype, adaptive), chosen)
        step += 1


@triton.jit(do_not_specialize=["first"])
def restore_masked_kernel(
    tensors, blocks, first, mask, backup, slots: tl.int64, dtype: tl.constexpr, width: tl.constexpr
):
    """Restores the selected elements."""
    block = blocks + 4 * (first + tl.program_id(0))
    tensor = tensors + tl.load(block) * FIELDS
    words, slot, count, offset, steps = selected(tensor, block, mask, slots)
    data = tl.load(tensor + DATA).to(tl.pointer_type(dtype)) + offset
    step = 0
    while step < steps:
        i = step * LANES + tl.arange(0, LANES)[None, :]
        chosen = is_set(words, i, i < count)
        here, slot = number_in_row(chosen, slot)
        saved = backup.to(tl.pointer_type(dtype)) + here * (width // dtype.itemsize)
        tl.store(data + i, tl.load(saved, chosen, other=0.0), chosen)
        step += 1


# --- operators --------------------------------------------------------------------------------------------------------


def check_slots(backup: list[Tensor], params: list[Tensor]) -> Tensor | None:
    """The one tensor of a masked backup; None without a backup."""
    if not backup:
        return None
    (slots,) = backup
    if slots.itemsize != max(p.itemsize for p in params) or not slots.is_contiguous():
        raise ValueError("a backup under a mask must be one contiguous tensor of the widest dtype")
    if slots.device != params[0].device:
        raise ValueError(f"backup is on {slots.device} and the parameters are on {params[0].device}")
    return slots


def restore_masked(tensors: TensorList, params: list[Tensor], backup: list[Tensor], mask: Tensor) -> None:
    tensors.check_mask(mask)
    slots = check_slots(backup, params)
    tensors.run(restore_masked_kernel, "whole", mask, slots, slots.numel(), width=slots.itemsize)


@operator
def ascend_(params, grads, backup, mask, rho, norm, adaptive):
    if mask is None:
        tensors = TensorList(params, grads, backup, changed=True)
        tensors.run(ascend_kernel, "whole", rho, norm, adaptive=adaptive, backup=len(backup) > 0)
    else:
        tensors = TensorList(params, grads, changed=True)
        tensors.check_mask(mask)
        slots = check_slots(backup, params)
        room, width = (0, 0) if slots is None else (slots.numel(), slots.itemsize)
        tensors.run(ascend_masked_kernel, "whole", mask, rho, norm, slots, room, adaptive=adaptive, width=width)
    tensors.wrote(*params, *backup)
