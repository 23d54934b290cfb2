"""Every option of `flatops landscape`; a field is a flag of the command line, its docstring the help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from flatops.train.config import check

from .sharpness import check_radii
from .surface import check_grid


@dataclass(kw_only=True)
class LandscapeConfig:
    """Draw the loss around trained networks, side by side: curves, surfaces, sharpness and the Hessian's top eigenvalue."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of `flatops train`, for their last checkpoint, or checkpoints; all of the same data."""
    output: Path = Path("runs/landscape")
    """Folder of landscape.json, landscape.png and landscape.html; those of an earlier call are replaced."""
    ema: bool = False
    """Draw the averaged weights, which `flatops train --ema` keeps beside the trained ones."""
    points: int = 25
    """Points along each direction, odd: a surface takes points × points losses of each network."""
    radius: float = 1.0
    """How far the grid reaches, as a share of every filter's norm."""
    all_parameters: bool = False
    """Also move biases and the weights of normalisation along the directions, which the paper leaves alone."""
    sigmas: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    """Average-case sharpness: standard deviations of RWP's noise over the norm of its filter."""
    draws: int = 8
    """Average-case sharpness: draws of the noise."""
    rhos: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    """Worst-case sharpness: lengths of SAM's ascent, over all weights together."""
    eigenvalues: int = 1
    """How many of the Hessian's largest eigenvalues."""
    iterations: int = 100
    """Most steps of the power iteration for each; a step takes as long as four losses or more."""
    batches: int = 4
    """Batches of training images, and of test images, that every loss is the mean over."""
    batch_size: int = 256
    """Images in a batch; a smaller one takes less memory."""
    seed: int = 0
    """Seed of the directions, of the noise, and of the choice of training images."""
    device: str = "auto"
    """Where to compute: auto (a CUDA device if there is one), cpu, cuda, cuda:1 …"""

    def __post_init__(self) -> None:
        check(len(self.runs) > 0, "runs must name at least one checkpoint or folder of flatops train")
        check_grid(self.points, self.radius)
        check_radii(sigmas=self.sigmas, rhos=self.rhos)
        for name in ("draws", "eigenvalues", "iterations", "batches", "batch_size"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        check(0 <= self.seed < 2**64, f"seed must be an integer in [0, 2**64), not {self.seed}")
