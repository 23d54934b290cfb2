"""The papers' code: the research scripts for RWP and SAM, rewritten. Loops over tensors that keep noise and copies."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def perturb(params: list[Tensor], sigma: float) -> list[Tensor]:
    """Adds RWP's noise, one tensor at a time. Returns the noise, which is subtracted later."""
    noise = []
    for p in params:
        if p.dim() > 1:
            norms = p.reshape(p.shape[0], -1).norm(dim=1, keepdim=True)
            std = norms.repeat(1, p[0].numel()).view(p.shape)
            e = torch.normal(0.0, sigma * std)
        else:
            e = torch.empty_like(p).normal_(0, sigma * (p.view(-1).norm().item() + 1e-16))
        p.add_(e)
        noise.append(e)
    return noise


@torch.no_grad()
def remove(params: list[Tensor], noise: list[Tensor]) -> None:
    """Subtracts the noise; rounding errors remain."""
    for p, e in zip(params, noise):
        p.sub_(e)


@torch.no_grad()
def grad_norm(grads: list[Tensor]) -> Tensor:
    """The gradient norm of SAM: one norm per tensor, stacked."""
    return torch.norm(torch.stack([g.norm(p=2) for g in grads]), p=2)


@torch.no_grad()
def ascend(params: list[Tensor], grads: list[Tensor], rho: float, norm: Tensor) -> list[Tensor]:
    """SAM's ascent, one tensor at a time. Returns copies of the weights."""
    scale = rho / (norm + 1e-12)
    kept = []
    for p, g in zip(params, grads):
        kept.append(p.clone())
        p.add_(g * scale)
    return kept


@torch.no_grad()
def copy_back(params: list[Tensor], kept: list[Tensor]) -> None:
    """Restores the weights from their copies."""
    for p, k in zip(params, kept):
        p.copy_(k)


@torch.no_grad()
def mask(scores: list[Tensor], k: int) -> list[Tensor]:
    """SSAM's mask: torch.topk over all scores concatenated, and a dense float mask for every tensor."""
    row = torch.cat([s.flatten() for s in scores])
    dense = torch.zeros_like(row)
    dense.scatter_(0, torch.topk(row, k).indices, torch.ones_like(row[:k]))
    return [m.view_as(s) for m, s in zip(dense.split([s.numel() for s in scores]), scores)]
