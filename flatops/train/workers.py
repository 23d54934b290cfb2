"""Datasets read by worker processes while the device trains; the batches do not depend on the number of workers."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from .augment import REPLACE, Augment, drawing_from
from .config import TrainConfig
from .dataset import Dataset, WorkerError, worker_errors
from .order import IGNORED, Batch, Planned

T = TypeVar("T")
NONE, MAX_SKIPPED = -1, 1000  # the index of no image; how many unreadable ones in a row are skipped
TEST = -1  # in place of the stream in the keys of test images
Key = tuple[int, int, int]  # stream, epoch, index
PATIENCE = 2.0  # seconds for workers to exit by themselves
SHARED_MEMORY = (
    "worker processes pass batches through /dev/shm: make it larger (docker run --shm-size 8g, or "
    "mount -o remount,size=8g /dev/shm), or use no workers (--workers 0)"
)


class Source(Protocol):
    """One split's images and names, in a form that worker processes can share without copying."""

    labels: np.ndarray
    left_out: Counter[str]  # see Dataset

    def open(self, index: int) -> Image.Image:
        """A decoded RGB image."""

    def name(self, index: int) -> str:
        """Its name in error messages."""


@dataclass
class Images:
    """The map-style dataset of the workers' DataLoader: decoded and augmented uint8 images by key.

    Args:
        config: bad_images, and the seed: with the key, it determines everything random.
        train, test: sources of the images.
        transforms: of training and of test images, from PIL to uint8 (3, size, size).
        size: side of an image in pixels.
    """

    config: TrainConfig
    train: Source
    test: Source
    transforms: tuple[Callable[[Image.Image], Any], Callable[[Image.Image], Any]]
    size: int

    def __getitem__(self, key: Key) -> tuple[np.ndarray, int, list[tuple[str, str]]]:
        """The image, its index, and what could not be read: a test image is then black, a training image replaced."""
        stream, epoch, index = key
        bad: list[tuple[str, str]] = []
        if stream == TEST:
            image = attempt(self.test.open, self.test, index, bad)
            if image is not None:
                return np.asarray(self.transforms[1](image)), index, bad
            return self._black(), index, bad
        for candidate in self._candidates(key):
            image = attempt(self.train.open, self.train, candidate, bad)
            if image is not None:
                with drawing_from(self.config.seed, stream, epoch, index):
                    return np.asarray(self.transforms[0](image)), candidate, bad
        return self._black(), NONE, bad

    def _candidates(self, key: Key) -> Iterator[int]:
        """A training image's index, then replacements drawn at random from the key, so that none is favoured."""
        *_, index = key
        yield index
        if self.config.bad_images == "skip":
            count = len(self.train.labels)
            rng = np.random.default_rng([REPLACE, self.config.seed, *key])
            drawn = rng.choice(count, min(count, MAX_SKIPPED), replace=False)
            yield from drawn[drawn != index][: MAX_SKIPPED - 1].tolist()

    def _black(self) -> np.ndarray:
        return np.zeros((3, self.size, self.size), dtype=np.uint8)

    @staticmethod
    def collate(items: list[tuple[np.ndarray, int, list]]) -> tuple[Tensor, list[int], list[tuple[str, str]]]:
        """A batch: images (B, 3, H, W) uint8, their indices, and what could not be read."""
        images, indices, bad = zip(*items)
        return shared(np.stack(images)), list(indices), [entry for some in bad for entry in some]


def shared(array: np.ndarray) -> Tensor:
    """A tensor in shared memory. The queue's thread would move it too, but silently lose it if /dev/shm is full."""
    tensor = torch.from_numpy(array)
    return tensor.share_memory_() if get_worker_info() else tensor


def attempt(read: Callable[[int], T], source: Source, index: int, bad: list[tuple[str, str]]) -> T | None:
    """`read(index)`, or None and a new entry in `bad` if it fails."""
    try:
        return read(index)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise any kind
        # PIL's messages contain the address of the object that it read from.
        reason = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))
        bad.append((source.name(index), (reason or type(error).__name__).splitlines()[0]))
        return None


class Sampler:
    """The loader's batch sampler; `batches` are the keys to read next."""

    def __init__(self) -> None:
        self.batches: Iterator[list[Key]] = iter(())

    def __iter__(self) -> Iterator[list[Key]]:
        return self.batches


def ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach the whole process group, to the training process, which stops the workers
    itself, if need be with a second SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


@dataclass
class FromWorkers(Dataset):
    """Images read by worker processes. One iteration at a time: starting another ends it.

    Args:
        config: workers, batch_size, timeout.
        images: the images.
        classes: number of classes.
        augment: augments and normalises batches on the device.
        train: None, and the training labels (N,) int64; by default those of `images`.
        wrong: number of training labels that were replaced by a wrong class.
    """

    config: TrainConfig
    images: Images
    classes: int
    augment: Augment
    train: tuple[None, Tensor] | None = None
    wrong: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")
    layout: torch.memory_format = torch.contiguous_format

    channels = 3

    def __post_init__(self) -> None:
        train, test = self.images.train, self.images.test
        self.train = self.train or (None, torch.from_numpy(train.labels))
        self.size, self.test_size, self.left_out = self.images.size, len(test.labels), train.left_out + test.left_out
        self.workers = default_workers() if self.config.workers is None else self.config.workers
        self.sampler = Sampler()
        self.loader: DataLoader | None = None

    @property
    def names(self) -> bytes:
        return getattr(self.images.train, "names", np.array(())).tobytes()

    def to(self, device: torch.device, memory_format: torch.memory_format) -> FromWorkers:
        self.device, self.layout = device, memory_format
        return self

    def why_lost(self, error: Exception) -> str | None:
        workers = getattr(getattr(self.loader, "_iterator", None), "_workers", ())
        try:
            for worker in workers:
                worker.join(0.1)  # its connections close before it exits
            codes = {worker.exitcode for worker in workers} - {None, 0}
        except RuntimeError:  # from torch's SIGCHLD handler
            codes = {1}
        # Either torch's error names its file in /dev/shm, or a worker was killed while it wrote there.
        if re.search("</torch_|Bus error", str(error)) or -signal.SIGBUS in codes:
            return f"/dev/shm is full: {SHARED_MEMORY}"
        if "DataLoader timed out" in str(error):
            return (
                f"the worker processes sent nothing for {self.config.timeout:g} s (timeout): perhaps a disk or a "
                "network does not respond; raise timeout, or use --workers 0"
            )
        return "a worker process was killed, perhaps for lack of memory: lower workers" if codes else None

    def close(self) -> None:
        """Stop the worker processes, by force if they hang; the next iteration starts new ones."""
        iterator = getattr(self.loader, "_iterator", None)
        self.loader = None
        if iterator is None:
            return
        # torch waits up to 5 s for each of them, one after the other.
        force = threading.Timer(PATIENCE, lambda: [worker.kill() for worker in iterator._workers])
        force.start()
        try:
            with suppress(RuntimeError):  # a worker was killed
                iterator._shutdown_workers()
        finally:
            force.cancel()

    def _batches(self, planned: Iterator[Planned]) -> Iterator[Batch]:
        planned, ahead = itertools.tee(planned)  # workers read ahead
        keys = ([(path[1], path[2], index) for index in indices.tolist()] for indices, path, *_ in ahead)
        for (_, *where), (images, indices) in zip(planned, self._read(keys)):
            yield self.augment(images, *where), self.train[1][indices].to(self.device, non_blocking=True)

    def test_batches(self, size: int, numbers: Sequence[int]) -> Iterator[Batch]:
        keys = ([(TEST, 0, i) for i in range(n * size, min((n + 1) * size, self.test_size))] for n in numbers)
        labels = torch.from_numpy(self.images.test.labels)
        for images, indices in self._read(keys):
            chosen = labels[indices].clone()
            for row, index in enumerate(indices.tolist() if self.bad else ()):
                if self.images.test.name(index) in self.bad:
                    chosen[row] = IGNORED
            yield self.augment.prepare(images), chosen.to(self.device, non_blocking=True)

    def _read(self, keys: Iterator[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch of keys, uint8 images (B, 3, size, size) on the device and their indices."""
        for images, indices in self._loaded(keys):
            # From pinned memory to a GPU, the copy needs no host sync.
            yield images.to(self.device, non_blocking=True).contiguous(memory_format=self.layout), indices

    def _loaded(self, keys: Iterator[list[Key]]) -> Iterator[tuple[Any, Tensor]]:
        """What the workers return for each batch of keys, and the indices; unreadable images are recorded or raised."""
        self.sampler.batches = keys
        for batch, indices, bad in self._from_loader():
            for name, reason in bad:
                if self.config.bad_images == "stop":
                    raise ValueError(f"cannot read {name}: {reason}; use bad_images skip to replace such images")
                self.bad[name] = reason
            if NONE in indices:
                (name, reason), tried = bad[0], min(self.train_size, MAX_SKIPPED)
                raise ValueError(f"{tried} training images in a row cannot be read, the first {name}: {reason}")
            yield batch, torch.tensor(indices)

    def _from_loader(self) -> Iterator[Any]:
        with worker_errors(self):
            if self.loader is None:
                self.loader = self._loader()
                try:
                    batches = iter(self.loader)
                except (OSError, RuntimeError) as error:
                    raise WorkerError(f"cannot start the worker processes: {error}; {SHARED_MEMORY}") from error
            else:
                batches = self._waited_for(lambda: iter(self.loader))
            while (batch := self._waited_for(lambda: next(batches, None))) is not None:
                yield batch

    def _waited_for(self, get: Callable[[], T]) -> T:
        self.waiting = True
        try:
            return get()
        finally:
            self.waiting = False

    def _loader(self) -> DataLoader:
        # Prefetched batches take shared memory: four per worker, fewer if they are large.
        ahead = max(1, min(4, 1024 // self.config.batch_size))
        options: dict[str, Any] = {"prefetch_factor": ahead, "persistent_workers": True, "timeout": self.config.timeout}
        return DataLoader(
            self.images,
            batch_sampler=self.sampler,
            num_workers=self.workers,
            collate_fn=self.images.collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # not the global one, which dropout draws from
            **(options if self.workers else {}),
        )


def default_workers() -> int:
    """A training process's share of the available CPUs, at most 16."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
