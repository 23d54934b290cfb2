"""Noise in the weights, whole or sharded, and the way back: what RWP and `flatops.perturb` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from flatops import distributed, ops
from flatops.distributed import all_local
from flatops.optim.flat import Undo, announce

Sigma = float | Tensor
Room = Callable[[list[Tensor]], list[Tensor]]


def add_noise(
    params: list[Tensor],
    index: list[int],
    sigma: Sigma,
    undo: list[Undo],
    *,
    restore: str,
    room: Room,
    eta: float = 0.0,
    fisher: Callable[[Tensor], Tensor] | None = None,
    **noise: Any,
) -> None:
    """Adds the noise of `ops.perturb_` in place.

    Args:
        params: on one device.
        index: their positions, which the noise depends on.
        sigma, eta: as for `ops.perturb_`.
        undo: told of every change before it is made.
        restore: 'exact', 'offload' or 'regenerate', as in `flatops.perturb`.
        room: makes the backup of a list of parameters.
        fisher: gives ARWP's F of a parameter; needed with eta > 0.
        **noise: seed, draw and stream.
    """
    for sharded, part, places in _by_kind(params, index):
        mine, drawn = all_local(part), {**noise, "index": places}
        if eta > 0:
            assert fisher is not None  # as said above
            of = all_local(map(fisher, part))
            drawn |= {"eta": eta, "fisher": distributed.gather(part, of) if sharded else of}
        (_add_gathered if sharded else _add)(part, mine, sigma, undo, restore, room, drawn)


def _add(
    params: list[Tensor], mine: list[Tensor], sigma: Sigma, undo: list[Undo], restore: str, room: Room, noise: dict[str, Any]
) -> None:
    if distributed.any_distributed(params):
        noise["first_row"] = [distributed.layout(p).first_row for p in params]
    if restore == "regenerate":
        with torch.inference_mode(False):  # an inference tensor has no version
            scales = ops.new_scales(mine)
        announce(undo, mine, scales, scales=scales, **noise)
        ops.perturb_(mine, sigma, scales=scales, **noise)
        return
    backup = room(params)
    if restore == "exact":
        announce(undo, mine, backup[-1], backup=backup)
        ops.perturb_(mine, sigma, backup=backup, **noise)
    else:
        announce(undo, mine, backup[-1], offloaded=backup)
        torch._foreach_copy_(backup, mine, non_blocking=True)
        ops.perturb_(mine, sigma, **noise)


def _add_gathered(
    params: list[Tensor], mine: list[Tensor], sigma: Sigma, undo: list[Undo], restore: str, room: Room, noise: dict[str, Any]
) -> None:
    """One filter each, whose norm and noise need all of it: biases and scales, small enough to be gathered whole."""
    backup, whole = room(params), distributed.gather(params, mine)
    ops.perturb_(whole, sigma, **noise)
    announce(undo, mine, backup[-1], **{"offloaded" if restore == "offload" else "backup": backup})
    torch._foreach_copy_(backup, mine)
    torch._foreach_copy_(mine, [distributed.shard_of(p, w) for p, w in zip(params, whole)])


def _by_kind(params: list[Tensor], index: list[int]) -> list[tuple[bool, list[Tensor], list[int]]]:
    """(one sharded filter each?, parameters, their positions): of one call each."""
    if not distributed.any_distributed(params):
        return [(False, params, index)]
    kinds: dict[Any, tuple[list[Tensor], list[int]]] = {}
    for p, i in zip(params, index):
        group = distributed.layout(p).group if p.dim() < 2 else None
        part = kinds.setdefault((group, p.dtype if group else None), ([], []))
        part[0].append(p)
        part[1].append(i)
    return [(group is not None, *part) for (group, _), part in kinds.items()]


def check_regenerate(params: Iterable[Tensor]) -> None:
    """Raises where drawing the noise again would not bring the weights back."""
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in params):
        raise TypeError(
            "restore='regenerate' would lose the low bits of bfloat16 and float16 weights: use 'exact'"
        )
