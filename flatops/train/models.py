"""Networks by name."""

from __future__ import annotations

import difflib
from itertools import pairwise

from torch import nn


def cnn(classes: int, channels: int) -> nn.Module:
    """Four 3×3 convolutions with BatchNorm, then a linear layer: 35,000 weights; images from 8×8 up."""
    widths = [channels, 16, 32, 32, 64]
    layers: list[nn.Module] = []
    for depth, (before, after) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        if depth % 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], classes))


def create(name: str, classes: int, channels: int) -> nn.Module:
    """The network of that name with fresh weights: `cnn` here, every other name in timm.

    Args:
        name: cnn, or any of timm.list_models().
        classes: number of outputs.
        channels: channels of an image.

    Raises:
        ValueError: timm knows no such name.
    """
    if name == "cnn":
        return cnn(classes, channels)
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, ["cnn", *timm.list_models()], n=3)
        hint = (
            f"did you mean {' or '.join(close)}?" if close else "choose cnn or a name of timm.list_models()"
        )
        raise ValueError(f"unknown model {name!r}; {hint}")
    return timm.create_model(name, num_classes=classes, in_chans=channels)
