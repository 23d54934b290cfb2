"""Datasets whose images worker processes read while the device trains; any number of them gives the same batches."""

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
NONE, MOST_BAD = -1, 1000  # the index of no image; how many unreadable ones in a row are skipped
TEST = -1  # takes the place of a stream in the keys of test images
Key = tuple[int, int, int]  # stream, epoch, index
PATIENCE = 2.0  # seconds that workers have to end by themselves
SHARED_MEMORY = (
    "batches travel through /dev/shm from the processes that read images: make it larger (docker run --shm-size 8g, or mount "
    "-o remount,size=8g /dev/shm), or read without them (--workers 0)"
)


class Source(Protocol):
    """One split's images and names, in a form that worker processes share without copying."""

    labels: np.ndarray
    left_out: Counter[str]  # see Dataset

    def open(self, index: int) -> Image.Image:
        """An image in RGB, decoded."""

    def name(self, index: int) -> str:
        """What to call it when it cannot be read."""


@dataclass
class Images:
    """Single images by key, decoded and randomly augmented, as uint8: what the workers' DataLoader indexes.

    Args:
        config: seed, from which together with the key all that is random follows; bad_images.
        train, test: where they come from.
        transforms: of training and of test images, from PIL to uint8 (3, size, size).
        size: side of an image in pixels.
    """

    config: TrainConfig
    train: Source
    test: Source
    transforms: tuple[Callable[[Image.Image], Any], Callable[[Image.Image], Any]]
    size: int

    def __getitem__(self, key: Key) -> tuple[np.ndarray, int, list[tuple[str, str]]]:
        """The image, its index, and what could not be read: then a test image is black, a training image replaced."""
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
        """A training image and those to try in its place, drawn by the key: neighbours would be favoured otherwise."""
        *_, index = key
        yield index
        if self.config.bad_images == "skip":
            count = len(self.train.labels)
            rng = np.random.default_rng([REPLACE, self.config.seed, *key])
            drawn = rng.choice(count, min(count, MOST_BAD), replace=False)
            yield from drawn[drawn != index][: MOST_BAD - 1].tolist()

    def _black(self) -> np.ndarray:
        return np.zeros((3, self.size, self.size), dtype=np.uint8)

    @staticmethod
    def collate(items: list[tuple[np.ndarray, int, list]]) -> tuple[Tensor, list[int], list[tuple[str, str]]]:
        """A batch: images (B, 3, H, W) uint8, their indices, and what could not be read."""
        images, indices, bad = zip(*items)
        return shared(np.stack(images)), list(indices), [entry for some in bad for entry in some]


def shared(array: np.ndarray) -> Tensor:
    """A tensor in shared memory, for the process that trains. The queue's thread would put it there too, but loses the
    batch in silence where /dev/shm is full; here the error is raised."""
    tensor = torch.from_numpy(array)
    return tensor.share_memory_() if get_worker_info() else tensor


def attempt(opened: Callable[[int], T], source: Source, index: int, bad: list[tuple[str, str]]) -> T | None:
    """What `opened` returns for an image of a source, or None and a new entry in `bad`."""
    try:
        return opened(index)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they trip over
        # PIL names the object that it read from by its address.
        reason = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))
        bad.append((source.name(index), (reason or type(error).__name__).splitlines()[0]))
        return None


class Sampler:
    """The loader's batch sampler: the keys of each batch to read next."""

    def __init__(self) -> None:
        self.batches: Iterator[list[Key]] = iter(())

    def __iter__(self) -> Iterator[list[Key]]:
        return self.batches


def ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach all processes of the group, to the one that trains: it ends the workers
    itself, with a second SIGTERM if need be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


@dataclass
class FromWorkers(Dataset):
    """Images that worker processes read. One pass at a time: a new one ends the last.

    Args:
        config: workers, batch_size, timeout.
        images: the images.
        classes: number of classes.
        augment: what happens to batches on the device.
        train: None, and the labels (N,) int64 to train on; by default those of `images`.
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
        """See Dataset.to."""
        self.device, self.layout = device, memory_format
        return self

    def why_lost(self, error: Exception) -> str | None:
        """See Dataset.why_lost."""
        workers = getattr(getattr(self.loader, "_iterator", None), "_workers", ())
        try:
            for worker in workers:
                worker.join(0.1)  # its connections close before it has ended
            codes = {worker.exitcode for worker in workers} - {None, 0}
        except RuntimeError:  # torch's handler of SIGCHLD raises it
            codes = {1}
        # Either torch names its file in /dev/shm, or a worker has written where there was no room left.
        if re.search("</torch_|Bus error", str(error)) or -signal.SIGBUS in codes:
            return f"/dev/shm is full: {SHARED_MEMORY}"
        if "DataLoader timed out" in str(error):
            return (
                f"the processes that read images sent nothing for {self.config.timeout:g} s (timeout): they may wait "
                "for a disk or a network that does not answer; --workers 0 reads without them"
            )
        return "a process that reads images was killed, for want of memory perhaps: lower workers" if codes else None

    def close(self) -> None:
        """End the worker processes, by force if they hang; the next pass would start new ones."""
        iterator = getattr(self.loader, "_iterator", None)
        self.loader = None
        if iterator is None:
            return
        # torch waits up to 5 s for each of them in turn.
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

    def test_batches(self, size: int, which: Sequence[int]) -> Iterator[Batch]:
        """See Dataset.test_batches."""
        keys = ([(TEST, 0, i) for i in range(n * size, min((n + 1) * size, self.test_size))] for n in which)
        labels = torch.from_numpy(self.images.test.labels)
        for images, indices in self._read(keys):
            chosen = labels[indices].clone()
            for row, index in enumerate(indices.tolist() if self.bad else ()):
                if self.images.test.name(index) in self.bad:
                    chosen[row] = IGNORED
            yield self.augment.prepare(images), chosen.to(self.device, non_blocking=True)

    def _read(self, keys: Iterator[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images (B, 3, size, size) on the device, and their indices, of each batch of keys."""
        for images, indices in self._loaded(keys):
            # The memory is pinned where there is a GPU, and the host does not wait for the copy.
            yield images.to(self.device, non_blocking=True).contiguous(memory_format=self.layout), indices

    def _loaded(self, keys: Iterator[list[Key]]) -> Iterator[tuple[Any, Tensor]]:
        """What the workers return for each batch of keys, and the indices; unreadable images are noted, or raised."""
        self.sampler.batches = keys
        for batch, indices, bad in self._from_loader():
            for name, reason in bad:
                if self.config.bad_images == "stop":
                    raise ValueError(
                        f"cannot read {name}: {reason}; bad_images skip would take another image in its place"
                    )
                self.bad[name] = reason
            if NONE in indices:
                (name, reason), tried = bad[0], min(self.train_size, MOST_BAD)
                raise ValueError(f"{tried} training images in a row cannot be read, the first {name}: {reason}")
            yield batch, torch.tensor(indices)

    def _from_loader(self) -> Iterator[Any]:
        with worker_errors(self):
            if self.loader is None:
                self.loader = self._loader()
                try:
                    batches = iter(self.loader)
                except (OSError, RuntimeError) as error:
                    reason = f"{error}; {SHARED_MEMORY}"
                    raise WorkerError(f"cannot start the processes that read images: {reason}") from error
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
        # Batches read ahead take up shared memory: four per worker, fewer if they are large.
        ahead = max(1, min(4, 1024 // self.config.batch_size))
        options: dict[str, Any] = {"prefetch_factor": ahead, "persistent_workers": True, "timeout": self.config.timeout}
        return DataLoader(
            self.images,
            batch_sampler=self.sampler,
            num_workers=self.workers,
            collate_fn=self.images.collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # every pass would draw from dropout's otherwise
            **(options if self.workers else {}),
        )


def default_workers() -> int:
    """A training process's share of the CPUs that it may use, 16 at most."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
