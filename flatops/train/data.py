"""Data sets by name, and the order in which a run sees them.

The order is a pure function of (seed, epoch, stream), and what augmentation draws one of (seed, epoch, stream, batch or image):
nothing has to be saved to resume it, and two streams of one epoch are two independent shuffles of the same images.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .augment import Augment
from .config import TrainConfig
from .world import World

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) float32, labels (B,) int64; or (B, classes) float32 after mixup

# Streams: the batches of the clean and perturbed passes, the wrong labels, what SSAM's masks are made from, and what is held out.
CLEAN, PERTURBED, LABELS, FISHER, VALIDATION = range(5)
IGNORED = -100  # the label of a test image that cannot be read; cross-entropy passes it by


def shuffled(count: int, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """The order of an epoch: a permutation of `count` images."""
    return np.random.default_rng([seed, stream, epoch]).permutation(count)


def piece(size: int, part: int, parts: int) -> slice:
    """The `part`-th of `parts` equal pieces of a batch."""
    return slice(part * size // parts, (part + 1) * size // parts)


@dataclass
class Data:
    """A data set held in memory, on the device that trains.

    Args:
        train: images (N, C, H, W), float32 ready to use or uint8, and labels (N,) int64 to train on.
        test: the same to evaluate on.
        classes: number of classes.
        wrong: number of training labels that were replaced.
        augment: what happens to batches of training images; None: nothing. Makes uint8 images float32.
    """

    train: Batch
    test: Batch
    classes: int
    wrong: int = 0
    augment: Augment | None = None
    waiting = False  # whether the next batch is being waited for

    @property
    def channels(self) -> int:
        return self.train[0].shape[1]

    @property
    def size(self) -> int:
        """Side of an image."""
        return self.train[0].shape[-1]

    @property
    def train_size(self) -> int:
        return len(self.train[1])

    @property
    def test_size(self) -> int:
        return len(self.test[1])

    @property
    def bad(self) -> dict[str, str]:
        """Images that could not be read, and why."""
        return {}

    @property
    def left_out(self) -> Counter[str]:
        """What lies beside the images and is not read, and how often."""
        return Counter()

    @property
    def fingerprint(self) -> str:
        """What tells these training images from others on resume."""
        digest = hashlib.sha256(self.train[1].cpu().numpy().tobytes()).hexdigest()[:16]
        return f"{self.train_size} images of {self.classes} classes, {digest}"

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
        order = torch.from_numpy(shuffled(len(labels), seed=seed, epoch=epoch, stream=stream)).to(labels.device)
        mine = piece(size, part, parts)
        for number, batch in enumerate(order.split(size)[start : len(labels) // size], start):
            index = batch[mine]
            chosen = images[index]
            if self.augment:
                chosen = self.augment(chosen, [seed, stream, epoch, number], size, mine)
            yield chosen, labels[index]

    def steps(self, streams: Sequence[int], size: int, **which: int) -> Iterator[tuple[Batch, ...]]:
        """The batches of each step, one a stream; arguments as those of `batches`."""
        return zip(*(self.batches(size, stream=stream, **which) for stream in streams))

    def test_batches(self, size: int, which: Sequence[int]) -> Iterator[Batch]:
        """Batches of the test images by their number."""
        images, labels = (tensor.split(size) for tensor in self.test)
        for number in which:
            chosen = images[number]
            yield (self.augment.prepare(chosen) if self.augment else chosen), labels[number]

    def why_lost(self, error: Exception) -> str | None:
        """What became of the processes that read images, and what to do, where an error comes of that."""
        return None

    def close(self) -> None:
        """Nothing is open."""

    def to(self, device: torch.device, memory_format: torch.memory_format) -> Data:
        """The same data on a device, in a layout."""
        train, test = (
            (x.to(device, memory_format=memory_format), y.to(device)) for x, y in (self.train, self.test)
        )
        return replace(self, train=train, test=test)


def listed(left_out: Counter[str]) -> str:
    """What is left out, such as `.gif (4), .txt (2)`."""
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{what} ({count:,})" for what, count in most[:8]) + " ..." * (len(most) > 8)


class ReaderError(ConnectionError):
    """A process that reads images died or hung."""


@contextmanager
def reader_errors(data: Data) -> Iterator[None]:
    """Say so where a process that reads images is lost: torch raises one of several errors then, and not only to who waits."""
    try:
        yield
    except ReaderError:  # said already
        raise
    except Exception as error:
        if why := data.why_lost(error):
            raise ReaderError(why) from error
        raise


@contextmanager
def reading(data: Data) -> Iterator[Data]:
    """Use a data set, and close it.

    Raises:
        ReaderError: a process that reads images died or hung.
    """
    try:
        with reader_errors(data):
            yield data
    finally:
        data.close()


def digits(config: TrainConfig | None = None) -> Data:
    """1,797 handwritten digits of 8×8 pixels, ten classes; a fixed quarter, balanced, is for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images / 16.0).float().reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(labels).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    images = (images - images[train].mean()) / images[train].std()
    erasing = config and (config.cutout or config.erasing)
    augment = Augment.of(config) if erasing else None
    return Data((images[train], labels[train]), (images[test], labels[test]), classes=10, augment=augment)


def synthetic(config: TrainConfig) -> Data:
    """Noise with random labels, for timing: enough for four batches, 1,024 images at least."""
    generator = torch.Generator().manual_seed(config.seed)
    side, classes = config.image_size or 32, config.classes or 10

    def made(count: int) -> Batch:
        images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
        return images, torch.randint(classes, (count,), generator=generator)

    augment = Augment.of(config, mean=(127.5,) * 3, std=(73.9,) * 3)
    return Data(made(max(1024, 4 * config.batch_size)), made(256), classes, augment=augment)


def cifar(config: TrainConfig) -> Data:
    """CIFAR-10 or CIFAR-100, in memory; with RandAugment, which wants single images, by way of worker processes."""
    from . import images

    return images.cifar_stream(config) if config.randaugment else images.cifar_memory(config)


def folder(config: TrainConfig) -> Data:
    """Images by class in train/ and val/, read by worker processes."""
    from . import images

    return images.folder(config)


SOURCES: dict[str, Callable[[TrainConfig], Data]] = {
    "digits": digits,
    "cifar10": cifar,
    "cifar100": cifar,
    "folder": folder,
    "synthetic": synthetic,
}


def load(config: TrainConfig, world: World = World()) -> Data:
    """The data that a run asks for, with its share of wrong training labels.

    Args:
        config: the run.
        world: its processes, of which the first downloads what is missing.

    Raises:
        ValueError: no such data set, one that is not as it should be, or fewer training images than a batch needs.
        OSError: a download broke off.
    """
    if config.data not in SOURCES:
        raise ValueError(f"unknown data {config.data!r}; choose from {', '.join(SOURCES)}")
    if config.randaugment and config.data in ("digits", "synthetic"):
        raise ValueError(f"randaugment is for photographs, not for {config.data}")
    if config.data.startswith("cifar"):
        from . import images

        world.from_first(lambda: images.fetch_cifar(config))
    data = SOURCES[config.data](config)
    if config.classes and data.classes != config.classes:
        raise ValueError(f"{config.data} has {data.classes} classes, and classes {config.classes} is asked for")
    if config.validation:
        data = hold_out(data, config)
    if data.train_size < config.batch_size:
        raise ValueError(
            f"batch_size {config.batch_size} exceeds the {data.train_size} training images of {config.data}"
        )
    images, labels = data.train
    noisy = wrong_labels(labels, data.classes, config.label_noise, config.seed)
    return replace(data, train=(images, noisy), wrong=int((noisy != labels).sum()))


def hold_out(data: Data, config: TrainConfig) -> Data:
    """Training images that the seed draws, instead of the test images.

    Raises:
        ValueError: the images are not in memory, or the share is none of them.
    """
    if type(data) is not Data:
        raise ValueError(
            "validation holds out images in memory: leave out randaugment, or for data folder put them in val/ yourself"
        )
    images, labels = data.train
    order = torch.from_numpy(shuffled(len(labels), seed=config.seed, epoch=0, stream=VALIDATION))
    held, kept = order.tensor_split([round(config.validation * len(order))])
    if not len(held):
        raise ValueError(f"validation {config.validation} of {len(order)} training images is none: raise it")
    return replace(data, train=(images[kept], labels[kept]), test=(images[held], labels[held]))


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
