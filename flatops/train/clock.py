"""Where a step's time goes: waiting for data, forward and backward passes, flatops, the optimizer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("data", "passes", "flatops", "optimizer")


class Clock:
    """Adds up the time of each part; entering another part inside it pauses the outer one.

    On a GPU it measures GPU time, with events and without host syncs: while a step waits for data, the GPU is idle.

    Args:
        device: the training device.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.lock = threading.Lock()  # the progress bar reads in its own thread
        self.part: str | None = None
        self.reset()

    def reset(self, seconds: dict[str, float] | None = None) -> None:
        """Restart from zero, or from an earlier clock's seconds."""
        self.seconds = dict.fromkeys(PARTS, 0.0) | (seconds or {})
        self.pending: deque[tuple[str, Any, Any]] = deque()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time inside the block for a part."""
        outer = self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def read(self, wait: bool = False) -> dict[str, float]:
        """Seconds by part so far; with `wait`, after a host sync, including all work queued on the GPU."""
        if wait and self.cuda:
            torch.cuda.synchronize()
        with self.lock:
            while self.pending and self.pending[0][2].query():
                part, start, end = self.pending.popleft()
                self.seconds[part] += start.elapsed_time(end) / 1000
            return dict(self.seconds)

    def _switch(self, part: str | None) -> str | None:
        now: Any = time.perf_counter()
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        if self.part and self.cuda:
            self.pending.append((self.part, self.since, now))
        elif self.part:
            self.seconds[self.part] += now - self.since
        outer, self.part, self.since = self.part, part, now
        return outer
