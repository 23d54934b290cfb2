"""Every option of the training program; a field is a flag of the command line, its docstring the help."""

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
    """What `train` and `compare` share: the data, the network, the schedule and the methods' options.

    Raises:
        ValueError: an option outside its range.
    """

    data: str = "digits"
    """Data set: digits (scikit-learn's handwritten digits, 8×8, nothing to download), cifar10, cifar100, folder (any tree of
    images by class: ImageNet's train/ and val/), or synthetic (noise, for timing). A wrong name lists them all."""
    data_dir: Path | None = None
    """folder: the tree that has train/ and val/, each with a folder of images per class. Hidden files and folders are
    ignored, files that are no images by their names are counted. cifar10, cifar100: where the data is or is downloaded
    to (left out: data)."""
    image_size: int | None = None
    """Side of the square images that the network sees, of folder (left out: 224) and synthetic (left out: 32)."""
    classes: int | None = None
    """Classes of synthetic (left out: 10); of every other data set, how many there have to be."""
    model: str = "cnn"
    """Network: cnn (the built-in four convolutions), any name that timm knows, such as resnet18, or one of torchvision's, such
    as torchvision:resnet18. A ResNet with _cifar at its end, such as resnet18_cifar, begins with a 3×3 convolution of stride 1
    and no pooling."""

    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a batch, over all processes; m-RWP draws two batches of this size for every step."""
    accumulate: int = 1
    """Micro-batches into which every process splits its share of a batch: less memory, the same step (but for
    BatchNorm, which normalises each of them on its own)."""
    base: Literal["sgd", "adamw"] = "sgd"
    """Optimizer under the method."""
    lr: float = 0.05
    """Peak learning rate; it falls to 0 along a cosine, step by step."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate first rises linearly (ImageNet: 5)."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    weight_decay: float = 5e-4
    """L2 penalty on every parameter (CIFAR: 5e-4, ImageNet: 1e-4); under adamw decoupled from the gradient."""
    clip_norm: float | None = None
    """Largest norm of the gradient that steps; a longer one is scaled down to it."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes, 0 to 1 (ImageNet: 0.1)."""
    label_noise: float = 0.0
    """Fraction of the training labels replaced by a wrong class, 0 to 1; test labels stay right."""
    validation: float = 0.0
    """Share of the training images, 0 to less than 1, to hold out and evaluate in place of the test images: choose
    options by these, and look at the test images once. The seed draws them; their labels stay right. Not for folder:
    put images into its val/ yourself."""

    augment: Literal["standard", "none"] = "standard"
    """standard: random flips, and random crops out of 4 pixels of padding (CIFAR) or of 8 to 100 % of the area (folder);
    nothing for digits and synthetic. none: images are only brought to their size."""
    randaugment: str | None = None
    """RandAugment for CIFAR and folder, as timm writes it, such as rand-m9-mstd0.5."""
    cutout: int = 0
    """Side in pixels of a square to erase at a random place of every image (CIFAR: 16)."""
    cutout_probability: float = 1.0
    """Share of the images that cutout reaches (in the code of the RWP and SSAM papers: 0.5)."""
    erasing: float = 0.0
    """Probability of erasing a random rectangle of 2 to 33 % of an image."""
    mixup: float = 0.0
    """Parameter of mixup's Beta distribution (ImageNet: 0.2; with cutmix: 0.8). With cutmix, batches get either, by chance."""
    cutmix: float = 0.0
    """Parameter of CutMix's Beta distribution (1.0)."""
    ema: float | None = None
    """Also keep and evaluate an exponential moving average of the weights with this decay, such as 0.9999, which grows to it
    over the first steps."""

    sigma: float | None = None
    """RWP family: standard deviation of the noise over the norm of its filter (papers: 0.01 on CIFAR,
    0.005 on ImageNet). Left out: the method's own default."""
    sigma_end: float | None = None
    """RWP family: sigma at the last step, reached along a cosine. Left out: sigma stays as it is."""
    lam: float | None = None
    """m-RWP family: weight of the perturbed gradient against the clean one, 0 to 1 (paper: 0.5)."""
    eta: float | None = None
    """ARWP family: how strongly the Fisher information of a filter shrinks its noise (paper: 0.1 to 1)."""
    beta: float | None = None
    """ARWP family: decay of the Fisher information per step, 0 to 1 (paper: 0.99)."""
    rho: float | None = None
    """SAM family: length of the ascent (papers: 0.05 to 0.2 for SAM and SSAM, ten times that for ASAM)."""
    rho_end: float | None = None
    """SAM family: rho at the last step, reached along a cosine. Left out: rho stays as it is."""
    sparsity: float | None = None
    """SSAM: share of the weights that do not climb, 0 to less than 1 (paper: 0.5)."""
    mask: Literal["fisher", "dynamic"] | None = None
    """SSAM: fisher climbs with the weights of the largest Fisher information; dynamic with random ones at first, of which
    those of the smallest gradients make room for others. Made anew every epoch."""
    pattern: str | None = None
    """SSAM: what the mask chooses among: global, layer, filter (whole ones), or n:m such as 2:4, which fixes the sparsity."""
    fisher_samples: int | None = None
    """SSAM with mask fisher: training images that the Fisher information is summed over (paper: 16 to 1024)."""

    device: str = "auto"
    """Where to train: auto (a CUDA device if there is one), cpu, cuda, cuda:1 …"""
    threads: int | None = None
    """CPU threads. Left out: 1 for the built-in cnn, too small to share out, else PyTorch's choice."""
    workers: int | None = None
    """Worker processes that read images, for each training process; 0 reads between steps. Left out: its share of the
    CPUs, 16 at most. The number makes no difference to the result."""
    decoder: Literal["pil", "dali"] = "pil"
    """folder: what decodes, crops and resizes the images: PIL in the worker processes, or NVIDIA DALI (nvidia-dali-cuda130), on
    the GPU where there is one. Their pixels differ by some steps of 255."""
    bad_images: Literal["stop", "skip"] = "stop"
    """What to do about an image that cannot be read: stop, or name it and use another, drawn by the seed, instead."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Run forward passes in bfloat16 or float16 autocast; weights stay float32. fp16 scales the loss."""
    channels_last: bool = False
    """Keep images and weights in the channels-last layout."""
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
            f"image_size is for data folder and synthetic: {self.data} has the size it has",
        )
        check(self.classes is None or self.classes >= 2, f"classes must be at least 2, not {self.classes}")
        check(
            self.clip_norm is None or 0 < self.clip_norm < math.inf,
            f"clip_norm must be finite and positive, not {self.clip_norm}",
        )
        check(self.ema is None or 0 < self.ema < 1, f"ema must lie between 0 and 1, not {self.ema}")
        check(
            self.base == "sgd" or not self.nesterov,
            "nesterov is a form of SGD's momentum: leave it out with base adamw",
        )
        if self.decoder == "dali":
            check(self.data == "folder", f"decoder dali is for data folder, not {self.data}")
            check(self.randaugment is None, "randaugment distorts PIL's images: leave out decoder dali")
            check(self.bad_images == "stop", "DALI stops at a bad image: bad_images skip needs decoder pil")


@dataclass(kw_only=True)
class TrainConfig(Recipe):
    """Train an image classifier with one method."""

    method: Annotated[MethodName, tyro.conf.arg(help=METHOD_HELP)] = "sgd"
    seed: int = 0
    """Seed of the weights, the order of the data, the wrong labels and the noise."""
    output: Path | None = None
    """Folder of the run, new or empty. Left out: runs/<data>-<model>-<method>-<time>."""
    resume: Path | None = None
    """Checkpoint, or folder of a run, to continue. Options left out are then those of that run."""
    checkpoint_every: int | None = None
    """Also write the checkpoint every so many steps. Left out: at the end of each epoch."""
    tensorboard: bool = False
    """Also write every epoch's figures for TensorBoard, in the run's folder."""

    rwp_parallel: bool = False
    """m-RWP family: a step takes one batch, not two: about half of the processes perturb, the others do not. The time of
    plain training. One process halves the batch."""
    ascent: Literal["synced", "local"] = "synced"
    """SAM family: whether processes climb along the gradient of the whole batch or each along that of its own part, which
    saves an exchange of gradients (m-sharpness)."""
    parallel: Literal["ddp", "fsdp"] | None = None
    """Under torchrun: replicate the network (ddp) or shard it (fsdp). Left out: ddp. No matter to one process."""
    timeout: float = 600.0
    """Seconds after which a process that waits gives up: for others under torchrun, for those that read images, for a server."""

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
    """Begin with a recipe of the papers, such as imagenet-resnet50-rwp; what else the command line gives goes before it. A wrong
    name lists them all."""
    profile: bool = False
    """Train nothing: time a step of every method, in turns, show what it spends its time on and its ratio to SGD's step. With
    the default data and model: synthetic images, and a ResNet-18 at 32×32, or on a GPU a ResNet-50 at 224×224."""


@dataclass(kw_only=True)
class CompareConfig(Recipe):
    """Train several methods over several seeds on one schedule, and compare them."""

    label_noise: float = 0.3
    """Fraction of the training labels replaced by a wrong class, 0 to 1; test labels stay right."""
    methods: tuple[MethodName, ...] = ("sgd", "rwp", "mrwp", "sam", "ssam")
    """Methods to compare. Options such as --sigma reach those that know them."""
    seeds: int = 3
    """Runs of each method, with seeds 0, 1, 2 …"""
    output: Path = Path("runs/compare")
    """Folder of compare.json and compare.png; those of an earlier comparison are replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.seeds >= 1, f"seeds must be at least 1, not {self.seeds}")
        check(len(set(self.methods)) == len(self.methods) > 0, "methods must name at least one method, each once")


def used_options(config: TrainConfig) -> dict[str, float | str]:
    """The options of a run that apply to its method, those left out with the method's defaults.

    Raises:
        ValueError: unknown method, or an option that does not apply to it.
    """
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
    """The same run with another method; options that do not apply to that one are left out."""
    method = find(name)
    foreign = set(OPTIONS).difference(method.accepts)
    rwp_parallel = config.rwp_parallel and method.batches == 2
    ascent = config.ascent if method.ascends else "synced"
    return replace(config, method=name, rwp_parallel=rwp_parallel, ascent=ascent, **dict.fromkeys(foreign))


def check(right: bool, message: str) -> None:
    """Raise ValueError(message) unless `right`."""
    if not right:
        raise ValueError(message)
