"""`flatops train --profile`: where a step goes, and what each method's step costs beside SGD's."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .clock import PARTS
from .config import METHOD_OPTIONS, TrainConfig
from .engine import Trainer, choose_device
from .methods import METHODS, known_options
from .world import launched

ROUNDS, WARMUP = 16, 2
# What is timed where no data and no network are asked for: digits are too small to tell anything.
PROFILED = {
    "cpu": {"model": "resnet18", "image_size": 32},
    "cuda": {"model": "resnet50", "image_size": 224, "batch_size": 256, "amp": "bf16", "channels_last": True},
}


def profile(config: TrainConfig, console: Console | None = None, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Time a step of every method on the data and network of a run, in one process, in turns.

    Args:
        config: the run; with the default data and network it is, on synthetic images, a ResNet-18 at 32×32, on a GPU a
            ResNet-50 at 224×224 in bf16 and batches of 256.
        console: where to print; the terminal by default.
        rounds: steps of each method that count.

    Returns:
        A row per method: `milliseconds` of a step (median over the rounds), `ratio` to SGD's (median of the ratios in each
        round), and the share of each part.

    Raises:
        ValueError: an option out of range; also under torchrun.
    """
    if launched().size > 1:
        raise ValueError("profile runs in one process: start it without torchrun")
    console = console or Console()
    default = TrainConfig()
    if (config.data, config.model) == (default.data, default.model):
        config = replace(config, data="synthetic", **PROFILED[choose_device(config.device).type])
    contenders = {method: Contender(method_config(config, method)) for method in METHODS}
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
        total = sum(parts.values())
        rows.append(
            {
                "method": method,
                "milliseconds": 1000 * median(seconds[method]),
                "ratio": median(own / sgd for own, sgd in zip(seconds[method], seconds["sgd"])),
                **{part: value / total for part, value in parts.items()},
            }
        )
        contender.trainer.data.close()
    trainer = contenders["sgd"].trainer
    console.print(
        f"{config.data} of {trainer.data.size}×{trainer.data.size}, {config.model}, batches of {config.batch_size}, "
        f"{trainer.device}, {torch.get_num_threads()} threads, {rounds} rounds",
        table(rows),
        sep="\n",
        highlight=False,
    )
    return rows


class Contender:
    """A run of which single steps are taken."""

    def __init__(self, config: TrainConfig) -> None:
        self.trainer = Trainer(config)
        self.trainer.network.train()
        self.batches = iter(())
        if "fisher_samples" in self.trainer.options:
            self.trainer.update_mask()

    def step(self) -> float:
        """Take a step; how long it took, its wait for data included."""
        trainer = self.trainer
        started = time.perf_counter()
        step = next(self.batches, None)
        if step is None:  # the next epoch
            trainer.step = 0
            self.batches = trainer.clocked(trainer._batches())
            step = next(self.batches)
        trainer._train_step(*step)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def method_config(config: TrainConfig, method: str) -> TrainConfig:
    """The run with another method: its options as far as they mean something to that one."""
    foreign = set(METHOD_OPTIONS) - known_options(method)
    forms = {"rwp_parallel": config.rwp_parallel and "lam" in METHODS[method].options, "ascent": "synced"}
    return replace(config, method=method, **dict.fromkeys(foreign), **forms)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows, to print."""
    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("method")
    for name in ("ms / step", "step / SGD's", *PARTS):
        result.add_column(name, justify="right")
    for row in rows:
        shares = (f"{row[part]:.1%}" for part in PARTS)
        result.add_row(METHODS[row["method"]].label, f"{row['milliseconds']:.1f}", f"{row['ratio']:.2f}", *shares)
    return result
