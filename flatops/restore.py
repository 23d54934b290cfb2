"""Weights changed in place, with a way back: what was changed, and a pass that gives it back whatever happens."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatops import distributed, ops
from flatops.backend import _C, outside_graphs


@dataclass
class Change:
    """A list of tensors that is changed together, and how it comes back."""

    tensors: list[Tensor]
    how: dict[str, Any]  # the arguments of restore_, or a copy of the weights in the host's memory
    token: Tensor  # the operator that changes them writes to it last ...
    version: int  # ... and so moves its version on: an interrupt between two lines of Python cannot blur what was done
    restored: int = -1  # the version that restoring gives the last tensor, for the same reason

    def undo(self) -> None:
        """Restores the tensors, if they were changed and have not been restored."""
        last = self.tensors[-1]
        if self.token._version == self.version or last._version == self.restored:
            return
        self.restored = last._version + 1
        if "offloaded" in self.how:
            with torch.no_grad():
                torch._foreach_copy_(self.tensors, self.how["offloaded"], non_blocking=True)
        else:
            ops.restore_(self.tensors, **self.how)


class Changes:
    """All that one pass changes, in the order in which it does."""

    _claims: dict[tuple[int, int], Sequence[Tensor]] = {}  # (thread, id of a Changes) -> the weights that it may change

    def __init__(self) -> None:
        self.made: list[Change] = []

    def claim(self, weights: Sequence[Tensor]) -> None:
        """Keeps other threads from changing these weights until `undo`.

        Raises:
            RuntimeError: if another thread has claimed some of them. Each would restore what it saw: the other's noise.
        """
        thread = threading.get_ident()
        self._claims[thread, id(self)] = weights  # before looking: of two threads that come together one sees the other
        others = [theirs for (other, _), theirs in list(self._claims.items()) if other != thread]
        if others and not _addresses(itertools.chain(*others)).isdisjoint(_addresses(weights)):
            raise RuntimeError(
                "another thread is perturbing these weights: give every thread a copy of the model, or hold a lock around "
                "the whole pass"
            )

    def announce(self, tensors: list[Tensor], token: Tensor, **how: Any) -> None:
        """Notes a change and how to undo it, before it is made."""
        self.made.append(Change(tensors, how, token, token._version))

    def undo(self) -> None:
        """Undoes all changes, the last first: two lists may hold the same memory. Then the weights are free for other threads."""
        for change in reversed(self.made):
            change.undo()
        self.made.clear()
        for key in [key for key in list(self._claims) if key[1] == id(self)]:
            self._claims.pop(key, None)


def _addresses(weights: Iterable[Tensor]) -> set[int]:
    return {w.data_ptr() for w in distributed.all_local(weights) if w.numel()}


def forget_copies(modules: list[Any]) -> None:
    """Drops copies of weights that are about to change or have just changed: autocast's in low precision, those of
    `parametrize.cached()`, and what `modules`, which are under fully_shard, have gathered."""
    torch.clear_autocast_cache()
    if parametrize := sys.modules.get("torch.nn.utils.parametrize"):
        parametrize._cache.clear()
    distributed.reshard(modules)


def _insist(function: Callable[..., Any]) -> Callable[..., Any]:
    def insisting(*args: Any) -> Any:
        try:
            return function(*args)
        except BaseException:
            function(*args)
            raise

    return insisting


class _Exit:
    """`__exit__` of a Pass: called again if an interrupt breaks it off, and compiled where there is a compiled core, since Python
    code can be interrupted before its first line."""

    def __get__(self, instance: Pass | None, owner: type) -> Callable[..., Any]:
        if instance is None:  # contextlib.ExitStack asks the class
            return lambda instance, *exception: instance.leave(*exception)
        return (_insist if _C is None else _C.insist)(instance.leave)


class Pass:
    """A perturbed pass, as a context manager: no interrupt, whenever it comes, leaves the weights perturbed.

    Args:
        owner: whose weights they are. It has
            `in_pass`, whether a pass is under way;
            `_begin(**options)`, which changes the weights, or returns False to join the pass that is under way;
            `restore()`, which gives them back, and is called again if it is interrupted;
            `_end(well)`, called with the weights back in place, after a pass that ended well or did not.
        *inside: context managers to enter when the weights have changed, and to leave before they come back.
        **options: for `_begin`.
    """

    __exit__ = _Exit()
    mine = left = False  # of one that an interrupt kept from being made, too

    def __init__(self, owner: Any, *inside: contextlib.AbstractContextManager[Any], **options: Any) -> None:
        self.owner, self.inside, self.options = owner, inside, options
        self.stack = contextlib.ExitStack()
        self.entered = self.left = False
        self.mine = False  # it began the pass, and so ends it

    @outside_graphs
    def __enter__(self) -> None:
        if self.entered:
            raise RuntimeError("a pass is entered once: make another for the next")
        self.entered = True
        begins = not self.owner.in_pass
        try:
            self.mine = self.owner._begin(**self.options)
            for manager in self.inside:
                self.stack.enter_context(manager)
        except BaseException as error:
            try:
                self.stack.__exit__(type(error), error, error.__traceback__)
            finally:
                if begins:
                    self.owner.restore()
                    self.owner._end(False)
            raise

    @outside_graphs
    def leave(self, *exception: Any) -> None:
        """Restores the weights, unless they belong to a pass that this one has joined."""
        if self.left:  # again, for an interrupt broke the end off
            error = KeyboardInterrupt()
            exception = type(error), error, None
        self.left, well = True, False
        try:
            self.stack.__exit__(*exception)
            well = exception[0] is None
        finally:
            if self.mine:
                self.owner.restore()
                self.owner._end(well)

    def __del__(self) -> None:
        """A pass that nobody can end any more: a debugger's interrupt came between its body and its end."""
        if self.mine and not self.left:
            self.leave(KeyboardInterrupt, None, None)
