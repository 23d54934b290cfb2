"""Masks of sparse SAM: what a pattern selects, parts of a mask, and its form in a checkpoint."""

from __future__ import annotations

import base64
import ctypes
import math
import re
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatops import ops, reference
from flatops.distributed import all_local, local, real_shape, shard_of

# --- patterns ---------------------------------------------------------------------------------------------------------


def n_of_m(pattern: str) -> Any:
    """(n, m) of a pattern such as '2:4'; None for a named pattern; ValueError for anything else, or n > m."""
    if pattern in ("global", "layer", "filter"):
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if not match:
        raise ValueError(f"pattern must be 'global', 'layer', 'filter' or 'n:m' such as '2:4', not {pattern!r}")
    n, m = int(match[1]), int(match[2])
    if not 1 <= n <= m:
        raise ValueError(f"pattern {pattern!r} would select {n} of every {m}: n must lie in [1, m]")
    return n, m


def keep(count: int, sparsity: float) -> int:
    """How many of `count` a mask selects."""
    return count - math.ceil(sparsity * count)


def choose(scores: list[Tensor], pattern: str, sparsity: float) -> Tensor:
    """The mask of the largest scores by a pattern (see `SSAM`); ValueError for a NaN or a negative score."""
    if pattern == "global":
        return ops.topk_mask(scores, keep(sum(t.numel() for t in scores), sparsity))
    if pattern == "layer":
        return join([ops.topk_mask([t], keep(t.numel(), sparsity)) for t in scores], scores)
    rows = [reference.rows(t) for t in scores]
    if pattern == "filter":
        means = torch.cat([r.double().mean(1) for r in rows])
        kept = ops.topk_mask([means], keep(len(means), sparsity))
        live = ops.unpack_mask(kept, [means])[0].split([len(r) for r in rows])
        return reference.pack([l[:, None].expand(r.shape).reshape(-1) for l, r in zip(live, rows)])
    ops.topk_mask(scores, 0)  # raises for a NaN or a negative score
    return reference.pack([_n_of_m(r, *n_of_m(pattern)).reshape(-1) for r in rows])


def _n_of_m(rows: Tensor, n: int, m: int) -> Tensor:
    whole = rows.shape[1] // m * m
    groups, rest = rows[:, :whole].unflatten(1, (-1, m)), rows[:, whole:]
    return torch.cat([_largest(groups, n).flatten(1), _largest(rest, -(-rest.shape[1] * n // m))], 1)


def _largest(x: Tensor, count: int) -> Tensor:
    """Which are the `count` largest along the last dimension, ties to the first."""
    order = x.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order, True)


# --- masks and their parts --------------------------------------------------------------------------------------------


def split(mask: Tensor, params: list[Tensor]) -> list[Tensor]:
    """A mask of each tensor of a list."""
    return [ops.pack_mask([live]) for live in ops.unpack_mask(mask, params)]


def join(masks: list[Tensor], params: list[Tensor]) -> Tensor:
    """The mask of a list from those of its tensors: the inverse of `split`."""
    return ops.pack_mask([ops.unpack_mask(mask, [p])[0] for mask, p in zip(masks, params)])


@dataclass
class Part:
    """What one ascent needs: parameters, a mask of just these, and a backup."""

    params: list[Tensor]
    mask: Tensor
    backup: list[Tensor]
    version: int  # of the whole mask's bits


class Mask:
    """A mask over all parameters (or shards of them) on a device, and its parts for lists without some of them."""

    def __init__(self, params: list[Tensor], bits: Tensor) -> None:
        self.params, self.bits = params, bits
        self.place = {p: i for i, p in enumerate(params)}
        self.parts: dict[tuple[Any, ...], Part] = {}
        self._unselected: tuple[int, list[Tensor]] = (-1, [])  # a version of the bits, and the result for it

    def __reduce__(self) -> tuple[Any, ...]:
        return Mask, (self.params, self.bits)

    def is_over(self, params: list[Tensor]) -> bool:
        """Whether it is a mask of exactly this list."""
        return len(params) == len(self.params) and all(a is b for a, b in zip(params, self.params))

    def part(self, params: list[Tensor]) -> Part:
        """The part for a list; made, by unpacking the mask, for a new list and after every change of the mask."""
        chosen = [self.place[p] for p in params if p in self.place]
        key = (params[0].dtype, *chosen)
        part = self.parts.get(key)
        if part is None or part.version != self.bits._version:
            present, mask = [self.params[i] for i in chosen], self.bits
            if 0 < len(chosen) < len(self.params):
                live = self.live()
                mask = ops.pack_mask([live[p] for p in present])
            backup, mine = part.backup if part else [], all_local(present)
            if present and not (backup and len(backup[0]) == ops.count_mask(mask, mine)):
                with torch.inference_mode(False):  # an inference tensor has no version
                    backup = ops.new_backup(mine, mask)
            if len(self.parts) > 8:  # lists that change from step to step
                self.parts.clear()
            part = self.parts[key] = Part(present, mask, backup, self.bits._version)
        return part

    def live(self) -> dict[Tensor, Tensor]:
        """The mask of every parameter as booleans."""
        return dict(zip(self.params, ops.unpack_mask(self.bits, all_local(self.params))))

    def unselected(self) -> list[Tensor]:
        """The parameters without a selected weight; one host sync per change of the mask."""
        if self._unselected[0] != self.bits._version:
            selected = torch.stack([live.any() for live in self.live().values()]).tolist()
            self._unselected = self.bits._version, [p for p, some in zip(self.params, selected) if not some]
        return self._unselected[1]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def encode(live: list[Tensor]) -> str:
    """Booleans as text: a checksum of their shapes, then one bit each, whatever their memory layout."""
    if not live:
        return ""
    words = ops.pack_mask([l.cpu().contiguous() for l in live])
    raw = ctypes.string_at(words.data_ptr(), 4 * words.numel())
    return f"{_shapes(live):08x}" + base64.b64encode(raw).decode()


def decode(text: str, params: list[Tensor]) -> list[Tensor]:
    """The inverse of `encode`, in the memory layout of `params` (for sharded ones, this process's rows).

    Raises:
        ValueError: for a mask of other parameters.
    """
    raw = bytearray(base64.b64decode(text[8:]))
    like = [torch.empty(real_shape(p), dtype=torch.bool, device="cpu") for p in params]
    if not params or int(text[:8], 16) != _shapes(like):
        raise ValueError("the mask in the checkpoint is for parameters of other shapes: nothing is loaded")
    live = ops.unpack_mask(torch.frombuffer(raw, dtype=torch.int32), like)
    mine = [shard_of(p, l) for p, l in zip(params, live)]
    return [torch.empty_like(local(p), dtype=torch.bool, requires_grad=False).copy_(l) for p, l in zip(params, mine)]


def _shapes(tensors: list[Tensor]) -> int:
    return zlib.crc32(repr([tuple(t.shape) for t in tensors]).encode())
