"""What the trainer asks of a dataset, and the table of datasets by name.

A dataset is a file in `datasets/` with a function that `register` names; it returns an `InMemory` or a `FromWorkers`.
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
    """Training and test images, and the batches that they are seen in."""

    train: tuple[Any, Tensor]  # images (N, C, H, W), None where workers read them, and labels (N,) int64
    test_size: int  # unreadable images included
    classes: int
    channels: int
    size: int  # side of an image in pixels
    names: bytes = b""  # of the training images, if they have any
    wrong: int = 0  # training labels that were replaced by a wrong class
    order_device: torch.device | str = "cpu"  # where indices of images are kept
    waiting: bool = False  # whether the trainer is waiting for a batch now
    bad: dict[str, str] = {}  # names of the images that could not be read, and why
    left_out: Counter[str] = Counter()  # kinds of files that lie among the images and are no images, with counts

    @property
    def train_size(self) -> int:
        return len(self.train[1])

    @property
    def fingerprint(self) -> str:
        """Tells these training images from others on resume, by their labels and names."""
        digest = hashlib.sha256(self.train[1].cpu().numpy().tobytes() + self.names).hexdigest()[:16]
        return f"{self.train_size} images of {self.classes} classes, {digest}"

    def steps(self, streams: Sequence[int], size: int, **which: int) -> Iterator[tuple[Batch, ...]]:
        """The batches of each step, one per stream.

        Args:
            streams: the shuffles to draw from.
            size: images in a batch over all processes.
            which: seed, epoch, start (the first step), rank and world_size, as `order.plan` has them.
        """
        planned = plan(self.train_size, size, streams, device=self.order_device, **which)
        return zip(*[self._batches(planned)] * len(streams))

    def batches(self, size: int, *, stream: int, **which: int) -> Iterator[Batch]:
        """The batches of one stream; arguments as those of `steps`."""
        return (batch for (batch,) in self.steps([stream], size, **which))

    @abstractmethod
    def _batches(self, planned: Iterator[Planned]) -> Iterator[Batch]:
        """The planned batches, augmented, on the device that trains."""

    @abstractmethod
    def test_batches(self, size: int, which: Sequence[int]) -> Iterator[Batch]:
        """Batches of the test images by number; the label of an image that cannot be read is IGNORED."""

    @abstractmethod
    def to(self, device: torch.device, memory_format: torch.memory_format) -> Dataset:
        """The same images, in batches on a device and in a memory format."""

    def held_out(self, fraction: float, seed: int) -> Dataset:
        """The same, with a fraction of the training images, which the seed draws, in place of the test images.

        Raises:
            ValueError: the images are not in memory, or the fraction is none of them.
        """
        raise ValueError(
            "validation holds out images in memory: leave out randaugment, or for data folder put them in val/ yourself"
        )

    def why_lost(self, error: Exception) -> str | None:
        """What became of the worker processes and what to do, if they are the cause of an error."""
        return None

    def close(self) -> None:
        """End the worker processes, if there are any."""


DATASETS: dict[str, tuple[Callable[[TrainConfig], Dataset], bool]] = {}


def register(*names: str, randaugment: bool = False) -> Callable:
    """Enter a function that loads a Dataset for a TrainConfig into the table.

    Args:
        names: values of `--data` that it is called for.
        randaugment: whether it follows the option `randaugment`, which is refused otherwise.
    """

    def entered(load: Callable[[TrainConfig], Dataset]) -> Callable[[TrainConfig], Dataset]:
        DATASETS.update(dict.fromkeys(names, (load, randaugment)))
        return load

    return entered


class WorkerError(ConnectionError):
    """A worker process died or hung."""


@contextmanager
def worker_errors(dataset: Dataset) -> Iterator[None]:
    """Turn errors that a lost worker causes into a WorkerError: torch raises several, and not only in the loader."""
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
    """Use a dataset, and close it.

    Raises:
        WorkerError: a worker process died or hung.
    """
    try:
        with worker_errors(dataset):
            yield dataset
    finally:
        dataset.close()


def listed(counts: Counter[str]) -> str:
    """Names and counts, the largest first, such as `.gif (4), .txt (2)`."""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{what} ({count:,})" for what, count in most[:8]) + " ..." * (len(most) > 8)
