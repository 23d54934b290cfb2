"""The loss along filter-normalised random directions, which are never stored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatops import ops
from flatops.restore import Pass
from flatops.weights import Kept

from .probe import LossFn, Pairs, Probe


@dataclass(frozen=True)
class Surface:
    """Losses on a grid.

    Args:
        axes: positions along each direction, relative to every filter's norm: at 0.5 a filter has moved by half of it.
        losses: nested lists, `losses[i][j]` at `axes[0][i]` and `axes[1][j]`, or `losses[i]`; may be inf or NaN.
        seed, draws: the directions, one draw each.
    """

    axes: list[list[float]]
    losses: list
    seed: int
    draws: list[int]


def surface(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Pairs,
    *,
    points: int = 25,
    radius: float = 1.0,
    seed: int = 0,
    draws: Sequence[int] = (0, 1),
    all_parameters: bool = False,
    on_pass: Callable[[], None] = lambda: None,
) -> Surface:
    """The loss at w + sum_k a_k d_k for every a on a grid, d_k filter-normalised Gaussian directions.

    d_f = ||w_f|| z_f / ||z_f|| for every filter f (a slice along dim 0), z = `ops.normal`: a function of (seed, draw,
    position of the parameter), regenerated at every point. Only one parameter's direction is in memory at a time. Every
    point is computed from the original weights, which are restored bit for bit, also after an exception.

    Args:
        model: evaluated in evaluation mode, where BatchNorm uses its running statistics.
        loss_fn: called as loss_fn(model(inputs), targets); a mean over the samples.
        batches: pairs (inputs, targets) on the model's device.
        points: points along each direction, an odd number, so that the middle is the original weights; default 25.
        radius: half the width of the grid, relative to every filter's norm; default 1.
        seed: seed of the directions, in [0, 2**64); default 0.
        draws: one per direction: one gives a curve, two a surface; default (0, 1).
        all_parameters: also move parameters of fewer than two dimensions, each as one filter: biases and normalisation
            weights, which the paper keeps fixed; default False.
        on_pass: called after every point.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.

    Example:
        >>> curve = landscape.surface(model, F.cross_entropy, batches, draws=[0])
        >>> plane = landscape.surface(model, F.cross_entropy, batches, points=15)

    References:
        Li et al.: Visualizing the Loss Landscape of Neural Nets. arXiv 1712.09913.
    """
    check_grid(points, radius)
    if len(draws) not in (1, 2) or len(set(draws)) != len(draws):
        raise ValueError(f"draws must be one or two different numbers, not {list(draws)}")
    if not any(all_parameters or p.dim() > 1 for p in model.parameters()):
        kind = "" if all_parameters else " of two or more dimensions: pass all_parameters=True"
        raise ValueError(f"model has no parameter{kind}")
    half = points // 2
    axis = [radius * (i - half) / half for i in range(points)]
    grid = itertools.product(axis, repeat=len(draws))
    kept = Kept(model)
    with Probe(model, loss_fn, batches, on_pass) as probe, Pass(kept):
        # A parameter's noise depends on its position among all parameters, whichever of them move.
        moving = [(index, w, clean) for index, (w, clean) in enumerate(kept.pairs) if all_parameters or w.dim() > 1]
        losses = []
        for place in grid:
            for index, w, clean in moving:
                move(w, clean, dict(zip(draws, place)), seed, index)
            losses.append(probe.loss())
    if len(draws) == 2:
        losses = [losses[start : start + points] for start in range(0, len(losses), points)]
    return Surface([axis] * len(draws), losses, seed, list(draws))


def direction(weight: Tensor, *, seed: int, draw: int, index: int = 0) -> Tensor:
    """A filter-normalised direction at a weight: d_f = ||w_f|| z_f / ||z_f||, z = `ops.normal`.

    Args:
        weight: of any floating dtype and memory format, which does not change the direction.
        seed, draw, index: the direction's seed and draw, and the parameter's position in its model.

    Returns:
        Contiguous float32 tensor of the weight's shape; zero where a filter is zero.
    """
    z = ops.normal(weight.shape, seed=seed, draw=draw, tensor=index, device=weight.device)
    if not z.numel():
        return z
    tiny = torch.finfo(torch.float32).tiny  # a filter of one element may draw 0
    # Contiguous, because norms are summed in storage order and the direction must not depend on it.
    scale = ops.filter_norms([weight.contiguous()]) / ops.filter_norms([z]).clamp_min(tiny)
    return z.mul_(scale.reshape([-1, *[1] * (z.dim() - 1)] if z.dim() else []))


@torch.no_grad()
def move(w: Tensor, clean: Tensor, place: dict[int, float], seed: int, index: int) -> None:
    """w <- clean + sum_k place[k] d_k, summed in float32 or float64, then rounded to w's dtype."""
    moved = clean.to(torch.promote_types(clean.dtype, torch.float32), copy=True)
    for draw, distance in place.items():
        if distance:
            moved.add_(direction(clean, seed=seed, draw=draw, index=index), alpha=distance)
    w.copy_(moved)


def check_grid(points: int, radius: float) -> None:
    """Raise ValueError unless a grid has a middle and a size."""
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be an odd number of at least 3, not {points}")
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be finite and positive, not {radius}")
