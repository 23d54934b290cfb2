"""A run's output: a header, a line per epoch, a progress bar, a log of JSON lines, and TensorBoard's."""

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

from flatops import terminal
from flatops.methods import METHODS

from .config import TrainConfig
from .dataset import format_counts
from .engine import Row, Trainer

AMP = {"none": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast with a loss scale"}
AUGMENTATIONS = ("randaugment", "cutout", "erasing", "mixup", "cutmix")
COLUMNS = {  # title: (key of the row, width, format)
    "epoch": ("epoch", 5, "d"),
    "lr": ("lr", 8, ".4f"),
    "sigma": ("sigma", 8, ".4f"),
    "rho": ("rho", 8, ".4f"),
    "train loss": ("train_loss", 12, "#.4g"),
    "train acc": ("train_accuracy", 11, ".1%"),
    "test loss": ("test_loss", 12, "#.4g"),
    "test acc": ("test_accuracy", 11, ".1%"),
    "top 5": ("test_top5", 9, ".1%"),
    "ema acc": ("ema_accuracy", 10, ".1%"),
    "images/s": ("images_per_second", 12, ",.0f"),
}


def plain(value: Any) -> Any:
    """A value for JSON: paths become strings, numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n"
    # File names that are not UTF-8 contain surrogates, which JSON and Python escape in the same way.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


class Log:
    """One JSON line per epoch.

    Args:
        path: the file, overwritten; None writes nothing.
        history: rows of finished epochs, which come first.
    """

    def __init__(self, path: Path | None, history: list[Row]) -> None:
        self.path = path
        if path:
            path.write_text("", encoding="utf-8")
        for row in history:
            self.add(row)

    def add(self, row: Row) -> None:
        """Append a row."""
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(row)) + "\n")


class ImagesPerSecond(ProgressColumn):
    """Recent training images per second."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed * self.batch_size:,.0f} images/s" if speed else "", style="cyan")


class Shares(ProgressColumn):
    """Each part's share of the epoch's time."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.trainer = trainer

    def render(self, task: Task) -> Text:
        return Text(describe_shares(self.trainer.clock.read()), style="magenta")


class Board:
    """Every epoch's metrics for TensorBoard; ModuleNotFoundError where it is not installed.

    Args:
        folder: where to write; None writes nothing.
        history: rows of finished epochs, which come first.
    """

    def __init__(self, folder: Path | None, history: list[Row]) -> None:
        self.writer = None
        if folder:
            from torch.utils.tensorboard import SummaryWriter  # optional

            for old in folder.glob("events.out.tfevents.*"):  # of the run that this one continues: in `history`
                old.unlink()
            self.writer = SummaryWriter(str(folder))
        for row in history:
            self.add(row)

    def add(self, row: Row) -> None:
        """Write a row: test_loss as test/loss and so on."""
        if self.writer:
            for name, value in row.items():
                self.writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
            self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self.writer:
            self.writer.close()


class Screen:
    """A run's terminal output, as a context manager.

    Args:
        trainer: the run.
        console: where to print.
    """

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self.trainer, self.console = trainer, console
        shown = {"sigma": "sigma_end" in trainer.options, "rho": "rho_end" in trainer.options}
        shown |= {"top 5": trainer.data.classes > 5 and trainer.config.data != "digits", "ema acc": trainer.average}
        self.columns = {title: c for title, c in COLUMNS.items() if shown.get(title, True)}
        self.reported: set[str] = set()  # unreadable images
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.0f} %"),
            ImagesPerSecond(trainer.config.batch_size),
            Shares(trainer),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
            disable=console.quiet,
        )
        self.bar = self.progress.add_task("", total=trainer.total_steps, completed=trainer.steps_done, epoch="")

    def __enter__(self) -> Screen:
        terminal.say(self.console, header(self.trainer))
        titles = "".join(f"{title:>{width}}" for title, (_, width, _) in self.columns.items())
        terminal.say(self.console, titles, style="bold")
        for row in self.trainer.history:
            self.epoch(row)
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def step(self) -> None:
        """Update the progress bar after a step."""
        epoch = f"{self.trainer.epoch + 1}/{self.trainer.config.epochs}"
        self.progress.update(self.bar, completed=self.trainer.steps_done, epoch=epoch)
        self._report(self.trainer.data.bad)

    def _report(self, bad: dict[str, str]) -> None:
        """Print unreadable images, each once."""
        for name in sorted(bad.keys() - self.reported):
            self.reported.add(name)
            terminal.say(self.console, f"skipped: cannot read {name}: {bad[name]}", style="yellow")

    def epoch(self, row: Row) -> None:
        """Print an epoch's line."""
        self._report(self.trainer.bad)
        cells = (f"{format(row[key], form):>{width}}" for key, width, form in self.columns.values())
        terminal.say(self.console, "".join(cells))


def header(trainer: Trainer) -> Panel:
    """The run's settings, defaults included."""
    config, weights = trainer.config, sum(p.numel() for p in trainer.model.parameters())
    threads = torch.get_num_threads()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan")
    grid.add_row("data", describe_data(trainer))
    if trainer.data.left_out:
        grid.add_row("", f"ignored: {format_counts(trainer.data.left_out)}")
    grid.add_row("model", f"{config.model}, {weights:,} weights, seed {config.seed}")
    grid.add_row("method", describe_method(trainer))
    grid.add_row(config.base, describe_schedule(config))
    if augmentations := {name: getattr(config, name) for name in AUGMENTATIONS if getattr(config, name)}:
        grid.add_row("augment", describe_options(augmentations))
    micro_batches = f", in {config.accumulate} micro-batches" * (config.accumulate > 1)
    steps = f"{trainer.steps_per_epoch} steps of {config.batch_size} images{micro_batches}"
    grid.add_row("epochs", f"{config.epochs}, each {steps}")
    grid.add_row(
        "device",
        f"{trainer.device}, {threads} thread{'s' * (threads > 1)}, "
        f"{AMP[config.amp]}{', channels last' * config.channels_last}{', compiled' * config.compile}",
    )
    if trainer.parallel:
        grid.add_row("processes", f"{trainer.world.size}, {trainer.parallel}")
    return Panel(grid, title="flatops train", title_align="left", expand=False)


def describe_data(trainer: Trainer) -> str:
    """The dataset and its numbers of images, wrong labels and classes."""
    data = trainer.data
    wrong = f" ({data.wrong:,} labels wrong)" if data.wrong else ""
    return (
        f"{trainer.config.data}, {data.train_size:,} training images{wrong}, "
        f"{data.test_size:,} {'held-out' if trainer.config.validation else 'test'} images, {data.classes} classes"
    )


def describe_method(trainer: Trainer) -> str:
    """The method's name and options."""
    forms = ["parallel"] * trainer.config.rwp_parallel + ["local ascent"] * (trainer.config.ascent == "local")
    return "  ".join([METHODS[trainer.config.method].label, describe_options(trainer.options), *forms]).strip()


def describe_options(options: dict[str, float | str]) -> str:
    """Options and their values, such as `sigma 0.05  lam 0.5`."""
    return "  ".join(
        f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}" for name, value in options.items()
    )


def describe_schedule(config: TrainConfig) -> str:
    """The learning rate schedule, and the base optimizer's other options."""
    warmup = f"warm-up of {config.warmup_epochs:g} epochs, then " if config.warmup_epochs else ""
    momentum = f"{'Nesterov ' * config.nesterov}momentum {config.momentum:g}, " if config.base == "sgd" else ""
    more = {"clip norm": config.clip_norm, "label smoothing": config.label_smoothing, "ema": config.ema}
    return (
        f"lr {config.lr:g}, {warmup}down to 0 along a cosine, {momentum}weight decay {config.weight_decay:g}"
        + "".join(f", {name} {value:g}" for name, value in more.items() if value)
    )


def describe_shares(seconds: dict[str, float]) -> str:
    """Each part's share of the time, such as `data 1 %  passes 93 %  flatops 4 %  optimizer 2 %`."""
    total = sum(seconds.values())
    return "  ".join(f"{part} {value / total:.0%}" for part, value in seconds.items()) if total else ""
