"""The interface of a dataset, and the table of datasets by name.

A dataset is a file in `datasets/` with a registered function that returns an `InMemory` or a `FromWorkers`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .config import TrainConfig
from .order import Batch, Planned, plan


class Dataset(ABC):
    """Training and test images, and their batches."""

    train: tuple[Any, Tensor]  # images (N, C, H, W), or None if workers read them, and labels (N,) int64
    test_size: int  # unreadable images included
    classes: int
    channels: int
    size: int  # side of an image in pixels
    names: bytes = b""  # of the training images, if they have any
    wrong: int = 0  # training labels that were replaced by a wrong class
    order_device: torch.device | str = "cpu"  # where the indices of images are
    waiting: bool = False  # whether the trainer is waiting for a batch now
    bad: dict[str, str] = {}  # names of the images that could not be read, and why
    left_out: Counter[str] = Counter()  # numbers of files that are not images, by extension

    @property
    def train_size(self) -> int:
        return len(self.train[1])

    @property
    def fingerprint(self) -> str:
        """Identifies the training images on resume, by their labels and names."""
        digest = hashlib.sha256(self.train[1].cpu().numpy().tobytes() + self.names).hexdigest()[:16]
        return f"{self.train_size} images of {self.classes} classes, {digest}"

    def steps(self, streams: Sequence[int], size: int, **which: int) -> Iterator[tuple[Batch, ...]]:
        """The batches of each step, one per stream.

        Args:
            streams: the shuffles to take them from.
            size: images in a batch over all processes.
            which: seed, epoch, start, rank and world_size, as for `order.plan`.
        """
        planned = plan(self.train_size, size, streams, device=self.order_device, **which)
        return zip(*[self._batches(planned)] * len(streams))

    def batches(self, size: int, *, stream: int, **which: int) -> Iterator[Batch]:
        """The batches of one stream; arguments as for `steps`."""
        return (batch for (batch,) in self.steps([stream], size, **which))

    @abstractmethod
    def _batches(self, planned: Iterator[Planned]) -> Iterator[Batch]:
        """The planned batches, augmented, on the training device."""

    @abstractmethod
    def test_batches(self, size: int, numbers: Sequence[int]) -> Iterator[Batch]:
        """The test batches of these numbers; the label of an unreadable image is IGNORED."""

    @abstractmethod
    def to(self, device: torch.device, memory_format: torch.memory_format) -> Dataset:
        """The same dataset with batches on a device, in a memory format."""

    def held_out(self, fraction: float, seed: int) -> Dataset:
        """The same dataset with a fraction of the training images, drawn from the seed, as its test images.

        Raises:
            ValueError: the images are not in memory, or the fraction selects none.
        """
        raise ValueError(
            "validation needs images in memory: leave out randaugment; for data folder, move images into val/ instead"
        )

    def why_lost(self, error: Exception) -> str | None:
        """What happened to the worker processes and what to do, if they caused the error."""
        return None

    def close(self) -> None:
        """Stop the worker processes, if there are any."""


DATASETS: dict[str, tuple[Callable[[TrainConfig], Dataset], bool]] = {}


def register(*names: str, randaugment: bool = False) -> Callable:
    """Register a function that makes a Dataset from a TrainConfig.

    Args:
        names: the values of `--data` that select it.
        randaugment: whether it supports the option `randaugment`, which is an error otherwise.
    """

    def decorator(load: Callable[[TrainConfig], Dataset]) -> Callable[[TrainConfig], Dataset]:
        DATASETS.update(dict.fromkeys(names, (load, randaugment)))
        return load

    return decorator


class WorkerError(ConnectionError):
    """A worker process died or hung."""


@contextmanager
def worker_errors(dataset: Dataset) -> Iterator[None]:
    """Turn any error caused by a lost worker into a WorkerError: torch raises several, not only in the loader."""
    try:
        yield
    except WorkerError:
        raise
    except Exception as error:
        if why := dataset.why_lost(error):
            raise WorkerError(why) from error
        raise


@contextmanager
def reading(dataset: Dataset) -> Iterator[Dataset]:
    """Use a dataset, then close it; WorkerError if a worker process died or hung."""
    try:
        with worker_errors(dataset):
            yield dataset
    finally:
        dataset.close()


def format_counts(counts: Counter[str]) -> str:
    """Counts as text, largest first, such as `.gif (4), .txt (2)`."""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{what} ({count:,})" for what, count in most[:8]) + " ..." * (len(most) > 8)
