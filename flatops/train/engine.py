"""The training loop of one run."""

from __future__ import annotations

import itertools
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import flatops
from flatops import distributed

from . import checkpoint, data, models, parallel, steps
from .augment import MIX, drawing_from
from .clock import Clock
from .config import TrainConfig, used_options
from .dataset import Dataset
from .gradient import Gradient, Output
from .metrics import Metrics
from .order import CLEAN, FISHER, PERTURBED, Batch
from .world import World

# An epoch's line of the log. Training metrics are means over its steps and all processes, at the weights of each step's
# first pass (RWP: perturbed weights), on the training labels, wrong ones included.
Row = dict[str, float]
EVALUATION_BATCH = 512


class Trainer:
    """A run and its state.

    Everything random follows from seed, epoch and step: runs can take turns in one process, and a resumed run is bit
    for bit equal to an uninterrupted one. When several processes train one network, each has a trainer, takes its share
    of every batch, and makes the same calls.

    Args:
        config: the run's options.
        world: the processes that train it; by default only this one.

    Raises:
        ValueError: unknown data, model, method or device, or an option out of range.
    """

    def __init__(self, config: TrainConfig, world: World = World()) -> None:
        self.config, self.world = config, world
        self.form, self.options = steps.choose(config, world.size), used_options(config)
        self.device = choose_device(config.device, world)
        set_threads(config)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.data = data.load(config).to(self.device, self.layout)
        self.fingerprint = self.data.fingerprint
        seed_everything(config.seed)
        self.model = models.create(config.model, self.data.classes, self.data.channels, self.data.size)
        self.model.to(self.device, memory_format=self.layout)
        check_takes_images(self.model, self.config.model, self.data, self.device)
        self.average = average_of(self.model, config.ema) if config.ema else None
        self.network = self.model  # runs the forward, perhaps as DDP; `model` has the weights and their names
        self.parallel = (config.parallel or "ddp") if world.size > 1 else None
        if self.parallel:
            self.network = parallel.distribute(self.model, self.parallel, self.device)
        self.clock = Clock(self.device)
        self.gradient = Gradient(self.network, self.model, self.device, config, self.clock)
        self.mix = mixing(config, self.data.classes) if config.mixup or config.cutmix else None
        self.steps_per_epoch = self.data.train_size // config.batch_size
        self.optimizer = steps.create_optimizer(self.model.parameters(), config, self.steps_per_epoch, world.size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.schedules = self._schedules()
        if config.amp == "fp16":  # schedules also advance in steps skipped because of overflow
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step\\(\\)` before")
        if config.compile:
            self.model.compile()  # in place, which keeps the names in the state_dict
        self.bad: dict[str, str] = {}  # unreadable images of all processes, and why
        self.epoch = 0  # finished epochs
        self.history: list[Row] = []
        self._begin_epoch()

    @property
    def steps_done(self) -> int:
        """Steps since the start of the run."""
        return self.epoch * self.steps_per_epoch + self.step

    def run_epoch(self, on_step: Callable[[Trainer], None] = lambda trainer: None) -> Row:
        """Train to the end of the epoch, evaluate, and return the epoch's row.

        Args:
            on_step: called after every step; it may save or abandon the run.
        """
        if self.step == 0:
            self._seed()
        self.network.train()
        started = time.perf_counter() - self.seconds
        if self.step == 0 and "fisher_samples" in self.options:
            self.update_mask()
        for batches in self._batches():
            self._train_step(*batches)
            self.seconds = time.perf_counter() - started
            on_step(self)
        images = self.steps_per_epoch * self.config.batch_size
        train_loss, train_accuracy = (self._summed() / images).tolist()  # host sync
        self.seconds = time.perf_counter() - started
        parts = self.clock.read(wait=True)
        figures = {f"test_{name}": value for name, value in self.evaluate().items()}
        if self.average:
            figures |= {f"ema_{name}": value for name, value in self.evaluate(self.average.module).items()}
        for bad in distributed.gather_objects(self.data.bad):
            self.bad |= bad
        group = self.optimizer.param_groups[0]
        self.epoch += 1
        row = {
            "epoch": self.epoch,
            **{name: float(group[name]) for name in ("lr", "sigma", "rho") if name in group},
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            **figures,
            **({"bad_images": len(self.bad)} if self.bad else {}),
            "seconds": self.seconds,
            **{f"{part}_seconds": seconds for part, seconds in parts.items()},
            "images_per_second": images / self.seconds,
        }
        self.history.append(row)
        self._begin_epoch()
        return row

    @torch.no_grad()
    def evaluate(self, model: nn.Module | None = None) -> dict[str, float]:
        """Loss, accuracies and calibration on the test data, with the first process's BatchNorm statistics.

        Args:
            model: the network to evaluate; by default the one in training.
        """
        self.network.eval()
        distributed.broadcast((model or self.model).buffers())
        metrics = Metrics(self.device, self.data.classes)
        count = math.ceil(self.data.test_size / EVALUATION_BATCH)
        # All processes run equally many batches, because forwards under FSDP are collective; surplus ones do not count.
        turns = range(self.world.rank, count + self.world.rank, self.world.size)
        batches = self.data.test_batches(EVALUATION_BATCH, [min(turn, count - 1) for turn in turns])
        for turn, batch in zip(turns, batches):
            output = self.gradient.forward(batch, model)
            if turn < count:
                metrics.add(*output, batch[1])
        return metrics.result()

    def is_finite(self) -> bool:
        """Whether the loss was finite in all of this epoch's steps so far. Collective, with a host sync."""
        return bool(self._summed().isfinite().all())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, in a form for any number of processes. Collective."""
        return {
            "config": checkpoint.pack_config(self.config),
            "data": self.fingerprint,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": {"epoch": self.seconds, **self.clock.read()},
            "history": self.history,
            "bad": self.bad,
            "model": parallel.full_state(self.model.state_dict()),
            "ema": self.average.module.state_dict() if self.average else None,
            "scaler": self.gradient.scaler.state_dict(),
            "optimizer": parallel.full_state(self.optimizer.state_dict()),
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "processes": distributed.gather_objects({"sums": self.sums.cpu(), "random": checkpoint.random_state()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state_dict() of a run with the same configuration.

        With the same world size the rest is bit for bit as if it had never stopped. With another one, sums are rounded
        differently and random states are drawn anew from the seed, the step and the rank.

        Raises:
            ValueError: that run has other data, or another model, method or schedule; nothing has been changed.
        """
        checkpoint.check_same_run(state["config"], checkpoint.pack_config(self.config))
        if state["data"] != self.fingerprint:
            raise ValueError(f"cannot resume: the run was trained on {state['data']}; data has {self.fingerprint}")
        checkpoint.check_same_weights(state["model"], self.model.state_dict())
        parallel.load_model(self.model, state["model"])
        if self.average:
            self.average.module.load_state_dict(state["ema"])
        if self.gradient.scaler.is_enabled():
            self.gradient.scaler.load_state_dict(state["scaler"])
        parallel.load_optimizer(self.optimizer, state["optimizer"])
        for schedule, its_state in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(its_state)
        self.epoch, self.step = state["epoch"], state["step"]
        parts = dict(state["seconds"])
        self.seconds = parts.pop("epoch")
        self.clock.reset(parts)
        self.history, self.bad = list(state["history"]), dict(state["bad"])
        saved = state["processes"]
        if len(saved) == self.world.size:
            self.sums = saved[self.world.rank]["sums"].to(self.device)
            checkpoint.set_random_state(saved[self.world.rank]["random"])
        else:
            if self.world.first:
                self.sums = sum(process["sums"] for process in saved).to(self.device)
            self._seed(self.step)

    def _schedules(self) -> list[LambdaLR | flatops.CosineRamp]:
        """The schedules of the learning rate, and of sigma and rho if they change; all advance with every step."""
        warmup = round(self.config.warmup_epochs * self.steps_per_epoch)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total_steps - warmup)))

        schedules: list[LambdaLR | flatops.CosineRamp] = [LambdaLR(self.optimizer, factor)]
        for name in ("sigma", "rho"):
            if f"{name}_end" in self.options:
                start, end = self.options[name], self.options[f"{name}_end"]
                schedules.append(flatops.CosineRamp(self.optimizer, name, start, end, self.total_steps))
        return schedules

    def _begin_epoch(self) -> None:
        self.step = 0  # finished steps of this epoch
        self.seconds = 0.0  # their time
        self.clock.reset()
        self.sums = torch.zeros(2, device=self.device)  # their summed loss and number of correct predictions

    def _seed(self, *step: int) -> None:
        """Seed this process for the epoch, or for the rest of it after a step; rank 0 as a single process would be."""
        process = (self.world.rank, *step) if step or not self.world.first else ()
        seed_everything(self.config.seed, self.epoch, *process)

    def _batches(self) -> Iterator[tuple[Batch, ...]]:
        """This process's batches for each remaining step of the epoch, one per stream of the method."""
        streams = (CLEAN, PERTURBED)[: self.form.batches]
        which = {"seed": self.config.seed, "epoch": self.epoch, "start": self.step} | self._share()
        loaded = self.data.steps(streams, self.config.batch_size, **which)
        for number in itertools.count(self.step):
            with self.clock("data"):
                step = next(loaded, None)
                if step is None:
                    return
                batches = tuple(self._prepared(stream, number, *batch) for stream, batch in zip(streams, step))
            yield batches

    def _prepared(self, stream: int, number: int, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        """A batch in the run's memory format, after mixup and CutMix if they are on."""
        if self.config.channels_last:
            images = images.contiguous(memory_format=self.layout)
        if self.mix:
            # All processes draw the same mixing proportion; each mixes within its share of the batch.
            with drawing_from(MIX, self.config.seed, stream, self.epoch, number):
                images, labels = self.mix(images, labels)
        return images, labels

    def _share(self) -> dict[str, int]:
        """The arguments of `order.plan` that select this process's share of every batch."""
        return {"rank": self.world.rank, "world_size": self.world.size}

    def update_mask(self) -> None:
        """Compute SSAM's next mask from samples."""
        samples, share, processes = self.options["fisher_samples"], {}, self.world.size
        # Each replica takes a share of the samples, and the optimizer sums over replicas; shards process all together.
        if self.parallel == "ddp":
            least, more = divmod(samples, processes)
            if not least:
                raise ValueError(f"fisher_samples must be at least 1 per process, not {samples} for {processes}")
            samples, share = least + (self.world.rank < more), self._share()
        which = {"stream": FISHER, "seed": self.config.seed, "epoch": self.epoch} | share
        batches = self.data.batches(self.config.batch_size, **which)
        self.optimizer.update_mask(self.model, F.cross_entropy, batches, samples=samples, progress=False)

    def _train_step(self, *batches: Batch) -> None:
        with self.clock("flatops"):  # the passes inside count as "passes"
            output = self.form.take(self.network, self.optimizer, self.gradient, *batches)
        with self.clock("optimizer"):
            scaler = self.gradient.scaler
            if self.config.clip_norm is not None:
                scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
            scaler.step(self.optimizer)
            scaler.update()
            self.optimizer.zero_grad()
        for schedule in self.schedules:
            schedule.step()
        count(self.sums, output, batches[0])
        self.step += 1
        if self.average:
            self.average.update(self.model, self.steps_done)

    def _summed(self) -> torch.Tensor:
        """The sums of all processes."""
        sums = self.sums.clone()
        distributed.all_reduce([sums])
        return sums


@torch.no_grad()
def count(sums: torch.Tensor, output: Output, batch: Batch) -> None:
    """Add a batch's summed loss and number of correct predictions to `sums` (2,), without a host sync."""
    labels = batch[1] if batch[1].dim() == 1 else batch[1].argmax(1)  # mixed images count as their larger part's class
    sums += torch.stack([output.loss * len(labels), (output.logits.argmax(1) == labels).sum()])


def average_of(model: nn.Module, decay: float) -> nn.Module:
    """An exponential moving average of weights and BatchNorm statistics, whose decay grows over the first steps."""
    from timm.utils import ModelEmaV3  # slow to import

    return ModelEmaV3(model, decay=decay, use_warmup=True)


def mixing(config: TrainConfig, classes: int) -> Callable[..., Batch]:
    """Mixup (Zhang et al., arXiv 1710.09412), CutMix (Yun et al., arXiv 1905.04899), or per batch one of the two."""
    from timm.data import Mixup  # slow to import

    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)


def choose_device(name: str, world: World = World()) -> torch.device:
    """The device of that name, or ValueError; auto is CUDA if available. Each of several processes has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world.size > 1 and name.startswith("cuda:"):
        raise ValueError(f"device {name} is for one process: use cuda, and each process takes its own GPU")
    if world.size > 1 and name == "cuda":
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def set_threads(config: TrainConfig) -> None:
    """Set PyTorch's CPU threads; the built-in cnn is fastest with one."""
    if config.threads is not None or config.model == "cnn":
        torch.set_num_threads(config.threads or 1)


def seed_everything(seed: int, *path: int) -> None:
    """Seed torch, numpy and Python from a run's seed and further integers such as the epoch."""
    word = int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])
    torch.manual_seed(word)
    np.random.seed(word)
    random.seed(word)


@torch.no_grad()
def check_takes_images(model: nn.Module, name: str, dataset: Dataset, device: torch.device) -> None:
    """Raise ValueError if a network cannot take the dataset's images; networks raise different errors themselves."""
    model.eval()
    try:
        model(torch.zeros(1, dataset.channels, dataset.size, dataset.size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"model {name} does not take images of {dataset.size}×{dataset.size}: {reason}") from error
    model.train()
