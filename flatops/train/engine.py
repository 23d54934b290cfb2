"""The training loop: one run, from its weights at a seed to its weights at the end."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

import flatops

from . import checkpoint, data, methods, models
from .config import TrainConfig

# One epoch, a line of the log. The training figures are means over its steps, at the weights of each
# step's first pass (perturbed ones for RWP) and on the labels as given, wrong ones included.
Row = dict[str, float]
EVALUATION_BATCH = 512


class Trainer:
    """One run at one point of its training, and the means to go on.

    Everything random follows from the seed, the epoch and the step, so that two runs may take turns in one
    process and a resumed one equals an uninterrupted one to the bit.

    Args:
        config: what to train, on what, how.

    Raises:
        ValueError: unknown data, model, method or device, or an option out of range.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.method, self.options = methods.find(config.method), methods.used_options(config)
        self.device = choose_device(config.device)
        set_threads(config)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.data = data.load(config).to(self.device, layout)
        seed_everything(config.seed)
        self.model = models.create(config.model, self.data.classes, self.data.channels)
        self.model.to(self.device, memory_format=layout)
        self.steps_per_epoch = len(self.data.train[1]) // config.batch_size
        self.optimizer = methods.create_optimizer(self.model.parameters(), config, self.steps_per_epoch)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.schedules = self._schedules()
        if config.compile:
            self.model.compile()  # in place: the names in the state_dict stay
        self.epoch = 0  # epochs done
        self.history: list[Row] = []
        self._begin_epoch()

    @property
    def steps_done(self) -> int:
        """Steps since the start of the run."""
        return self.epoch * self.steps_per_epoch + self.step

    def run_epoch(self, on_step: Callable[[Trainer], None] = lambda trainer: None) -> Row:
        """Train to the end of the epoch, evaluate, and return the epoch's row.

        Args:
            on_step: called after every step; the state is whole there, to be saved or left for good.
        """
        if self.step == 0:
            seed_everything(self.config.seed, self.epoch)
        self.model.train()
        started = time.perf_counter() - self.seconds
        if self.step == 0 and "fisher_samples" in self.options:
            self._update_mask()
        for batches in self._batches():
            self._train_step(*batches)
            self.seconds = time.perf_counter() - started
            on_step(self)
        train_loss, train_accuracy = self._train_means()  # waits for the device
        self.seconds = time.perf_counter() - started
        test_loss, test_accuracy = self.evaluate()
        group = self.optimizer.param_groups[0]
        self.epoch += 1
        row = {
            "epoch": self.epoch,
            **{name: float(group[name]) for name in ("lr", "sigma", "rho") if name in group},
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "seconds": self.seconds,
            "images_per_second": self.steps_per_epoch * self.config.batch_size / self.seconds,
        }
        self.history.append(row)
        self._begin_epoch()
        return row

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the test data."""
        self.model.eval()
        sums = torch.zeros(2, device=self.device)
        for batch in self.data.test_batches(EVALUATION_BATCH):
            count(sums, self._forward(batch), batch)
        loss, correct = (sums / len(self.data.test[1])).tolist()
        return loss, correct

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on."""
        return {
            "config": checkpoint.pack_config(self.config),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "random": checkpoint.random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict() of a run with the same configuration.

        Raises:
            ValueError: that run's data, model, method or schedule is another; nothing has changed then.
        """
        check_same_run(state["config"], checkpoint.pack_config(self.config))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for schedule, its_state in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(its_state)
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.sums = state["sums"].to(self.device)
        self.history = list(state["history"])
        checkpoint.set_random_state(state["random"])

    def _schedules(self) -> list[LambdaLR | flatops.CosineRamp]:
        """The learning rate, and sigma where it moves; all of them step with the optimizer."""
        warmup = round(self.config.warmup_epochs * self.steps_per_epoch)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total_steps - warmup)))

        schedules: list[LambdaLR | flatops.CosineRamp] = [LambdaLR(self.optimizer, factor)]
        if "sigma_end" in self.options:
            start, end = self.options["sigma"], self.options["sigma_end"]
            schedules.append(flatops.CosineRamp(self.optimizer, "sigma", start, end, self.total_steps))
        return schedules

    def _begin_epoch(self) -> None:
        self.step = 0  # steps done in this epoch
        self.seconds = 0.0  # time they took
        self.sums = torch.zeros(2, device=self.device)  # their summed losses and right answers

    def _batches(self) -> zip[tuple[data.Batch, ...]]:
        """The batches of each step that is left in the epoch, one per shuffle that the method draws from."""
        where = {"seed": self.config.seed, "epoch": self.epoch, "start": self.step}
        streams = (data.CLEAN, data.PERTURBED)[: self.method.batches]
        return zip(*(self.data.batches(self.config.batch_size, stream=stream, **where) for stream in streams))

    def _update_mask(self) -> None:
        where = {"seed": self.config.seed, "epoch": self.epoch, "stream": data.FISHER}
        self.optimizer.update_mask(
            self.model,
            F.cross_entropy,
            self.data.batches(self.config.batch_size, **where),
            samples=self.options["fisher_samples"],
            progress=False,
        )

    def _train_step(self, *batches: data.Batch) -> None:
        output = self.method.step(self.model, self.optimizer, self._forward, *batches)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for schedule in self.schedules:
            schedule.step()
        count(self.sums, output, batches[0])
        self.step += 1

    def _forward(self, batch: data.Batch) -> methods.Output:
        images, labels = batch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            logits = self.model(images)
        smoothing = self.config.label_smoothing if self.model.training else 0.0
        return methods.Output(F.cross_entropy(logits.float(), labels, label_smoothing=smoothing), logits)

    def _train_means(self) -> list[float]:
        return (self.sums / (self.steps_per_epoch * self.config.batch_size)).tolist()


@torch.no_grad()
def count(sums: torch.Tensor, output: methods.Output, batch: data.Batch) -> None:
    """Add a batch's summed loss and right answers to `sums` (2,), without waiting for the device."""
    _, labels = batch
    sums += torch.stack([output.loss * len(labels), (output.logits.argmax(1) == labels).sum()])


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is CUDA where there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device


def set_threads(config: TrainConfig) -> None:
    """Give PyTorch its CPU threads; more than one slows the built-in cnn down."""
    if config.threads is not None or config.model == "cnn":
        torch.set_num_threads(config.threads or 1)


def seed_everything(seed: int, *path: int) -> None:
    """Seed the generators of torch, numpy and Python from a run's seed and a path such as the epoch."""
    word = int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])
    torch.manual_seed(word)
    np.random.seed(word)
    random.seed(word)


MAY_DIFFER = {"output", "resume", "checkpoint_every", "device", "threads"}  # all else decides the weights


def check_same_run(saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError naming every option in which a checkpoint's run and the one asked for differ."""
    differ = [name for name in asked if name not in MAY_DIFFER and saved.get(name) != asked[name]]
    if differ:
        parts = ", ".join(f"{name} {saved.get(name)} (asked for: {asked[name]})" for name in differ)
        raise ValueError(f"cannot resume: the checkpoint's run has {parts}")
