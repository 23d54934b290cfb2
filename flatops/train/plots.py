"""Plots of a run and of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from flatops.methods import METHODS

from .engine import Row


def learning_curves(history: list[Row], title: str, path: Path) -> None:
    """Plot a run's loss and accuracy over its epochs, on the training and the test data."""
    figure, (losses, accuracies) = panels(title)
    epochs = [row["epoch"] for row in history]
    for axes, quantity in ((losses, "loss"), (accuracies, "accuracy")):
        for split, colour in (("train", METHODS["sgd"].colour), ("test", METHODS["sam"].colour)):
            values = [row[f"{split}_{quantity}"] for row in history]
            axes.plot(epochs, values, color=colour, lw=2, marker="o" if len(history) == 1 else None, label=split)
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.legend(frameon=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracies.yaxis.set_major_formatter(PercentFormatter(1))
    save(figure, path)


def comparison(runs: list[dict[str, Any]], methods: Sequence[str], title: str, path: Path) -> None:
    """Plot test accuracy over the epochs (mean and standard deviation over seeds) and every seed's last value.

    Args:
        runs: one entry per run, with its `method`, `seed` and `history`.
        methods: methods to plot, in this order.
        title: title of the figure.
        path: PNG to write.
    """
    figure, (curves, finals) = panels(title, widths=(3, 2))
    ticks = []
    for position, (method, label, colour) in enumerate((m, METHODS[m].label, METHODS[m].colour) for m in methods):
        histories = [run["history"] for run in runs if run["method"] == method]
        accuracy = np.array([[row["test_accuracy"] for row in history] for history in histories])
        seeds, epochs = accuracy.shape
        mean, deviation = accuracy.mean(0), accuracy.std(0, ddof=1 if seeds > 1 else 0)
        curves.plot(range(1, epochs + 1), mean, color=colour, lw=2, label=label)
        curves.fill_between(range(1, epochs + 1), mean - deviation, mean + deviation, color=colour, alpha=0.18, lw=0)
        x = position + np.linspace(-0.12, 0.12, seeds) * (seeds > 1)
        finals.scatter(x, accuracy[:, -1], color=colour, alpha=0.6, s=28, lw=0)
        finals.hlines(mean[-1], position - 0.28, position + 0.28, color=colour, lw=3)
        ticks.append(f"{label}\n{mean[-1]:.1%}")
    curves.set(xlabel="epoch", ylabel="test accuracy", title="mean and standard deviation over seeds")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.legend(frameon=False, loc="lower right")
    finals.set(title="last epoch: mean, and every seed", xlim=(-0.5, len(methods) - 0.5))
    finals.set_xticks(range(len(methods)), ticks)
    for axes in (curves, finals):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    save(figure, path)


def panels(title: str, widths: tuple[int, int] = (1, 1)) -> tuple[Figure, tuple[Axes, Axes]]:
    """An empty figure of two panels side by side."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axes = figure.subplots(1, 2, width_ratios=widths)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#e6e6e6")
        each.set_axisbelow(True)
    return figure, tuple(axes)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=150)
