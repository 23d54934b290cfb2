"""How operators are declared: once, beside their definitions in reference.py, for every backend's namespace.

What changes between steps (sigma, rho, draw, a norm) is a tensor of one element, float64 or int64, on the device of the
parameters: a Python number would be compiled into a graph and would have to be copied to a GPU. `key` is
`seed ^ (stream << 32)`; `index` is each parameter's position in the optimizer, `first_row` the number of its first filter in the
whole of which it is a shard (none: all 0). A mask is int32: one bit an element in storage order,
each tensor from a new word on, then for every 1,024 elements how many ones come before them in the list. Under a mask, `backup` is one
tensor for the whole list, a slot for each element that the mask lets through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

SCHEMAS: dict[str, str] = {}
_FAKES: dict[str, Callable[..., Any]] = {}


def operator(schema: str, fake: Callable[..., Any] = lambda *args: None) -> Callable[[F], F]:
    """Declares an operator by the name of the function that defines it, which is no business of autograd's.

    Args:
        schema: its arguments and result, as torch.library spells them; `(a!)` marks what is written.
        fake: makes the result without computing it, from the arguments: what a compiler needs to know.
    """

    def declare(definition: F) -> F:
        SCHEMAS[definition.__name__], _FAKES[definition.__name__] = schema, fake
        return torch.no_grad()(definition)

    return declare


_libraries: list[torch.library.Library] = []  # a Library unregisters what it holds when it is collected


def define(namespace: str) -> torch.library.Library:
    """Defines every operator in `namespace`, with fakes. Returns the library to register kernels in."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
    return library


# --- the lengths of results --------------------------------------------------------------------------------------------


def filters(t: torch.Tensor) -> int:
    """How many filters a tensor has: slices along dim 0, one for a tensor of one dimension or none, none if it is empty."""
    return 0 if t.numel() == 0 else t.shape[0] if t.dim() > 1 else 1


def mask_words(t: torch.Tensor) -> int:
    """How many words of a mask a tensor takes: 32 elements each."""
    return -(-t.numel() // 32)


def mask_size(tensors: Sequence[torch.Tensor]) -> int:
    """The length of a mask over a list: the words of all tensors, then a rank for every 1,024 elements of each."""
    return sum(mask_words(t) + -(-t.numel() // 1024) for t in tensors)
