"""`flatops landscape`: networks of `flatops train` side by side, as JSON, a plot and a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from flatops import info, terminal
from flatops.methods import METHODS
from flatops.train import TrainConfig, checkpoint, data, models
from flatops.train.config import used_options
from flatops.train.dataset import Dataset, reading
from flatops.train.engine import choose_device, set_threads
from flatops.train.order import CLEAN, Batch
from flatops.train.report import write_json

from . import page, plots
from .config import LandscapeConfig
from .hessian import top_eigenvalues
from .sharpness import sharpness
from .surface import surface

Splits = dict[str, list[Batch]]  # training and test: batches on the device
STEPS = 5  # of the ascent after SAM's


def landscape(config: LandscapeConfig, console: Console | None = None) -> dict[str, Any]:
    """Measure the loss around each network and write landscape.json, landscape.png and landscape.html.

    All use the same images without augmentation, float32, evaluation mode, and directions from the same seed.

    Args:
        config: the networks, and the range and resolution of the measurement.
        console: where to print; the terminal by default.

    Returns:
        The content of landscape.json: title, config, machine, and for each network its name, line, plane, sharpness and
        eigenvalues. `plots.portrait` and `page.write` draw it.

    Raises:
        ValueError: an option out of range, a damaged checkpoint, or checkpoints of different data.
        FileNotFoundError: no checkpoint there.
        OSError: the output cannot be written.
    """
    console = console or terminal.console()
    states = [checkpoint.read(run) for run in config.runs]
    configs = [checkpoint.unpack_config(state, run) for state, run in zip(states, config.runs)]
    check_same_data(config.runs, states)
    if config.ema:
        states = [averaged(state, run) for state, run in zip(states, config.runs)]
    device = choose_device(config.device)
    set_threads(configs[0])
    if config.output.exists() and not config.output.is_dir():
        raise ValueError(f"output {config.output} is not a folder")
    config.output.mkdir(parents=True, exist_ok=True)
    with reading(data.load(plain_images(configs[0], config.batch_size))) as images:
        if images.fingerprint != states[0]["data"]:
            raise ValueError(f"{config.runs[0]} was trained on {states[0]['data']}; data has {images.fingerprint}")
        splits = choose_batches(images.to(device, torch.contiguous_format), config)
    networks = describe_networks(config.runs, configs, states)
    with Bar(config, console) as bar:
        for network, trained, state in zip(networks, configs, states):
            model = models.create(trained.model, images.classes, images.channels, images.size)
            load_weights(model, state["model"], network["checkpoint"])
            bar.begin(network["name"])
            network |= measure(model.to(device), splits, config, bar.advance)
    result = {
        "title": describe_data(configs[0], splits, config.ema),
        "config": asdict(config),
        "machine": info.report(),
        "networks": networks,
    }
    write_json(config.output / "landscape.json", result)
    plots.portrait(result, config.output / "landscape.png")
    page.write(result, config.output / "landscape.html")
    terminal.say(console, f"\n{result['title']}", style="bold")
    terminal.say(console, table(result), f"Written to {config.output}: landscape.png, .html and .json")
    return result


def measure(
    model: nn.Module, splits: Splits, config: LandscapeConfig, on_pass: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """A network's curve, sharpness and eigenvalues on both splits, and its surface on the training images."""
    grid = {"points": config.points, "radius": config.radius, "all_parameters": config.all_parameters}
    common = {"seed": config.seed, "on_pass": on_pass}
    radii = {"sigmas": config.sigmas, "draws": config.draws, "rhos": config.rhos, "steps": STEPS}
    power = {"count": config.eigenvalues, "iterations": config.iterations}

    def measure_split(batches: list[Batch]) -> dict[str, Any]:
        loss = (model, F.cross_entropy, batches)
        return {
            "line": asdict(surface(*loss, draws=[0], **grid, **common)),
            "sharpness": asdict(sharpness(*loss, **radii, **common)),
            "eigenvalues": [asdict(each) for each in top_eigenvalues(*loss, **power, **common)],
        }

    parts = {split: measure_split(batches) for split, batches in splits.items()}
    plane = asdict(surface(model, F.cross_entropy, splits["training"], **grid, **common))
    return {"plane": plane, **{name: {s: part[name] for s, part in parts.items()} for name in parts["test"]}}


def passes(config: LandscapeConfig) -> int:
    """Passes over the batches in `measure`, if every power iteration takes all of its steps."""
    rises = 1 + config.draws * len(config.sigmas) + (2 + 2 * STEPS) * len(config.rhos)
    return config.points**2 + 2 * (config.points + rises + config.iterations * config.eigenvalues)


# --- networks and images --------------------------------------------------------------------------------


def check_same_data(runs: tuple[Path, ...], states: list[dict[str, Any]]) -> None:
    """Raise ValueError unless all checkpoints have the same training images."""
    first, *others = [(s["config"]["data"], s["config"]["image_size"], s["data"]) for s in states]
    for run, other in zip(runs[1:], others):
        if other != first:
            here, there = (", ".join(str(part) for part in which if part) for which in (first, other))
            raise ValueError(f"runs of different data: {runs[0]} has {here}; {run} has {there}")


def averaged(state: dict[str, Any], run: Path) -> dict[str, Any]:
    """The checkpoint with the averaged weights and their accuracies as its network's, or ValueError if it has none."""
    if state["ema"] is None:
        raise ValueError(f"ema: {run} has no averaged weights; flatops train --ema keeps them")
    history = [row | {"test_accuracy": row["ema_accuracy"]} for row in state["history"]]
    return state | {"model": state["ema"], "history": history}


def plain_images(config: TrainConfig, batch_size: int) -> TrainConfig:
    """The run without random augmentation."""
    plain = {"augment": "none", "randaugment": None, "cutout": 0, "erasing": 0.0}
    return replace(config, batch_size=batch_size, **plain)


def choose_batches(images: Dataset, config: LandscapeConfig) -> Splits:
    """The first batches of the shuffled training images, and of the test images."""
    training = images.batches(config.batch_size, seed=config.seed, epoch=0, stream=CLEAN)
    count = min(config.batches, ceil(images.test_size / config.batch_size))
    return {
        "training": list(islice(training, config.batches)),
        "test": list(images.test_batches(config.batch_size, range(count))),
    }


def load_weights(model: nn.Module, state: dict[str, Any], path: str) -> None:
    """Load a checkpoint's weights, or raise ValueError if they are not those of its network."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} has weights of another network than its model: {reason}") from error


def describe_networks(
    runs: tuple[Path, ...], configs: list[TrainConfig], states: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Each network's name, such as `m-RWP σ 0.05` (with the run's name if two are equal), colour and checkpoint."""
    labels = [describe_method(config) for config in configs]
    count = Counter(labels)
    methods = [config.method for config in configs]
    distinct = len(set(methods)) == len(methods)  # then the methods' usual colours
    return [
        {
            "name": label if count[label] == 1 else f"{label} ({terminal.readable(run.name)})",
            "colour": METHODS[config.method].colour if distinct else plots.PALETTE[number % len(plots.PALETTE)],
            "checkpoint": str(run),
            "epoch": state["epoch"],
            "test_accuracy": state["history"][-1]["test_accuracy"] if state["history"] else None,
        }
        for number, (label, run, config, state) in enumerate(zip(labels, runs, configs, states))
    ]


def describe_method(config: TrainConfig) -> str:
    """The method and its radius."""
    options = used_options(config)
    radius = [f"{sign} {options[name]:g}" for name, sign in (("sigma", "σ"), ("rho", "ρ")) if name in options]
    return " ".join([METHODS[config.method].label, *radius])


def describe_data(config: TrainConfig, splits: Splits, ema: bool) -> str:
    """The title: the network, and the images that every loss is the mean over."""
    training, test = (sum(len(labels) for _, labels in batches) for batches in splits.values())
    wrong = f", {100 * config.label_noise:g} % of the training labels wrong" if config.label_noise else ""
    weights = f"the averaged weights of {config.model}" if ema else config.model
    return f"Loss around {weights} on {config.data}{wrong} ({training:,} training and {test:,} test images)"


# --- the terminal ---------------------------------------------------------------------------------------


class Bar:
    """The progress bar, as a context manager."""

    def __init__(self, config: LandscapeConfig, console: Console) -> None:
        self.each, self.begun = passes(config), 0
        name, share = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.percentage:.0f} %"))
        columns = [name, BarColumn(bar_width=None), share]
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self.task = self.progress.add_task("", total=self.each * len(config.runs))

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def begin(self, name: str) -> None:
        """Start a network; the power iterations of earlier ones may have been shorter than estimated."""
        self.progress.update(self.task, description=name, completed=self.each * self.begun)
        self.begun += 1

    def advance(self) -> None:
        """Count a finished pass over the batches."""
        self.progress.advance(self.task)


def table(result: dict[str, Any]) -> Table:
    """Each network's loss, sharpness at the largest radii, top eigenvalue and its iterations, on both splits."""
    sigma, rho = (result["config"][radii][-1] for radii in ("sigmas", "rhos"))
    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column("\nnetwork", overflow="fold")
    for column in ("\nimages", "\nloss", f"rise\nσ {sigma:g}", f"rise\nρ {rho:g}", "top\neigenvalue", "\nsteps"):
        shown.add_column(column, justify="right", no_wrap=True)
    for network in result["networks"]:
        for split, rise in network["sharpness"].items():
            top = network["eigenvalues"][split][0]
            shown.add_row(
                network["name"],
                split,
                f"{rise['loss']:.4g}",
                f"{rise['average'][-1]:.3g} ± {rise['error'][-1]:.1g}",
                f"{rise['worst'][-1]:.3g}",
                f"{top['value']:.4g} ± {top['residual'] * abs(top['value']):.1g}",
                f"{top['iterations']}",
            )
    return shown
