"""How much the loss rises around the weights: average- and worst-case sharpness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor, nn

from flatops import distributed, ops
from flatops.perturb import perturb
from flatops.restore import Pass
from flatops.weights import Kept

from .probe import LossFn, Pairs, Probe


@dataclass(frozen=True)
class Sharpness:
    """Rises of the loss, as lists along `sigmas` and `rhos`.

    Args:
        loss: L(w), at the unperturbed weights.
        sigmas: standard deviations of the noise relative to its filter's norm.
        average: E[L(w + noise)] - L(w), the mean over the draws.
        error: its standard error; 0 with one draw.
        rhos: lengths of the ascent, over all weights together.
        sam: L(w + rho g / ||g||) - L(w), after SAM's ascent step.
        worst: the largest rise found within rho, by SAM's step or later ones; a lower bound, at least 0.
    """

    loss: float
    sigmas: list[float]
    average: list[float]
    error: list[float]
    rhos: list[float]
    sam: list[float]
    worst: list[float]


def sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Pairs,
    *,
    sigmas: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
    draws: int = 8,
    rhos: Sequence[float] = (0.05, 0.1, 0.2, 0.5),
    steps: int = 5,
    seed: int = 0,
    on_pass: Callable[[], None] = lambda: None,
) -> Sharpness:
    """The rise of the loss at several radii: on average under RWP's noise, and at worst along an ascent.

    Average: E[L(w + eps)] - L(w), eps_f ~ N(0, (sigma ||w_f||)^2 I), over all parameters. Worst: max L(w + e) - L(w)
    over ||e|| <= rho, over the parameters that require a gradient, by SAM's step e = rho g / ||g|| and then
    e <- P(e + rho / 2 g / ||g||) with the gradient at w + e, where P projects onto the ball. The weights are restored
    bit for bit.

    Args:
        model: evaluated in evaluation mode, where BatchNorm uses its running statistics.
        loss_fn: called as loss_fn(model(inputs), targets); a mean over the samples.
        batches: pairs (inputs, targets) on the model's device.
        sigmas: typically 0.005 to 0.1.
        draws: number of draws of the noise, 0 to draws - 1, the same for every sigma; default 8.
        rhos: typically 0.05 to 0.5.
        steps: ascent steps after SAM's; default 5.
        seed: seed of the noise, in [0, 2**64); default 0.
        on_pass: called after every pass over the batches: 1 + draws |sigmas| + (2 + 2 steps) |rhos| times.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.

    References:
        Foret et al.: Sharpness-Aware Minimization for Efficiently Improving Generalization. arXiv 2010.01412.
        Andriushchenko et al.: A Modern Look at the Relationship between Sharpness and Generalization. arXiv 2302.07011.
    """
    check_radii(sigmas=sigmas, rhos=rhos)
    if draws < 1 or steps < 0:
        raise ValueError(f"draws must be at least 1 and steps at least 0, not {draws} and {steps}")
    with Probe(model, loss_fn, batches, on_pass) as probe:
        loss = probe.loss()
        noisy = [noisy_losses(probe, sigma, draws, seed) for sigma in sigmas]
        ascended = [ascend(probe, rho, steps) for rho in rhos]
    return Sharpness(
        loss=loss,
        sigmas=list(sigmas),
        average=[fmean(losses) - loss for losses in noisy],
        error=[deviation(losses) / math.sqrt(draws) for losses in noisy],
        rhos=list(rhos),
        sam=[losses[0] - loss for losses in ascended],
        worst=[largest([loss, *losses]) - loss for losses in ascended],
    )


def noisy_losses(probe: Probe, sigma: float, draws: int, seed: int) -> list[float]:
    """The loss under each draw of RWP's noise."""
    losses = []
    for draw in range(draws):
        with perturb(probe.model, sigma, seed=seed, draw=draw):
            losses.append(probe.loss())
    return losses


def ascend(probe: Probe, rho: float, steps: int) -> list[float]:
    """The losses along an ascent within a ball of radius rho, after SAM's step and after every later one."""
    kept = Kept(probe.trainable)
    losses = []
    with Pass(kept):
        for length in (rho, *[rho / 2] * steps):
            grads = distributed.all_local(probe.gradient())
            # No weight moves if the gradient is 0 or not finite.
            ops.ascend_([w for w, _ in kept.pairs], grads, length, norm=ops.grad_norm(grads))
            project(kept.pairs, rho)
            losses.append(probe.loss())
    return losses


@torch.no_grad()
def project(pairs: list[tuple[Tensor, Tensor]], rho: float) -> None:
    """Project weights whose distance from their backups, over all of them, exceeds rho back onto the ball."""
    distance = math.sqrt(sum((w.double() - clean.double()).square().sum() for w, clean in pairs))
    if distance > rho:
        for w, clean in pairs:
            w.copy_(clean.double().lerp(w.double(), rho / distance))


def deviation(losses: list[float]) -> float:
    """The standard deviation over the draws; 0 for a single one, NaN if a loss is not finite."""
    if not all(map(math.isfinite, losses)):
        return math.nan
    return stdev(losses) if len(losses) > 1 else 0.0


def largest(losses: list[float]) -> float:
    """The maximum; NaN counts as the largest, because the ascent has left the range of the dtype."""
    return math.nan if any(map(math.isnan, losses)) else max(losses)


def check_radii(**radii: Sequence[float]) -> None:
    """Raise ValueError unless there is a radius of each kind, and all are finite and positive."""
    for name, values in radii.items():
        if not values or not all(0 < value < math.inf for value in values):
            raise ValueError(f"{name} must be finite and positive numbers, at least one, not {list(values)}")
