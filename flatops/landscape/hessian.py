"""The Hessian's largest eigenvalues, by power iteration."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatops import ops

from .probe import LossFn, Pairs, Probe


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue and its precision.

    Args:
        value: the Rayleigh quotient v.Hv of the last vector.
        residual: ||Hv - value v|| / |value|; an eigenvalue lies within residual |value| of `value`.
        iterations: number of Hessian-vector products.
    """

    value: float
    residual: float
    iterations: int


def top_eigenvalues(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Pairs,
    *,
    count: int = 1,
    iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    on_pass: Callable[[], None] = lambda: None,
) -> list[Eigenvalue]:
    """The Hessian's eigenvalues of largest magnitude, of the mean loss, in the order found.

    v <- Hv / ||Hv||, orthogonal to the eigenvectors already found, over all parameters that require a gradient.

    Args:
        model: on one device; it is evaluated in evaluation mode, where BatchNorm uses its running statistics.
        loss_fn: called as loss_fn(model(inputs), targets); a mean over the samples; twice differentiable.
        batches: pairs (inputs, targets) on the model's device.
        count: number of eigenvalues; default 1. Each needs a vector of the weights' size.
        iterations: the most for each eigenvalue; default 100.
        tolerance: the residual at which to stop; default 1e-3.
        seed: seed of the initial vectors; default 0.
        on_pass: called after every product.

    Raises:
        ValueError, TypeError: naming the argument.

    References:
        Yao et al.: PyHessian: Neural Networks Through the Lens of the Hessian. arXiv 1912.07145.
    """
    if count < 1 or iterations < 1:
        raise ValueError(f"count and iterations must be at least 1, not {count} and {iterations}")
    found: list[Eigenvalue] = []
    vectors: list[Tensor] = []
    with Probe(model, loss_fn, batches, on_pass) as probe:
        params = probe.trainable
        if any(p.is_complex() for p in params):
            raise TypeError("model has complex parameters: eigenvalues are computed for real ones only")
        size, device = sum(p.numel() for p in params), params[0].device
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in params), torch.float32)
        for draw in range(min(count, size)):
            start = ops.normal([size], seed=seed, draw=draw, device=device).to(dtype)
            eigenvalue, vector = power_iteration(probe, start, vectors, iterations, tolerance)
            found.append(eigenvalue)
            vectors.append(vector)
    return found


def power_iteration(
    probe: Probe, start: Tensor, others: list[Tensor], iterations: int, tolerance: float
) -> tuple[Eigenvalue, Tensor]:
    """The largest eigenvalue orthogonal to `others`, and its eigenvector, a flat vector of norm 1."""
    product, residual, done = orthogonal(start, others), math.inf, 0
    while residual > tolerance and done < iterations:  # NaN ends it
        vector = product / product.norm()
        product = orthogonal(flat_product(probe, vector), others)
        value = float(vector @ product)
        error = float((product - value * vector).norm())
        residual, done = error / abs(value) if value else error, done + 1
    return Eigenvalue(value, residual, done), vector


def flat_product(probe: Probe, vector: Tensor) -> Tensor:
    """The Hessian times a flat vector, computed in each parameter's dtype."""
    params = probe.trainable
    parts = vector.split([p.numel() for p in params])
    product = probe.hessian_times([part.view(p.shape).to(p.dtype) for part, p in zip(parts, params)])
    return torch.cat([part.reshape(-1).to(vector.dtype) for part in product])


def orthogonal(vector: Tensor, others: list[Tensor]) -> Tensor:
    """Project a vector onto the complement of orthonormal others."""
    for other in others:
        vector = vector - (other @ vector) * other
    return vector
