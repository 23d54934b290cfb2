"""Datasets that fit into the training device's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .augment import Augment
from .dataset import Dataset
from .order import VALIDATION, Batch, Planned, shuffled


@dataclass
class InMemory(Dataset):
    """Images and labels as tensors.

    Args:
        train: images (N, C, H, W), normalised float32 or uint8, and labels (N,) int64.
        test: the same for evaluation.
        classes: number of classes.
        wrong: number of training labels that were replaced by a wrong class.
        augment: augments training batches and normalises uint8 images to float32; None: nothing.
    """

    train: Batch
    test: Batch
    classes: int
    wrong: int = 0
    augment: Augment | None = None

    def __post_init__(self) -> None:
        images, labels = self.train
        self.channels, self.size = images.shape[1], images.shape[-1]
        self.test_size, self.order_device = len(self.test[1]), labels.device

    def _batches(self, planned: Iterator[Planned]) -> Iterator[Batch]:
        images, labels = self.train
        for indices, *where in planned:
            chosen = images[indices]
            yield (self.augment(chosen, *where) if self.augment else chosen), labels[indices]

    def test_batches(self, size: int, numbers: Sequence[int]) -> Iterator[Batch]:
        images, labels = (tensor.split(size) for tensor in self.test)
        for number in numbers:
            chosen = images[number]
            yield (self.augment.prepare(chosen) if self.augment else chosen), labels[number]

    def held_out(self, fraction: float, seed: int) -> InMemory:
        images, labels = self.train
        order = torch.from_numpy(shuffled(len(labels), seed=seed, epoch=0, stream=VALIDATION))
        held, kept = order.tensor_split([round(fraction * len(order))])
        if not len(held):
            raise ValueError(f"validation {fraction} of {len(order)} training images selects none: raise it")
        return replace(self, train=(images[kept], labels[kept]), test=(images[held], labels[held]))

    def to(self, device: torch.device, memory_format: torch.memory_format) -> InMemory:
        train, test = ((x.to(device, memory_format=memory_format), y.to(device)) for x, y in (self.train, self.test))
        return replace(self, train=train, test=test)
