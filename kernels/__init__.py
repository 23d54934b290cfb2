"""The operators in Triton: one function for each definition in flatops/reference.py, in OPERATORS by its name.

One launch serves all tensors of a dtype, and with two more before it the filters that are too long for one program;
`grad_norm` takes one launch a dtype and two more; a mask takes one for every eight bits of a score, and four more (mask.py).
Nothing waits for the GPU, and everything can be captured in a CUDA graph once it has run before, since Triton compiles a kernel
when it is first called.
"""

from . import ascend, fisher, mask, perturb, sum
from .tensor_list import OPERATORS

__all__ = ["OPERATORS", "ascend", "fisher", "mask", "perturb", "sum"]
