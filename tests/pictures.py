"""Small folders of images, and ways to damage them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def make_folder(root: Path, train: int = 24, val: int = 8, classes: tuple[str, ...] = CLASSES) -> Path:
    """train/ and val/ with this many images per class, of different sizes; each class has its colour."""
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


# How an upright image is stored under each EXIF orientation.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encoded(image: Image.Image, kind: str, orientation: int | None = None, **options: object) -> bytes:
    """An image file that EXIF turns upright."""
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][274] = orientation
        image = image.transpose(STORED[orientation]) if STORED[orientation] is not None else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def truncate(path: Path) -> Path:
    """Cuts off the second half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
