"""The training program, `flatops train` and `flatops compare`, also as functions.

from flatops.train import TrainConfig, train
history = train(TrainConfig(method="mrwp", label_noise=0.3))
"""

from .compare import compare
from .config import CompareConfig, TrainCommand, TrainConfig
from .engine import Trainer
from .profile import profile
from .run import train

__all__ = ["CompareConfig", "TrainCommand", "TrainConfig", "Trainer", "compare", "profile", "train"]
