"""What a run shows while it trains: a header, a line per epoch, a progress bar; and its log of JSON lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .config import TrainConfig
from .engine import Row, Trainer
from .methods import Options

COLUMNS = {  # title: (key of the row, width, format)
    "epoch": ("epoch", 5, "d"),
    "lr": ("lr", 8, ".4f"),
    "sigma": ("sigma", 8, ".4f"),
    "train loss": ("train_loss", 12, "#.4g"),
    "train acc": ("train_accuracy", 11, ".1%"),
    "test loss": ("test_loss", 12, "#.4g"),
    "test acc": ("test_accuracy", 11, ".1%"),
    "images/s": ("images_per_second", 12, ",.0f"),
}


def plain(value: Any) -> Any:
    """A value that JSON knows: paths become text, numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Log:
    """One JSON line per epoch.

    Args:
        path: the file; written anew. None writes nothing.
        history: rows of epochs already done, which come first.
    """

    def __init__(self, path: Path | None, history: list[Row]) -> None:
        self.path = path
        if path:
            path.write_text("")
        for row in history:
            self.add(row)

    def add(self, row: Row) -> None:
        """Append a row."""
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(plain(row)) + "\n")


class ImagesPerSecond(ProgressColumn):
    """Training images per second over the last steps."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed * self.batch_size:,.0f} images/s" if speed else "", style="cyan")


class Screen:
    """The terminal of one run, as a context manager.

    Args:
        trainer: the run.
        console: where to print.
    """

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self.trainer, self.console = trainer, console
        self.columns = {
            title: c for title, c in COLUMNS.items() if title != "sigma" or "sigma_end" in trainer.options
        }
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.0f} %"),
            ImagesPerSecond(trainer.config.batch_size),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
            disable=console.quiet,
        )
        self.bar = self.progress.add_task(
            "", total=trainer.total_steps, completed=trainer.steps_done, epoch=""
        )

    def __enter__(self) -> Screen:
        self.console.print(header(self.trainer))
        self.console.print(
            "".join(f"{title:>{width}}" for title, (_, width, _) in self.columns.items()), style="bold"
        )
        for row in self.trainer.history:
            self.epoch(row)
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def step(self) -> None:
        """Show that a step was done."""
        epoch = f"{self.trainer.epoch + 1}/{self.trainer.config.epochs}"
        self.progress.update(self.bar, completed=self.trainer.steps_done, epoch=epoch)

    def epoch(self, row: Row) -> None:
        """Print an epoch's line."""
        cells = (f"{format(row[key], form):>{width}}" for key, width, form in self.columns.values())
        self.console.print("".join(cells), highlight=False)


def header(trainer: Trainer) -> Panel:
    """The values that the run uses, defaults included."""
    config, weights = trainer.config, sum(p.numel() for p in trainer.model.parameters())
    threads = torch.get_num_threads()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan")
    grid.add_row("data", describe_data(trainer))
    grid.add_row("model", f"{config.model}, {weights:,} weights, seed {config.seed}")
    grid.add_row("method", describe_method(trainer))
    grid.add_row("sgd", describe_schedule(config))
    grid.add_row(
        "length", f"{config.epochs} epochs of {trainer.steps_per_epoch} steps of {config.batch_size} images"
    )
    grid.add_row(
        "device",
        f"{trainer.device}, {threads} thread{'s' * (threads > 1)}, "
        f"{'bfloat16 autocast' if config.bf16 else 'float32'}",
    )
    if trainer.parallel:
        grid.add_row("processes", f"{trainer.world.size}, {trainer.parallel}")
    return Panel(grid, title="flatops train", title_align="left", expand=False)


def describe_data(trainer: Trainer) -> str:
    """Sizes of the data, and how much of it is wrong."""
    data = trainer.data
    wrong = f" ({data.wrong:,} labels wrong)" if data.wrong else ""
    return (
        f"{trainer.config.data}, {len(data.train[1]):,} training images{wrong}, "
        f"{len(data.test[1]):,} test images, {data.classes} classes"
    )


def describe_method(trainer: Trainer) -> str:
    """The method's name and options."""
    forms = ["parallel"] * trainer.config.rwp_parallel + ["local ascent"] * (trainer.config.ascent == "local")
    return "  ".join([trainer.method.label, describe_options(trainer.options), *forms]).strip()


def describe_options(options: Options) -> str:
    """Options and their values, such as `sigma 0.05  lam 0.5`."""
    return "  ".join(
        f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}"
        for name, value in options.items()
    )


def describe_schedule(config: TrainConfig) -> str:
    """The learning rate's way and the rest of SGD."""
    warmup = f"up over {config.warmup_epochs:g} epochs, then " if config.warmup_epochs else ""
    return (
        f"lr {config.lr:g}, {warmup}down to 0 along a cosine, momentum {config.momentum:g}, "
        f"weight decay {config.weight_decay:g}"
    )
