"""The weights of m-RWP's two gradients, where the losses are not multiplied by them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from flatops import distributed


@contextlib.contextmanager
def weighted_gradients(params: list[Tensor], weight: float, hooks: list[Any]) -> Iterator[None]:
    """Multiplies what arrives in p.grad by a weight, before any all-reduce; `hooks` holds what does so meanwhile.

    Raises:
        RuntimeError: for sharded parameters, and at the end where a gradient came without a backward.
    """
    if weight == 1:
        yield
        return
    if distributed.any_distributed(params):
        raise RuntimeError(
            "the gradients of shards cannot be weighed: write perturbed() out and multiply the loss by perturbed_weight"
        )
    before = [None if p.grad is None else (p.grad, p.grad._version) for p in params]
    weighed: set[int] = set()

    def weigh(i: int, grad: Tensor) -> Tensor:
        weighed.add(i)
        return grad * weight

    hooks += [p.register_hook(functools.partial(weigh, i)) for i, p in enumerate(params)]
    try:
        yield
        for i, (p, old) in enumerate(zip(params, before)) if hooks else ():
            new = p.grad
            if i not in weighed and new is not None and not (old and old[0] is new and old[1] == new._version):
                raise RuntimeError(
                    f"a gradient of shape {tuple(p.shape)} was written to p.grad without a backward, so that m-RWP's weight "
                    "is not in it: call torch.autograd.backward or grad on the parameters themselves, or write perturbed() "
                    "out and multiply the gradients by optimizer.clean_weight and optimizer.perturbed_weight"
                )
    finally:
        remove(hooks)


def remove(hooks: list[Any]) -> None:
    """Removes hooks, and empties the list."""
    while hooks:
        hooks.pop().remove()
