"""Which options does each method do best with? A random search of the same size for each, on images held out of the training ones.

The test images have no part in it. Every method draws its trials from one grid of schedules, and from the radii of its own kind;
SGD, which has none, so tries more schedules. The best few of the trials are looked at again with more seeds, for the best of
many is in part the luckiest.

    python -m flatops.benchmarks.tuning      # 20 minutes on two cores; writes benchmarks/results/tuning.json
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
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
METHODS = ("sgd", "rwp", "mrwp", "arwp", "sam", "ssam")
LABEL_NOISE = 0.3
TRIALS, FINALISTS = 20, 4
SEEDS, MORE_SEEDS = range(1000, 1004), range(1004, 1012)  # none of those that the methods are compared with

SCHEDULE = {"epochs": (10, 20), "lr": (0.02, 0.05, 0.1), "weight_decay": (5e-4, 5e-3, 0.02, 0.05, 0.08, 0.12)}
SIGMA, RHO = (0.01, 0.02, 0.03, 0.05, 0.07), (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
SPACE: dict[str, dict[str, tuple[float, ...]]] = {
    "sgd": SCHEDULE,
    "rwp": SCHEDULE | {"sigma": SIGMA},
    "mrwp": SCHEDULE | {"sigma": SIGMA},
    "arwp": SCHEDULE | {"sigma": SIGMA, "eta": (0.1, 1.0)},
    "sam": SCHEDULE | {"rho": RHO},
    "ssam": SCHEDULE | {"rho": RHO},
}
Options = dict[str, float]


def trials(method: str, count: int = TRIALS) -> list[Options]:
    """Different points of a method's space, by chance, the same every time."""
    names, values = zip(*SPACE[method].items())
    sizes = [len(each) for each in values]
    chosen = np.random.default_rng(0).permutation(int(np.prod(sizes)))[:count]
    points = np.stack(np.unravel_index(chosen, sizes), axis=1)
    return [{n: v[i] for n, v, i in zip(names, values, point)} for point in points]


def accuracy(job: tuple[str, Options, int]) -> float:
    """The last epoch's accuracy on held-out images of one training."""
    method, options, seed = job
    config = TrainConfig(method=method, label_noise=LABEL_NOISE, validation=0.2, **options)
    return run_seed({method: config}, seed)[0]["history"][-1]["test_accuracy"]


def spread(call: Callable[[T], R], jobs: Iterable[T]) -> list[R]:
    """The results of jobs that are each one thread's, over all cores."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        return list(processes.map(call, jobs))


def search(method: str, count: int = TRIALS, seeds: Iterable[int] = SEEDS, more: Iterable[int] = MORE_SEEDS) -> list[dict[str, Any]]:
    """A row for every trial: its options and its accuracies by seed; the finalists first, the best of all before them."""
    rows = [{"method": method, "options": options, "accuracies": []} for options in trials(method, count)]

    def look(rows: list[dict[str, Any]], seeds: Iterable[int]) -> None:
        seeds = list(seeds)
        found = spread(accuracy, [(method, row["options"], seed) for row in rows for seed in seeds])
        for i, row in enumerate(rows):
            row["accuracies"] += found[i * len(seeds) : (i + 1) * len(seeds)]

    def best_first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(rows, key=lambda row: -fmean(row["accuracies"]))

    look(rows, seeds)
    rows = best_first(rows)
    look(rows[:FINALISTS], more)
    return best_first(rows[:FINALISTS]) + rows[FINALISTS:]


def main() -> int:
    """Searches for all methods; prints each one's best."""
    result = {**provenance(), "label_noise": LABEL_NOISE, "space": SPACE, "rows": []}
    for method in METHODS:
        rows = search(method)
        print(f"{method}: {fmean(rows[0]['accuracies']):.1%} with {rows[0]['options']}", flush=True)
        result["rows"] += rows
    write(result, RESULT)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
