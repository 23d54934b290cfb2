"""Image files as the network sees them: upright, in RGB, 8 bits per channel."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

# By their names; of an animation the first picture counts. What else lies in a folder is left out, and said to be.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".bmp", ".tif", ".tiff", ".webp", ".gif"),
)
BITS_PER_SAMPLE = 258  # a tag of TIFF


def opened(raw: bytes) -> Image.Image:
    """An image file of which the header is read.

    Raises:
        ValueError: its pixels have no known range: floats, integers of 32 bits, or signed ones.
        Exception: whatever PIL trips over.
    """
    image = Image.open(io.BytesIO(raw))
    # PIL has 16 bits in "I" too where the format has no more.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "integers of 32 bits, or signed ones"
        raise ValueError(
            f"its pixels are {kind}: which value is white is not known; store it with 8 or 16 bits a channel"
        )
    return image


def decoded(raw: bytes) -> Image.Image:
    """An image file upright, as EXIF says, in RGB, with 16 bits scaled to 8; errors as those of `opened`."""
    image = opened(raw)
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # EXIF is damaged more often than images are, and PIL has no one error for it
        pass
    if image.mode.startswith("I"):  # grey, which convert() would cut off at 255
        [bits] = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, [16])
        image = Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    return image.convert("RGB")


def to_array(image: Image.Image) -> np.ndarray:
    """A PIL image as uint8 (3, H, W)."""
    return np.asarray(image).transpose(2, 0, 1)
