"""How everything here is measured: contenders in turn in one process, the best of many rounds, ratios and not times.

A shared machine drifts by tens of per cent within minutes, but it drifts for all contenders of a round alike. On a CPU the
figure is one thread's CPU time: the wall times of two threads flip between two levels.
"""

from __future__ import annotations

import gc
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flatops
from flatops.backend import _C
from flatops.info import cpu_name


def best_times(
    contenders: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.thread_time,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Seconds of each contender's fastest call; one call each, a round, after one round that does not count."""
    best = dict.fromkeys(contenders, float("inf"))
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds + 1):
            for name, call in contenders.items():
                start = clock()
                call()
                seconds = clock() - start
                if i:
                    best[name] = min(best[name], seconds)
            progress()
    finally:
        gc.enable()
    return best


class _Counter(TorchDispatchMode):
    """Counts what PyTorch dispatches, and what stops the host to read a number."""

    READS = ("aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default")
    VIEWS = ("aten.detach.default", "aten.view.default", "aten.alias.default")

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.host_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name in self.READS:
            self.host_reads += 1
        elif name not in self.VIEWS:
            self.operations += 1
        return func(*args, **(kwargs or {}))


def count(call: Callable[[], Any]) -> tuple[int, int]:
    """Operations that PyTorch dispatches in one call, each a launch on a GPU, and numbers that the host reads back."""
    with _Counter() as counter:
        call()
    return counter.operations, counter.host_reads


def provenance() -> dict[str, Any]:
    """Machine, versions, commit and date: part of every result."""
    try:
        here = Path(__file__).resolve().parent
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "machine": cpu_name(),
        "simd": _C.simd() if _C else None,
        "system": f"{platform.system()} {platform.machine()}",
        "flatops": flatops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
