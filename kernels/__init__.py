"""The operators in Triton: one function for each schema in flatops/schemas.py."""

from flatops.kernels.ascend import ascend_
from flatops.kernels.fisher import filter_fisher_
from flatops.kernels.perturb import normal_, perturb_, restore_
from flatops.kernels.sum import filter_norms, grad_norm

__all__ = ["ascend_", "filter_fisher_", "filter_norms", "grad_norm", "normal_", "perturb_", "restore_"]
