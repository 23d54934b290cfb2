"""What does a step of each method cost relative to SGD's? A convolutional network and a transformer, one thread.

It measures what `flatops train --profile` shows. Batches are a sixteenth of the usual size, so flatops' share of a step
is larger here than in real training.
"""

from __future__ import annotations

import io
from statistics import fmean
from typing import Any

from rich.console import Console

from flatops.benchmarks.measure import of_processes, provenance
from flatops.train.config import TrainConfig
from flatops.train.profile import profile

NETWORKS = {  # name: timm name, image size, batch size
    "ResNet-18 for CIFAR": ("resnet18_cifar", 32, 8),
    "ViT-Ti/16": ("vit_tiny_patch16_224", 96, 8),
}


def measure(
    networks: dict[str, tuple[str, int, int]] = NETWORKS, rounds: int = 2, processes: int = 3
) -> dict[str, Any]:
    """One row per method and network: its step relative to SGD's, and flatops' share of it, averaged over processes."""
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
