"""The operators in Triton: OPERATORS holds a function for each definition in flatops/reference.py, by name.

Kernel launches: one per dtype, plus two if there are filters too long for one program; `grad_norm`: one per dtype plus
two; masks: one per eight bits of a score plus four (mask.py). There is no host sync. An operator can be captured in a
CUDA graph after a first call, in which Triton compiles its kernels.
"""

from . import ascend, fisher, mask, perturb, sum
from .tensor_list import OPERATORS

__all__ = ["OPERATORS", "ascend", "fisher", "mask", "perturb", "sum"]
