"""How everything here is measured: contenders in turn in one process, over many rounds, as ratios.

A shared machine drifts by tens of per cent within minutes, but equally for all contenders of a round. On a CPU the
figure is one thread's CPU time, the best of all rounds: the wall times of two threads vary between two levels. On a GPU
it is the time between two events, the median of all rounds, without the host's time.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import flatops
from flatops.backend import _C
from flatops.info import cpu_name

T = TypeVar("T")


def in_turn(
    contenders: dict[str, Callable[[], T]], rounds: int, progress: Callable[[], Any] = lambda: None
) -> dict[str, list[T]]:
    """Results per contender of one call per round, after one warm-up round."""
    results: dict[str, list[T]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds + 1):
            for name, call in contenders.items():
                result = call()
                if i:
                    results[name].append(result)
            progress()
    finally:
        gc.enable()
    return results


def best_times(
    contenders: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.thread_time,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Seconds of each contender's fastest call, with a heap that keeps its pages."""
    keep_pages()

    def timed(call: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            start = clock()
            call()
            return clock() - start

        return run

    times = in_turn({name: timed(call) for name, call in contenders.items()}, rounds, progress)
    return {name: min(seconds) for name, seconds in times.items()}


def best_of_processes(rows_of: Callable[..., list[dict[str, Any]]], *args: Any, processes: int) -> list[dict[str, Any]]:
    """The rows of several processes, each with the lowest `ms` of all of them."""
    found = of_processes(rows_of, *args, processes=processes)
    return [rows[0] | {"ms": min(row["ms"] for row in rows)} for rows in zip(*found, strict=True)]


def of_processes(
    rows_of: Callable[..., list[dict[str, Any]]], *args: Any, processes: int
) -> list[list[dict[str, Any]]]:
    """The rows of several processes, run one after another.

    The position of tensors in memory varies between processes, which changes the time of a pass by a fifth.
    """
    found = []
    for _ in range(processes):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found.append(process.submit(rows_of, *args).result())
    return found


@functools.cache
def keep_pages() -> None:
    """Keeps glibc's malloc from returning memory to the system.

    Otherwise contenders that allocate sometimes pay for fresh pages and sometimes do not, and vary by a quarter between
    runs. This is the best case for them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(option, value)


def quantile(values: list[float], share: float) -> float:
    """The value below which a `share` of the values lie; 0.5 is the median."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- batches: the time of one short call is less than that of its launch ----------------------------------------------


@dataclass
class Sample:
    """Seconds per call of a batch of calls."""

    device: float  # from the first kernel's start to the last one's end
    host: float  # until the last call returned
    wall: float  # until the device was done, without measures to keep the host ahead
    queued: bool  # whether every launch was queued before the device began, so that `device` excludes the host


class Batch:
    """Takes samples of a call on a GPU; on a CPU, where device and host are the same, it rehearses.

    The GPU first sleeps until the host has launched the whole batch. Otherwise kernels shorter than their launch would
    be timed at the host's pace. A call with a host sync cannot be queued; then `device` is the time that passes on the
    GPU, including idle time.
    """

    SPAN = 2e-3  # longest batch, in seconds ...
    CALLS = 32  # ... and in calls: the queue holds about a thousand launches
    CYCLES = 2e9  # highest clock rate of a GPU, in Hz

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self.call, self.on_gpu = call, device.type == "cuda"
        self.calls, self.pause = 1, 0.0
        if self.on_gpu:
            call()  # compiles, allocates
            first = self()
            self.calls = max(1, min(self.CALLS, int(self.SPAN / first.wall)))
            self.pause = 1e-4 + 2 * first.host * self.calls

    def __call__(self) -> Sample:
        if not self.on_gpu:
            wall, host = time.perf_counter(), time.thread_time()
            self.call()
            host, wall = time.thread_time() - host, time.perf_counter() - wall
            return Sample(device=host, host=host, wall=wall, queued=True)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self.pause * self.CYCLES))
        start.record()
        host = self._run()
        queued = not start.query()
        end.record()
        torch.cuda.synchronize()
        wall = time.perf_counter()
        self._run()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - wall) / self.calls
        return Sample(device=start.elapsed_time(end) / 1e3 / self.calls, host=host, wall=wall, queued=queued)

    def _run(self) -> float:
        start = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        return (time.perf_counter() - start) / self.calls


def graph_of(call: Callable[[], Any], calls: int) -> Callable[[], None]:
    """A call that replays `calls` calls as one CUDA graph. Errors of the capture are raised."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


# --- counts: they do not depend on the machine ------------------------------------------------------------------------


class _Counter(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches and the values that the host reads."""

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
    """Operations that PyTorch dispatches in one call (each a launch on a GPU), and values that the host reads back."""
    with _Counter() as counter:
        call()
    return counter.operations, counter.host_reads


def traced(call: Callable[[], Any]) -> dict[str, int]:
    """What one call does on a GPU according to the profiler: see `tally`. On a CPU all counts are zero."""
    return tally(_trace(call))


def _trace(call: Callable[[], Any], **how: Any) -> list[dict[str, Any]]:
    """The profiler's events of one call."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        with profile(activities=activities, **how) as profiler:
            with record_function(MARK):
                call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(errors="replace"), strict=False)["traceEvents"]


MARK = "flatops: the call that counts"
SYNCS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "CtxSynchronize")


def tally(events: list[dict[str, Any]]) -> dict[str, int]:
    """Counts in a profiler's trace: kernel launches, copies and fills, host syncs, and copies to the host.

    Only host syncs between the start and the end of the mark count: the profiler synchronises as well.
    """
    mark = next(e for e in events if e.get("cat") == "user_annotation" and e["name"] == MARK)
    first, last = mark["ts"], mark["ts"] + mark["dur"]
    calls = [
        e["name"].removeprefix("cuda").removeprefix("cu")
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and first <= e["ts"] <= last
    ]
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return {
        "launches": sum(e["cat"] == "kernel" for e in on_gpu),
        "copies": sum(e["cat"] != "kernel" for e in on_gpu),
        "host_syncs": sum(name in SYNCS or name == "Memcpy" for name in calls),
        "host_reads": sum(e["cat"] == "gpu_memcpy" and "DtoH" in e["name"] for e in on_gpu),
    }


def allocations(call: Callable[[], Any]) -> dict[str, int]:
    """Bytes that one call takes from torch's allocator, according to the profiler: see `balance`."""
    return balance(_trace(call, profile_memory=True))


def balance(events: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes allocated within the mark of a profiler's trace: in total, at the peak, and still held at the end."""
    mark = next(e for e in events if e.get("cat") == "user_annotation" and e["name"] == MARK)
    first, last = mark["ts"], mark["ts"] + mark["dur"]
    changes = [e["args"]["Bytes"] for e in events if e["name"] == "[memory]" and first <= e["ts"] <= last]
    held = list(itertools.accumulate(changes, initial=0))
    return {"allocated": sum(c for c in changes if c > 0), "peak": max(held), "kept": held[-1]}


def waits(call: Callable[[], Any], device: torch.device) -> str | None:
    """What torch reports about a call with a host sync; None if there is none."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def available_memory() -> int:
    """Bytes of memory still available."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: all memory, free or not
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- provenance -------------------------------------------------------------------------------------------------------


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Machine, versions, commit and date: part of every result."""
    here = Path(__file__).resolve().parent
    git = lambda *what: subprocess.run(
        ["git", *what], cwd=here, capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        changed = bool(git("status", "--porcelain"))
        commit = git("rev-parse", "--short", "HEAD") + "+" * changed
    except (OSError, subprocess.CalledProcessError):
        commit = None
    found = {
        "machine": cpu_name(),
        "simd": _C.simd() if _C else None,
        "system": f"{platform.system()} {platform.machine()}",
        "flatops": flatops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            triton = None
        found |= {
            "gpu": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "l2_bytes": gpu.L2_cache_size,
            "cuda": torch.version.cuda,
            "triton": triton,
        }
    return found
