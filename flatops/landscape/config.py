"""Every option of `flatops landscape`: a field is a flag, its docstring the help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from flatops.train.config import check

from .sharpness import check_radii
from .surface import check_grid


@dataclass(kw_only=True)
class LandscapeConfig:
    """Plot the loss landscapes of trained networks: curves, surfaces, sharpness and the Hessian's top eigenvalue."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Checkpoints, or folders of `flatops train` for their last checkpoint; all trained on the same data."""
    output: Path = Path("runs/landscape")
    """Folder for landscape.json, landscape.png and landscape.html, which replace those of an earlier call."""
    ema: bool = False
    """Plot the averaged weights that `flatops train --ema` keeps."""
    points: int = 25
    """Points along each direction, an odd number; a surface takes points × points losses per network."""
    radius: float = 1.0
    """Largest distance along a direction, relative to every filter's norm."""
    all_parameters: bool = False
    """Also move biases and normalisation weights along the directions; the paper keeps them fixed."""
    sigmas: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    """Average-case sharpness: standard deviations of RWP's noise relative to its filter's norm."""
    draws: int = 8
    """Average-case sharpness: number of draws of the noise."""
    rhos: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    """Worst-case sharpness: lengths of SAM's ascent, over all weights together."""
    eigenvalues: int = 1
    """Number of the Hessian's largest eigenvalues."""
    iterations: int = 100
    """Most power iterations per eigenvalue; each takes as long as four losses or more."""
    batches: int = 4
    """Every loss is the mean over this many batches, of training and of test images."""
    batch_size: int = 256
    """Images in a batch; fewer take less memory."""
    seed: int = 0
    """Seed of the directions, the noise, and the choice of training images."""
    device: str = "auto"
    """Where to compute: auto (CUDA if available), cpu, cuda, cuda:1 …"""

    def __post_init__(self) -> None:
        check(len(self.runs) > 0, "runs must name at least one checkpoint or folder of flatops train")
        check_grid(self.points, self.radius)
        check_radii(sigmas=self.sigmas, rhos=self.rhos)
        for name in ("draws", "eigenvalues", "iterations", "batches", "batch_size"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        check(0 <= self.seed < 2**64, f"seed must be an integer in [0, 2**64), not {self.seed}")
