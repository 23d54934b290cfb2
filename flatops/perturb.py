"""Noise in the weights of any model, without an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flatops.backend import outside_graphs
from flatops.restore import Pass
from flatops.scalars import check_integer, on, plain
from flatops.weights import Weights, by_device, check_regenerate, check_weights

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
    check_integer("position", position, bits=31)
    return Pass(_Noisy(weights, sigma, restore, plain(position), {"seed": seed, "draw": draw, "stream": stream}))


class _Noisy:
    """Whose weights the pass of a `perturb` changes."""

    def __init__(
        self, weights: Any, sigma: float | Tensor, restore: str, position: int, noise: dict[str, int | Tensor]
    ) -> None:
        if restore not in RESTORE:
            raise ValueError(f"restore must be one of {', '.join(map(repr, RESTORE))}, not {restore!r}")
        self.params = list(check_weights(weights).values())
        if restore == "regenerate":
            check_regenerate(self.params)
        self.sigma, self.how, self.position, self.noise = sigma, restore, position, noise
        self.weights = Weights()

    @property
    def in_pass(self) -> bool:
        return bool(self.weights.changes.made)

    def _begin(self) -> bool:
        self.weights.claim(self.params)
        self.weights.forget_copies()
        with torch.no_grad():
            for device, (params, index) in by_device(self.params, self.position).items():
                noise = {name: on(device, value) for name, value in self.noise.items()}
                self.weights.add_noise(params, index, on(device, self.sigma), restore=self.how, **noise)
        return True

    def restore(self) -> None:
        self.weights.restore()

    def _end(self, well: bool) -> None:
        pass
