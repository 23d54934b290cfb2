"""Noise in the weights of any model, without an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flatops import distributed, ops
from flatops.backend import outside_graphs
from flatops.optim.flat import (
    DTYPES,
    Pass,
    Undo,
    claim,
    forget_copies,
    on,
    perturbed_pass,
    plain,
    release,
    take_back,
    while_perturbed,
)
from flatops.optim.noise import add_noise, check_regenerate

RESTORE = ("exact", "offload", "regenerate")


@outside_graphs
def perturb(
    weights: nn.Module | Tensor | Iterable[Tensor],
    sigma: float | Tensor = 0.01,
    *,
    seed: int | Tensor = 0,
    draw: int | Tensor = 0,
    stream: int = 0,
    position: int = 0,
    restore: str = "exact",
) -> Pass:
    """Adds RWP's noise to weights in place for what runs within; they come back bit for bit, whatever happens.

    w_f <- w_f + eps_f, eps_f ~ N(0, (sigma ||w_f||_2)^2 I) for every filter f (a slice along dim 0): the bits that `flatops.RWP`
    over the same list has at the same seed, draw and stream. For evaluation under weight noise, ensembles, robustness tests,
    and training what is not perturbed, such as adapters on a frozen base.

    Args:
        weights: a module, for all of its parameters, frozen ones too; or tensors, such as some of its parameters. Complex ones
            are pairs of real ones.
        sigma: noise as a share of the filter's norm, >= 0; default 0.01. A number, or a tensor of one on the weights' device.
        seed, draw, stream: which noise: another draw, other noise. Default 0, on every process; across replicas that are to
            differ, let `stream` be the rank.
        position: of the first of the weights, the others count on from there; default 0. Noise is drawn by position: two calls
            at one position and draw give weights of equal shapes the same noise, so a loop over layers numbers them.
        restore: where the weights are meanwhile.
            'exact' (default): in a copy on their device.
            'offload': in a copy in the host's memory, pinned for a GPU's, where the device has no room: 2 bytes per bfloat16
                weight, moved there and back.
            'regenerate': nowhere, the noise is drawn again and subtracted; one number a filter. They drift by about 1.5e-8
                sqrt(passes), and bfloat16 and float16 are refused.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.

    Example:
        >>> losses = []
        >>> for draw in range(8):
        ...     with torch.no_grad(), flatops.perturb(model, sigma=0.01, draw=draw):
        ...         losses.append(loss_fn(model(x), y))

    A backward pass has to run within: outside the weights are others, and autograd says so; not so under activation
    checkpointing, which computes the forward again with what is there. A step of the weights themselves is undone at the end.

    References:
        Li et al.: Efficient Generalization Improvement Guided by Random Weight Perturbation. arXiv 2211.11489.
        Li et al.: Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape. arXiv 2409.14396.
    """
    if not (isinstance(position := plain(position), int) and 0 <= position < 2**31):
        raise ValueError(f"position must be an integer in [0, 2**31), not {position!r}")
    return _Noisy(weights, sigma, restore, {"seed": seed, "draw": draw, "stream": stream}, position).perturbed()


class _Noisy:
    """Weights while a `perturb` lasts."""

    def __init__(self, weights: Any, sigma: float | Tensor, restore: str, noise: dict[str, Any], position: int = 0) -> None:
        if isinstance(weights, nn.Module):
            if distributed.is_sharded_module(
                weights
            ):  # gathered weights, which a forward may leave behind, are copies
                distributed.reshard(distributed.sharded_modules())
            named = dict(weights.named_parameters())
        else:
            weights = [weights] if isinstance(weights, Tensor) else list(weights)
            named = {f"weights[{i}]": w for i, w in enumerate(weights)}
        if not named:
            raise ValueError("weights holds no tensor: there is nothing to perturb")
        if restore not in RESTORE:
            raise ValueError(f"restore must be one of {', '.join(map(repr, RESTORE))}, not {restore!r}")
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
                raise ValueError(
                    f"{name} was made under torch.inference_mode(), which allows no change: clone it outside"
                )
            distributed.check_layout(w, name)
        if restore == "regenerate":
            check_regenerate(named.values())
        self.weights, self.sigma, self.how, self.noise = list(named.values()), sigma, restore, noise
        self.position = position
        self.undo: list[Undo] = []
        self.modules: list[Any] = []  # under fully_shard

    @property
    def in_pass(self) -> bool:
        return bool(self.undo)

    @perturbed_pass
    def perturbed(self) -> Iterator[None]:
        yield from while_perturbed(self)

    @outside_graphs
    def _enter(self) -> None:
        claim(self, self.weights)
        if distributed.any_distributed(self.weights):
            self.modules = distributed.sharded_modules()
        forget_copies(self.modules)
        devices: dict[torch.device, tuple[list[Tensor], list[int]]] = {}
        for i, w in enumerate(self.weights, self.position):
            part = devices.setdefault(w.device, ([], []))
            part[0].append(w)
            part[1].append(i)
        with torch.no_grad():
            for device, (weights, index) in devices.items():
                noise = {name: on(device, value) for name, value in self.noise.items()}
                sigma = on(device, self.sigma)
                add_noise(weights, index, sigma, self.undo, restore=self.how, room=self._room, **noise)

    def _room(self, weights: list[Tensor]) -> list[Tensor]:
        mine = distributed.all_local(weights)
        with torch.inference_mode(False):  # an inference tensor has no version
            if self.how == "offload":
                return [
                    torch.empty_like(w, device="cpu", pin_memory=w.is_cuda, requires_grad=False) for w in mine
                ]
            return ops.new_backup(mine)

    @outside_graphs
    def restore(self) -> None:
        take_back(self.undo)
        forget_copies(self.modules)
        release(self)
