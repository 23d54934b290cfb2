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


def create(name: str, classes: int, channels: int, size: int | None = None) -> nn.Module:
    """The network of that name with new weights.

    Args:
        name: cnn; a name from timm.list_models(), for a ResNet also with _cifar appended; or torchvision:NAME with one
            from torchvision.models.list_models().
        classes: number of outputs.
        channels: channels of an image.
        size: side of an image, for networks with a fixed input size.

    Raises:
        ValueError: unknown name, or a network that cannot take this many channels.
    """
    if name == "cnn":
        return cnn(classes, channels)
    if name.startswith("torchvision:"):
        return from_torchvision(name.removeprefix("torchvision:"), classes, channels)
    import timm  # slow to import

    if name.endswith("_cifar") and timm.is_model(name.removesuffix("_cifar")):
        return for_small_images(create(name.removesuffix("_cifar"), classes, channels, size), name)
    if not timm.is_model(name):
        raise unknown(name, ["cnn", *timm.list_models()], "cnn, a name of timm.list_models() or torchvision:NAME")
    fixed = getattr(timm.get_pretrained_cfg(name, allow_unregistered=True), "fixed_input_size", False)
    some = {"img_size": size} if fixed and size else {}
    return timm.create_model(name, num_classes=classes, in_chans=channels, **some)


def from_torchvision(name: str, classes: int, channels: int) -> nn.Module:
    """A torchvision network with new weights; ValueError for an unknown name, or images without 3 channels."""
    from torchvision import models  # slow to import

    known = models.list_models(module=models)
    if name not in known:
        raise unknown(f"torchvision:{name}", [f"torchvision:{each}" for each in known], "a name of torchvision.models")
    if channels != 3:
        raise ValueError(f"torchvision's networks take images with 3 channels, not {channels}: choose one from timm")
    some = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=classes, **some)


def for_small_images(model: nn.Module, name: str) -> nn.Module:
    """A ResNet with a first convolution of 3×3, stride 1, and no pooling, as papers use on CIFAR; else ValueError."""
    first = getattr(model, "conv1", None)
    if not (isinstance(first, nn.Conv2d) and hasattr(model, "maxpool")):
        raise ValueError(f"model {name!r}: only a plain ResNet has a CIFAR variant, such as resnet18_cifar")
    model.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def unknown(name: str, known: list[str], advice: str) -> ValueError:
    """The error for an unknown name, with the most similar ones."""
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose {advice}"
    return ValueError(f"unknown model {name!r}; {hint}")
