"""Where the time of a step goes: waiting for data, forward and backward passes, flatops, the optimizer."""

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
    """Adds up the time of each part; one entered inside another stops that one until it is left.

    On a GPU it is the GPU's time, by events that nobody waits for: what a step waits for data, the GPU stands idle.

    Args:
        device: the one that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.lock = threading.Lock()  # the progress bar reads in a thread of its own
        self.part: str | None = None
        self.reset()

    def reset(self, seconds: dict[str, float] | None = None) -> None:
        """Begin anew, or from what an earlier one read."""
        self.seconds = dict.fromkeys(PARTS, 0.0) | (seconds or {})
        self.pending: deque[tuple[str, Any, Any]] = deque()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time within for a part."""
        outer = self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def read(self, wait: bool = False) -> dict[str, float]:
        """Seconds by part so far; with `wait` also of what the GPU has still to do."""
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
