"""Photographs: CIFAR-10 and CIFAR-100, and any folder of images by class."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import dali
from .augment import Augment
from .config import TrainConfig
from .data import Data
from .stream import Images, Stream, default_workers

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
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
        cifar_sets(config, download=True)
    except Exception as error:  # urllib, http.client, socket, tarfile and torchvision have one each
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"cannot download {config.data} to {root}: {reason}; try again, or give the folder that has it as data_dir"
        ) from error


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

    def __init__(self, root: Path, names: list[str], labels: list[int]) -> None:
        self.root, self.labels = str(root), np.array(labels)
        self.names = np.array([os.fsencode(name) for name in names])

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()

    def open(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.read(index))).convert("RGB")


def folder(config: TrainConfig) -> Stream:
    """A tree of train/CLASS/IMAGE and val/CLASS/IMAGE.

    Raises:
        ValueError: no such tree, an empty class, or other classes in val/ than in train/; or DALI is not installed.
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
    classes = sorted(e.name for e in os.scandir(split) if e.is_dir() and not e.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"{split} has {len(classes)} class folders: two or more are needed")
    return classes


def find_images(split: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    """The image files of a split by name, relative to it, and their labels.

    Raises:
        ValueError: a class has none.
    """
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = []
        for place, _, files in os.walk(split / name, followlinks=True):
            inside = os.path.relpath(place, split)
            found += [os.path.join(inside, f) for f in files if f.lower().endswith(EXTENSIONS)]
        if not found:
            raise ValueError(f"the class folder {split / name} has no images ({', '.join(EXTENSIONS)})")
        names += sorted(found)
        labels += [label] * len(found)
    return names, labels


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
    )
