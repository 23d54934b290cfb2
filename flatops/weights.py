"""Weights on any devices, whole or sharded: their backups, the noise and the ascent that change them, and the norm to climb by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatops import distributed, ops
from flatops.distributed import all_local
from flatops.restore import Changes, forget_copies
from flatops.scalars import on

DTYPES = (*ops.DTYPES, torch.complex64, torch.complex128)  # complex weights are changed as pairs of real ones


class Weights:
    """What changes weights in place, and what it takes to restore them."""

    def __init__(self) -> None:
        self.changes = Changes()
        self.backups: dict[int, Tensor] = {}  # by the weight's position
        self.modules: list[Any] | None = None  # under fully_shard; None until they have been looked for
        self.offloaded = False  # whether shards rest in the host's memory

    def claim(self, params: list[Tensor]) -> None:
        """Keeps other threads from these weights until `restore`; RuntimeError if one has them."""
        self.changes.claim(params)
        if self.modules is None:
            self.modules = distributed.sharded_modules() if distributed.any_distributed(params) else []
            self.offloaded = distributed.is_offloaded(params)

    def forget_copies(self) -> None:
        """Before and after a change: no forward will use a copy of other weights, and no copy is being made."""
        if self.offloaded:
            torch.accelerator.synchronize()
        forget_copies(self.modules or [])

    def restore(self) -> None:
        """Gives all weights back to the bit."""
        self.changes.undo()
        self.forget_copies()

    def backup(self, params: list[Tensor], index: list[int], offload: bool = False) -> list[Tensor]:
        """Room for a copy of each, made once a position: addresses never change, and a step allocates nothing."""
        mine = all_local(params)
        device = torch.device("cpu") if offload else mine[0].device
        with torch.inference_mode(False):  # an inference tensor has no version
            for i, w in zip(index, mine):
                b = self.backups.get(i)
                if (
                    b is None
                    or b.shape != w.shape
                    or b.dtype != w.dtype
                    or b.device != device
                    or b.stride() != w.stride()
                ):
                    pinned = offload and w.is_cuda
                    self.backups[i] = torch.empty_like(w, device=device, pin_memory=pinned, requires_grad=False)
        return [self.backups[i] for i in index]

    def keep(self, params: list[Tensor], index: list[int], offload: bool = False) -> list[Tensor]:
        """Copies the weights, so that anything may write to them until `restore`; returns the copies."""
        mine, backup = all_local(params), self.backup(params, index, offload)
        self.changes.announce(mine, backup[-1], **{"offloaded" if offload else "backup": backup})
        torch._foreach_copy_(backup, mine, non_blocking=offload)
        return backup

    def climb(self, params: list[Tensor], along: list[Tensor], rho: float | Tensor, **how: Any) -> None:
        """`ops.ascend_`, of which `how` holds backup, mask, norm and adaptive."""
        mine = all_local(params)
        self.changes.announce(mine, how["backup"][-1], backup=how["backup"], mask=how.get("mask"))
        ops.ascend_(mine, along, rho, **how)

    def add_noise(
        self,
        params: list[Tensor],
        index: list[int],
        sigma: float | Tensor,
        *,
        restore: str,
        eta: float = 0.0,
        fisher: Callable[[Tensor], Tensor] | None = None,
        **noise: Any,
    ) -> None:
        """Adds the noise of `ops.perturb_`.

        Args:
            params: on one device.
            index: their positions, which the noise depends on.
            sigma, eta: as for `ops.perturb_`.
            restore: 'exact', 'offload' or 'regenerate', as in `flatops.perturb`.
            fisher: gives ARWP's F of a parameter; needed with eta > 0.
            **noise: seed, draw and stream.
        """
        for one_filter_each, part, places in _by_kind(params, index):
            mine, drawn = all_local(part), {**noise, "index": places}
            if eta > 0:
                assert fisher is not None  # as said above
                of = all_local(map(fisher, part))
                drawn |= {"eta": eta, "fisher": distributed.gather(part, of) if one_filter_each else of}
            if one_filter_each:
                self._add_gathered(part, places, mine, sigma, restore, drawn)
                continue
            if distributed.any_distributed(part):
                drawn["first_row"] = [distributed.layout(p).first_row for p in part]
            if restore == "regenerate":
                with torch.inference_mode(False):  # an inference tensor has no version
                    scales = ops.new_scales(mine)
                self.changes.announce(mine, scales, scales=scales, **drawn)
                ops.perturb_(mine, sigma, scales=scales, **drawn)
            elif restore == "exact":
                backup = self.backup(part, places)
                self.changes.announce(mine, backup[-1], backup=backup)
                ops.perturb_(mine, sigma, backup=backup, **drawn)
            else:
                self.keep(part, places, offload=True)
                ops.perturb_(mine, sigma, **drawn)

    def _add_gathered(
        self,
        params: list[Tensor],
        index: list[int],
        mine: list[Tensor],
        sigma: float | Tensor,
        restore: str,
        noise: Any,
    ) -> None:
        """One filter each, whose norm and noise need all of it: biases and scales, small enough to be gathered whole."""
        whole = distributed.gather(params, mine)
        ops.perturb_(whole, sigma, **noise)
        self.keep(params, index, offload=restore == "offload")
        torch._foreach_copy_(mine, [distributed.shard_of(p, w) for p, w in zip(params, whole)])


def _by_kind(params: list[Tensor], index: list[int]) -> list[tuple[bool, list[Tensor], list[int]]]:
    """(sharded and one filter each?, parameters, their positions): of one operator call each."""
    if not distributed.any_distributed(params):
        return [(False, params, index)]
    kinds: dict[Any, tuple[list[Tensor], list[int]]] = {}
    for p, i in zip(params, index):
        group = distributed.layout(p).group if p.dim() < 2 else None
        part = kinds.setdefault((group, p.dtype if group else None), ([], []))
        part[0].append(p)
        part[1].append(i)
    return [(group is not None, *part) for (group, _), part in kinds.items()]


def norm(lists: Iterable[tuple[list[Tensor], list[Tensor], bool]]) -> Tensor:
    """The norm that `ops.ascend_` divides by, over all devices and shards: float64, on the first list's device.

    Args:
        lists: (parameters, directions, whether the direction is multiplied by the weight, as ASAM's is); one device each.
    """
    norms: dict[Any, list[Tensor]] = {}  # by the process group whose members have the rest of it
    for params, directions, adaptive in lists:
        for group, places in distributed.by_group(params).items():
            weights = all_local(params[i] for i in places) if adaptive else None
            norms.setdefault(group, []).append(ops.grad_norm([directions[i] for i in places], weights))
    if list(norms) == [None] and len(norms[None]) == 1:
        return norms[None][0]
    device = next(iter(norms.values()))[0].device
    squares = []
    for group, of in norms.items():
        square = torch.stack([on(device, n) for n in of]).square().sum()
        if group is not None:
            torch.distributed.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def by_device(params: Iterable[Tensor], position: int = 0) -> dict[torch.device, tuple[list[Tensor], list[int]]]:
    """The tensors on each device, and their positions, counted from `position`."""
    parts: dict[torch.device, tuple[list[Tensor], list[int]]] = {}
    for i, p in enumerate(params, position):
        part = parts.setdefault(p.device, ([], []))
        part[0].append(p)
        part[1].append(i)
    return parts


class Kept:
    """Weights that the body of a `Pass` may write to at will: they come back from copies.

    Args:
        weights: as for `check_weights`.

    `pairs`, within the pass, holds every weight and its copy in their order, complex ones as pairs of real ones.
    """

    def __init__(self, weights: nn.Module | Iterable[Tensor]) -> None:
        self.params, self.weights = list(check_weights(weights).values()), Weights()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    @property
    def in_pass(self) -> bool:
        return bool(self.pairs)

    def _begin(self) -> bool:
        self.weights.claim(self.params)
        self.weights.forget_copies()
        with torch.no_grad():
            copies: dict[int, Tensor] = {}
            for params, index in by_device(self.params).values():
                copies.update(zip(index, self.weights.keep(params, index)))
        self.pairs = [(w, copies[i]) for i, w in enumerate(all_local(self.params))]
        return True

    def restore(self) -> None:
        self.weights.restore()

    def _end(self, well: bool) -> None:
        self.pairs = []


def check_weights(weights: nn.Module | Tensor | Iterable[Tensor]) -> Mapping[str, Tensor]:
    """A module's parameters, or tensors, by name.

    Raises:
        ValueError, TypeError: where there is none, or one that cannot be changed in place and come back.
    """
    if isinstance(weights, nn.Module):
        if distributed.is_sharded_module(weights):  # gathered weights, which a forward may leave behind, are copies
            distributed.reshard(distributed.sharded_modules())
        named: dict[str, Tensor] = {**dict(weights.named_parameters())}
    else:
        weights = [weights] if isinstance(weights, Tensor) else list(weights)
        named = {f"weights[{i}]": w for i, w in enumerate(weights)}
    if not named:
        raise ValueError("weights holds no tensor: there is nothing to perturb")
    for name, w in named.items():
        if not isinstance(w, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(w).__name__}")
        if w.dtype not in DTYPES:
            raise TypeError(
                f"{name} is {w.dtype}: expected float32, bfloat16, float16, float64 or complex numbers; leave quantised "
                "weights out"
            )
        # bitsandbytes packs its codes in tensors of any dtype, torchao wraps them.
        if hasattr(w, "quant_state") or (hasattr(w, "__tensor_flatten__") and not distributed.is_distributed(w)):
            raise TypeError(f"{name} is quantised or wrapped ({type(w).__name__}): leave it out")
        if w.is_meta:
            raise ValueError(f"{name} is on the meta device, offloaded or not loaded yet: there is nothing to perturb")
        if w.is_inference():
            raise ValueError(f"{name} was made under torch.inference_mode(), which allows no change: clone it outside")
        distributed.check_layout(w, name)
    return named


def check_regenerate(params: Iterable[Tensor]) -> None:
    """Raises where drawing the noise again would not bring the weights back."""
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in params):
        raise TypeError("restore='regenerate' would lose the low bits of bfloat16 and float16 weights: use 'exact'")
