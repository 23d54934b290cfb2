"""Every option of `flatops train` and `flatops compare`: a field is a flag, its docstring the help."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flatops.methods import METHODS, OPTIONS, find

MethodName = Literal[tuple(METHODS)]
_SUMMARIES = ((summary, ", ".join(names)) for summary, names in groupby(METHODS, lambda name: METHODS[name].summary))
METHOD_HELP = "; ".join(f"{names}: {summary}" for summary, names in _SUMMARIES if summary) + "."


@dataclass(kw_only=True)
class Recipe:
    """The options that `train` and `compare` share: the data, the network, the schedule and the methods' options.

    Raises:
        ValueError: an option outside its range.
    """

    # The help keeps line breaks: a line ends where a sentence does.
    data: str = "digits"
    """Dataset: digits (scikit-learn's handwritten digits, 8×8, no download), cifar10, cifar100, folder, or synthetic.
    folder: any tree of images by class, such as ImageNet's train/ and val/. synthetic: random noise, for timing."""
    data_dir: Path | None = None
    """folder: the tree with train/ and val/, each with one folder of images per class. Hidden files are ignored.
    cifar10, cifar100: where the data is or is downloaded to (if unset: data)."""
    image_size: int | None = None
    """Side in pixels of the network's square inputs, for folder (if unset: 224) and synthetic (if unset: 32)."""
    classes: int | None = None
    """Number of classes of synthetic (if unset: 10); for other datasets, the number that they must have."""
    model: str = "cnn"
    """Network: cnn (built in, four convolutions), a timm name such as resnet18, or one such as torchvision:resnet18.
    With _cifar appended, as in resnet18_cifar, a ResNet begins with a 3×3 convolution of stride 1 and no pooling."""

    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a batch, over all processes. m-RWP takes two batches of this size per step."""
    accumulate: int = 1
    """Gradient accumulation: micro-batches into which every process splits its share of a batch.
    Needs less memory for the same step, except that BatchNorm normalises each micro-batch separately."""
    base: Literal["sgd", "adamw"] = "sgd"
    """Base optimizer."""
    lr: float = 0.05
    """Peak learning rate; it decays to 0 along a cosine, step by step."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up of the learning rate (ImageNet: 5)."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: float = 5e-4
    """Weight decay of all parameters (CIFAR: 5e-4, ImageNet: 1e-4): an L2 penalty, with adamw decoupled."""
    clip_norm: float | None = None
    """Clip the gradient to this norm before every step."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes, 0 to 1 (ImageNet: 0.1)."""
    label_noise: float = 0.0
    """Fraction of the training labels replaced by a wrong class, 0 to 1; test labels stay correct."""
    validation: float = 0.0
    """Fraction of the training images, 0 to less than 1, to hold out and evaluate on instead of the test images.
    Choose options with it, and use the test images once. The seed selects the images; their labels stay correct.
    Not for folder: move images into its val/ instead."""

    augment: Literal["standard", "none"] = "standard"
    """standard: random flips, and random crops with 4 pixels of padding (CIFAR) or of 8 to 100 % of the area (folder).
    digits and synthetic are not augmented. none: images are only brought to the input size."""
    randaugment: str | None = None
    """RandAugment for CIFAR and folder, in timm's notation, such as rand-m9-mstd0.5."""
    cutout: int = 0
    """Side in pixels of the square that cutout erases from an image (CIFAR: 16)."""
    cutout_probability: float = 1.0
    """Probability that an image gets cutout (code of the RWP and SSAM papers: 0.5)."""
    erasing: float = 0.0
    """Probability of random erasing, of a rectangle of 2 to 33 % of an image."""
    mixup: float = 0.0
    """mixup's Beta parameter (ImageNet: 0.2; with cutmix: 0.8). With both, each batch gets one of the two at random."""
    cutmix: float = 0.0
    """CutMix's Beta parameter (1.0)."""
    ema: float | None = None
    """Also keep and evaluate an exponential moving average of the weights with this decay, such as 0.9999.
    The decay grows to this value over the first steps."""

    sigma: float | None = None
    """RWP family: standard deviation of the noise relative to its filter's norm (papers: CIFAR 0.01, ImageNet 0.005).
    If this or another option of a method is unset: the method's default."""
    sigma_end: float | None = None
    """RWP family: sigma at the last step, reached along a cosine. If unset: sigma is constant."""
    lam: float | None = None
    """m-RWP family: weight of the perturbed gradient against the clean one, 0 to 1 (paper: 0.5)."""
    eta: float | None = None
    """ARWP family: how strongly a filter's Fisher information reduces its noise (paper: 0.1 to 1)."""
    beta: float | None = None
    """ARWP family: decay of the Fisher information per step, 0 to 1 (paper: 0.99)."""
    rho: float | None = None
    """SAM family: length of the ascent (papers: 0.05 to 0.2 for SAM and SSAM, ten times that for ASAM)."""
    rho_end: float | None = None
    """SAM family: rho at the last step, reached along a cosine. If unset: rho is constant."""
    sparsity: float | None = None
    """SSAM: share of the weights that are not perturbed, 0 to less than 1 (paper: 0.5)."""
    mask: Literal["fisher", "dynamic"] | None = None
    """SSAM: how weights are selected, again in every epoch. fisher: those with the largest Fisher information.
    dynamic: random ones at first; then those with the smallest gradients are replaced by others."""
    pattern: str | None = None
    """SSAM: structure of the mask: global, layer, filter (whole filters), or n:m such as 2:4, which sets sparsity."""
    fisher_samples: int | None = None
    """SSAM with mask fisher: training images that the Fisher information is summed over (paper: 16 to 1024)."""

    device: str = "auto"
    """Where to train: auto (CUDA if available), cpu, cuda, cuda:1 …"""
    threads: int | None = None
    """CPU threads. If unset: 1 for the built-in cnn, which is too small for more, otherwise PyTorch's choice."""
    workers: int | None = None
    """Worker processes per training process, to read images; 0 reads between steps. Results do not depend on it.
    If unset: the process's share of the CPUs, at most 16."""
    decoder: Literal["pil", "dali"] = "pil"
    """folder: decode, crop and resize with PIL in the workers, or with NVIDIA DALI (nvidia-dali-cuda130), on the GPU.
    Their pixel values differ by a few 255ths."""
    bad_images: Literal["stop", "skip"] = "stop"
    """What to do with an unreadable image: stop, or report it and use another one, drawn from the seed."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Run forward passes in bfloat16 or float16 autocast; weights stay float32. fp16 scales the loss."""
    channels_last: bool = False
    """Use the channels_last memory format for images and weights."""
    compile: bool = False
    """Compile the network with torch.compile."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "threads", "image_size"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name} must be at least 1, not {value}")
        for name in ("lr", "momentum", "weight_decay", "warmup_epochs", "mixup", "cutmix", "cutout", "workers"):
            value = getattr(self, name)
            check(value is None or 0 <= value < math.inf, f"{name} must be finite and not negative, not {value}")
        for name in ("label_smoothing", "label_noise", "erasing", "cutout_probability"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"{name} must lie between 0 and 1, not {value}")
        check(0 <= self.validation < 1, f"validation must be at least 0 and less than 1, not {self.validation}")
        check(self.warmup_epochs <= self.epochs, f"warmup_epochs {self.warmup_epochs} exceeds epochs {self.epochs}")
        check(
            self.image_size is None or self.data in ("folder", "synthetic"),
            f"image_size is for data folder and synthetic only: leave it out with data {self.data}",
        )
        check(self.classes is None or self.classes >= 2, f"classes must be at least 2, not {self.classes}")
        check(
            self.clip_norm is None or 0 < self.clip_norm < math.inf,
            f"clip_norm must be finite and positive, not {self.clip_norm}",
        )
        check(self.ema is None or 0 < self.ema < 1, f"ema must lie between 0 and 1, not {self.ema}")
        check(self.base == "sgd" or not self.nesterov, "nesterov is for base sgd: leave it out with base adamw")
        if self.decoder == "dali":
            check(self.data == "folder", f"decoder dali is for data folder, not {self.data}")
            check(self.randaugment is None, "randaugment needs images from PIL: leave out decoder dali")
            check(self.bad_images == "stop", "DALI cannot skip an unreadable image: bad_images skip needs decoder pil")


@dataclass(kw_only=True)
class TrainConfig(Recipe):
    """Train an image classifier with one method."""

    method: Annotated[MethodName, tyro.conf.arg(help=METHOD_HELP)] = "sgd"
    seed: int = 0
    """Seed of the initial weights, the order of the data, the wrong labels and the noise."""
    output: Path | None = None
    """Folder for the run, new or empty. If unset: runs/<data>-<model>-<method>-<time>."""
    resume: Path | None = None
    """Checkpoint, or folder of a run, to continue. Options that are not given are those of that run."""
    checkpoint_every: int | None = None
    """Also save a checkpoint every so many steps. If unset: only at the end of each epoch."""
    tensorboard: bool = False
    """Also write every epoch's metrics for TensorBoard, to the run's folder."""

    rwp_parallel: bool = False
    """m-RWP family: take one batch per step instead of two, in the time of plain training.
    About half of the processes take the perturbed pass, the others the clean one; a single process splits the batch."""
    ascent: Literal["synced", "local"] = "synced"
    """SAM family: ascend along the gradient of the whole batch (synced), or in each process along its share's (local).
    local saves one all-reduce of the gradients (m-sharpness)."""
    parallel: Literal["ddp", "fsdp"] | None = None
    """Under torchrun: replicate the network (ddp) or shard it (fsdp). If unset: ddp. Ignored by a single process."""
    timeout: float = 600.0
    """Seconds to wait for other processes under torchrun, for worker processes and for a download's server."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.seed >= 0, f"seed must not be negative, not {self.seed}")
        check(
            self.checkpoint_every is None or self.checkpoint_every >= 1,
            f"checkpoint_every must be at least 1, not {self.checkpoint_every}",
        )
        check(0 < self.timeout < 1e6, f"timeout must lie between 0 and 1e6 seconds, not {self.timeout}")
        if self.parallel == "fsdp":
            check(
                not self.rwp_parallel,
                "parallel fsdp makes one replica of all processes, and rwp_parallel needs two: use parallel ddp",
            )
            check(
                self.ascent == "synced",
                "ascent local needs the whole network on every process: use parallel ddp, not fsdp",
            )
            check(not self.channels_last, "parallel fsdp shards contiguous weights: leave out channels_last")
            check(self.ema is None, "ema needs the whole network on every process: use parallel ddp, not fsdp")


@dataclass(kw_only=True)
class TrainCommand(TrainConfig):
    """Train an image classifier with one method."""

    preset: str | None = None
    """Start from a paper's recipe, such as imagenet-resnet50-rwp, which other options override.
    An unknown name prints the list."""
    profile: bool = False
    """Instead of training, time a step of every method, and show where the time goes and the ratio to SGD's step.
    With the default data and model: synthetic images and a ResNet-18 at 32×32, or on a GPU a ResNet-50 at 224×224."""


@dataclass(kw_only=True)
class CompareConfig(Recipe):
    """Train several methods over several seeds on one schedule, and compare them."""

    label_noise: float = 0.3
    """Fraction of the training labels replaced by a wrong class, 0 to 1; test labels stay correct."""
    methods: tuple[MethodName, ...] = ("sgd", "rwp", "mrwp", "sam", "ssam")
    """Methods to compare. Options such as --sigma apply to those that have them."""
    seeds: int = 3
    """Runs per method, with seeds 0, 1, 2 …"""
    output: Path = Path("runs/compare")
    """Folder for compare.json and compare.png, which replace those of an earlier comparison."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.seeds >= 1, f"seeds must be at least 1, not {self.seeds}")
        check(len(set(self.methods)) == len(self.methods) > 0, "methods must name at least one method, each once")


def used_options(config: TrainConfig) -> dict[str, float | str]:
    """The hyperparameters of a run's method, defaults included; ValueError for an option that does not apply to it."""
    method = find(config.method)
    given = {name: getattr(config, name) for name in OPTIONS if getattr(config, name) is not None}
    foreign = sorted(set(given).difference(method.accepts))
    if foreign:
        raise ValueError(f"{config.method} has no option {', '.join(foreign)}")
    options = method.options | given
    mask, pattern = options.get("mask"), options.get("pattern", "")
    for name in ["sparsity"] * (":" in pattern) + ["fisher_samples"] * (mask == "dynamic"):
        if name in given:
            raise ValueError(f"mask {mask} with pattern {pattern} has no option {name}")
        del options[name]
    return options


def with_method(config: TrainConfig, name: str) -> TrainConfig:
    """The same run with another method; options that do not apply to it are unset."""
    method = find(name)
    foreign = set(OPTIONS).difference(method.accepts)
    rwp_parallel = config.rwp_parallel and method.batches == 2
    ascent = config.ascent if method.ascends else "synced"
    return replace(config, method=name, rwp_parallel=rwp_parallel, ascent=ascent, **dict.fromkeys(foreign))


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)
