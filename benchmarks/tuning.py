"""Which options are best for each method? A random search of equal size for each, on held-out training images.

The test images are not used. All methods try the same schedules, each with a random radius of its own kind, and then
every radius on the best schedule. The best few trials are repeated with more seeds, because the best of many is partly
luck.

    python -m flatops.benchmarks.tuning      # 20 minutes on two cores; writes benchmarks/results/tuning.json
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

from flatops.benchmarks.bench import write
from flatops.benchmarks.measure import provenance
from flatops.train.compare import run_seed
from flatops.train.config import TrainConfig

T, R = TypeVar("T"), TypeVar("R")
RESULT = Path(__file__).resolve().parent / "results/tuning.json"
LABEL_NOISE = 0.3
TRIALS, FINALISTS = 24, 4
SEEDS, MORE_SEEDS = range(1000, 1004), range(1004, 1012)  # disjoint from the seeds of the comparison

SCHEDULE = {"epochs": (5, 10, 20), "lr": (0.01, 0.02, 0.05), "weight_decay": (5e-3, 0.02, 0.05, 0.08, 0.12, 0.2)}
SIGMA, RHO = {"sigma": (0.01, 0.02, 0.03, 0.05, 0.07)}, {"rho": (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)}
RADII: dict[str, dict[str, tuple[float, ...]]] = {
    "sgd": {},
    "rwp": SIGMA,
    "mrwp": SIGMA,
    "arwp": SIGMA | {"eta": (0.1, 1.0)},
    "sam": RHO,
    "ssam": RHO,
}
Options = dict[str, float]


def trials(method: str, count: int = TRIALS) -> list[Options]:
    """The schedules that all methods try, each with a radius of this method; the same in every run."""
    random = np.random.default_rng(0)
    schedules = random.permutation(list(product(*SCHEDULE.values())))[:count]
    options = [dict(zip(SCHEDULE, map(float, schedule))) for schedule in schedules]
    for name, values in RADII[method].items():
        drawn = random.permutation(np.resize(values, count))  # every value equally often
        options = [each | {name: float(value)} for each, value in zip(options, drawn)]
    return [each | {"epochs": int(each["epochs"])} for each in options]


def accuracy(job: tuple[str, Options, int]) -> float:
    """The last epoch's accuracy on held-out images in one training run."""
    method, options, seed = job
    config = TrainConfig(method=method, label_noise=LABEL_NOISE, validation=0.2, **options)
    return run_seed({method: config}, seed)[0]["history"][-1]["test_accuracy"]


def spread(call: Callable[[T], R], jobs: Iterable[T]) -> list[R]:
    """The results of single-threaded jobs, spread over all cores."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        return list(processes.map(call, jobs))


def search(
    method: str, count: int = TRIALS, seeds: Iterable[int] = SEEDS, more: Iterable[int] = MORE_SEEDS
) -> list[dict[str, Any]]:
    """One row per trial with its options and its accuracies by seed: finalists first, the best at the top."""

    def evaluate(rows: list[dict[str, Any]], seeds: Iterable[int]) -> None:
        jobs = [(method, row["options"], seed) for row in rows for seed in seeds]
        for (_, options, _), found in zip(jobs, spread(accuracy, jobs)):
            next(row for row in rows if row["options"] == options)["accuracies"].append(found)

    def rows_of(options: list[Options]) -> list[dict[str, Any]]:
        return [{"method": method, "options": each, "accuracies": []} for each in options]

    def best_first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(rows, key=lambda row: -fmean(row["accuracies"]))

    rows = rows_of(trials(method, count))
    evaluate(rows, seeds)
    best = best_first(rows)[0]["options"]
    radii = [best | dict(zip(RADII[method], values)) for values in product(*RADII[method].values())]
    others = rows_of([each for each in radii if each not in [row["options"] for row in rows]])
    evaluate(others, seeds)
    rows = best_first(rows + others)
    evaluate(rows[:FINALISTS], more)
    return best_first(rows[:FINALISTS]) + rows[FINALISTS:]


def main() -> int:
    """Searches for all methods; prints the best options of each."""
    result = {**provenance(), "label_noise": LABEL_NOISE, "schedule": SCHEDULE, "radii": RADII, "rows": []}
    for method in RADII:
        rows = search(method)
        print(f"{method}: {fmean(rows[0]['accuracies']):.1%} with {rows[0]['options']}", flush=True)
        result["rows"] += rows
    write(result, RESULT)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
