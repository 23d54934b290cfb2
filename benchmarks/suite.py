"""Runs all CPU benchmarks one after another, then makes the tables and pictures from their results.

`flatops bench --suite full` takes a quarter of an hour on an idle machine with two cores. Each benchmark has its own
process, so that nothing that one leaves in memory or in a cache affects another.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from flatops.benchmarks import bench, picture, tables
from flatops.landscape import plots

ROOT = Path(__file__).resolve().parent.parent


# Name of a file of rows, and the module whose measure() makes them. What is timed runs alone.
TIMED = {"cpu": "bench"} | {
    name: name for name in ("models", "peers", "memory", "growth", "methods", "distributed", "machine_code")
}
TOGETHER = {name: name for name in ("flatness", "accuracy")}
QUESTIONS = TIMED | TOGETHER
PICTURES = {
    "cpu": "bench.png",
    "growth": "growth.png",
    "peers": "peers.png",
    "flatness": "landscape.png",
    "accuracy": "accuracy.png",
}


def ask(modules: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The measurements of several modules with their defaults, in parallel, each in its own process."""
    with ThreadPoolExecutor() as threads:
        yield from threads.map(ask_one, modules)


def ask_one(module: str) -> dict[str, Any]:
    """A module's measurement, in its own process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(answer, module).result()


def answer(module: str) -> dict[str, Any]:
    """A module's measurement."""
    return importlib.import_module(f"flatops.benchmarks.{module}").measure()


def main(config: bench.Config) -> int:
    """Runs everything and writes the rows; without --results also the tables and pictures of README and docs."""
    here = not config.results
    if here and not (ROOT / "README.md").exists():
        raise ValueError("there is no README here to write tables into: say --results FOLDER, or run it in a checkout")
    for module in QUESTIONS.values():
        importlib.import_module(f"flatops.benchmarks.{module}")  # a missing dependency is an error now, not later
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler from reporting each of its starts
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as unfinished:  # a suite that is interrupted leaves the old results
        folder = config.results or Path(unfinished)
        folder.mkdir(parents=True, exist_ok=True)
        for group in (*([name] for name in TIMED), TOGETHER):
            for name, result in zip(group, ask(QUESTIONS[name] for name in group)):
                bench.write(result, folder / f"{name}.json")
            print(f"{time.monotonic() - start:.0f} s", flush=True)
        if here:
            shutil.copytree(folder, ROOT / "benchmarks/results", dirs_exist_ok=True)
            publish(ROOT, folder)
    return 0


def publish(root: Path, folder: Path) -> None:
    """Makes the tables and pictures of a checkout from the rows in a folder."""
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in QUESTIONS}
    tables.write(root, results)
    picture.draw(results["cpu"], root / "docs/bench.png")
    picture.draw_growth(results["growth"], root / "docs/growth.png")
    picture.draw_peers(results["peers"], root / "docs/peers.png")
    plots.portrait(results["flatness"], root / "docs/landscape.png")
    picture.draw_accuracy(results["accuracy"], root / "docs/accuracy.png")
    for name, page in PICTURES.items():
        picture.stamp(root / "docs" / page, results[name])
