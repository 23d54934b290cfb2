"""scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np
import torch

from ..augment import Augment
from ..config import TrainConfig
from ..dataset import register
from ..memory import InMemory


@register("digits")
def digits(config: TrainConfig) -> InMemory:
    """1,797 handwritten digits of 8×8 pixels, ten classes; a fixed, stratified quarter is the test set."""
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images / 16.0).float().reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(labels).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    images = (images - images[train].mean()) / images[train].std()
    augment = Augment.of(config) if config.cutout or config.erasing else None
    return InMemory((images[train], labels[train]), (images[test], labels[test]), classes=10, augment=augment)
