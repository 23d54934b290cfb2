"""What happens to whole batches on the device: normalisation, random crops and flips, cutout, erasing; and RandAugment.

Everything random follows from a path of integers such as (seed, stream, epoch, step) and is drawn for the whole batch,
of which a process takes its share: any number of processes sees the same images.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .config import TrainConfig

AUGMENT, MIX, REPLACE = 1001, 1002, 1003  # keep these draws apart from the shuffles'


@dataclass(frozen=True)
class Augment:
    """Batches of images as the network sees them.

    Args:
        padding: pixels on every side, out of which a random crop of the old size is taken.
        flip: mirror half of the images.
        cutout: side in pixels of the square that is erased (DeVries and Taylor, arXiv 1708.04552).
        cutout_probability: share of the images that have one.
        erasing: probability of erasing a rectangle (Zhong et al., arXiv 1708.04896).
        mean, std: of every channel, in units of uint8; float32 images are normalised already.
    """

    padding: int = 0
    flip: bool = False
    cutout: int = 0
    cutout_probability: float = 1.0
    erasing: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def of(cls, config: TrainConfig, **more: Any) -> Augment:
        """With cutout and erasing as a run asks for them; `more` are the other arguments."""
        return cls(cutout=config.cutout, cutout_probability=config.cutout_probability, erasing=config.erasing, **more)

    def __call__(self, images: Tensor, path: Sequence[int], size: int, share: slice) -> Tensor:
        """Training images.

        Args:
            images: this process's share of a batch, (B, C, H, W).
            path: what the random draws follow from.
            size: images in the whole batch.
            share: which of them these are.
        """
        rng = np.random.default_rng([AUGMENT, *path])
        height, width = images.shape[2:]
        if self.padding or self.flip:
            shifts = rng.integers(2 * self.padding + 1, size=(2, size))
            mirrored = rng.random(size) < 0.5 if self.flip else np.zeros(size, dtype=bool)
            images = moved(F.pad(images, (self.padding,) * 4), *shifts[:, share], mirrored[share], height, width)
        images = self.prepare(images)
        if self.cutout:
            centres = rng.integers((height, width), size=(size, 2))
            low = centres - self.cutout // 2
            sides = self.cutout * (rng.random((size, 1)) < self.cutout_probability)
            images = erased(images, low[share], (low + sides)[share])
        if self.erasing:
            low, high = rectangles(rng, self.erasing, size, height, width)
            images = erased(images, low[share], high[share])
        return images

    def prepare(self, images: Tensor) -> Tensor:
        """Images normalised: zero is the mean colour."""
        if images.dtype != torch.uint8:
            return images
        mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images.float() - mean) / std


def moved(images: Tensor, down: np.ndarray, right: np.ndarray, mirrored: np.ndarray, height: int, width: int) -> Tensor:
    """The crops of `height` × `width` at (down, right) of each image, mirrored where asked for."""
    columns = np.arange(width)
    columns = right[:, None] + np.where(mirrored[:, None], columns[::-1], columns)
    rows = down[:, None] + np.arange(height)
    rows, columns = (torch.from_numpy(index).to(images.device) for index in (rows, columns))
    which = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[which, channels, rows[:, None, :, None], columns[:, None, None, :]]


def erased(images: Tensor, low: np.ndarray, high: np.ndarray) -> Tensor:
    """Images with 0, the mean colour, in the rectangle from `low` (row, column) up to `high`, each (B, 2)."""
    inside = []
    for axis, length in enumerate(images.shape[2:]):
        at = torch.arange(length, device=images.device)
        start, end = (torch.from_numpy(edge[:, axis]).to(images.device)[:, None] for edge in (low, high))
        inside.append((at >= start) & (at < end))
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


def rectangles(
    rng: np.random.Generator, probability: float, size: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """What random erasing erases: the corners of `size` rectangles, empty for images that it leaves alone."""
    area = rng.uniform(0.02, 1 / 3, size) * height * width * (rng.random(size) < probability)
    ratio = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3), size))
    sides = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1).round().astype(np.int64)
    sides = np.minimum(sides, (height, width))
    low = (rng.random((size, 2)) * ((height, width) - sides + 1)).astype(np.int64)
    return low, low + sides


@contextmanager
def drawing_from(*path: int) -> Iterator[None]:
    """Seed torch's (CPU), numpy's and Python's generators within, for other libraries' augmentation; then restore them."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    word = int(np.random.SeedSequence(path).generate_state(1)[0])
    torch.random.default_generator.manual_seed(word)
    np.random.seed(word)
    random.seed(word)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def randaugment(config: TrainConfig, size: int, mean: Sequence[float]) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment of single images.

    Args:
        config: the run, whose option `randaugment` describes it.
        size: side of an image in pixels.
        mean: mean colour in units of uint8, which fills what an image is moved away from.

    Raises:
        ValueError: timm cannot read the description.
    """
    from timm.data.auto_augment import rand_augment_transform  # slow to import

    how = {"translate_const": round(0.45 * size), "img_mean": tuple(map(round, mean))}
    try:
        return rand_augment_transform(config.randaugment, how)
    except (AssertionError, KeyError, ValueError) as error:
        message = f"randaugment {config.randaugment!r} is none that timm knows, such as rand-m9-mstd0.5"
        raise ValueError(message) from error
