"""Chooses sparse SAM's masks: by the largest scores, at random, or by updating the last one; on one process or many."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flatops import distributed, ops
from flatops.distributed import all_local, local, real_shape
from flatops.optim import masks
from flatops.optim.masks import Mask
from flatops.scalars import check_integer, check_range, on
from flatops.schemas import mask_size

Masks = dict[torch.device, Mask]
CHOICES = {
    "mask": ("fisher", "dynamic"),
    "fisher": ("samples", "minibatch"),
    "drop": ("gradient", "weight", "random"),
    "grow": ("gradient", "weight", "random"),
}


def check_options(group: dict[str, Any]) -> None:
    """Raises for options of SSAM that are out of range or cannot be combined."""
    check_range("sparsity", group["sparsity"], high=1.0)
    if group["sparsity"] == 1:
        raise ValueError("sparsity must be less than 1: no weight would ascend")
    n_of_m = masks.n_of_m(group["pattern"])
    if n_of_m and group["sparsity"] != 1 - n_of_m[0] / n_of_m[1]:
        raise ValueError(f"sparsity is fixed by pattern {group['pattern']!r}: do not change it")
    check_range("drop_rate", group["drop_rate"], high=1.0)
    for name, known in CHOICES.items():
        if group[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {group[name]!r}")
    for name in ("total_updates", "update_every", "seed"):
        check_integer(name, group[name])
    if not isinstance(group["skip_masked"], bool):
        raise ValueError(f"skip_masked must be True or False, not {group['skip_masked']!r}")
    if group["skip_masked"] and (group["fisher"] == "minibatch" or group["grow"] == "gradient"):
        raise ValueError(
            "skip_masked computes no gradients to choose a mask by: use it without fisher='minibatch', grow='gradient'"
        )
    if group["mask"] == "dynamic":
        if group["pattern"] not in ("global", "layer"):
            raise ValueError(
                f"pattern {group['pattern']!r} is for mask='fisher': dynamic masks are 'global' or 'layer'"
            )
        if group["fisher"] != "samples":
            raise ValueError(f"fisher={group['fisher']!r} is for mask='fisher'")
    elif group["update_every"] and group["fisher"] == "samples":
        raise ValueError("update_every needs mask='dynamic' or fisher='minibatch': samples are given to update_mask()")


class Masker:
    """Chooses masks over the trainable parameters of all devices and processes together.

    Args:
        parts: device -> parameters and their positions.
        options: a group of SSAM's `param_groups`.
    """

    def __init__(self, parts: dict[torch.device, tuple[list[Tensor], list[int]]], options: dict[str, Any]) -> None:
        self.parts, self.options = parts, options
        self.params = [p for params, _ in parts.values() for p in params]
        self.index = [i for _, index in parts.values() for i in index]
        self.sharded = any(distributed.by_group(params).keys() != {None} for params, _ in parts.values())

    # --- the three ways -----------------------------------------------------------------------------------------------

    def largest(self, scores: dict[Tensor, Tensor]) -> Masks:
        """The masks of the largest scores."""
        pattern, sparsity = self.options["pattern"], self.options["sparsity"]
        if self.sharded:
            gathered = self._gathered(scores)
            return self._from_first(lambda: masks.choose(gathered, pattern, sparsity))
        together = [on(self.params[0].device, scores[p]) for p in self.params]
        bits = masks.choose(together, pattern, sparsity)
        if len(self.parts) == 1:
            return {self.params[0].device: Mask(self.params, bits)}
        return self.of(dict(zip(self.params, ops.unpack_mask(bits, together))))

    def random(self) -> Masks:
        """Random masks: those of the largest |normals|."""
        seed, draw = self.options["seed"], self.options["updates"]
        scores = {}
        for p, i in zip(self.params, self.index):
            z = ops.normal(real_shape(p), seed=seed, draw=draw, tensor=i, device=p.device)
            scores[p] = torch.empty_like(local(p), dtype=torch.float32).copy_(distributed.shard_of(p, z.abs_()))
        return self.largest(scores)

    def moved(self, current: Masks) -> Masks:
        """The masks after the next update: some selected weights are dropped, as many others grown."""
        t, total = self.options["updates"], self.options["total_updates"]
        rate = self.options["drop_rate"] * ((1 + math.cos(math.pi * min(t, total) / total)) / 2 if total else 1)
        drop, grow = self.options["drop"], self.options["grow"]
        if self.sharded:  # gathered, and moved on rank 0
            live = self._gathered({p: l for mask in current.values() for p, l in mask.live().items()})
            by = [s and self._gathered(dict(zip(self.params, s))) for s in self._scores(drop, grow, self.params)]
            like = by[0] or by[1] or [torch.empty(l.shape, device="cpu") for l in live]
            return self._from_first(lambda: self._move(ops.pack_mask(live), like, self.index, by, rate))
        new = {}
        with distributed.together():
            for device, (params, index) in self.parts.items():
                by = self._scores(drop, grow, params)
                new[device] = Mask(params, self._move(current[device].bits, all_local(params), index, by, rate))
        return new

    def fits(self, current: Masks) -> bool:
        """Whether these are masks of exactly these parameters."""
        return self.parts.keys() == current.keys() and all(
            current[device].is_over(params) for device, (params, _) in self.parts.items()
        )

    # --- their parts --------------------------------------------------------------------------------------------------

    @staticmethod
    def _scores(drop: str, grow: str, params: list[Tensor]) -> list[Any]:
        """The scores for dropping and for growing; None: random."""

        def by(kind: str) -> list[Tensor] | None:
            if kind == "random":
                return None
            if kind == "weight":
                return all_local(params)
            return [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in params]

        return [by(drop), by(grow)]

    def _move(self, bits: Tensor, like: list[Tensor], index: list[int], scores: list[Any], rate: float) -> Tensor:
        """The mask over `like` after dropping and growing a share of its ones, by these scores."""
        drop, grow = scores

        def move(mask: Tensor, which: slice) -> Tensor:
            ops.regrow_mask_(
                mask,
                like[which],
                round(rate * ops.count_mask(mask, like[which])),
                drop=drop and drop[which],
                grow=grow and grow[which],
                seed=self.options["seed"],
                draw=self.options["updates"],
                index=index[which],
            )
            return mask

        if self.options["pattern"] == "global":
            return move(bits.clone(), slice(None))
        each = [move(mask, slice(i, i + 1)) for i, mask in enumerate(masks.split(bits, like))]
        return masks.join(each, like)

    def _gathered(self, mine: dict[Tensor, Tensor]) -> list[Tensor]:
        """The whole of each sharded tensor, in host memory on rank 0; an empty list on other ranks. Collective."""
        gathered = []
        for p in self.params:
            t = distributed.whole(p, mine[p])
            gathered += [t.cpu()] if distributed.world()[0] == 0 else []
        return gathered

    def _from_first(self, make: Callable[[], Tensor]) -> Masks:
        """The masks of this process's shards, from a mask over whole parameters that rank 0 makes. Collective."""
        like = [torch.empty(real_shape(p), dtype=torch.bool, device="cpu") for p in self.params]
        bits = distributed.from_first(make, (mask_size(like),), torch.int32, self.params[0].device).cpu()
        return self.of({p: distributed.shard_of(p, l) for p, l in zip(self.params, ops.unpack_mask(bits, like))})

    def of(self, live: dict[Tensor, Tensor]) -> Masks:
        """The masks of these booleans, by parameter; of a parameter not among them no weight is selected."""

        def bits(p: Tensor) -> Tensor:
            if p not in live:
                return torch.zeros_like(local(p), dtype=torch.bool, requires_grad=False)
            mine = on(p.device, live[p])
            return mine.contiguous() if distributed.is_distributed(p) else mine

        return {d: Mask(params, ops.pack_mask([bits(p) for p in params])) for d, (params, _) in self.parts.items()}
