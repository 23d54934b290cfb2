"""Perturbs and restores weights on any devices, whole or sharded; the global norm of SAM's ascent."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatops import checks, distributed, ops
from flatops.distributed import all_local
from flatops.restore import Changes, forget_copies
from flatops.scalars import on

DTYPES = (*checks.DTYPES, torch.complex64, torch.complex128)  # complex weights are changed as pairs of real ones


class Weights:
    """Changes weights in place and restores them."""

    def __init__(self) -> None:
        self.changes = Changes()
        self.backups: dict[int, Tensor] = {}  # by the weight's position
        self.modules: list[Any] | None = None  # those under fully_shard; None: not looked for yet
        self.offloaded = False  # whether FSDP keeps shards in the host's memory

    def claim(self, params: list[Tensor]) -> None:
        """Keeps other threads from changing these weights until `restore`; RuntimeError if one has claimed them."""
        self.changes.claim(params)
        if self.modules is None:
            self.modules = distributed.sharded_modules() if distributed.any_distributed(params) else []
            self.offloaded = distributed.is_offloaded(params)

    def forget_copies(self) -> None:
        """Before and after a change: drops stale copies of the weights, and waits for copies under way."""
        if self.offloaded:
            torch.accelerator.synchronize()
        forget_copies(self.modules or [])

    def restore(self) -> None:
        """Restores all weights: every bit, unless the noise was drawn again."""
        self.changes.undo()
        self.forget_copies()

    def backup(self, params: list[Tensor], index: list[int], offload: bool = False) -> list[Tensor]:
        """An uninitialised backup for each; made once per position, so addresses stay and a step allocates nothing."""
        mine = all_local(params)
        device = torch.device("cpu") if offload else mine[0].device
        with torch.inference_mode(False):  # an inference tensor has no version
            for i, w in zip(index, mine):
                b = self.backups.get(i)
                if b is None or (b.shape, b.dtype, b.device, b.stride()) != (w.shape, w.dtype, device, w.stride()):
                    pinned = offload and w.is_cuda
                    self.backups[i] = torch.empty_like(w, device=device, pin_memory=pinned, requires_grad=False)
        return [self.backups[i] for i in index]

    def keep(self, params: list[Tensor], index: list[int], offload: bool = False) -> None:
        """Copies the weights to their backups, so that anything may write to them until `restore`."""
        mine, backup = all_local(params), self.backup(params, index, offload)
        self.changes.announce(mine, backup[-1], **{"offloaded" if offload else "backup": backup})
        torch._foreach_copy_(backup, mine, non_blocking=offload)

    def ascend(self, params: list[Tensor], along: list[Tensor], rho: float | Tensor, **how: Any) -> None:
        """`ops.ascend_`; `how` holds its backup, mask, norm and adaptive."""
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
            fisher: returns a parameter's F (ARWP); required with eta > 0.
            **noise: seed, draw and stream.
        """
        for split_filters, part, places in _by_kind(params, index):
            mine, drawn = all_local(part), {**noise, "index": places}
            if eta > 0:
                assert fisher is not None
                of = all_local(map(fisher, part))
                drawn |= {"eta": eta, "fisher": distributed.gather(part, of) if split_filters else of}
            if split_filters:  # gathered, because a filter's norm and noise need all of it; biases are small
                whole = distributed.gather(part, mine)
                ops.perturb_(whole, sigma, **drawn)
                self.keep(part, places, offload=restore == "offload")
                torch._foreach_copy_(mine, [distributed.shard_of(p, w) for p, w in zip(part, whole)])
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


def _by_kind(params: list[Tensor], index: list[int]) -> list[tuple[bool, list[Tensor], list[int]]]:
    """(whether their filters are split over processes, parameters, their positions), for one operator call each."""
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
    """The norm for `ops.ascend_` over all devices and shards: float64, on the first list's device.

    Args:
        lists: (parameters, directions, whether directions are multiplied by weights, as in ASAM); one device each.
    """
    norms: dict[Any, list[Tensor]] = {}  # by the process group that holds the other shards
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
    """The tensors on each device and their positions, counted from `position`."""
    parts: dict[torch.device, tuple[list[Tensor], list[int]]] = {}
    for i, p in enumerate(params, position):
        part = parts.setdefault(p.device, ([], []))
        part[0].append(p)
        part[1].append(i)
    return parts


class Changed(abc.ABC):
    """The owner of a `Pass` over weights without an optimizer.

    Args:
        weights: as for `check_weights`.
    """

    def __init__(self, weights: nn.Module | Iterable[Tensor]) -> None:
        self.params, self.weights = list(check_weights(weights).values()), Weights()

    @abc.abstractmethod
    def _change(self) -> None:
        """Changes the weights, by way of `self.weights`."""

    @property
    def in_pass(self) -> bool:
        return bool(self.weights.changes.made)

    def _begin(self) -> bool:
        self.weights.claim(self.params)
        self.weights.forget_copies()
        with torch.no_grad():
            self._change()
        return True

    def restore(self) -> None:
        self.weights.restore()

    def _end(self, well: bool) -> None:
        """Nothing is left to do."""


class Kept(Changed):
    """Weights that the body of a `Pass` may write anything to: they are restored from a backup."""

    def _change(self) -> None:
        for params, index in by_device(self.params).values():
            self.weights.keep(params, index)

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """During the pass, every weight and its backup in order, complex ones as pairs of real ones."""
        return [(w, self.weights.backups[i]) for i, w in enumerate(all_local(self.params))]


def check_weights(weights: nn.Module | Tensor | Iterable[Tensor]) -> Mapping[str, Tensor]:
    """A module's parameters, or tensors, by name.

    Raises:
        ValueError, TypeError: if there is none, or one that cannot be changed in place and restored.
    """
    if isinstance(weights, nn.Module):
        if distributed.is_sharded_module(weights):  # a forward may have left gathered copies in place of the shards
            distributed.reshard(distributed.sharded_modules())
        named: dict[str, Tensor] = {**dict(weights.named_parameters())}
    else:
        weights = [weights] if isinstance(weights, Tensor) else list(weights)
        named = {f"weights[{i}]": w for i, w in enumerate(weights)}
    if not named:
        raise ValueError("weights holds no tensor: pass a module with parameters, or tensors")
    for name, w in named.items():
        if not isinstance(w, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(w).__name__}")
        if w.dtype not in DTYPES:
            raise TypeError(
                f"{name} is {w.dtype}: expected float32, bfloat16, float16, float64 or complex numbers; leave "
                "quantised weights out"
            )
        # bitsandbytes packs quantised weights in tensors of any dtype, torchao wraps them in a subclass.
        if hasattr(w, "quant_state") or (hasattr(w, "__tensor_flatten__") and not distributed.is_distributed(w)):
            raise TypeError(f"{name} is quantised or wrapped ({type(w).__name__}): leave it out")
        if w.is_meta:
            raise ValueError(f"{name} is on the meta device, offloaded or not loaded yet: load it first")
        if w.is_inference():
            raise ValueError(f"{name} was made under torch.inference_mode() and cannot be changed: clone it outside")
        distributed.check_layout(w, name)
    return named


def check_regenerate(params: Iterable[Tensor]) -> None:
    """Raises TypeError for dtypes that drawing the noise again cannot restore."""
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in params):
        raise TypeError("restore='regenerate' loses the low bits of bfloat16 and float16 weights: use 'exact'")
