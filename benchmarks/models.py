"""Do the floors of one model hold for others? Operators × the parameter lists of models × dtypes × threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from flatops.benchmarks.bench import Row, compared_with, operator_rows, parameter_shapes, threaded_rows
from flatops.benchmarks.measure import available_memory, best_of_processes, best_times, count, provenance

Shapes = list[tuple[int, ...]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPERATORS = (
    "floor",
    "perturb_",
    "perturb_, backup, restore_",
    "grad_norm",
    "ascend_, backup, restore_",
    "topk_mask, half",
)
THREADED = ("ResNet-50", "float32")  # the case that is measured with several threads
# Weights from which a model is measured in bfloat16 only, as such models are trained, and without peers.
BIG = 2 * 10**8


def wide_resnet_28_10() -> Shapes:
    """WideResNet-28-10 for CIFAR-100 (arXiv 1605.07146), which timm lacks."""
    shapes: Shapes = [(16, 3, 3, 3)]
    before = 16
    for width in (160, 320, 640):
        for block in range(4):
            shapes += [(before,)] * 2 + [(width, before, 3, 3)] + [(width,)] * 2 + [(width, width, 3, 3)]
            shapes += [(width, before, 1, 1)] * (block == 0)
            before = width
    return shapes + [(640,), (640,), (100, 640), (100,)]


def llama(layers: int = 22, width: int = 2048, hidden: int = 5632, keys: int = 256, words: int = 32000) -> Shapes:
    """A Llama-like decoder; the defaults are TinyLlama's 1.1 billion weights (arXiv 2401.02385)."""
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    layer = attention + [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(words, width), *layer * layers, (width,), (words, width)]


MODELS: dict[str, Callable[[], Shapes]] = {
    "ResNet-18": lambda: parameter_shapes("resnet18"),
    "ResNet-50": lambda: parameter_shapes("resnet50"),
    "WideResNet-28-10": wide_resnet_28_10,
    "ViT-S/16": lambda: parameter_shapes("vit_small_patch16_224"),
    "ViT-B/16": lambda: parameter_shapes("vit_base_patch16_224"),
    "Llama, 1.1 billion": llama,
}


def measure(models: dict[str, Callable[[], Shapes]] = MODELS, rounds: int = 3, processes: int = 3) -> dict[str, Any]:
    """One row per operator and peer, model and dtype; and the gain of more threads on one of them."""
    threads = torch.get_num_threads()
    cases: list[tuple[str, str, Shapes]] = []
    skipped: list[str] = []
    for model, shapes_of in models.items():
        shapes = shapes_of()
        weights = sum(map(math.prod, shapes))
        for dtype in DTYPES if weights < BIG else ("bfloat16",):
            need = weights * (4 * DTYPES[dtype].itemsize + (24 if weights < BIG else 0))
            if need > 0.75 * available_memory():
                skipped.append(f"{model}, {dtype}: needs {need / 2**30:.0f} GiB")
            else:
                cases.append((model, dtype, shapes))
    # The position of large tensors in memory does not matter.
    large, small = ([case for case in cases if (sum(map(math.prod, case[2])) >= BIG) is big] for big in (True, False))
    found = best_of_processes(_rows, small, threads, rounds, processes=processes)
    found += best_of_processes(_rows, large, threads, rounds * processes, processes=1)
    rows = [row for row in found if "threads" not in row]
    floors = {(row["model"], row["dtype"]): row["ms"] for row in rows if row["name"] == "floor"}
    wall = {(row["name"], row["threads"]): row["ms"] for row in found if "threads" in row}
    return {
        **provenance(),
        "rounds": rounds,
        "processes": processes,
        "threads": threads,
        "skipped": skipped,
        "rows": [row | {"floors": row["ms"] / floors[row["model"], row["dtype"]]} for row in rows],
        "gain": [
            {"name": name, "threads": threads, "times": wall[name, 1] / ms}
            for (name, number), ms in wall.items()
            if number == threads > 1
        ],
    }


def _chosen(shapes: Shapes, dtype: torch.dtype, peers: bool) -> list[tuple[Row, str]]:
    every = operator_rows(shapes, torch.device("cpu"), "cpp", dtype)
    return [
        (row, of)
        for row, of in zip(every, compared_with(every))
        if of in OPERATORS and (peers or not row.peer and row.name != "topk_mask, half") and not row.slow
    ]


def _rows(cases: list[tuple[str, str, Shapes]], threads: int, rounds: int) -> list[dict[str, Any]]:
    """What one process measures: every case with one thread, and one of them with all threads by wall clock."""
    torch.set_num_threads(1)
    rows = []
    for model, dtype, shapes in cases:
        weights = sum(map(math.prod, shapes))
        chosen = _chosen(shapes, DTYPES[dtype], peers=weights < BIG)
        times = best_times({str(i): row.call for i, (row, _) in enumerate(chosen)}, rounds)
        about = {"model": model, "weights": weights, "tensors": len(shapes), "dtype": dtype}
        rows += [
            about
            | {"name": row.name, "of": of, "peer": row.peer, "ms": times[str(i)] * 1e3}
            | dict(zip(("operations", "host_reads"), count(row.call)))
            for i, (row, of) in enumerate(chosen)
        ]
        if (model, dtype) == THREADED and threads > 1:
            rows += threaded_rows([row for row, _ in chosen if not row.peer], threads, 4 * rounds)
    return rows
