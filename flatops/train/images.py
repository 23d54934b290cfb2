"""Photographs: CIFAR-10 and CIFAR-100, and any folder of images by class."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import dali
from .augment import Augment
from .config import TrainConfig
from .data import Data, listed
from .decode import EXTENSIONS, decoded
from .stream import Images, Stream, default_workers

IMAGENET = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
CIFAR = {
    "cifar10": {"mean": (125.307, 122.950, 113.865), "std": (62.993, 62.089, 66.705)},
    "cifar100": {"mean": (129.304, 124.070, 112.434), "std": (68.170, 65.392, 70.418)},
}
CIFAR_PADDING = 4


# CIFAR


def cifar_sets(config: TrainConfig, download: bool = False) -> list[Any]:
    """torchvision's training and test set of the CIFAR that a run asks for."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[config.data]
    root = config.data_dir or Path("data")
    return [kind(root, train=train, download=download) for train in (True, False)]


def fetch_cifar(config: TrainConfig) -> None:
    """Download CIFAR unless it is there, whole.

    Raises:
        OSError: the download broke off, or what came is damaged.
    """
    try:
        cifar_sets(config)
        return
    except RuntimeError:  # not there, or not whole: checksums are compared
        pass
    root = config.data_dir or Path("data")
    try:
        with silence_for_at_most(config.timeout):
            cifar_sets(config, download=True)
    except Exception as error:  # urllib, http.client, socket, tarfile and torchvision have one each
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"cannot download {config.data} to {root}: {reason}; try again, or give the folder that has it as data_dir"
        ) from error


@contextmanager
def silence_for_at_most(seconds: float) -> Iterator[None]:
    """A limit for how long a server may say nothing: urllib has none of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def cifar_memory(config: TrainConfig) -> Data:
    """CIFAR in the device's memory, which crops, flips and blots out whole batches."""
    standard = config.augment == "standard"
    augment = Augment.of(
        config,
        padding=CIFAR_PADDING * standard,
        flip=standard,
        **CIFAR[config.data],
    )
    sets = cifar_sets(config)
    train, test = (
        (torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in sets
    )
    return Data(train, test, classes=len(sets[0].classes), augment=augment)


class Pictures:
    """Images in memory, one by one; a source for `Images`."""

    left_out: Counter[str] = Counter()

    def __init__(self, arrays: np.ndarray, labels: list[int]) -> None:
        self.arrays, self.labels = arrays, np.array(labels)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.arrays[index])

    def name(self, index: int) -> str:
        return f"image {index}"


def cifar_stream(config: TrainConfig) -> Stream:
    """CIFAR by way of worker processes, for RandAugment."""
    from torchvision import transforms

    sets = cifar_sets(config)
    before = [transforms.RandomCrop(32, CIFAR_PADDING), transforms.RandomHorizontalFlip()]
    training = [*(before if config.augment == "standard" else []), randaugment(config, 32), to_array]
    return stream(
        config,
        [Pictures(s.data, s.targets) for s in sets],
        len(sets[0].classes),
        (transforms.Compose(training), to_array),
        32,
        CIFAR[config.data],
    )


# Folders


class Files:
    """Image files of one split; a source for `Images`. Names lie in one array: lists of a million would be copied by workers."""

    def __init__(self, root: Path, names: list[bytes], labels: list[int], left_out: Counter[str]) -> None:
        self.root, self.names, self.labels, self.left_out = str(root), np.array(names), np.array(labels), left_out

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()

    def open(self, index: int) -> Image.Image:
        return decoded(self.read(index))


def folder(config: TrainConfig) -> Stream:
    """A tree of train/CLASS/IMAGE and val/CLASS/IMAGE.

    Raises:
        ValueError: no such tree, an empty class, or other classes in val/ than in train/; or DALI is not installed.
        OSError: a folder cannot be read.
    """
    if config.decoder == "dali":
        dali.check_installed()
    root = config.data_dir
    if root is None:
        raise ValueError("data folder needs data_dir, the tree that has train/ and val/")
    held_out = next((root / name for name in ("val", "validation", "test") if (root / name).is_dir()), root / "val")
    train, test = (find_classes(root / "train"), find_classes(held_out))
    if train != test:
        differ = sorted(set(train) ^ set(test))
        some = ", ".join(differ[:3]) + (" ..." if len(differ) > 3 else "")
        raise ValueError(
            f"{root} has {len(train)} classes in train/ and {len(test)} in {held_out.name}/: not in both are {some}"
        )
    sources = [Files(split, *find_images(split, train)) for split in (root / "train", held_out)]
    size = config.image_size or 224
    return stream(config, sources, len(train), folder_transforms(config, size), size, IMAGENET)


def find_classes(split: Path) -> list[str]:
    """The classes of a split: its folders by name.

    Raises:
        ValueError: it is not there, or has fewer than two.
    """
    if not split.is_dir():
        raise ValueError(f"no folder {split}: data_dir needs train/ and val/, each with a folder of images per class")
    classes = sorted((e.name for e in entries(split) if is_folder(e) and not leads_back(e, [real(split)])), key=os.fsencode)
    if len(classes) < 2:
        raise ValueError(f"{split} has {len(classes)} class folders: two or more are needed")
    return classes


def find_images(split: Path, classes: list[str]) -> tuple[list[bytes], list[int], Counter[str]]:
    """The image files of a split by name, relative to it, and their labels; and what else is there, how often.

    Raises:
        ValueError: a class has none.
        OSError: a folder cannot be read.
    """
    names: list[bytes] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter()
    for label, name in enumerate(classes):
        found, others = [], Counter()
        for file in files_below(split / name, others):
            ending = os.path.splitext(file)[1].lower()
            if ending in EXTENSIONS:
                found.append(os.fsencode(file.removeprefix(os.path.join(split, ""))))
            else:
                others[ending or "no ending"] += 1
        if not found:
            there = f"; there is {listed(others)}" if others else ""
            raise ValueError(f"the class folder {split / name} has no images ({', '.join(EXTENSIONS)}){there}")
        names += sorted(found)
        labels += [label] * len(found)
        left_out += others
    return names, labels, left_out


def files_below(folder: Path | str, left_out: Counter[str], way: tuple[str, ...] = ()) -> Iterator[str]:
    """The files in a folder and in those below, hidden ones aside. Links are followed, unless to where they lie themselves.

    Args:
        folder: where to look.
        left_out: links that are not followed are counted here.
        way: the folders that led here.
    """
    way = (*way, real(folder))
    for entry in entries(folder):
        if not is_folder(entry):
            if entry.is_symlink() or entry.is_file():  # not a pipe, which a reader would wait at
                yield entry.path
        elif leads_back(entry, way):
            left_out["links to a folder around them"] += 1
        else:
            yield from files_below(entry.path, left_out, way)


def entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """What a folder has, but for what is hidden: .ipynb_checkpoints has copies, and ._x.jpg is no image."""
    with os.scandir(folder) as found:
        return [entry for entry in found if not entry.name.startswith(".")]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def leads_back(entry: os.DirEntry[str], way: Iterable[str]) -> bool:
    """Whether a folder is a link to one of those on the way to it, or to one that has these in it."""
    if not entry.is_symlink():
        return False
    target = real(entry.path)
    return any(place.startswith(target) for place in way)


def real(folder: Path | str) -> str:
    """A folder's name without links, with a slash behind it."""
    return os.path.join(os.path.realpath(folder), "")


def folder_transforms(config: TrainConfig, size: int) -> tuple[Callable, Callable]:
    """ImageNet's usual crops: for training of 8 to 100 % of the area, for testing the middle of 7/8 of the side."""
    if config.decoder == "dali":
        return (dali.random_window if config.augment == "standard" else dali.central_window), dali.central_window
    from timm.data import create_transform

    common = {"input_size": size, "interpolation": "bilinear", "use_prefetcher": True, "crop_pct": 0.875}
    testing = create_transform(**common)
    distort = randaugment(config, size) if config.randaugment else None
    if config.augment == "standard":
        return create_transform(
            is_training=True, color_jitter=None, auto_augment=config.randaugment, **common
        ), testing
    if distort:
        from torchvision import transforms

        return transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), distort, to_array]), testing
    return testing, testing


# Both


def randaugment(config: TrainConfig, size: int) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment.

    Raises:
        ValueError: timm cannot read what is asked for.
    """
    from timm.data.auto_augment import rand_augment_transform

    middle = tuple(round(value) for value in (CIFAR.get(config.data) or IMAGENET)["mean"])
    how = {"translate_const": round(0.45 * size), "img_mean": middle}
    try:
        return rand_augment_transform(config.randaugment, how)
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"randaugment {config.randaugment!r} is none that timm knows, such as rand-m9-mstd0.5") from error


def to_array(image: Image.Image) -> np.ndarray:
    """A PIL image as uint8 (3, H, W)."""
    return np.asarray(image).transpose(2, 0, 1)


def stream(
    config: TrainConfig,
    sources: list[Any],
    classes: int,
    transforms: tuple[Callable, Callable],
    size: int,
    colours: dict[str, tuple[float, ...]],
) -> Stream:
    """Training and test images, read by worker processes."""
    train, test = sources
    images, kind = (dali.Windows, dali.DaliStream) if config.decoder == "dali" else (Images, Stream)
    return kind(
        images(train, test, transforms, size, config.seed, config.bad_images == "skip"),
        (None, torch.from_numpy(train.labels)),
        classes,
        Augment.of(config, **colours),
        default_workers() if config.workers is None else config.workers,
        config.batch_size,
        config.timeout,
    )
