"""Augmentation of batches on the device: normalisation, random crops and flips, cutout, erasing; and RandAugment.

Random numbers follow from a path of integers such as (seed, stream, epoch, step) and are drawn for the whole batch, of
which each process takes its share: the images do not depend on the number of processes.
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

AUGMENT, MIX, REPLACE = 1001, 1002, 1003  # make these draws independent of the shuffles


@dataclass(frozen=True)
class Augment:
    """Augments and normalises batches of images.

    Args:
        padding: pixels added on every side before a random crop of the original size.
        flip: mirror images with probability 1/2.
        cutout: side in pixels of the erased square (DeVries and Taylor, arXiv 1708.04552).
        cutout_probability: probability that an image gets cutout.
        erasing: probability of erasing a rectangle (Zhong et al., arXiv 1708.04896).
        mean, std: of every channel, in units of uint8; float32 images are already normalised.
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
        """With a run's cutout and erasing; `more` are the other arguments."""
        return cls(cutout=config.cutout, cutout_probability=config.cutout_probability, erasing=config.erasing, **more)

    def __call__(self, images: Tensor, path: Sequence[int], size: int, share: slice) -> Tensor:
        """Augment training images.

        Args:
            images: this process's share of a batch, (B, C, H, W).
            path: the integers that the random numbers follow from.
            size: images in the whole batch.
            share: this process's images in it.
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
        """Normalise images: zero is the mean colour."""
        if images.dtype != torch.uint8:
            return images
        mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images.float() - mean) / std


def moved(images: Tensor, down: np.ndarray, right: np.ndarray, mirrored: np.ndarray, height: int, width: int) -> Tensor:
    """Crops of `height` × `width` at (down, right) of each image, mirrored where `mirrored` is true."""
    columns = np.arange(width)
    columns = right[:, None] + np.where(mirrored[:, None], columns[::-1], columns)
    rows = down[:, None] + np.arange(height)
    rows, columns = (torch.from_numpy(index).to(images.device) for index in (rows, columns))
    which = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[which, channels, rows[:, None, :, None], columns[:, None, None, :]]


def erased(images: Tensor, low: np.ndarray, high: np.ndarray) -> Tensor:
    """Set each image's rectangle from `low` (row, column) up to `high`, both (B, 2), to 0, the mean colour."""
    inside = []
    for axis, length in enumerate(images.shape[2:]):
        at = torch.arange(length, device=images.device)
        start, end = (torch.from_numpy(edge[:, axis]).to(images.device)[:, None] for edge in (low, high))
        inside.append((at >= start) & (at < end))
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


def rectangles(
    rng: np.random.Generator, probability: float, size: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The corners of random erasing's `size` rectangles, empty for images that it skips."""
    area = rng.uniform(0.02, 1 / 3, size) * height * width * (rng.random(size) < probability)
    ratio = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3), size))
    sides = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1).round().astype(np.int64)
    sides = np.minimum(sides, (height, width))
    low = (rng.random((size, 2)) * ((height, width) - sides + 1)).astype(np.int64)
    return low, low + sides


@contextmanager
def drawing_from(*path: int) -> Iterator[None]:
    """Seed torch (CPU), numpy and Python inside the block, for other libraries' augmentation; then restore them."""
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
    """timm's RandAugment, for single images.

    Args:
        config: the run, whose option `randaugment` describes it.
        size: side of an image in pixels.
        mean: mean colour in units of uint8, which fills the area that an image is shifted out of.

    Raises:
        ValueError: timm does not know the description.
    """
    from timm.data.auto_augment import rand_augment_transform  # slow to import

    how = {"translate_const": round(0.45 * size), "img_mean": tuple(map(round, mean))}
    try:
        return rand_augment_transform(config.randaugment, how)
    except (AssertionError, KeyError, ValueError) as error:
        message = f"timm does not know randaugment {config.randaugment!r}; an example is rand-m9-mstd0.5"
        raise ValueError(message) from error
