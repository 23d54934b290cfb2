"""How flat are the minima that SGD and m-RWP find? The two networks of docs/landscape.md, by its commands."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from flatops.benchmarks.measure import provenance
from flatops.benchmarks.tuning import LABEL_NOISE
from flatops.landscape.config import LandscapeConfig
from flatops.landscape.run import landscape
from flatops.train import TrainConfig, train


def measure(epochs: int = 40, **grid: Any) -> dict[str, Any]:
    """The contents of landscape.json for both, and one row for each network on its training and on its test images.

    Args:
        epochs: training epochs of both.
        grid: options of `flatops landscape`.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = {method: Path(folder, method) for method in ("sgd", "mrwp")}
        quiet = Console(file=io.StringIO())
        for method, run in runs.items():
            train(TrainConfig(method=method, epochs=epochs, label_noise=LABEL_NOISE, output=run), quiet)
        config = LandscapeConfig(runs=tuple(runs.values()), output=Path(folder, "landscape"), **grid)
        found = landscape(config, quiet)
    networks = found["networks"]
    for network in networks:
        del network["checkpoint"]  # deleted together with the folder
    rows = [row_of(network, split) for network in networks for split in network["sharpness"]]
    radii = {"sigmas": config.sigmas, "rhos": config.rhos}
    return {**provenance(), "title": found["title"], "config": radii, "networks": networks, "rows": rows}


def row_of(network: dict[str, Any], split: str) -> dict[str, Any]:
    """A network's flatness on one split."""
    line, rise = network["line"][split]["losses"], network["sharpness"][split]
    [top] = network["eigenvalues"][split]
    return {
        "network": network["name"],
        "images": split,
        "test_accuracy": network["test_accuracy"],
        "loss": rise["loss"],
        "ends": [line[0], line[-1]],
        "average": rise["average"],
        "error": rise["error"],
        "worst_rise": rise["worst"],
        "eigenvalue": top["value"],
    }
