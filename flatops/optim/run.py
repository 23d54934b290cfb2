"""An optimizer's run-time state, which is not in checkpoints."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flatops.weights import Weights


class Stage(enum.IntEnum):
    """The stage of a step; in PERTURBED and IN_STEP a perturbed pass is running."""

    IDLE = 0  # no perturbed pass since the last step
    READY = 1  # a perturbed pass has ended; step() is next
    PERTURBED = 2
    IN_STEP = 3  # step(closure) has perturbed the weights for its only pass; perturbed() in the closure joins it


@dataclass
class Run:
    """One mutable object, because Lightning's proxies copy an optimizer's attributes, by reference."""

    stage: Stage = Stage.IDLE
    before: Stage = Stage.IDLE  # the stage before the perturbed pass
    passes_in_step: bool = True  # step(closure) runs the passes
    warned: bool = False
    given: bool = False  # the optimizer was built from nn.Parameters only
    agreed: bool = False  # all processes have been checked to have the same optimizer
    default_seed: bool = False  # the user has given no seed
    weights: Weights = field(default_factory=Weights)
    finite: Tensor | None = None  # whether the norm of SAM's first pass is finite; None once passed on to a gradient
    hooks: list[Any] = field(default_factory=list)
    skipped: list[Tensor] = field(
        default_factory=list
    )  # parameters whose requires_grad SSAM.ascent_pass has turned off

    @property
    def in_pass(self) -> bool:
        """Whether a perturbed pass is running."""
        return self.stage >= Stage.PERTURBED

    @property
    def is_ready(self) -> bool:
        """Whether a perturbed pass has ended since the last step."""
        return (self.before if self.in_pass else self.stage) is Stage.READY
