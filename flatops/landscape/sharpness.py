"""How much the loss rises around the weights: on average, and at worst."""

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
        loss: at the weights as they are.
        sigmas: standard deviations of the noise over the norm of its filter.
        average: E[L(w + noise)] - L(w), the mean over the draws.
        error: its standard error; 0 with one draw.
        rhos: lengths of the ascent, over all weights together.
        sam: L(w + rho g / ||g||) - L(w), one step of sharpness-aware minimisation.
        worst: the largest rise that the ascent met within rho, that step's included, 0 if there was none; a lower bound.
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
    """The rise of the loss under RWP's noise, on average, and under an adversary, at several radii.

    Average: E[L(w + eps)] - L(w), eps_f ~ N(0, (sigma ||w_f||)^2 I), over all parameters. Worst: max L(w + e) - L(w) for
    ||e|| <= rho, over the parameters that require a gradient, by SAM's step e = rho g / ||g|| and then
    e <- P(e + rho / 2 g / ||g||) with the gradient there, P the projection onto the ball. The weights come back bit for bit.

    Args:
        model: in evaluation mode meanwhile, so that BatchNorm uses its running statistics.
        loss_fn: called as loss_fn(model(inputs), targets); a mean over the samples.
        batches: pairs (inputs, targets) on the model's device.
        sigmas: typically 0.005 to 0.1.
        draws: of the noise, 0, 1, ... draws - 1, the same for every sigma; default 8.
        rhos: typically 0.05 to 0.5.
        steps: of the ascent after SAM's; default 5.
        seed: of the noise, in [0, 2**64); default 0.
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
        climbed = [climb(probe, rho, steps) for rho in rhos]
    return Sharpness(
        loss=loss,
        sigmas=list(sigmas),
        average=[fmean(losses) - loss for losses in noisy],
        error=[deviation(losses) / math.sqrt(draws) for losses in noisy],
        rhos=list(rhos),
        sam=[losses[0] - loss for losses in climbed],
        worst=[largest([loss, *losses]) - loss for losses in climbed],
    )


def noisy_losses(probe: Probe, sigma: float, draws: int, seed: int) -> list[float]:
    """The loss under each draw of RWP's noise."""
    losses = []
    for draw in range(draws):
        with perturb(probe.model, sigma, seed=seed, draw=draw):
            losses.append(probe.loss())
    return losses


def climb(probe: Probe, rho: float, steps: int) -> list[float]:
    """The losses that an ascent within a ball of radius rho meets, SAM's step first."""
    kept = Kept(probe.trainable)
    losses = []
    with Pass(kept):
        for length in (rho, *[rho / 2] * steps):
            slope = distributed.all_local(probe.gradient())
            # Nothing moves where the gradient is 0 or not finite.
            ops.ascend_([w for w, _ in kept.pairs], slope, length, norm=ops.grad_norm(slope))
            project(kept.pairs, rho)
            losses.append(probe.loss())
    return losses


@torch.no_grad()
def project(pairs: list[tuple[Tensor, Tensor]], rho: float) -> None:
    """Brings weights that are further than rho from their backups, all together, back to the ball's surface."""
    distance = math.sqrt(sum((w.double() - clean.double()).square().sum() for w, clean in pairs))
    if distance > rho:
        for w, clean in pairs:
            w.copy_(clean.double().lerp(w.double(), rho / distance))


def deviation(losses: list[float]) -> float:
    """The standard deviation over the draws; 0 of one, NaN where a loss is not finite."""
    if not all(map(math.isfinite, losses)):
        return math.nan
    return stdev(losses) if len(losses) > 1 else 0.0


def largest(losses: list[float]) -> float:
    """The maximum; NaN counts as more than any number, for the ascent left what can be computed."""
    return math.nan if any(map(math.isnan, losses)) else max(losses)


def check_radii(**radii: Sequence[float]) -> None:
    """Raise unless there is a radius of each kind, and all are finite and positive."""
    for name, values in radii.items():
        if not values or not all(0 < value < math.inf for value in values):
            raise ValueError(f"{name} must be finite and positive numbers, at least one, not {list(values)}")
