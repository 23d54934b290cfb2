"""The operators' schemas, shared by every backend: each backend registers the same names in a namespace of its own.

What changes between steps (sigma, rho, draw, a norm) is a tensor of one element, float64 or int64, on the device of the
parameters: a Python number would be compiled into a graph and would have to be copied to a GPU. `key` is
`seed ^ (stream << 32)`; `index` is each parameter's position in the optimizer.
"""

from __future__ import annotations

import torch

SCHEMAS = {
    "filter_norms": "(Tensor[] params) -> Tensor",
    "perturb_": "(Tensor(a!)[] params, Tensor(b!) scales, Tensor(c!)[] backup, Tensor sigma, Tensor key, Tensor draw, "
    "int[] index, Tensor[] fisher, float eta) -> ()",
    "restore_": "(Tensor(a!)[] params, Tensor[] backup, Tensor? scales, Tensor? key, Tensor? draw, int[] index, "
    "Tensor[] fisher, float eta) -> ()",
    "normal_": "(Tensor(a!) out, Tensor key, Tensor draw, int index) -> ()",
    "filter_fisher_": "(Tensor(a!)[] fisher, Tensor[] grads, float beta, Tensor scale) -> ()",
    "grad_norm": "(Tensor[] grads, Tensor[] params) -> Tensor",
    "ascend_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] backup, Tensor rho, Tensor norm, bool adaptive) -> ()",
}


def filters(t: torch.Tensor) -> int:
    """How many filters a tensor has: slices along dim 0, one for a tensor of one dimension or none, none if it is empty."""
    return 0 if t.numel() == 0 else t.shape[0] if t.dim() > 1 else 1


# What a compiler needs to know of an operator's result without running it; None for those that only change their arguments.
_FAKES = {
    "filter_norms": lambda params: params[0].new_empty(sum(map(filters, params)), dtype=torch.float32),
    "grad_norm": lambda grads, params: grads[0].new_empty((), dtype=torch.float64),
}

_libraries = []  # a Library unregisters what it holds when it is collected


def define(namespace: str) -> torch.library.Library:
    """Defines every operator in `namespace`, with fakes. Returns the library to register kernels in."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES.get(name, lambda *args: None), lib=library)
    return library
