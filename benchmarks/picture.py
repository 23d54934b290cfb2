"""The pictures of README and docs, from the measured rows."""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flatops.benchmarks.tables import FOREACH, PAPERS, named
from flatops.methods import METHODS


def digest(result: dict[str, Any]) -> str:
    """The digest of the rows that a picture is made from."""
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()


def stamp(path: Path, result: dict[str, Any]) -> None:
    """Writes into a picture the digest of the rows that it shows."""
    about = PngInfo()
    about.add_text("rows", digest(result))
    with Image.open(path) as image:
        image.load()
    image.save(path, pnginfo=about)


def axes_of(width: float, height: float):
    """A figure without a window, and axes without the top and right spines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars: the cost of a perturbed pass in floors, of flatops and of the papers' code."""
    rows = result["rows"]

    def pair(label: str, name: str, other: str) -> tuple[str, float, float]:
        return label, named(rows, of=name, name=other)["floors"], named(rows, name=name)["floors"]

    pairs = [
        pair("RWP\nperturb, restore", "perturb_, backup, restore_", PAPERS),
        pair("SAM\nascend, restore", "ascend_, backup, restore_", PAPERS),
        pair("noise alone", "normals alone", "torch.Tensor.normal_"),
    ]
    figure, axes = axes_of(8, 2.8)
    for i, (_, theirs, ours) in enumerate(pairs):
        for y, value, color in ((i - 0.19, theirs, "0.75"), (i + 0.19, ours, "tab:blue")):
            axes.barh(y, value, 0.36, color=color)
            axes.text(value, y, f" {value:.1f}", va="center", fontsize=9)
    axes.set_yticks(range(len(pairs)), [name for name, _, _ in pairs])
    axes.invert_yaxis()
    axes.set_xlabel("floors: reads and writes of all weights, one thread; less is better")
    axes.set_title(
        f"{result['model']}, {result['weights'] / 1e6:.1f} million weights, {result['machine']}", fontsize=10
    )
    axes.barh(0, 0, color="0.75", label="research scripts (noise: torch.normal_)")
    axes.barh(0, 0, color="tab:blue", label="flatops")
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def draw_growth(result: dict[str, Any], path: Path) -> None:
    """Time per call over the number of weights, on logarithmic axes."""
    figure, axes = axes_of(8, 3.6)
    for name in dict.fromkeys(point["name"] for point in result["points"]):
        points = [(p["weights"], p["us"]) for p in result["points"] if p["name"] == name]
        axes.loglog(*zip(*points), marker=".", color="0.6" if name == "floor" else None, label=name)
    axes.set_xlabel("weights")
    axes.set_ylabel("µs a call, one thread")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_peers(result: dict[str, Any], path: Path) -> None:
    """Bars: a perturbed pass of each optimizer, in floors."""
    rows = [row for row in result["rows"] if row["model"] == "resnet50"]
    figure, axes = axes_of(8, 4.6)
    colors = {"flatops": "tab:blue", FOREACH: "0.6", PAPERS: "0.85"}
    for i, row in enumerate(rows):
        axes.barh(i, row["floors"], 0.75, color=colors.get(row["name"], "0.75"))
        axes.text(row["floors"], i, f" {row['floors']:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row['method']}, {row['name']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("floors: reads and writes of all weights, one thread; less is better")
    axes.set_title(f"a perturbed pass, ResNet-50, {result['machine']}", fontsize=10)
    figure.savefig(path, dpi=150)


def draw_accuracy(result: dict[str, Any], path: Path) -> None:
    """Test accuracy over training time in epochs of SGD, for the two tables side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, both = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, (schedule, title) in zip(
        both, (("fixed", "one schedule for all"), ("tuned", "each tuned on held-out images"))
    ):
        rows = [row for row in result["rows"] if row["schedule"] == schedule]
        [sgd] = [row["curve"] for row in rows if row["method"] == "sgd"]
        epoch = sum(seconds for _, seconds in sgd) / len(sgd)
        for row in rows:
            accuracies, seconds = zip(*row["curve"])
            times = [each / epoch for each in accumulate(seconds)]
            method = METHODS[row["method"]]
            axes.plot(times, accuracies, color=method.colour, lw=1.6, label=method.label)
            axes.plot(times[-1], accuracies[-1], "o", color=method.colour)
        axes.set(
            title=f"{title}, {result['seeds'][schedule]} seeds", xlabel="training time, epochs of SGD", ylim=(0.6, 1)
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
    both[0].set_ylabel("test accuracy, mean")
    both[0].yaxis.set_major_formatter(PercentFormatter(1))
    both[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
