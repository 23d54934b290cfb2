"""What an optimizer knows while it runs, and no checkpoint holds."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flatops.weights import Weights


class Stage(enum.IntEnum):
    """Where a step is; from PERTURBED on the weights are perturbed."""

    IDLE = 0  # no perturbed pass since the last step
    READY = 1  # a perturbed pass has ended: what comes is step()
    PERTURBED = 2
    IN_STEP = 3  # step(closure) has perturbed them for its only evaluation; perturbed() in the closure joins that pass


@dataclass
class Run:
    """Run-time state, in one mutable object: Lightning's proxies copy an optimizer's attributes, not what they refer to."""

    stage: Stage = Stage.IDLE
    before: Stage = Stage.IDLE  # the stage to go back to when a pass is broken off
    passes_in_step: bool = True  # step(closure) runs the passes
    warned: bool = False
    given: bool = False  # all that it was given are nn.Parameters
    agreed: bool = False  # all processes have the same optimizer
    default_seed: bool = False  # nobody has given one
    weights: Weights = field(default_factory=Weights)
    finite: Tensor | None = None  # whether SAM's first pass was, until a gradient of the second one carries it
    hooks: list[Any] = field(default_factory=list)
    skipped: list[Tensor] = field(default_factory=list)  # need no gradient in SSAM's first pass

    @property
    def in_pass(self) -> bool:
        """Whether a perturbed pass is under way."""
        return self.stage >= Stage.PERTURBED

    @property
    def is_ready(self) -> bool:
        """Whether a perturbed pass has ended since the last step."""
        return (self.before if self.in_pass else self.stage) is Stage.READY
