"""`flatops train --profile`: where the time of a step goes, without loading images, and each method's ratio to SGD."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from flatops import distributed, terminal
from flatops.methods import METHODS

from .clock import PARTS
from .config import TrainConfig, with_method
from .dataset import reading
from .engine import Trainer, choose_device
from .run import memory_advice

ROUNDS, WARMUP = 16, 2
# Used instead of the default data and model: digits are too small for a meaningful profile.
PROFILED = {
    "cpu": {"model": "resnet18", "image_size": 32},
    "cuda": {"model": "resnet50", "image_size": 224, "batch_size": 256, "amp": "bf16", "channels_last": True},
}


def profile(config: TrainConfig, console: Console | None = None, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Time a step of every method on a run's data and network, in turns, in one process.

    Args:
        config: the run; the default data and model are replaced by synthetic images and a ResNet-18 at 32×32, on a GPU
            a ResNet-50 at 224×224 in bf16 with batches of 256.
        console: where to print; the terminal by default.
        rounds: timed steps per method.

    Returns:
        A row per method: `milliseconds` per step (median over rounds), `ratio` to SGD's step (median of each round's
        ratio), and the share of each part.

    Raises:
        ValueError: an option out of range; also under torchrun.
    """
    if distributed.launched()[1] > 1:
        raise ValueError("profile runs in one process: start it without torchrun")
    console = console or terminal.console()
    default = TrainConfig()
    if (config.data, config.model) == (default.data, default.model):
        size = PROFILED[choose_device(config.device).type]
        config = replace(
            config, data="synthetic", **{k: v for k, v in size.items() if getattr(config, k) == getattr(default, k)}
        )
    with memory_advice(config):
        contenders = {method: Contender(with_method(config, method)) for method in METHODS}
        for contender in contenders.values():
            for _ in range(WARMUP):
                contender.step()
            contender.trainer.clock.reset()
    seconds = {method: [] for method in METHODS}
    for _ in range(rounds):
        for method, contender in contenders.items():
            seconds[method].append(contender.step())
    rows = []
    for method, contender in contenders.items():
        parts = contender.trainer.clock.read(wait=True)
        del parts["data"]
        total = sum(parts.values())
        rows.append(
            {
                "method": method,
                "milliseconds": 1000 * median(seconds[method]),
                "ratio": median(own / sgd for own, sgd in zip(seconds[method], seconds["sgd"])),
                **{part: value / total for part, value in parts.items()},
            }
        )
    trainer = contenders["sgd"].trainer
    terminal.say(
        console,
        f"{config.data} of {trainer.data.size}×{trainer.data.size}, {config.model}, batches of {config.batch_size}, "
        f"{trainer.device}, {torch.get_num_threads()} threads, {rounds} rounds",
        table(rows),
    )
    return rows


class Contender:
    """A run of timed steps, always on the same batches: workers would prefetch during the other runs' turns."""

    def __init__(self, config: TrainConfig) -> None:
        self.trainer = Trainer(config)
        self.trainer.network.train()
        if "fisher_samples" in self.trainer.options:
            self.trainer.update_mask()
        with reading(self.trainer.data):
            self.batches = next(self.trainer._batches())

    def step(self) -> float:
        """Take a step and return its seconds."""
        started = time.perf_counter()
        self.trainer._train_step(*self.batches)
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def table(rows: list[dict[str, Any]]) -> Table:
    """The printed rows."""
    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("method")
    parts = [part for part in PARTS if part != "data"]
    for name in ("ms / step", "step / SGD's", *parts):
        result.add_column(name, justify="right")
    for row in rows:
        shares = (f"{row[part]:.1%}" for part in parts)
        result.add_row(METHODS[row["method"]].label, f"{row['milliseconds']:.1f}", f"{row['ratio']:.2f}", *shares)
    return result
