"""How much memory does a perturbed pass take besides weights and gradients? Bytes per weight in torch's allocator."""

from __future__ import annotations

from typing import Any

import torch

from flatops.benchmarks.bench import Buffers, parameter_shapes
from flatops.benchmarks.measure import allocations, provenance
from flatops.benchmarks.peers import PLAIN, contenders


def measure(model: str = "resnet50") -> dict[str, Any]:
    """For every contender of `peers`: peak and retained bytes of the first pass, and what each later pass allocates."""
    b = Buffers(parameter_shapes(model), torch.device("cpu"), torch.float32)
    rows = []
    for (method, name), call in contenders(b).items():
        if method == PLAIN:
            continue
        first, later = allocations(call), allocations(call)
        rows.append(
            {
                "method": method,
                "name": name,
                "peak": round(first["peak"] / b.weights, 2),
                "kept": round(first["kept"] / b.weights, 2),
                "allocated": round(later["allocated"] / b.weights, 2),
            }
        )
    return {**provenance(), "model": model, "weights": b.weights, "tensors": len(b.params), "rows": rows}
