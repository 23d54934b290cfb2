"""Applies m-RWP's weights to gradients, for losses that are not weighted."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from flatops import distributed


@contextlib.contextmanager
def weighted_gradients(params: list[Tensor], weight: float, hooks: list[Any]) -> Iterator[None]:
    """Context manager that multiplies new gradients by a weight, before any all-reduce; `hooks` holds its hooks.

    Raises:
        RuntimeError: for sharded parameters; on exit, if p.grad was written to without a backward.
    """
    if weight == 1:
        yield
        return
    if distributed.any_distributed(params):
        raise RuntimeError(
            "gradients of sharded parameters cannot be weighted: use perturbed() and multiply the losses by "
            "clean_weight and perturbed_weight"
        )
    before = [None if p.grad is None else (p.grad, p.grad._version) for p in params]
    weighted: set[int] = set()

    def weigh(i: int, grad: Tensor) -> Tensor:
        weighted.add(i)
        return grad * weight

    try:
        for i, p in enumerate(params):
            hooks.append(p.register_hook(functools.partial(weigh, i)))  # one by one: an interrupt loses none of them
        yield
        for i, (p, old) in enumerate(zip(params, before)) if hooks else ():
            new = p.grad
            if i not in weighted and new is not None and not (old and old[0] is new and old[1] == new._version):
                raise RuntimeError(
                    f"a gradient of shape {tuple(p.shape)} was written to p.grad without a backward, so m-RWP's weight "
                    "is not applied: call torch.autograd.backward or grad on the parameters themselves, or use "
                    "perturbed() and multiply the gradients by optimizer.clean_weight and optimizer.perturbed_weight"
                )
    finally:
        remove(hooks)


def remove(hooks: list[Any]) -> None:
    """Removes hooks and empties the list."""
    while hooks:
        hooks.pop().remove()
