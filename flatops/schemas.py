"""The operators' schemas, shared by every backend: each backend registers the same names in a namespace of its own.

What changes between steps (sigma, rho, draw, a norm) is a tensor of one element, float64 or int64, on the device of the
parameters: a Python number would be compiled into a graph and would have to be copied to a GPU. `key` is
`seed ^ (stream << 32)`; `index` is each parameter's position in the optimizer, `first_row` the number of its first filter in the
whole of which it is a shard (none: all 0). A mask is int32: one bit an element in storage order,
each tensor from a new word on, then for every 1,024 elements how many ones come before them in the list. Under a mask, `backup` is one
tensor for the whole list, a slot for each element that the mask lets through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SCHEMAS = {
    "filter_norms": "(Tensor[] params) -> Tensor",
    "perturb_": "(Tensor(a!)[] params, Tensor(b!) scales, Tensor(c!)[] backup, Tensor sigma, Tensor key, Tensor draw, "
    "int[] index, int[] first_row, Tensor[] fisher, float eta) -> ()",
    "subtract_noise_": "(Tensor(a!)[] params, Tensor scales, Tensor key, Tensor draw, int[] index, int[] first_row, "
    "Tensor[] fisher, float eta) -> ()",
    "restore_": "(Tensor(a!)[] params, Tensor[] backup, Tensor? mask) -> ()",
    "normal_": "(Tensor(a!) out, Tensor key, Tensor draw, int index) -> ()",
    "filter_fisher_": "(Tensor(a!)[] fisher, Tensor[] grads, float beta, Tensor scale) -> ()",
    "grad_norm": "(Tensor[] grads, Tensor[] params) -> Tensor",
    "ascend_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] backup, Tensor? mask, Tensor rho, Tensor norm, "
    "bool adaptive) -> ()",
    "fisher_": "(Tensor(a!)[] fisher, Tensor[] grads, Tensor scale) -> ()",
    "topk_mask": "(Tensor[] scores, int k) -> (Tensor, Tensor)",
    "regrow_mask_": "(Tensor(a!) mask, Tensor[] params, Tensor[] drop, Tensor[] grow, Tensor key, Tensor draw, int[] index, "
    "int count) -> Tensor",
}


def filters(t: torch.Tensor) -> int:
    """How many filters a tensor has: slices along dim 0, one for a tensor of one dimension or none, none if it is empty."""
    return 0 if t.numel() == 0 else t.shape[0] if t.dim() > 1 else 1


def mask_words(t: torch.Tensor) -> int:
    """How many words of a mask a tensor takes: 32 elements each."""
    return -(-t.numel() // 32)


def mask_size(tensors: Sequence[torch.Tensor]) -> int:
    """The length of a mask over a list: the words of all tensors, then a rank for every 1,024 elements of each."""
    return sum(mask_words(t) + -(-t.numel() // 1024) for t in tensors)


# What a compiler needs to know of an operator's result without running it; None for those that only change their arguments.
_FAKES = {
    "filter_norms": lambda params: params[0].new_empty(sum(map(filters, params)), dtype=torch.float32),
    "grad_norm": lambda grads, params: grads[0].new_empty((), dtype=torch.float64),
    "topk_mask": lambda scores, k: (
        scores[0].new_empty(mask_size(scores), dtype=torch.int32),
        scores[0].new_empty((), dtype=torch.int64),
    ),
    "regrow_mask_": lambda mask, *_: mask.new_empty((), dtype=torch.int64),
}

_libraries: list[torch.library.Library] = []  # a Library unregisters what it holds when it is collected


def define(namespace: str) -> torch.library.Library:
    """Defines every operator in `namespace`, with fakes. Returns the library to register kernels in."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES.get(name, lambda *args: None), lib=library)
    return library
