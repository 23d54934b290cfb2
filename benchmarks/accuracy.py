"""How accurate does each method make a network, and which of the papers' claims hold? Handwritten digits.

In one table all methods share a schedule on which plain training memorises the wrong labels; in the other each has the
options that `tuning.py` found best on held-out images. Each favours one side. The test images are used only here.
"""

from __future__ import annotations

import json
from statistics import fmean, median, stdev
from typing import Any

from flatops.benchmarks import tuning
from flatops.benchmarks.measure import provenance
from flatops.train.compare import Run, run_seed
from flatops.train.config import TrainConfig, used_options

FIXED: dict[str, Any] = {"epochs": 40}
SEEDS = {"fixed": 5, "tuned": 10}
MARGIN = 0.005  # difference in accuracy below which a method is not worse


def tuned() -> dict[str, tuning.Options]:
    """Each method's best options on held-out images."""
    best: dict[str, tuning.Options] = {}
    for row in json.loads(tuning.RESULT.read_text())["rows"]:
        best.setdefault(row["method"], row["options"])
    return best


def options_of(schedule: str) -> dict[str, dict[str, Any]]:
    """Each method's options in one of the two tables; with the fixed schedule these are its defaults."""
    return tuned() if schedule == "tuned" else dict.fromkeys(tuning.RADII, FIXED)


def runs_of(job: tuple[str, int]) -> list[Run]:
    """Trains all methods of one of the two tables with one seed."""
    schedule, seed = job
    configs = {
        method: TrainConfig(method=method, label_noise=tuning.LABEL_NOISE, **options)
        for method, options in options_of(schedule).items()
    }
    return run_seed(configs, seed)


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean, by Student's t."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def accuracies(schedule: str, runs: list[Run]) -> list[dict[str, Any]]:
    """One row per method: accuracy per seed, difference to SGD, and training time relative to SGD.

    Args:
        schedule: fixed or tuned.
        runs: runs of every method, with the same seeds.
    """
    last = lambda method: [run["history"][-1]["test_accuracy"] for run in runs if run["method"] == method]
    time = lambda method: [sum(row["seconds"] for row in run["history"]) for run in runs if run["method"] == method]
    return [
        {
            "schedule": schedule,
            "method": method,
            "options": options | used_options(TrainConfig(method=method, **options)),
            "accuracies": last(method),
            "mean": fmean(last(method)),
            "deviation": stdev(last(method)),
            "above_sgd": difference(last(method), last("sgd")),
            "to_sgd": median(own / sgd for own, sgd in zip(time(method), time("sgd"))),
            "curve": [
                [fmean(rows[key] for rows in epoch) for key in ("test_accuracy", "seconds")]
                for epoch in zip(*(run["history"] for run in runs if run["method"] == method))
            ],
        }
        for method, options in options_of(schedule).items()
    ]


def difference(a: list[float], b: list[float]) -> dict[str, float]:
    """The mean of a − b, paired by seed, and its interval."""
    pairs = [x - y for x, y in zip(a, b)]
    low, high = interval(pairs)
    return {"mean": fmean(pairs), "low": low, "high": high}


# --- the papers' claims -----------------------------------------------------------------------------------------------

# Claim, method, the method it is compared with, kind of claim ("better" or "no worse"), arXiv number.
CLAIMS = (
    ("SAM is better than SGD", "sam", "sgd", "better", "2010.01412"),
    ("RWP is better than SGD", "rwp", "sgd", "better", "2211.11489"),
    ("RWP is no worse than SAM", "rwp", "sam", "no worse", "2211.11489"),
    ("SSAM with half of the weights is no worse than SAM", "ssam", "sam", "no worse", "2210.05177"),
    ("m-RWP is better than RWP", "mrwp", "rwp", "better", "2404.00357"),
    ("m-RWP is no worse than SAM", "mrwp", "sam", "no worse", "2404.00357"),
    ("ARWP is better than RWP", "arwp", "rwp", "better", "2404.00357"),
)


def verdict(found: dict[str, float], kind: str) -> str:
    """A claim is "seen" or "the opposite" if its whole interval lies on one side of it, else "not seen"."""
    least = 0.0 if kind == "better" else -MARGIN
    return "seen" if found["low"] > least else "the opposite" if found["high"] < least else "not seen"


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per claim about accuracy and per table."""
    by = {(row["schedule"], row["method"]): row["accuracies"] for row in rows}
    result = []
    for claim, one, other, kind, paper in CLAIMS:
        for schedule in SEEDS:
            found = difference(by[schedule, one], by[schedule, other])
            result.append(
                {"claim": claim, "paper": paper, "schedule": schedule, **found, "verdict": verdict(found, kind)}
            )
    return result


def measure(seeds: dict[str, int] = SEEDS) -> dict[str, Any]:
    """Both tables and the verdicts. One core trains all methods of a seed in turn."""
    jobs = [(schedule, seed) for schedule, count in seeds.items() for seed in range(count)]
    found = tuning.spread(runs_of, jobs)
    rows = []
    for schedule in seeds:
        rows += accuracies(schedule, [run for (of, _), runs in zip(jobs, found) if of == schedule for run in runs])
    return {**provenance(), "label_noise": tuning.LABEL_NOISE, "seeds": seeds, "rows": rows, "verdicts": verdicts(rows)}
