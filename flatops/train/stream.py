"""Images that worker processes read while the device trains: any number of them gives the same batches."""

from __future__ import annotations

import hashlib
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
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .augment import REPLACE, Augment, drawing_from
from .data import IGNORED, Batch, ReaderError, piece, reader_errors, shuffled

T = TypeVar("T")
NONE, MOST_BAD = -1, 1000  # the number of no image; how many in a row are passed by
TEST = -1  # where training images have a stream
Key = tuple[int, int, int]  # stream, epoch, index
PATIENCE = 2.0  # seconds that reading processes have to end by themselves
SHARED_MEMORY = (
    "batches travel through /dev/shm from the processes that read images: make it larger (docker run --shm-size 8g, or mount "
    "-o remount,size=8g /dev/shm), or read without them (--workers 0)"
)


class Source(Protocol):
    """Images and their names, in a form that costs worker processes no memory."""

    labels: np.ndarray
    left_out: Counter[str]  # what lies beside them, and is not read

    def open(self, index: int) -> Image.Image:
        """An image in RGB, decoded."""

    def name(self, index: int) -> str:
        """What to call it when it cannot be read."""


@dataclass
class Images(Dataset):
    """Single images by key: decoded, cropped and distorted at random, as uint8.

    Args:
        train, test: where they come from.
        transforms: of PIL images to uint8 (3, size, size), of training and of test images.
        size: side of what comes out.
        seed: with the key, it decides what is random.
        skip_bad: whether a training image that cannot be read has another in its place; otherwise it is black, and an error.
    """

    train: Source
    test: Source
    transforms: tuple[Callable[[Image.Image], Any], Callable[[Image.Image], Any]]
    size: int
    seed: int
    skip_bad: bool = False

    def __getitem__(self, key: Key) -> tuple[np.ndarray, int, list[tuple[str, str]]]:
        """The image, its number, and what could not be read: a test image is black then, a training one another that can be."""
        stream, epoch, index = key
        bad: list[tuple[str, str]] = []
        if stream == TEST:
            image = attempt(self.test.open, self.test, index, bad)
            if image is not None:
                return np.asarray(self.transforms[1](image)), index, bad
            return self._black(), index, bad
        for number in self._candidates(key):
            image = attempt(self.train.open, self.train, number, bad)
            if image is not None:
                with drawing_from(self.seed, stream, epoch, index):
                    return np.asarray(self.transforms[0](image)), number, bad
        return self._black(), NONE, bad

    def _candidates(self, key: Key) -> Iterator[int]:
        """A training image, and the others to try in its place, which the key draws: the next one would be drawn for all before it."""
        *_, index = key
        yield index
        if self.skip_bad:
            count = len(self.train.labels)
            drawn = np.random.default_rng([REPLACE, self.seed, *key]).choice(count, min(count, MOST_BAD), replace=False)
            yield from drawn[drawn != index][: MOST_BAD - 1].tolist()

    def _black(self) -> np.ndarray:
        return np.zeros((3, self.size, self.size), dtype=np.uint8)

    @staticmethod
    def collate(items: list[tuple[np.ndarray, int, list]]) -> tuple[Tensor, list[int], list[tuple[str, str]]]:
        """A batch: images (B, 3, H, W) uint8, their numbers, and what could not be read."""
        images, numbers, bad = zip(*items)
        return sent(np.stack(images)), list(numbers), [entry for some in bad for entry in some]


def sent(array: np.ndarray) -> Tensor:
    """A tensor for the process that trains, in shared memory. It would be put there on its way too, by a thread of the queue's,
    which loses the batch without a word to anybody where /dev/shm is full; here the error arrives."""
    tensor = torch.from_numpy(array)
    return tensor.share_memory_() if get_worker_info() else tensor


def attempt(opened: Callable[[int], T], source: Source, index: int, bad: list[tuple[str, str]]) -> T | None:
    """What `opened` makes of an image of a source, or None and a new entry in `bad`."""
    try:
        return opened(index)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they trip over
        reason = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))  # PIL names the object that it read from, by its address
        bad.append((source.name(index), (reason or type(error).__name__).splitlines()[0]))
        return None


class Plan:
    """The keys of each batch that the loader is to make next, as its batch sampler."""

    def __init__(self) -> None:
        self.batches: Iterator[list[Key]] = iter(())

    def __iter__(self) -> Iterator[list[Key]]:
        return self.batches


def deaf_to_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach the whole group of processes, and the one that trains decides what becomes of the others: it
    ends them itself, with a second SIGTERM if it has to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


@dataclass
class Stream:
    """A data set read by worker processes; as `Data` to those who use it.

    Args:
        images: the images.
        train: None and the labels (N,) int64 to train on.
        classes: number of classes.
        augment: what happens to batches on the device.
        workers: processes that read; 0 reads in between steps.
        batch_size: images in a batch over all processes.
        timeout: seconds after which one that waits for the processes that read gives up.
        wrong: number of training labels that were replaced.
    """

    images: Images
    train: tuple[None, Tensor]
    classes: int
    augment: Augment
    workers: int
    batch_size: int
    timeout: float = 600.0
    wrong: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")
    layout: torch.memory_format = torch.contiguous_format
    channels: int = 3

    def __post_init__(self) -> None:
        self.plan = Plan()
        self.loader: DataLoader | None = None
        self.waiting = False

    @property
    def left_out(self) -> Counter[str]:
        """See Data.left_out."""
        return self.images.train.left_out + self.images.test.left_out

    @property
    def size(self) -> int:
        return self.images.size

    @property
    def train_size(self) -> int:
        return len(self.train[1])

    @property
    def test_size(self) -> int:
        """Test images, those included that cannot be read."""
        return len(self.images.test.labels)

    @property
    def fingerprint(self) -> str:
        """What tells these training images from others on resume: their names and labels."""
        digest = hashlib.sha256(self.train[1].numpy().tobytes())
        digest.update(getattr(self.images.train, "names", np.array(())).tobytes())
        return f"{self.train_size} images of {self.classes} classes, {digest.hexdigest()[:16]}"

    def to(self, device: torch.device, memory_format: torch.memory_format) -> Stream:
        """The same data, whose batches go to a device."""
        self.device, self.layout = device, memory_format
        return self

    def why_lost(self, error: Exception) -> str | None:
        """See Data.why_lost."""
        workers = getattr(getattr(self.loader, "_iterator", None), "_workers", ())
        try:
            for worker in workers:
                worker.join(0.1)  # its connections close before it is gone
            codes = {worker.exitcode for worker in workers} - {None, 0}
        except RuntimeError:  # which torch raises in its handler of the signal that a process has ended
            codes = {1}
        # torch names its file in /dev/shm, or a process has written where there was no room any more.
        if re.search("</torch_|Bus error", str(error)) or -signal.SIGBUS in codes:
            return f"/dev/shm is full: {SHARED_MEMORY}"
        if "DataLoader timed out" in str(error):
            return (
                f"the processes that read images sent nothing for {self.timeout:g} s (timeout): they may wait for a disk or a "
                "network that does not answer; --workers 0 reads without them"
            )
        return "a process that reads images was killed, for want of memory perhaps: lower workers" if codes else None

    def close(self) -> None:
        """End the worker processes, those that are stuck by force; the next pass would start others."""
        iterator = getattr(self.loader, "_iterator", None)
        self.loader = None
        if iterator is None:
            return
        # torch asks one after the other, and waits for 5 s each time.
        force = threading.Timer(PATIENCE, lambda: [worker.kill() for worker in iterator._workers])
        force.start()
        try:
            with suppress(RuntimeError):  # raised where a worker is killed
                iterator._shutdown_workers()
        finally:
            force.cancel()

    def batches(self, size: int, *, stream: int, **which: int) -> Iterator[Batch]:
        """See Data.batches."""
        for (batch,) in self.steps([stream], size, **which):
            yield batch

    def steps(
        self,
        streams: Sequence[int],
        size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        part: int = 0,
        parts: int = 1,
    ) -> Iterator[tuple[Batch, ...]]:
        """See Data.steps. One pass at a time: a new one ends the last."""
        mine, count = piece(size, part, parts), self.train_size
        orders = [shuffled(count, seed=seed, epoch=epoch, stream=stream) for stream in streams]
        numbers = range(start, count // size)

        def plan() -> Iterator[list[Key]]:
            for number in numbers:
                for stream, order in zip(streams, orders):
                    chosen = order[number * size : (number + 1) * size][mine]
                    yield [(stream, epoch, int(index)) for index in chosen]

        made = self._read(plan())
        for number in numbers:
            step = []
            for stream in streams:
                images, indices = next(made)
                images = self.augment(images, [seed, stream, epoch, number], size, mine)
                step.append((images, self.train[1][indices].to(self.device, non_blocking=True)))
            yield tuple(step)

    def test_batches(self, size: int, which: Sequence[int]) -> Iterator[Batch]:
        """See Data.test_batches. Images that cannot be read have the label IGNORED."""
        count = self.test_size
        plan = ([(TEST, 0, index) for index in range(n * size, min((n + 1) * size, count))] for n in which)
        labels = torch.from_numpy(self.images.test.labels)
        for images, indices in self._read(plan):
            chosen = labels[indices].clone()
            for row, index in enumerate(indices.tolist() if self.bad else ()):
                if self.images.test.name(index) in self.bad:
                    chosen[row] = IGNORED
            yield self.augment.prepare(images), chosen.to(self.device, non_blocking=True)

    def _read(self, plan: Iterator[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images (B, 3, size, size) on the device, and their numbers."""
        for images, indices in self._loaded(plan):
            # On a GPU the host does not wait for the copy: the memory is pinned.
            yield images.to(self.device, non_blocking=True).contiguous(memory_format=self.layout), indices

    def _loaded(self, plan: Iterator[list[Key]]) -> Iterator[tuple[Any, Tensor]]:
        """What worker processes make of each batch of keys, and the numbers; what could not be read is noted, or raised."""
        self.plan.batches = plan
        for batch, numbers, bad in self._batches_of_workers():
            for name, reason in bad:
                if not self.images.skip_bad:
                    raise ValueError(
                        f"cannot read {name}: {reason}; bad_images skip would take another image in its place"
                    )
                self.bad[name] = reason
            if NONE in numbers:
                (name, reason), tried = bad[0], min(self.train_size, MOST_BAD)
                raise ValueError(f"{tried} training images in a row cannot be read, the first {name}: {reason}")
            yield batch, torch.tensor(numbers)

    def _batches_of_workers(self) -> Iterator[Any]:
        """What the loader has."""
        with reader_errors(self):
            if self.loader is None:
                self.loader = self._loader()
                try:
                    batches = iter(self.loader)
                except (OSError, RuntimeError) as error:
                    raise ReaderError(f"cannot start the processes that read images: {error}; {SHARED_MEMORY}") from error
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
        # What is ahead lies in shared memory: four batches a worker, fewer of large ones.
        ahead = max(1, min(4, 1024 // self.batch_size))
        kept = {"prefetch_factor": ahead, "persistent_workers": True, "timeout": self.timeout}
        some: dict[str, Any] = kept if self.workers else {}
        return DataLoader(
            self.images,
            batch_sampler=self.plan,
            num_workers=self.workers,
            collate_fn=self.images.collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=deaf_to_signals,
            generator=torch.Generator(),  # or every pass would draw from the one that dropout uses
            **some,
        )


def default_workers() -> int:
    """A process's share of the CPUs that this machine lets it use, 16 at most."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
