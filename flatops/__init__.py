"""flatops: flat-minima training (RWP, m-RWP, ARWP, SAM, ASAM, SSAM) on fused kernels, under PyTorch optimizers."""

from flatops import ops
from flatops.backend import backend
from flatops.optim import RWP, SAM, SSAM, CosineRamp, freeze_batchnorm_stats, passes, unwrap
from flatops.perturb import perturb

__all__ = [
    "RWP",
    "SAM",
    "SSAM",
    "CosineRamp",
    "backend",
    "freeze_batchnorm_stats",
    "ops",
    "passes",
    "perturb",
    "unwrap",
]
__version__ = "0.1.0"
