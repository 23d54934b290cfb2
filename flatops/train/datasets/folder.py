"""Any tree of images by class, such as ImageNet's train/ and val/."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from .. import dali
from ..augment import Augment, randaugment
from ..config import TrainConfig
from ..dataset import format_counts, register
from ..decode import EXTENSIONS, decoded, to_array
from ..workers import FromWorkers, Images

COLOURS = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}  # of ImageNet


@register("folder", randaugment=True)
def folder(config: TrainConfig) -> FromWorkers:
    """A tree of train/CLASS/IMAGE and val/CLASS/IMAGE.

    Raises:
        ValueError: no such tree, an empty class, different classes in val/ and train/, or DALI is not installed.
        OSError: a folder cannot be read.
    """
    if config.decoder == "dali":
        dali.check_installed()
    root = config.data_dir
    if root is None:
        raise ValueError("data folder needs data_dir, the folder with train/ and val/")
    held_out = next((root / name for name in ("val", "validation", "test") if (root / name).is_dir()), root / "val")
    train, test = (find_classes(root / "train"), find_classes(held_out))
    if train != test:
        differ = sorted(set(train) ^ set(test))
        some = ", ".join(differ[:3]) + (" ..." if len(differ) > 3 else "")
        raise ValueError(
            f"{root} has {len(train)} classes in train/ and {len(test)} in {held_out.name}/; only in one: {some}"
        )
    sources = [Files(split, *find_images(split, train)) for split in (root / "train", held_out)]
    size = config.image_size or 224
    reader, kind = (dali.Windows, dali.FromDali) if config.decoder == "dali" else (Images, FromWorkers)
    images = reader(config, *sources, transforms(config, size), size)
    return kind(config, images, len(train), Augment.of(config, **COLOURS))


class Files:
    """A `Source` of the image files of one split. Names are an array because workers would copy a list of them."""

    def __init__(self, root: Path, names: list[bytes], labels: list[int], left_out: Counter[str]) -> None:
        self.root, self.names, self.labels, self.left_out = str(root), np.array(names), np.array(labels), left_out

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()

    def open(self, index: int) -> Image.Image:
        return decoded(self.read(index))


def find_classes(split: Path) -> list[str]:
    """The classes of a split, which are its folders by name; ValueError if there are fewer than two."""
    if not split.is_dir():
        raise ValueError(f"no folder {split}: data_dir needs train/ and val/, each with a folder of images per class")
    classes = sorted(
        (e.name for e in entries(split) if is_folder(e) and not leads_back(e, [real(split)])), key=os.fsencode
    )
    if len(classes) < 2:
        raise ValueError(f"{split} has {len(classes)} class folders, but needs two or more")
    return classes


def find_images(split: Path, classes: list[str]) -> tuple[list[bytes], list[int], Counter[str]]:
    """The sorted image files of a split, relative to it, their labels, and the numbers of other files by extension.

    Raises:
        ValueError: a class has no images.
        OSError: a folder cannot be read.
    """
    names: list[bytes] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter()
    for label, name in enumerate(classes):
        found, others = [], Counter()
        for file in files_below(split / name, others):
            extension = os.path.splitext(file)[1].lower()
            if extension in EXTENSIONS:
                found.append(os.fsencode(file.removeprefix(os.path.join(split, ""))))
            else:
                others[extension or "no extension"] += 1
        if not found:
            only = f"; it has {format_counts(others)}" if others else ""
            raise ValueError(f"the class folder {split / name} has no images ({', '.join(EXTENSIONS)}){only}")
        names += sorted(found)
        labels += [label] * len(found)
        left_out += others
    return names, labels, left_out


def files_below(folder: Path | str, left_out: Counter[str], parents: tuple[str, ...] = ()) -> Iterator[str]:
    """The files in a folder and its subfolders, except hidden ones. Links are followed, except to a parent folder.

    Args:
        folder: where to look.
        left_out: counts the links that are not followed.
        parents: the folders that led here.
    """
    parents = (*parents, real(folder))
    for entry in entries(folder):
        if not is_folder(entry):
            if entry.is_symlink() or entry.is_file():  # not a pipe, which could block forever
                yield entry.path
        elif leads_back(entry, parents):
            left_out["links to a parent folder"] += 1
        else:
            yield from files_below(entry.path, left_out, parents)


def entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """The entries of a folder, except hidden ones: .ipynb_checkpoints has copies, and ._x.jpg is not an image."""
    with os.scandir(folder) as found:
        return [entry for entry in found if not entry.name.startswith(".")]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def leads_back(entry: os.DirEntry[str], parents: Iterable[str]) -> bool:
    """Whether an entry is a link to one of its parent folders, or to a folder that contains one."""
    if not entry.is_symlink():
        return False
    target = real(entry.path)
    return any(parent.startswith(target) for parent in parents)


def real(folder: Path | str) -> str:
    """A folder's path with links resolved and a trailing slash."""
    return os.path.join(os.path.realpath(folder), "")


def transforms(config: TrainConfig, size: int) -> tuple[Callable, Callable]:
    """ImageNet's usual crops: 8 to 100 % of the area for training, the central 7/8 of the shorter side for testing."""
    if config.decoder == "dali":
        return (dali.random_window if config.augment == "standard" else dali.central_window), dali.central_window
    from timm.data import create_transform  # slow to import

    common = {"input_size": size, "interpolation": "bilinear", "use_prefetcher": True, "crop_pct": 0.875}
    testing = create_transform(**common)
    distort = randaugment(config, size, COLOURS["mean"]) if config.randaugment else None
    if config.augment == "standard":
        return create_transform(is_training=True, color_jitter=None, auto_augment=config.randaugment, **common), testing
    if distort:
        from torchvision.transforms import CenterCrop, Compose, Resize

        return Compose([Resize(size), CenterCrop(size), distort, to_array]), testing
    return testing, testing
