"""What does a step of each method cost beside SGD's? A convolutional network and a transformer, one thread.

It is what `flatops train --profile` shows of them. Batches are a sixteenth of the usual ones, so that flatops' share of a step is
larger here than where networks are trained in earnest.
"""

from __future__ import annotations

import io
from statistics import fmean
from typing import Any

from rich.console import Console

from flatops.benchmarks.measure import of_processes, provenance
from flatops.train.config import TrainConfig
from flatops.train.profile import profile

NETWORKS = {  # name to timm's, the side of an image, the batch
    "ResNet-18 for CIFAR": ("resnet18_cifar", 32, 8),
    "ViT-Ti/16": ("vit_tiny_patch16_224", 96, 8),
}


def measure(
    networks: dict[str, tuple[str, int, int]] = NETWORKS, rounds: int = 2, processes: int = 3
) -> dict[str, Any]:
    """A row for every method on each network: its step in steps of SGD, and flatops' share of it, means of some processes."""
    found = of_processes(_rows, networks, rounds, processes=processes)
    mean = lambda same, key: fmean(row[key] for row in same) if same[0][key] is not None else None
    rows = [same[0] | {key: mean(same, key) for key in ("to_sgd", "share")} for same in zip(*found, strict=True)]
    return {**provenance(), "rounds": rounds, "processes": processes, "rows": rows}


def _rows(networks: dict[str, tuple[str, int, int]], rounds: int) -> list[dict[str, Any]]:
    """What one process measures."""
    rows = []
    for network, (model, side, batch) in networks.items():
        config = TrainConfig(data="synthetic", model=model, image_size=side, batch_size=batch, threads=1)
        about = {"network": network, "side": side, "batch": batch}
        found = profile(config, Console(file=io.StringIO()), rounds)
        rows += [
            about
            | {
                "method": row["method"],
                "to_sgd": row["ratio"],
                "share": row["flatops"] if row["method"] != "sgd" else None,
            }
            for row in found
        ]
    return rows
