"""Schedules of hyperparameters in param_groups other than lr."""

from __future__ import annotations

import math
from typing import Any

import torch


class CosineRamp:
    """Moves one hyperparameter of every group from `start` to `end` along half a cosine.

    value(t) = end + (start - end) (1 + cos(pi t / T)) / 2, and `end` from T on. If it is 0 in some groups, but not in
    all, it stays 0 there. A tensor is written to in place.

    Args:
        optimizer: whose param_groups are written to, now and in every step().
        key: the hyperparameter, such as 'sigma' or 'rho'.
        start, end: its values at step 0 and at step `total_steps`.
        total_steps: T, > 0.

    Raises:
        ValueError: for a key that the groups do not have, negative values, or no steps.

    References:
        The increasing sigma of arXiv 2404.00357.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, key: str, start: float, end: float, total_steps: int) -> None:
        if any(key not in group for group in optimizer.param_groups):
            raise ValueError(f"key {key!r} is not a hyperparameter of {type(optimizer).__name__}")
        if not (min(start, end) >= 0 and math.isfinite(start) and math.isfinite(end)):
            raise ValueError(f"start and end must be finite numbers >= 0, not {start} and {end}")
        if total_steps <= 0:
            raise ValueError(f"total_steps must be > 0, not {total_steps}")
        self.optimizer, self.key, self.start, self.end, self.total_steps = optimizer, key, start, end, total_steps
        zero = [i for i, group in enumerate(optimizer.param_groups) if group[key] == 0]
        self.frozen = zero if len(zero) < len(optimizer.param_groups) else []
        self.t = 0
        self._write()

    @property
    def value(self) -> float:
        """The current value."""
        t = min(self.t, self.total_steps)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * t / self.total_steps)) / 2

    def step(self) -> None:
        """Advances by one step."""
        self.t += 1
        self._write()

    def _write(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            if i not in self.frozen:
                if isinstance(group[self.key], torch.Tensor):
                    group[self.key].fill_(self.value)
                else:
                    group[self.key] = self.value

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state, for `load_state_dict`."""
        return {"t": self.t, "frozen": self.frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict()`."""
        self.t, self.frozen = state["t"], list(state["frozen"])
        self._write()
