"""Small folders of images, and what is wrong with some."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def make_folder(root: Path, train: int = 24, val: int = 8, classes: tuple[str, ...] = CLASSES) -> Path:
    """train/ and val/ with so many images of each class, of unlike sizes; a class has its colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 160, (20 + number % 5, 24, 3))
                pixels[..., label % 3] += 90
                kind = "png" if number % 2 else "jpg"
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:03}.{kind}")
    return root


def truncate(path: Path) -> Path:
    """Cut the second half of a file off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
