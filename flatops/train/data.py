"""Data sets by name, and the order in which a run sees them.

The order is a pure function of (seed, epoch, stream): nothing has to be saved to resume it, and two streams
of one epoch are two independent shuffles of the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import TrainConfig

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) float32, labels (B,) int64

# Streams: the batches of the clean and perturbed passes, the wrong labels, and what SSAM's masks are made from.
CLEAN, PERTURBED, LABELS, FISHER = range(4)


@dataclass
class Data:
    """A data set held in memory, on the device that trains.

    Args:
        train: images (N, C, H, W) float32 and labels (N,) int64 to train on.
        test: the same to evaluate on.
        classes: number of classes.
        wrong: number of training labels that were replaced.
    """

    train: Batch
    test: Batch
    classes: int
    wrong: int = 0

    @property
    def channels(self) -> int:
        return self.train[0].shape[1]

    def batches(
        self,
        size: int,
        *,
        seed: int,
        epoch: int,
        stream: int,
        start: int = 0,
        part: int = 0,
        parts: int = 1,
    ) -> Iterator[Batch]:
        """Full batches of an epoch's shuffle, from batch `start` on; images left over wait for the next epoch.

        Of every batch it gives the `part`-th of `parts` equal pieces, so that many processes see what one would.
        """
        images, labels = self.train
        order = torch.from_numpy(np.random.default_rng([seed, stream, epoch]).permutation(len(labels)))
        for batch in order.to(labels.device).split(size)[start : len(labels) // size]:
            index = batch[part * size // parts : (part + 1) * size // parts]
            yield images[index], labels[index]

    def test_batches(self, size: int) -> list[Batch]:
        """The test images in order."""
        return list(zip(self.test[0].split(size), self.test[1].split(size)))

    def to(self, device: torch.device, memory_format: torch.memory_format) -> Data:
        """The same data on a device, in a layout."""
        train, test = (
            (x.to(device, memory_format=memory_format), y.to(device)) for x, y in (self.train, self.test)
        )
        return Data(train, test, self.classes, self.wrong)


def digits() -> Data:
    """1,797 handwritten digits of 8×8 pixels, ten classes; a fixed quarter, balanced, is for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images / 16.0).float().reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(labels).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    images = (images - images[train].mean()) / images[train].std()
    return Data((images[train], labels[train]), (images[test], labels[test]), classes=10)


SOURCES: dict[str, Callable[[], Data]] = {"digits": digits}


def load(config: TrainConfig) -> Data:
    """The data that a run asks for, with its share of wrong training labels.

    Raises:
        ValueError: no such data set, or fewer training images than a batch needs.
    """
    if config.data not in SOURCES:
        raise ValueError(f"unknown data {config.data!r}; choose from {', '.join(SOURCES)}")
    data = SOURCES[config.data]()
    images, labels = data.train
    if len(labels) < config.batch_size:
        raise ValueError(
            f"batch_size {config.batch_size} exceeds the {len(labels)} training images of {config.data}"
        )
    labels = wrong_labels(labels, data.classes, config.label_noise, config.seed)
    return Data((images, labels), data.test, data.classes, wrong=int((labels != data.train[1]).sum()))


def wrong_labels(labels: Tensor, classes: int, fraction: float, seed: int) -> Tensor:
    """Labels with round(fraction·N) of them moved to another class, all other classes equally likely.

    Args:
        labels: (N,) int64.
        classes: number of classes.
        fraction: share to replace, 0 to 1.
        seed: the same seed replaces the same labels by the same classes.
    """
    rng = np.random.default_rng([seed, LABELS])
    chosen = rng.permutation(len(labels))[: round(fraction * len(labels))]
    shift = rng.integers(1, classes, size=len(chosen))
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + torch.from_numpy(shift)) % classes
    return noisy
