"""The order in which a run sees its images, a pure function of (seed, epoch, stream).

Resuming needs no saved state, and two streams of an epoch are independent shuffles of the same images. Augmentation
depends on (seed, stream, epoch, step), or on the image in place of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) float32, labels (B,) int64; or (B, classes) float32 after mixup

# Streams: clean and perturbed pass, wrong labels, samples for SSAM's masks, images held out for validation.
CLEAN, PERTURBED, LABELS, FISHER, VALIDATION = range(5)
IGNORED = -100  # the label of a test image that cannot be read; cross-entropy ignores it


def shuffled(count: int, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """The order of an epoch: a permutation of `count` images."""
    return np.random.default_rng([seed, stream, epoch]).permutation(count)


class Planned(NamedTuple):
    """A process's share of one batch, before its images are loaded."""

    indices: Tensor  # of the images, int64
    path: list[int]  # the seed of augmentation: seed, stream, epoch, step
    size: int  # images in the whole batch
    share: slice  # this process's images in the batch


def plan(
    count: int,
    size: int,
    streams: Sequence[int],
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Planned]:
    """An epoch's batches from step `start` on, one per stream and step; an incomplete last batch is dropped."""
    orders = [torch.from_numpy(shuffled(count, seed=seed, epoch=epoch, stream=s)).to(device) for s in streams]
    share = slice(rank * size // world_size, (rank + 1) * size // world_size)
    for step in range(start, count // size):
        for stream, order in zip(streams, orders):
            yield Planned(order[step * size : (step + 1) * size][share], [seed, stream, epoch, step], size, share)
