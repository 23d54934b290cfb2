"""The operators in Triton: one function for each schema in flatops/schemas.py.

One launch serves all tensors of a dtype, and with two more before it the filters that are too long for one program;
`grad_norm` takes one launch a dtype and two more; a mask takes one for every eight bits of a score, and four more (mask.py).
Nothing waits for the GPU, and everything can be captured in a CUDA graph once it has run before, since Triton compiles a kernel
when it is first called.
"""

from .ascend import ascend_
from .fisher import filter_fisher_, fisher_
from .mask import regrow_mask_, topk_mask
from .perturb import normal_, perturb_, restore_, subtract_noise_
from .sum import filter_norms, grad_norm

__all__ = [
    "ascend_",
    "filter_fisher_",
    "filter_norms",
    "fisher_",
    "grad_norm",
    "normal_",
    "perturb_",
    "regrow_mask_",
    "restore_",
    "subtract_noise_",
    "topk_mask",
]
