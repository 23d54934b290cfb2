"""Records of in-place changes to weights, and the context manager that undoes them, even after an interrupt."""

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
    """A list of tensors that one operator changes, and how to restore it.

    Version counters tell what has been done: a flag set by the next line of Python could be lost to an interrupt.
    """

    tensors: list[Tensor]
    how: dict[str, Any]  # the arguments of restore_, or {"offloaded": backup in the host's memory}
    token: Tensor  # the backup or the scales: its version grows when there is something to undo ...
    version: int  # ... from this one
    restored: int = -1  # the version that restoring gives the last of the tensors

    def undo(self) -> None:
        """Restores the tensors, if they were changed and are not restored yet."""
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
    """All changes of one pass, in order."""

    _claims: dict[tuple[int, int], Sequence[Tensor]] = {}  # (thread, id of a Changes) -> the weights that it may change

    def __init__(self) -> None:
        self.made: list[Change] = []

    def claim(self, weights: Sequence[Tensor]) -> None:
        """Keeps other threads from changing these weights until `undo`.

        Raises:
            RuntimeError: if another thread has claimed some of them: its noise would be in this one's backup.
        """
        thread = threading.get_ident()
        self._claims[thread, id(self)] = weights  # before looking, so that of two threads at least one sees the other
        others = [theirs for (other, _), theirs in list(self._claims.items()) if other != thread]
        if others and not _addresses(itertools.chain(*others)).isdisjoint(_addresses(weights)):
            raise RuntimeError(
                "another thread is perturbing these weights: give every thread a copy of the model, or hold a lock "
                "during the whole pass"
            )

    def announce(self, tensors: list[Tensor], token: Tensor, **how: Any) -> None:
        """Records a change that is about to be made, and how to undo it."""
        self.made.append(Change(tensors, how, token, token._version))

    def undo(self) -> None:
        """Undoes all changes, last first because lists may share memory, and gives up the claim."""
        for change in reversed(self.made):
            change.undo()
        self.made.clear()
        for key in [key for key in list(self._claims) if key[1] == id(self)]:
            self._claims.pop(key, None)


def _addresses(weights: Iterable[Tensor]) -> set[int]:
    return {w.data_ptr() for w in distributed.all_local(weights) if w.numel()}


def forget_copies(modules: list[Any]) -> None:
    """Drops stale copies of the weights: those of autocast, of `parametrize.cached()` and of FSDP modules."""
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
    """`__exit__` of a Pass, which runs again if an interrupt breaks it off.

    Compiled if possible: a Python function can be interrupted before its first line.
    """

    def __get__(self, instance: Pass | None, owner: type) -> Callable[..., Any]:
        if instance is None:  # contextlib.ExitStack asks the class
            return lambda instance, *exception: instance.leave(*exception)
        return (_insist if _C is None else _C.insist)(instance.leave)


class Pass:
    """A perturbed pass as a context manager: an interrupt at any moment still restores the weights.

    Args:
        owner: an object with
            `in_pass`, whether a pass is running;
            `_begin(**options)`, which changes the weights and returns True, or returns False to join the running pass;
            `restore()`, which restores them, and is called again if interrupted;
            `_end(well)`, called after the restore; `well` is False after an exception.
        *inside: context managers entered after the weights are changed and left before they are restored.
        **options: for `_begin`.
    """

    __exit__ = _Exit()
    # Of the class, so that __del__ finds them where an interrupt broke off __init__.
    entered = left = False
    mine = False  # whether it began the pass, and so ends it

    def __init__(self, owner: Any, *inside: contextlib.AbstractContextManager[Any], **options: Any) -> None:
        self.owner, self.inside, self.options = owner, inside, options
        self.stack = contextlib.ExitStack()

    @outside_graphs
    def __enter__(self) -> None:
        if self.entered:
            raise RuntimeError("a pass can be entered once: call perturbed() or perturb() again")
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
                self.left = True  # or __del__ would end a later pass of this owner
            raise

    @outside_graphs
    def leave(self, *exception: Any) -> None:
        """Restores the weights, unless this pass joined a running one."""
        if self.left:  # called again, because the first call raised
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
        """Ends a pass that was entered and never left."""
        if self.mine and not self.left:
            self.leave(KeyboardInterrupt, None, None)
