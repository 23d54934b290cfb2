"""Datasets by name, and wrong labels."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from . import datasets
from .config import TrainConfig
from .dataset import DATASETS, Dataset
from .order import LABELS

for _module in pkgutil.iter_modules(datasets.__path__):
    importlib.import_module(f"{datasets.__name__}.{_module.name}")  # registers its datasets


def load(config: TrainConfig) -> Dataset:
    """A run's dataset, with its fraction of wrong training labels. Collective for datasets that are downloaded.

    Raises:
        ValueError: unknown or malformed dataset, or fewer training images than a batch.
        OSError: the download failed.
    """
    if config.data not in DATASETS:
        raise ValueError(f"unknown data {config.data!r}; choose from {', '.join(DATASETS)}")
    loader, takes_randaugment = DATASETS[config.data]
    if config.randaugment and not takes_randaugment:
        raise ValueError(f"randaugment is for photographs, not for {config.data}")
    dataset = loader(config)
    if config.classes and dataset.classes != config.classes:
        raise ValueError(f"classes is {config.classes}, but {config.data} has {dataset.classes}")
    if config.validation:
        dataset = dataset.held_out(config.validation, config.seed)
    if dataset.train_size < config.batch_size:
        raise ValueError(
            f"batch_size {config.batch_size} exceeds the {dataset.train_size} training images of {config.data}"
        )
    images, labels = dataset.train
    noisy = wrong_labels(labels, dataset.classes, config.label_noise, config.seed)
    return replace(dataset, train=(images, noisy), wrong=int((noisy != labels).sum()))


def wrong_labels(labels: Tensor, classes: int, fraction: float, seed: int) -> Tensor:
    """Replace round(fraction·N) labels by another class, all other classes equally likely.

    Args:
        labels: (N,) int64.
        classes: number of classes.
        fraction: 0 to 1.
        seed: determines which labels, and the new classes.
    """
    rng = np.random.default_rng([seed, LABELS])
    chosen = rng.permutation(len(labels))[: round(fraction * len(labels))]
    shift = rng.integers(1, classes, size=len(chosen))
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + torch.from_numpy(shift)) % classes
    return noisy
