"""Weight noise without an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from flatops.backend import outside_graphs
from flatops.restore import Pass
from flatops.scalars import check_integer, on, plain
from flatops.weights import Changed, by_device, check_regenerate

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
    """Context manager that adds RWP's noise to weights in place; on exit, also by an exception, it restores every bit.

    w_f <- w_f + eps_f, eps_f ~ N(0, (sigma ||w_f||_2)^2 I) for every filter f (a slice along dim 0), with the same bits
    as `flatops.RWP` over the same list at the same seed, draw and stream. For evaluation under weight noise, ensembles,
    robustness tests, and training other weights, such as adapters on a frozen base.

    Args:
        weights: a module (all of its parameters, frozen ones too), or tensors. Complex weights are pairs of real ones.
        sigma: noise relative to the filter's norm, >= 0; default 0.01. A number, or a one-element tensor on the
            weights' device.
        seed, draw, stream: select the noise; default 0. For different noise on every replica, pass the rank as
            `stream`.
        position: of the first weight, default 0; the others follow. Two calls with the same draw and position give
            weights of equal shapes the same noise, so in a loop over layers count the positions on.
        restore: how the weights are restored.
            'exact' (default): from a backup on their device.
            'offload': from a backup in the host's memory (pinned for a GPU): 2 bytes per bfloat16 weight, copied twice.
            'regenerate': by drawing the noise again and subtracting it; stores one number per filter. Drifts by about
                1.5e-8 sqrt(passes); refused for bfloat16 and float16.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.

    Example:
        >>> losses = []
        >>> for draw in range(8):
        ...     with torch.no_grad(), flatops.perturb(model, sigma=0.01, draw=draw):
        ...         losses.append(loss_fn(model(x), y))

    Run the backward inside too: later, autograd raises an error, or, under activation checkpointing, recomputes the
    forward with the restored weights. An update of the weights inside is lost on exit.

    References:
        Li et al.: Efficient Generalization Improvement Guided by Random Weight Perturbation. arXiv 2211.11489.
        Li et al.: Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape. arXiv 2409.14396.
    """
    check_integer("position", position, bits=31)
    return Pass(_Noisy(weights, sigma, restore, plain(position), {"seed": seed, "draw": draw, "stream": stream}))


class _Noisy(Changed):
    """The owner of the `Pass` of `perturb`."""

    def __init__(
        self, weights: Any, sigma: float | Tensor, restore: str, position: int, noise: dict[str, int | Tensor]
    ) -> None:
        if restore not in RESTORE:
            raise ValueError(f"restore must be one of {', '.join(map(repr, RESTORE))}, not {restore!r}")
        super().__init__(weights)
        if restore == "regenerate":
            check_regenerate(self.params)
        self.sigma, self.how, self.position, self.noise = sigma, restore, position, noise

    def _change(self) -> None:
        for device, (params, index) in by_device(self.params, self.position).items():
            noise = {name: on(device, value) for name, value in self.noise.items()}
            self.weights.add_noise(params, index, on(device, self.sigma), restore=self.how, **noise)
