"""`flatops compare`: methods side by side over several seeds, as a table, a plot, and JSON."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from statistics import fmean, median, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flatops import distributed, info, terminal
from flatops.methods import METHODS, OPTIONS, find

from . import plots
from .config import CompareConfig, Recipe, TrainConfig, used_options
from .dataset import reading
from .engine import Row, Trainer
from .report import describe_options, write_json

Run = dict[str, Any]  # method, seed and history of one training


def compare(config: CompareConfig, console: Console | None = None) -> dict[str, Any]:
    """Train each method with each seed and write compare.json and compare.png.

    Accuracies are those of the last epoch. A run is bit for bit equal to `flatops train` with its method and seed.

    Args:
        config: the comparison.
        console: where to print; the terminal by default.

    Returns:
        The content of compare.json: config, machine, summary (a row per method), runs (one per method and seed).

    Raises:
        ValueError: an option out of range, or one that applies to none of the methods; also under torchrun.
    """
    if distributed.launched()[1] > 1:
        raise ValueError("compare runs in one process: start it without torchrun")
    console = console or terminal.console()
    configs = {method: method_config(config, method) for method in config.methods}
    check_options(config)
    config.output.mkdir(parents=True, exist_ok=True)
    runs = run_all(config, configs, console)
    result = {
        "config": asdict(config),
        "machine": info.report(),
        "summary": [summarise(method, configs[method], runs) for method in config.methods],
        "runs": runs,
    }
    title = describe(config)
    write_json(config.output / "compare.json", result)
    plots.comparison(runs, config.methods, title, config.output / "compare.png")
    terminal.say(console, f"\n{title}", style="bold")
    terminal.say(console, table(result["summary"]), Text(caveat(config)))
    terminal.say(console, f"\nWritten to {config.output / 'compare.json'} and compare.png")
    return result


def method_config(config: CompareConfig, method: str) -> TrainConfig:
    """One method's training configuration, with those of the comparison's options that apply to it."""
    foreign = set(OPTIONS).difference(find(method).accepts)
    shared = {field.name for field in fields(Recipe)} - foreign
    return TrainConfig(method=method, **{name: getattr(config, name) for name in shared})


def check_options(config: CompareConfig) -> None:
    """Raise ValueError for an option that was given and applies to none of the methods."""
    accepted = {name for method in config.methods for name in find(method).accepts}
    unused = [name for name in OPTIONS if getattr(config, name) is not None and name not in accepted]
    if unused:
        raise ValueError(f"none of {', '.join(config.methods)} has the option {', '.join(unused)}")


def run_all(config: CompareConfig, configs: dict[str, TrainConfig], console: Console) -> list[Run]:
    """Train every method and seed."""
    runs: list[Run] = []
    progress = Progress(
        TextColumn("{task.description:<7}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("seed {task.fields[seed]}/" + str(config.seeds)),
        TextColumn("test {task.fields[accuracy]:6.1%}", style="cyan"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with progress:
        total = config.seeds * config.epochs
        bars = {m: progress.add_task(METHODS[m].label, total=total, seed=1, accuracy=0.0) for m in configs}
        for seed in range(config.seeds):

            def show(method: str, row: Row) -> None:
                progress.update(bars[method], advance=1, seed=seed + 1, accuracy=row["test_accuracy"])

            runs += run_seed(configs, seed, show)
    return runs


def run_seed(
    configs: dict[str, TrainConfig], seed: int, on_epoch: Callable[[str, Row], None] = lambda method, row: None
) -> list[Run]:
    """Train every method with one seed. They take turns epoch by epoch, so that their times can be paired.

    Args:
        configs: every method's training configuration; their numbers of epochs may differ.
        seed: seed of all of them.
        on_epoch: called with the method and the row after every epoch.
    """
    trainers = {method: Trainer(replace(config, seed=seed)) for method, config in configs.items()}
    with ExitStack() as stack:
        for trainer in trainers.values():
            stack.enter_context(reading(trainer.data))
        for epoch in range(max(config.epochs for config in configs.values())):
            for method, trainer in trainers.items():
                if epoch < configs[method].epochs:
                    on_epoch(method, trainer.run_epoch())
    return [{"method": m, "seed": seed, "history": trainer.history} for m, trainer in trainers.items()]


def summarise(method: str, config: TrainConfig, runs: list[Run]) -> dict[str, Any]:
    """A method's row: options, accuracy over the seeds, time per epoch and its ratio to SGD's."""
    own, sgd = ([run["history"] for run in runs if run["method"] == name] for name in (method, "sgd"))
    accuracies = [history[-1]["test_accuracy"] for history in own]
    seconds, sgd_seconds = ([row["seconds"] for history in group for row in history] for group in (own, sgd))
    return {
        "method": method,
        "options": used_options(config),
        "accuracy_mean": fmean(accuracies),
        "accuracy_std": stdev(accuracies) if len(accuracies) > 1 else None,
        "seconds_per_epoch": median(seconds),
        "time_to_sgd": median(s / t for s, t in zip(seconds, sgd_seconds)) if sgd else None,
    }


def describe(config: CompareConfig) -> str:
    """The title of the comparison."""
    noise = f" with {config.label_noise:.0%} wrong labels" if config.label_noise else ""
    seeds = f"{config.seeds} seeds" if config.seeds > 1 else "1 seed"
    held_out = f"{config.validation:.0%} of the training images held out for testing, " if config.validation else ""
    return f"{config.data}{noise}: {held_out}{config.model}, {config.epochs} epochs, lr {config.lr:g}, {seeds}"


def table(summary: list[dict[str, Any]]) -> Table:
    """The printed summary, with the best mean accuracy in bold."""
    best = max(row["accuracy_mean"] for row in summary)
    result = Table(box=box.SIMPLE_HEAD)
    for name in ("method", "options"):
        result.add_column(name)
    for name in ("test accuracy", "s/epoch", "time / SGD"):
        result.add_column(name, justify="right")
    for row in summary:
        spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.1f}"
        ratio = "–" if row["time_to_sgd"] is None else f"{row['time_to_sgd']:.2f}"
        result.add_row(
            METHODS[row["method"]].label,
            describe_options(row["options"]),
            f"{100 * row['accuracy_mean']:.1f}{spread} %",
            f"{row['seconds_per_epoch']:.3f}",
            ratio,
            style="bold" if row["accuracy_mean"] == best else None,
        )
    return result


def caveat(config: CompareConfig) -> str:
    """What to keep in mind when reading the table."""
    if config.validation:
        return "One schedule for all methods; test images are held-out training images, which may be used for tuning."
    text = "One schedule for all methods, whose options were tuned on these test images."
    if config == replace(CompareConfig(), methods=config.methods, seeds=config.seeds, output=config.output):
        text += (
            " The schedule favours the flat-minima methods: it is long enough for SGD to memorise the wrong labels. "
            "When every method is tuned on held-out images, SGD is as good: see both tables in README.md."
        )
    return text
