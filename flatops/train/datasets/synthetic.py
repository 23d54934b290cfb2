"""Random noise with random labels, for timing."""

from __future__ import annotations

import torch

from ..augment import Augment
from ..config import TrainConfig
from ..dataset import register
from ..memory import InMemory
from ..order import Batch


@register("synthetic")
def synthetic(config: TrainConfig) -> InMemory:
    """Enough images for four batches, at least 1,024."""
    generator = torch.Generator().manual_seed(config.seed)
    side, classes = config.image_size or 32, config.classes or 10

    def drawn(count: int) -> Batch:
        images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
        return images, torch.randint(classes, (count,), generator=generator)

    augment = Augment.of(config, mean=(127.5,) * 3, std=(73.9,) * 3)
    return InMemory(drawn(max(1024, 4 * config.batch_size)), drawn(256), classes, augment=augment)
