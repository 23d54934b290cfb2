"""Every option of the training program; a field is a flag of the command line, its docstring the help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MethodName = Literal["sgd", "rwp", "mrwp", "arwp", "marwp", "sam", "asam", "ssam"]


@dataclass(kw_only=True)
class Recipe:
    """What `train` and `compare` share: the data, the network, the schedule and the methods' options.

    Raises:
        ValueError: an option outside its range.
    """

    data: str = "digits"
    """Data set: digits (scikit-learn's handwritten digits, 8×8, nothing to download)."""
    model: str = "cnn"
    """Network: cnn (the built-in four convolutions) or any name that timm knows, such as resnet18."""

    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a batch, over all processes; m-RWP draws two batches of this size for every step."""
    lr: float = 0.05
    """Peak learning rate; it falls to 0 along a cosine, step by step."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate first rises linearly (ImageNet: 5)."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 5e-4
    """L2 penalty on every parameter (CIFAR: 5e-4, ImageNet: 1e-4)."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes, 0 to 1 (ImageNet: 0.1)."""
    label_noise: float = 0.0
    """Fraction of the training labels replaced by a wrong class, 0 to 1; test labels stay right."""

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
    bf16: bool = False
    """Run forward passes in bfloat16 autocast; weights stay float32."""
    channels_last: bool = False
    """Keep images and weights in the channels-last layout."""
    compile: bool = False
    """Compile the network with torch.compile."""

    def __post_init__(self) -> None:
        at_least_one = ["epochs", "batch_size"] + ["threads"] * (self.threads is not None)
        for name in at_least_one:
            check(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"{name} must be finite and not negative, not {value}")
        for name in ("label_smoothing", "label_noise"):
            check(
                0 <= getattr(self, name) <= 1, f"{name} must lie between 0 and 1, not {getattr(self, name)}"
            )
        check(
            self.warmup_epochs <= self.epochs,
            f"warmup_epochs {self.warmup_epochs} exceeds epochs {self.epochs}",
        )


@dataclass(kw_only=True)
class TrainConfig(Recipe):
    """Train an image classifier with one method."""

    method: MethodName = "sgd"
    """rwp: random weight perturbation; mrwp: mixed with the clean gradient; arwp, marwp: adapted to the
    Fisher information; sam: sharpness-aware minimisation; asam: adaptive SAM; ssam: sparse SAM."""
    seed: int = 0
    """Seed of the weights, the order of the data, the wrong labels and the noise."""
    output: Path | None = None
    """Folder of the run, new or empty. Left out: runs/<data>-<model>-<method>-<time>."""
    resume: Path | None = None
    """Checkpoint, or folder of a run, to continue. Options left out are then those of that run."""
    checkpoint_every: int | None = None
    """Also write the checkpoint every so many steps. Left out: at the end of each epoch."""

    rwp_parallel: bool = False
    """m-RWP family: a step takes one batch, not two: about half of the processes perturb, the others do not. The time of
    plain training. One process halves the batch."""
    ascent: Literal["synced", "local"] = "synced"
    """SAM family: whether processes climb along the gradient of the whole batch or each along that of its own part, which
    saves an exchange of gradients (m-sharpness)."""
    parallel: Literal["ddp", "fsdp"] | None = None
    """Under torchrun: replicate the network (ddp) or shard it (fsdp). Left out: ddp. No matter to one process."""
    timeout: float = 600.0
    """Under torchrun: seconds after which a process that waits for another gives up."""

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
        check(
            len(set(self.methods)) == len(self.methods) > 0,
            "methods must name at least one method, each once",
        )


METHOD_OPTIONS = (
    "sigma",
    "sigma_end",
    "lam",
    "eta",
    "beta",
    "rho",
    "sparsity",
    "mask",
    "pattern",
    "fisher_samples",
)


def check(right: bool, message: str) -> None:
    """Raise ValueError(message) unless `right`."""
    if not right:
        raise ValueError(message)
