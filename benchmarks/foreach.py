"""RWP and SAM with torch's foreach operators: the best that is possible without custom kernels."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def perturb(params: list[Tensor], sigma: float, backup: list[Tensor]) -> None:
    """Copies the weights to `backup` and adds RWP's noise. Only the norms of filters still need a loop."""
    torch._foreach_copy_(backup, params)
    norms = [torch.linalg.vector_norm(p, dim=tuple(range(1, p.dim())) or None, keepdim=p.dim() > 1) for p in params]
    torch._foreach_mul_(norms, sigma)
    noise = [torch.randn_like(p) for p in params]
    torch._foreach_mul_(noise, norms)
    torch._foreach_add_(params, noise)


@torch.no_grad()
def grad_norm(grads: list[Tensor]) -> Tensor:
    """The gradient norm of SAM."""
    return torch.stack(torch._foreach_norm(grads)).norm()


@torch.no_grad()
def ascend(params: list[Tensor], grads: list[Tensor], rho: float, norm: Tensor, backup: list[Tensor]) -> None:
    """Copies the weights to `backup` and takes SAM's ascent."""
    torch._foreach_copy_(backup, params)
    torch._foreach_add_(params, torch._foreach_mul(grads, rho / (norm + 1e-12)))


@torch.no_grad()
def copy_back(params: list[Tensor], backup: list[Tensor]) -> None:
    """Restores the weights."""
    torch._foreach_copy_(params, backup)
