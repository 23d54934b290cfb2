"""A list of tensors as kernels see it: pointers, filters, lengths, and the blocks of work, one per program.

A program works on ROWS rows. A filter of up to TILE elements takes a row for every REDUCE elements, rounded up to a
power of two rows, and a program takes as many filters as fit. A longer filter is cut into pieces of TILE elements, one
per program.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED

REDUCE, LANES = tl.constexpr(1024), tl.constexpr(128)  # csrc/tensor_list.h
# Results do not depend on the number of rows; the interpreter is faster with few large programs.
LOG_ROWS = tl.constexpr(6 if INTERPRETED.value else 3)
ROWS, TILE = tl.constexpr(1 << LOG_ROWS.value), tl.constexpr(REDUCE.value << LOG_ROWS.value)
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
FOLD_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}  # for one row of LANES at a time: no barriers

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


# --- what a program reads: a row of int64 for each tensor, a row of int32 for each block ------------------------------

# The columns of a tensor. The first six are addresses, or 0; DROP and GROW are the scores of regrow_mask_. ALIGNED:
# whether every filter can be read and written 16 bytes at a time; ALIGNED + 1: whether the tensor as one filter can.
# FIRST_WORD and FIRST_RANK: the positions of the tensor's words and ranks in a mask over the list.
DATA, OTHER, BACKUP, DROP, GROW, FISHER = map(tl.constexpr, range(6))
FILTERS, LENGTH, FIRST_FILTER, INDEX, FIRST_ROW, ONE_DIM, ALIGNED = map(tl.constexpr, range(6, 13))
FIRST_WORD, FIRST_RANK, FIELDS = map(tl.constexpr, range(14, 17))


@triton.jit
def rows_of(tensor, block, dtype: tl.constexpr, whole: tl.constexpr, reduces: tl.constexpr, vector: tl.constexpr):
    """How the rows of a block share its elements: REDUCE each with `reduces`, else evenly.

    Args:
        tensor, block: rows of their tables.
        vector: the tensor is ALIGNED. The compiler attaches this hint to values, so each path of a kernel calls this.

    Returns:
        data, other, backup: pointers to the beginning of the block.
        place: the beginning of each row, counted from there, [ROWS, 1].
        count: how many elements a row has, [ROWS, 1].
        filter, offset: the row's filter, and the offset of its first element in it, [ROWS, 1].
        steps: how many times LANES the longest row is. Loop by `while`: the interpreter of Triton 3.6 cannot use it in
            a range with a recent NumPy.
    """
    first, start, shift = tl.load(block + 1), tl.load(block + 2).to(tl.int64) * REDUCE, tl.load(block + 3)
    filters, length = tl.load(tensor + FILTERS), tl.load(tensor + LENGTH)
    if whole:
        length *= filters
        filters = tl.minimum(filters, 1)
    reach = tl.minimum(length - start, TILE).to(tl.int32)
    if reduces:
        steps = tl.cdiv(tl.minimum(reach, REDUCE), LANES)
        each = REDUCE
    else:
        steps = tl.cdiv(reach, LANES << shift)
        each = steps * LANES
    row = tl.arange(0, ROWS)[:, None]
    offset = (row & ((1 << shift) - 1)) * each
    place = (row >> shift) * length.to(tl.int32) + offset
    filter = first + (row >> shift)
    count = tl.where(filter < filters, reach - offset, 0)
    begin = first * length + start
    data = tl.load(tensor + DATA).to(tl.pointer_type(dtype))
    other = tl.load(tensor + OTHER).to(tl.pointer_type(dtype))
    backup = tl.load(tensor + BACKUP).to(tl.pointer_type(dtype))
    if vector:
        data, other, backup = tl.multiple_of(data, 16), tl.multiple_of(other, 16), tl.multiple_of(backup, 16)
        begin = tl.multiple_of(begin, 4)
        place, count = tl.multiple_of(place, [4, 4]), tl.multiple_of(count, [4, 4])
    return data + begin, other + begin, backup + begin, place, count, filter, start + offset, steps


@triton.jit
def by_filter(tensor, block, array):
    """Pointers to the entries of a block's rows in an array over all filters, and whether the rows have one: [ROWS]."""
    filter = tl.load(block + 1) + (tl.arange(0, ROWS) >> tl.load(block + 3))
    return array + tl.load(tensor + FIRST_FILTER) + filter, filter < tl.load(tensor + FILTERS)


# --- cutting ----------------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """Blocks of work.

    Attributes:
        blocks: int32 [blocks, 4]: tensor, first filter, start in the filter in units of REDUCE, log2(a filter's rows).
        launches: dtype, first block, number of blocks.
        folds: int32 [filters cut into pieces, 4]: tensor, filter, its first sum (ROWS per block), its number of sums.
    """

    blocks: Tensor
    launches: list[tuple[torch.dtype, int, int]]
    folds: Tensor


class Shapes:
    """What depends only on the shapes and dtypes of a list."""

    def __init__(self, shapes: Iterable[torch.Size], dtypes: Iterable[torch.dtype]) -> None:
        self.dtypes = dtypes
        self.one_dim = [len(s) <= 1 for s in shapes]
        self.filters = [0 if s.numel() == 0 else 1 if len(s) <= 1 else s[0] for s in shapes]
        self.lengths = [s.numel() // max(n, 1) for s, n in zip(shapes, self.filters)]
        self.first_filters = [0, *itertools.accumulate(self.filters)]
        sizes = [f * n for f, n in zip(self.filters, self.lengths)]
        self.elements = sum(sizes)
        self.first_words = [0, *itertools.accumulate(triton.cdiv(n, 32) for n in sizes)]
        self.words = self.first_words[-1]  # of a mask, before its ranks
        ranks = (triton.cdiv(n, REDUCE.value) for n in sizes)
        self.first_ranks = list(itertools.accumulate(ranks, initial=self.words))
        self.mask_size = self.first_ranks[-1]
        self.cut = functools.cache(self.cut)

    def cut(self, kind: str) -> Cut:
        """Cuts 'all' filters, only the 'long' ones, or 'whole' tensors, as one filter each and always into pieces."""
        nothing = torch.empty(0, 4, dtype=torch.int64)
        blocks, folds, launches, count = [nothing], [nothing], [], 0
        for dtype in dict.fromkeys(self.dtypes):
            first = count
            for i in (i for i, d in enumerate(self.dtypes) if d == dtype):
                filters, length = self.filters[i], self.lengths[i]
                if kind == "whole":
                    filters, length = 1, filters * length
                sums, pieces = triton.cdiv(length, REDUCE.value), triton.cdiv(length, TILE.value)
                if kind == "whole" or pieces > 1:
                    shift, filter = LOG_ROWS.value, torch.arange(filters)
                    folds.append(_table(i, filter, (count + filter * pieces) * ROWS.value, sums))
                    filter, piece = filter.repeat_interleave(pieces), torch.arange(pieces).repeat(filters)
                elif kind == "long" or not filters:
                    continue
                else:
                    shift = (sums - 1).bit_length()
                    filter, piece = torch.arange(0, filters, ROWS.value >> shift), 0
                blocks.append(_table(i, filter, piece * ROWS.value, shift))
                count += len(blocks[-1])
            if count > first:
                launches.append((dtype, first, count - first))
        return Cut(torch.cat(blocks).int(), launches, torch.cat(folds).int())


def _table(*columns: Tensor | int) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, columns)), 1)


_shapes = functools.lru_cache(maxsize=64)(Shapes)


# --- tables on the device ---------------------------------------------------------------------------------------------


class _OnDevice(NamedTuple):
    table: Tensor
    stream: torch.cuda.Stream | None  # on which it is filled
    filled: torch.cuda.Event | None


_tables: OrderedDict[object, _OnDevice] = OrderedDict()
# Tensors that captured graphs read: kept for good, since there is no notice when a graph is deleted.
_graphs_read: list[Tensor] = []
# Pinned memory for tables made during a capture, when none can be allocated.
_reserve = torch.empty(0, dtype=torch.int64)


def _on_device(key: object, values: Callable[[], Tensor], device: torch.device) -> Tensor:
    """The table `values()` on a device, cached by `key`, copied without a host sync."""
    if device.type == "cpu":
        capturing, stream = False, None
    else:
        capturing, stream = torch.cuda.is_current_stream_capturing(), torch.cuda.current_stream()
    entry = _tables.get(key)
    if entry is None:
        if capturing:  # not cached: the copy is part of the graph, and has not run yet
            return _pinned_for_graph(values()).to(device, non_blocking=True)
        table = _pinned(values()).to(device, non_blocking=True) if stream else values()
        entry = _tables[key] = _OnDevice(table, stream, stream and stream.record_event())
        if len(_tables) > 256:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    if capturing:  # the table is filled, because torch.cuda.graph synchronizes before the capture
        _graphs_read.append(entry.table)
    elif stream != entry.stream:
        stream.wait_event(entry.filled)
        entry.table.record_stream(stream)
    return entry.table


def _pinned(values: Tensor) -> Tensor:
    global _reserve
    if not _reserve.numel():
        _reserve = torch.empty(1 << 17, dtype=torch.int64, pin_memory=True)
    return values.pin_memory()


def _pinned_for_graph(values: Tensor) -> Tensor:
    global _reserve
    count = triton.cdiv(values.nbytes, 8)
    if count > _reserve.numel():
        pinned = values.pin_memory()  # allowed by newer versions of PyTorch
    else:
        room, _reserve = _reserve[:count], _reserve[count:]
        pinned = room.view(values.dtype)[: values.numel()].view(values.shape).copy_(values)
    _graphs_read.append(pinned)
    return pinned


# --- lists and operators ----------------------------------------------------------------------------------------------


class TensorList:
    """Tensors as kernels see them: those whose filters are not contiguous are copied, and `wrote` copies them back.

    Args:
        data: the tensors that define the filters.
        other, backup, drop, grow: lists of the same shapes and dtypes, read in the storage order of `data`; or none.
        other_dtype: of `other`, if it differs.
        fisher: float32, one entry per slice along dim 0; or none.
        index: `tensor` in the noise's counter.
        first_row: the noise's `filter` of each first filter; or none, for 0.
        changed: whether the operator changes `data`, which then must not share memory.
    """

    def __init__(
        self,
        data: Sequence[Tensor],
        other: Sequence[Tensor] = (),
        backup: Sequence[Tensor] = (),
        drop: Sequence[Tensor] = (),
        grow: Sequence[Tensor] = (),
        fisher: Sequence[Tensor] = (),
        index: Sequence[int] = (),
        first_row: Sequence[int] = (),
        changed: bool = False,
        other_dtype: torch.dtype | None = None,
    ) -> None:
        self.device = data[0].device
        if INTERPRETED and self.device.type != "cpu":
            raise RuntimeError("Triton's interpreter reads only the host's memory: unset TRITON_INTERPRET")
        self.shapes = _shapes(tuple(t.shape for t in data), tuple(t.dtype for t in data))
        self._copies: list[tuple[Tensor, Tensor, Tensor]] = []
        for ts, dtype in ((other, other_dtype), (backup, None), (drop, None), (grow, None)):
            if any(t.numel() != p.numel() or t.dtype != (dtype or p.dtype) for t, p in zip(ts, data)):
                raise ValueError("tensors of one parameter differ in shape or dtype: they must match")
        for i, (f, p) in enumerate(zip(fisher, data)):
            _check_array(f"fisher[{i}]", f, p.shape[0] if p.dim() else 1, self.device)
        contiguous = [p.is_contiguous() for p in data]
        addresses = tuple(
            tuple(
                (t if simple and t.is_contiguous() else self._lay_out(t, p)).data_ptr()
                for t, p, simple in zip(ts, data, contiguous)
            )
            for ts in (data, other, backup, drop, grow)
        )
        addresses += (tuple(f.data_ptr() for f in fisher),)
        key = (self.device, self.shapes, addresses, tuple(index), tuple(first_row), changed)
        self.table = _on_device(key, lambda: self._table(addresses, index, first_row, changed), self.device)

    def _lay_out(self, t: Tensor, like: Tensor) -> Tensor:
        """`t`, or a copy of it, with contiguous filters in the storage order of `like`."""
        view = t.permute(sorted(range(t.dim()), key=lambda d: (d > 0, -like.stride(d) if d else 0)))
        if view.is_contiguous():
            return t
        self._copies.append((t, view, view.contiguous()))
        return self._copies[-1][2]

    def _table(
        self, addresses: tuple[tuple[int, ...], ...], index: Sequence[int], first_row: Sequence[int], changed: bool
    ) -> Tensor:
        shapes, none = self.shapes, [0] * len(self.shapes.dtypes)
        if changed:
            sizes = [f * n * d.itemsize for f, n, d in zip(shapes.filters, shapes.lengths, shapes.dtypes)]
            spans = sorted((a, a + n, i) for i, (a, n) in enumerate(zip(addresses[0], sizes)) if n)
            for (_, end, i), (begin, _, j) in itertools.pairwise(spans):
                if end > begin:
                    raise ValueError(f"params[{i}] and params[{j}] share memory: pass it once")
        columns = [a or none for a in addresses]
        columns += [shapes.filters, shapes.lengths, shapes.first_filters[:-1]]
        columns += [index or none, first_row or none, shapes.one_dim]
        data, other, backup = columns[:3]
        at_16 = [(a | b | c) % 16 == 0 for a, b, c in zip(data, other, backup)]
        columns.append([a and n % 4 == 0 for a, n in zip(at_16, shapes.lengths)])
        columns.append([a and f * n % 4 == 0 for a, f, n in zip(at_16, shapes.filters, shapes.lengths)])
        columns += [shapes.first_words[:-1], shapes.first_ranks[:-1]]
        return torch.tensor(columns).T.contiguous()

    def run(self, kernel, kind: str, *args, by_dtype: bool = True, **constants) -> None:
        """Launches a kernel over the blocks of `kind`: once per dtype, or once, with dtype None."""
        cut = self.shapes.cut(kind)
        if not cut.launches:
            return
        blocks = _on_device((self.device, self.shapes, kind, "blocks"), lambda: cut.blocks, self.device)
        for dtype, first, count in cut.launches if by_dtype else [(None, 0, len(cut.blocks))]:
            constants["dtype"] = TYPES.get(dtype)
            kernel[(count,)](self.table, blocks, first, *args, **constants, **OPTIONS)

    def fold(self, kernel, kind: str, *args) -> None:
        """Launches a kernel over the filters that `kind` cuts into pieces, if there are any."""
        cut = self.shapes.cut(kind)
        if len(cut.folds):
            folds = _on_device((self.device, self.shapes, kind, "folds"), lambda: cut.folds, self.device)
            kernel[(len(folds),)](self.table, folds, *args, **FOLD_OPTIONS)

    def check_scales(self, scales: Tensor) -> None:
        """Raises unless there is room for one number per filter."""
        _check_array("scales", scales, self.shapes.first_filters[-1], self.device)

    def check_mask(self, mask: Tensor) -> None:
        """Raises unless it has the form of a mask over this list."""
        _check_array("mask", mask, self.shapes.mask_size, self.device, torch.int32)

    def wrote(self, *changed: Tensor) -> None:
        """Copies back what was changed in a copy, and moves version counters on."""
        ids = {id(t) for t in changed}
        for t, view, copy in self._copies:
            if id(t) in ids:
                view.copy_(copy)
        for t in changed:
            if not t.is_inference():
                torch.autograd.graph.increment_version(t)


def _check_array(name: str, t: Tensor, size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    if (t.dtype, t.numel(), t.device) != (dtype, size, device) or not t.is_contiguous():
        raise ValueError(f"{name} must be a contiguous {dtype} tensor of {size} entries on {device}")


OPERATORS: dict[str, Callable] = {}  # by the names of their schemas


def operator(function: Callable) -> Callable:
    """Registers an operator, to run on the device of its first argument and unseen by autograd."""

    @functools.wraps(function)
    def run(first, *args):
        with torch.no_grad(), torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return function(first, *args)

    OPERATORS[function.__name__] = run
    return run
