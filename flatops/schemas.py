"""Declares each operator once, beside its definition in reference.py, for the namespaces of all backends.

Numbers that change between steps (sigma, rho, draw, a norm) are tensors of one element, float64 or int64, on the
parameters' device: a Python number would be a constant of a compiled graph, and a copy to the GPU at every step.
`key` is `seed ^ (stream << 32)`, `index` each parameter's position in the optimizer, `first_row` the index of a shard's
first filter in the whole parameter (an empty list: all 0). A mask is int32: one bit per element in storage order, each
tensor starting at a new word, then ranks: for every 1,024 elements the number of ones before them in the list. Under a
mask, `backup` is one tensor for the whole list, with a slot for each selected element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

SCHEMAS: dict[str, str] = {}
_FAKES: dict[str, Callable[..., Any]] = {}


def operator(schema: str, fake: Callable[..., Any] = lambda *args: None) -> Callable[[F], F]:
    """Declares an operator with the name of the function that defines it. Autograd does not see it.

    Args:
        schema: its arguments and result, as for torch.library; `(a!)` marks what is written.
        fake: makes an uninitialised result from the arguments, for torch.compile.
    """

    def declare(definition: F) -> F:
        SCHEMAS[definition.__name__], _FAKES[definition.__name__] = schema, fake
        return torch.no_grad()(definition)

    return declare


_libraries: list[torch.library.Library] = []  # kept alive: a Library that is collected unregisters its operators


def define(namespace: str) -> torch.library.Library:
    """Defines every operator in `namespace`, with fakes. Returns the library to register kernels in."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
    return library


# --- the lengths of results -------------------------------------------------------------------------------------------


def filters(t: torch.Tensor) -> int:
    """How many filters a tensor has: its slices along dim 0; 1 if it has at most one dimension; 0 if it is empty."""
    return 0 if t.numel() == 0 else t.shape[0] if t.dim() > 1 else 1


def mask_words(t: torch.Tensor) -> int:
    """How many words of a mask a tensor takes, for 32 elements each."""
    return -(-t.numel() // 32)


def mask_size(tensors: Sequence[torch.Tensor]) -> int:
    """The length of a list's mask: the words of all tensors, then a rank for every 1,024 elements of each."""
    return sum(mask_words(t) + -(-t.numel() // 1024) for t in tensors)
