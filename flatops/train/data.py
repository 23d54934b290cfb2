"""Datasets by name, with the wrong labels that a run asks for."""

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

for _file in pkgutil.iter_modules(datasets.__path__):
    importlib.import_module(f"{datasets.__name__}.{_file.name}")  # which registers the datasets in it


def load(config: TrainConfig) -> Dataset:
    """The dataset that a run asks for, with its share of wrong training labels. Collective if it has to be downloaded.

    Raises:
        ValueError: no such dataset, one that is not as it should be, or fewer training images than a batch needs.
        OSError: a download broke off.
    """
    if config.data not in DATASETS:
        raise ValueError(f"unknown data {config.data!r}; choose from {', '.join(DATASETS)}")
    loader, takes_randaugment = DATASETS[config.data]
    if config.randaugment and not takes_randaugment:
        raise ValueError(f"randaugment is for photographs, not for {config.data}")
    dataset = loader(config)
    if config.classes and dataset.classes != config.classes:
        raise ValueError(f"{config.data} has {dataset.classes} classes, and classes {config.classes} is asked for")
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
