"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images of 32×32 pixels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from PIL import Image

from ..augment import Augment, randaugment
from ..config import TrainConfig
from ..dataset import register
from ..decode import to_array
from ..download import torchvision_sets
from ..memory import InMemory
from ..workers import FromWorkers, Images

COLOURS = {
    "cifar10": {"mean": (125.307, 122.950, 113.865), "std": (62.993, 62.089, 66.705)},
    "cifar100": {"mean": (129.304, 124.070, 112.434), "std": (68.170, 65.392, 70.418)},
}
PADDING = 4


@register("cifar10", "cifar100", randaugment=True)
def cifar(config: TrainConfig) -> InMemory | FromWorkers:
    """In memory, augmented in batches; with RandAugment, which takes single images, from workers."""
    from torchvision import datasets, transforms  # slow to import

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[config.data]
    colours, standard = COLOURS[config.data], config.augment == "standard"
    train, test = torchvision_sets(kind, config)
    classes = len(train.classes)
    if not config.randaugment:
        augment = Augment.of(config, padding=PADDING * standard, flip=standard, **colours)
        pairs = (
            (torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in (train, test)
        )
        return InMemory(*pairs, classes, augment=augment)
    crops = [transforms.RandomCrop(32, PADDING), transforms.RandomHorizontalFlip()]
    training = transforms.Compose([*crops * standard, randaugment(config, 32, colours["mean"]), to_array])
    images = Images(config, Arrays(train), Arrays(test), (training, to_array), 32)
    return FromWorkers(config, images, classes, Augment.of(config, **colours))


class Arrays:
    """A `Source` of the images of a torchvision dataset."""

    left_out: Counter[str] = Counter()

    def __init__(self, images) -> None:
        self.arrays, self.labels = images.data, np.array(images.targets)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.arrays[index])

    def name(self, index: int) -> str:
        return f"image {index}"
