"""The base of RWP, SAM and SSAM: the perturbed pass, the step, and the class made from a base optimizer."""

from __future__ import annotations

import abc
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flatops import distributed
from flatops.backend import outside_graphs
from flatops.optim import scaler
from flatops.optim.combine import check_base, combine, rebuild
from flatops.optim.groups import Groups
from flatops.optim.run import Run, Stage
from flatops.restore import Pass
from flatops.scalars import number

if TYPE_CHECKING:
    from typing_extensions import Self


class Flat(Groups):
    """The base of every flat-minima optimizer; use `flatops.RWP`, `flatops.SAM` or `flatops.SSAM`."""

    flat: type[Flat]
    grad_scale: Any  # a GradScaler sets these for fused bases
    found_inf: Any

    # --- what an algorithm defines ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _perturb(self) -> None:
        """Changes the weights through `run.weights`."""

    @abc.abstractmethod
    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """The whole algorithm before the step: leaves the gradient in p.grad and returns the loss to report."""

    @abc.abstractmethod
    def _passes(self, model: nn.Module | None, loss_scale: Any) -> Iterator[AbstractContextManager[None]]:
        """The passes over one micro-batch, each a context for a forward and backward; see `flatops.passes`."""

    @property
    def has_clean_pass(self) -> bool:
        """Whether a step has a clean pass before the perturbed pass."""
        return True

    @property
    def passes_in_step(self) -> bool:
        """Whether step(closure) runs the passes; a training loop that runs them itself sets this to False."""
        return self.run.passes_in_step

    @passes_in_step.setter
    def passes_in_step(self, value: bool) -> None:
        self.run.passes_in_step = value

    # --- the perturbed pass -------------------------------------------------------------------------------------------

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are perturbed now; for closures, which run in both passes."""
        return self.in_pass

    @property
    def in_pass(self) -> bool:
        """Whether a perturbed pass is running; True also on clean replicas of parallel m-RWP."""
        return self.run.in_pass

    @outside_graphs
    def perturbed(self) -> Pass:
        """Context manager that perturbs the weights in place; on exit, also by an exception, it restores them.

        Example:
            >>> with optimizer.perturbed():
            ...     loss_fn(model(x), y).backward()
            >>> optimizer.step()

        Raises:
            RuntimeError: on entry, if the weights are already perturbed.
        """
        return Pass(self)

    def _begin(self) -> bool:
        if self.run.stage is Stage.IN_STEP:
            return False
        self._enter()
        return True

    def _enter(self) -> None:
        run, params = self.run, self._all_params()
        if run.in_pass:
            raise RuntimeError(
                "perturbed() or first_step() while the weights are perturbed: end that pass first, or call restore()"
            )
        run.before, run.stage = run.stage, Stage.PERTURBED
        if run.weights.modules is None:
            distributed.check_params(params, run.given)
        run.weights.claim(params)
        if torch.is_grad_enabled():  # without gradients no step follows, so neither check is needed
            if scaler.has_unscaled(self):
                raise RuntimeError(
                    "unscale_() before the perturbed pass, whose gradient is scaled again: call it after perturbed()"
                )
            if not run.agreed:
                self._agree()
        self._check_groups()
        self._check_world()
        run.weights.forget_copies()
        with torch.no_grad():
            self._perturb()

    def _check_world(self) -> None:
        """Raises for options that do not work with these processes."""

    def _check_reduced(self, what: str) -> None:
        """Raises if fully_shard has not reduced the gradients that `what` needs."""
        if self.run.weights.modules:
            distributed.check_reduced(self.run.weights.modules, self._all_params(), what)

    def _agree(self) -> None:
        """Checks, once, that all processes have the same optimizer. Collective; a host sync."""
        if distributed.world()[1] > 1:
            values, own = self._agreement(), self.options["seed"] if self.run.default_seed else None
            if own is not None:
                values["seed"] = ["the default" if seed == own else seed for seed in values["seed"]]
            first = distributed.check_agreement(values, offer=own)
            if own is not None:  # torch's seed, and so the default, may differ between processes: all take rank 0's
                for group in self.param_groups:
                    group["seed"] = first if group["seed"] == own else group["seed"]
                self.options["seed"] = first
        self.run.agreed = True

    def _agreement(self) -> dict[str, Any]:
        """Values that must be equal on all processes."""
        params = [[(*p.shape, p.dtype, p.requires_grad) for p in group["params"]] for group in self.param_groups]
        return {"the optimizer": type(self).__name__, "params": params} | {
            key: [number(v) if isinstance(v := group[key], Tensor) else v for group in self.param_groups]
            for key in self.options
        }

    @outside_graphs
    def restore(self) -> None:
        """Restores the weights if they are perturbed, as perturbed() and second_step() do by themselves."""
        run = self.run
        run.weights.restore()
        for hook in run.hooks:
            hook.remove()
        run.hooks.clear()
        if run.in_pass:
            run.stage = run.before

    def _end(self, well: bool) -> None:
        """Called after the restore; `well` is False after an exception."""
        if well and torch.is_grad_enabled():  # under no_grad the pass has made no gradient to step with
            self.run.stage = Stage.READY

    # --- stepping -----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the weights from p.grad; with a closure, runs the whole algorithm.

        Args:
            closure: zeroes the gradients, runs forward and backward, returns the loss. Called once per pass; only once
                if `perturbed()` has already run or the closure uses it. Not allowed through `GradScaler.step`.

        Returns:
            What the closure returned in the clean pass (of RWP without one: in its only pass); None without a closure.

        Raises:
            RuntimeError: inside `perturbed()`, or with a closure through a GradScaler.
        """
        self._not_while_perturbed("step()")
        run = self.run
        if closure is None:
            if not (run.is_ready or run.warned) and self.passes_in_step:
                run.warned = True
                warnings.warn(
                    f"{type(self).__name__}.step() without a perturbed pass is plain {self.base.__name__}: run the "
                    "backward in `with optimizer.perturbed():`, or pass a closure",
                    stacklevel=user_frame(),
                )
            loss = None
        else:
            if not callable(closure):
                raise TypeError(f"closure must be callable, not {closure!r}")
            if hasattr(self, "grad_scale") or scaler.has_unscaled(self):  # inside scaler.step()
                for name in ("grad_scale", "found_inf"):  # a fused base would apply them in its next step
                    self.__dict__.pop(name, None)
                raise RuntimeError(
                    "scaler.step(optimizer, closure) would step on scaled gradients: use perturbed() and "
                    "scaler.step(optimizer)"
                )
            with torch.enable_grad():
                loss = self._evaluate(closure) if self.passes_in_step and not run.is_ready else closure()
            self._not_while_perturbed("step()")  # if the closure began a pass and did not end it
        self._before_step()
        self._base_step()
        self._after_step()
        run.stage = Stage.IDLE
        return loss

    def _before_step(self) -> None:
        """Called with the final gradient in p.grad; that of a fused base under a GradScaler is still scaled."""

    def _after_step(self) -> None:
        """Called when the base optimizer has made its state."""

    def _base_step(self) -> None:
        # torch wraps both our step() and the base's with hooks, which must run once.
        step = self.base.step
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)

    @outside_graphs
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights until `second_step`; for loops written for davda54/sam."""
        begins = not self.in_pass
        try:
            self._enter()
        except BaseException:
            if begins:
                self.restore()
                self._end(False)
            raise
        if zero_grad:
            self.zero_grad()

    @outside_graphs
    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and steps from p.grad.

        Raises:
            RuntimeError: without a first_step, or if a GradScaler has not unscaled the gradient.
        """
        if not self.in_pass:
            raise RuntimeError("second_step() without first_step()")
        self.restore()
        self._end(True)
        if scaler.has_left_scaled(self):
            raise RuntimeError(
                "second_step() would step on the scaled gradient: call scaler.unscale_(optimizer) before it, or use "
                "perturbed() and scaler.step(optimizer)"
            )
        self.step()
        if zero_grad:
            self.zero_grad()

    # --- the class, and copies ----------------------------------------------------------------------------------------

    def __new__(cls, params: Any = None, base: Any = None, *args: Any, **kwargs: Any) -> Self:
        made: Any = cls
        if cls.base is None:
            check_base(base, Flat, kwargs)
            made = combine(made, base)
        return object.__new__(made)

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (self.flat, self.base), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        self._not_while_perturbed("copying or pickling")
        return {**super().__getstate__(), "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not hasattr(self, "run"):  # load_state_dict calls this too, on an optimizer that has one
            self.run = Run()
        super().__setstate__(state)


def user_frame() -> int:
    """The stacklevel, for warnings, of the first caller outside flatops and torch."""
    frame, level = inspect.currentframe(), 0
    ours = ("flatops", "torch", "contextlib")
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ours:
        frame, level = frame.f_back, level + 1
    return level
