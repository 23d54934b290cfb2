"""Plots of surfaces, and of everything that `flatops landscape` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .surface import Surface

if TYPE_CHECKING:  # matplotlib is slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which are colour-blind safe.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
STYLES = {"training": "-", "test": "--"}
COLUMNS = 3  # panels in a row
AXIS = "direction {} (relative to each filter's norm)"


def plot(surfaces: dict[str, Surface], path: Path | str | None = None, title: str = "") -> Figure:
    """Plot surfaces by name: curves in one panel, planes in panels side by side, on one scale.

    Args:
        surfaces: all with one direction or all with two.
        path: PNG to write; None writes nothing.
        title: title of the figure.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: no surface, or curves and planes together.
        ModuleNotFoundError: matplotlib is missing.
    """
    dimensions = {len(surface.axes) for surface in surfaces.values()}
    if len(dimensions) != 1:
        raise ValueError("surfaces must have at least one entry, and all one direction or all two")
    drawn = {name: asdict(surface) for name, surface in surfaces.items()}
    if dimensions == {2}:
        figure, panels = new_figure(title, len(drawn))
        draw_planes(figure, panels, drawn)
    else:
        figure, [axes] = new_figure(title, 1)
        for number, (name, line) in enumerate(drawn.items()):
            draw_line(axes, line, color=PALETTE[number % len(PALETTE)], label=name)
        finish_lines(axes, list(drawn.values()))
        axes.legend(frameon=False)
    if path:
        figure.savefig(path, dpi=150)
    return figure


def portrait(result: dict[str, Any], path: Path | str) -> None:
    """Plot every network's plane, the curves, both kinds of sharpness and the top eigenvalues.

    Args:
        result: the content of landscape.json.
        path: PNG to write.
    """
    networks = result["networks"]
    figure, panels = new_figure(result["title"], len(networks) + 4)
    *planes, line, average, worst, eigenvalues = panels
    named = {literal(caption(network)): network["plane"] for network in networks}
    draw_planes(figure, planes, named, "training loss")
    for network in networks:
        for split, style in STYLES.items():
            how = {"color": network["colour"], "ls": style}
            draw_line(line, network["line"][split], **how)
            draw_rises(average, network["sharpness"][split], "sigmas", "average", **how)
            draw_rises(worst, network["sharpness"][split], "rhos", "worst", **how)
    finish_lines(line, [each for network in networks for each in network["line"].values()])
    line.set_title("along direction 1")
    average.set(title="average rise under noise", xlabel="σ (noise, relative to each filter's norm)")
    worst.set(title="worst rise found within a ball", xlabel="ρ (radius, all weights together)")
    finish_rises(average, result["config"]["sigmas"])
    finish_rises(worst, result["config"]["rhos"])
    draw_eigenvalues(eigenvalues, networks)
    legend(figure, networks)
    figure.savefig(path, dpi=100)


def limits(surfaces: Sequence[dict[str, Any]]) -> tuple[float, float, bool]:
    """The smallest and the largest finite loss, made different if equal, and whether a log scale can show them."""
    losses = np.concatenate([np.ravel(np.array(surface["losses"], dtype=float)) for surface in surfaces])
    losses = losses[np.isfinite(losses)]
    if not losses.size:
        return 0.0, 1.0, False
    low, high = float(losses.min()), float(losses.max())
    if low > 0:
        return (low, high, True) if high > low * (1 + 1e-9) else (low / 2, low * 2, True)
    return (low, high, False) if high > low else (low - 1, low + 1, False)


def draw_planes(
    figure: Figure, panels: Sequence[Axes], surfaces: dict[str, dict[str, Any]], label: str = "loss"
) -> None:
    """Contours side by side with common colours; hatched where the loss is not finite."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    low, high, log = limits(list(surfaces.values()))
    colours = {"norm": (LogNorm if log else Normalize)(low, high), "cmap": "viridis"}
    levels = np.geomspace(low, high, 25) if log else np.linspace(low, high, 25)
    levels[[0, -1]] = low, high  # exactly: rounding may have excluded a loss
    ticks = round_values(low, high, log)
    for axes, (name, surface) in zip(panels, surfaces.items()):
        losses = np.ma.masked_invalid(np.array(surface["losses"], dtype=float).T)
        hatched = "\n(hatched: not finite)" if losses.mask.any() else ""
        axes.set(title=name + hatched, aspect="equal", xlabel=AXIS.format(1), ylabel=AXIS.format(2))
        axes.grid(False)
        axes.locator_params(nbins=5)
        axes.patch.set(facecolor="#dddddd", edgecolor="#999999", hatch="///")
        if losses.count():
            axes.contourf(*surface["axes"], losses, levels, **colours)
            if any(losses.min() < tick < losses.max() for tick in ticks):
                lines = axes.contour(*surface["axes"], losses, ticks, colors="white", linewidths=0.7)
                axes.clabel(lines, fmt="%g", fontsize=8)
        axes.plot(0, 0, "+", color="white", ms=9)
    bar = figure.colorbar(ScalarMappable(**colours), ax=panels[-1], label=label, ticks=ticks, format="%g")
    bar.minorticks_off()


def round_values(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between two limits; fewer per decade if there are many decades."""
    from matplotlib.ticker import MaxNLocator

    if not log or high < 5 * low:
        return [float(v) for v in MaxNLocator(8).tick_values(low, high) if low < v < high]
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))))
    digits = (1, 2, 5) if len(decades) <= 3 else (1, 3) if len(decades) <= 7 else (1,)
    return [v for k in decades for v in (d * 10.0**k for d in digits) if low < v < high]


def draw_line(axes: Axes, line: dict[str, Any], **style: Any) -> None:
    """A curve, with gaps where the loss is not finite."""
    axes.plot(line["axes"][0], np.array(line["losses"], dtype=float), lw=2, **style)


def finish_lines(axes: Axes, lines: list[dict[str, Any]]) -> None:
    """Labels, and a log scale if it can show all curves."""
    axes.set(xlabel=AXIS.format(1), ylabel="loss", yscale="log" if limits(lines)[2] else "linear")


def draw_rises(axes: Axes, sharpness: dict[str, Any], radii: str, rises: str, **style: Any) -> None:
    """The rise of the loss over the radii; averages with their standard error."""
    rise = np.array(sharpness[rises], dtype=float)
    error = np.array(sharpness["error"], dtype=float) if rises == "average" else None
    axes.errorbar(sharpness[radii], rise, error, marker="o", ms=4, lw=2, **style)


def finish_rises(axes: Axes, radii: Sequence[float]) -> None:
    """Labels and log scales; the vertical one is linear around 0 if noise also lowers the loss."""
    low, high = axes.dataLim.intervaly
    axes.set(ylabel="rise of the loss", xscale="log")
    if low > 0:
        axes.set_yscale("log")
    elif high > 0:
        axes.set_yscale("symlog", linthresh=10.0 ** (np.floor(np.log10(high)) - 3))
    axes.autoscale_view()
    axes.set_xticks(radii, [f"{radius:g}" for radius in radii])
    axes.minorticks_off()


def draw_eigenvalues(axes: Axes, networks: list[dict[str, Any]]) -> None:
    """A bar for each of a network's largest eigenvalues, filled for training images and empty for test images."""
    for number, network in enumerate(networks):
        parts = network["eigenvalues"]
        values = np.array([each["value"] for split in STYLES for each in parts[split]], dtype=float)
        width = 0.8 / len(values)
        places = number + width * (np.arange(len(values)) - (len(values) - 1) / 2)
        colour = network["colour"]
        faces = [colour] * len(parts["training"]) + ["none"] * len(parts["test"])
        bars = axes.bar(places, values, 0.9 * width, color=faces, edgecolor=colour, lw=2)
        for bar in bars[len(parts["training"]) :]:
            bar.set_linestyle(STYLES["test"])
        axes.bar_label(bars, fmt="%.3g", padding=2)
    axes.set(title="top eigenvalue of the Hessian", ylabel="eigenvalue")
    axes.set_xticks([])
    axes.margins(y=0.12)


def caption(network: dict[str, Any]) -> str:
    """A network's name and test accuracy."""
    accuracy = network["test_accuracy"]
    return network["name"] if accuracy is None else f"{network['name']}: test accuracy {accuracy:.1%}"


def literal(text: str) -> str:
    """Escape dollar signs, between which matplotlib would typeset mathematics."""
    return text.replace("$", r"\$")


def legend(figure: Figure, networks: list[dict[str, Any]]) -> None:
    """The legend of colours and dashes, under all panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=network["colour"], lw=4, label=literal(network["name"])) for network in networks]
    handles += [
        Line2D([], [], color="#444444", lw=2, ls=style, label=f"{split} images") for split, style in STYLES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def new_figure(title: str, panels: int) -> tuple[Figure, list[Axes]]:
    """An empty figure and its panels, row by row."""
    from matplotlib.figure import Figure

    columns, rows = min(panels, COLUMNS), ceil(panels / COLUMNS)
    figure = Figure(figsize=(1 + 4.2 * columns, 0.6 + 4 * rows), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#e6e6e6")
        each.set_axisbelow(True)
    return figure, axes
