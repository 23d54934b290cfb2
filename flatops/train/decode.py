"""Decoding image files: upright, in RGB, with 8 bits per channel."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

# Of image files; an animation's first frame is used. Other files in a folder are ignored, and counted in the header.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".bmp", ".tif", ".tiff", ".webp", ".gif"),
)
BITS_PER_SAMPLE = 258  # a TIFF tag


def opened(raw: bytes) -> Image.Image:
    """Open an image file and read its header.

    Raises:
        ValueError: its pixels have no known range: floats, 32-bit integers, or signed ones.
        Exception: any error from PIL.
    """
    image = Image.open(io.BytesIO(raw))
    # PIL also uses mode "I" for the 16 bits of PNG and PPM.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise ValueError(f"its pixels are {kind} of unknown range: store it with 8 or 16 bits per channel")
    return image


def decoded(raw: bytes) -> Image.Image:
    """Decode an image file, upright according to EXIF, in RGB, with 16 bits scaled to 8; errors as in `opened`."""
    image = opened(raw)
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # PIL raises any kind for damaged EXIF, which is common; the image itself is good, so it is kept
        pass
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        [bits] = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, [16])
        image = Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    return image.convert("RGB")


def to_array(image: Image.Image) -> np.ndarray:
    """A PIL image as uint8 (3, H, W)."""
    return np.asarray(image).transpose(2, 0, 1)
