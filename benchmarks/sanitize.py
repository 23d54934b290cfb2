"""Runs every operator of one backend once on small tensors of odd shapes, for a memory checker:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m flatops.benchmarks.sanitize cuda

Without torch's cache every tensor is an allocation of its own, so an access beyond its end is found. Results are
checked only for being restored; the test suite does the rest.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from flatops import ops

# A scalar, tails of every length, filters shorter than a warp, one that fills a block, and one split over several.
SHAPES = [(), (1,), (7,), (0, 3), (5, 9), (33, 147), (3, 1023), (2, 8193), (20001,), (6, 3, 3, 3)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make(dtype: torch.dtype, device: str, misaligned: bool) -> list[Tensor]:
    """A tensor of every shape; misaligned ones begin one element after the start of their memory."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for shape in SHAPES:
        room = torch.randn(torch.Size(shape).numel() + 1, generator=generator).to(device, dtype)
        tensors.append((room[1:] if misaligned else room[:-1]).view(shape))
    return tensors


def run(backend: str, device: str, dtype: torch.dtype, misaligned: bool) -> None:
    """Calls every operator, in an order that ends with the initial weights."""
    params, grads = (make(dtype, device, misaligned) for _ in range(2))
    before = [p.clone() for p in params]
    fisher = [torch.ones(p.shape[:1] if p.dim() else (1,), device=device) for p in params]
    how = {"backend": backend}
    noise = {"seed": 1, "draw": 2, "eta": 0.5, "fisher": fisher, **how}
    backup = ops.new_backup(params)
    ops.filter_norms(params, **how)
    ops.filter_fisher_(fisher, grads, 0.99, **how)
    ops.perturb_(params, 0.01, backup=backup, **noise)
    ops.restore_(params, backup=backup, **how)
    ops.perturb_(params, 0.01, seed=1, draw=2, **how)
    ops.restore_(params, backup=backup, **how)
    if dtype in (torch.float32, torch.float64):
        scales = ops.perturb_(params, 0.01, **noise)
        ops.restore_(params, scales=scales, **noise)
        ops.restore_(params, backup=backup, **how)
    for adaptive in (False, True):
        norm = ops.grad_norm(grads, params if adaptive else None, **how)
        ops.ascend_(params, grads, 0.05, norm=norm, adaptive=adaptive, backup=backup, **how)
        ops.restore_(params, backup=backup, **how)
    for p, b in zip(params, before):
        if not torch.equal(p.cpu(), b.cpu()):
            raise AssertionError(f"{backend}, {dtype}: a weight of shape {tuple(p.shape)} was not restored")


def main(backend: str, device: str) -> None:
    """Runs all dtypes, aligned and misaligned, and the noise alone."""
    for dtype in DTYPES:
        for misaligned in (False, True):
            run(backend, device, dtype, misaligned)
    for shape in SHAPES:
        ops.normal(shape, seed=1, draw=2, device=device, backend=backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{backend} on {device}: every operator ran on {len(SHAPES)} shapes and {len(DTYPES)} dtypes")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cuda")
