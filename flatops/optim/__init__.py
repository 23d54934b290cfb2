"""Flat-minima optimizers over any torch.optim class."""

from flatops.optim.batchnorm import freeze_batchnorm_stats
from flatops.optim.passes import passes, unwrap
from flatops.optim.rwp import RWP
from flatops.optim.sam import SAM
from flatops.optim.schedules import CosineRamp
from flatops.optim.ssam import SSAM

__all__ = ["RWP", "SAM", "SSAM", "CosineRamp", "freeze_batchnorm_stats", "passes", "unwrap"]
