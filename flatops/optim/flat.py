"""What RWP, SAM and SSAM share: the class made from a base optimizer, the perturbed pass, and what survives a checkpoint."""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
import inspect
import itertools
import math
import numbers
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from flatops import distributed, ops
from flatops.backend import _C, outside_graphs
from flatops.optim import scaler

if TYPE_CHECKING:
    from typing_extensions import Self

DTYPES = (*ops.DTYPES, torch.complex64, torch.complex128)  # of parameters; complex ones are perturbed as pairs of real ones
P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Undo:
    """One perturbed list of parameters and how it comes back."""

    params: list[Tensor]
    how: dict[str, Any]  # what restore_ takes, or a copy of the weights in the host's memory
    token: Tensor  # the perturbing operator writes to it last ...
    version: int  # ... and so moves its version on: an interrupt between two lines of Python cannot blur what was done
    restored: int = -1  # the version that restoring gives the last parameter, for the same reason

    def take_back(self) -> None:
        """Restores the parameters, if they were perturbed and have not been restored."""
        last = self.params[-1]
        if self.token._version == self.version or last._version == self.restored:
            return
        self.restored = last._version + 1
        if "offloaded" in self.how:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.how["offloaded"], non_blocking=True)
        else:
            ops.restore_(self.params, **self.how)


def announce(undo: list[Undo], mine: list[Tensor], token: Tensor, **how: Any) -> None:
    """Notes a change of `mine`, this process's part of parameters, before it is made, and how to undo it."""
    undo.append(Undo(mine, how, token, token._version))


def take_back(undo: list[Undo]) -> None:
    """Restores all that was announced, the last first: two lists may hold the same memory."""
    for change in reversed(undo):
        change.take_back()
    undo.clear()


_claims: dict[tuple[int, int], Sequence[Tensor]] = {}  # (thread, id of an owner) -> the weights that it is perturbing


def claim(owner: Any, weights: Sequence[Tensor]) -> None:
    """Notes that an owner perturbs these weights in this thread, until `release`.

    Raises:
        RuntimeError: if another thread is perturbing some of them. Each would restore what it saw: the other's noise.
    """
    thread = threading.get_ident()
    _claims[thread, id(owner)] = weights  # before looking: of two threads that come together one at least sees the other
    others = [theirs for (other, _), theirs in list(_claims.items()) if other != thread]
    if others and not _addresses(itertools.chain(*others)).isdisjoint(_addresses(weights)):
        raise RuntimeError(
            "another thread is perturbing these weights: give every thread a copy of the model, or hold a lock around the whole pass"
        )


def release(owner: Any) -> None:
    """The owner's weights are as they were."""
    for key in [key for key in list(_claims) if key[1] == id(owner)]:
        _claims.pop(key, None)


def _addresses(weights: Iterable[Tensor]) -> set[int]:
    return {w.data_ptr() for w in distributed.all_local(weights) if w.numel()}


def forget_copies(modules: list[Any]) -> None:
    """Drops copies of weights that are about to change or have just changed: autocast's in low precision, those of
    `parametrize.cached()`, and what `modules`, which are under fully_shard, have gathered."""
    torch.clear_autocast_cache()
    if parametrize := sys.modules.get("torch.nn.utils.parametrize"):
        parametrize._cache.clear()
    distributed.reshard(modules)


@dataclass
class Run:
    """Run-time state, in one mutable object: Lightning's proxies copy an optimizer's attributes, not what they refer to."""

    perturbed: bool = False  # the weights are perturbed now
    ready: bool = False  # a perturbed pass has run since the last step
    inside_step: bool = False  # step(closure) has perturbed the weights for its only evaluation
    lent: bool = False  # a hook has begun the pass, and the closure that step() is given will end it
    warned: bool = False
    undo: list[Undo] = field(default_factory=list)
    backup: dict[Tensor, Tensor] = field(default_factory=dict)
    given: bool = False  # all that it was given are nn.Parameters
    agreed: bool = False  # all processes have the same optimizer
    modules: list[Any] | None = None  # under fully_shard; None until they have been looked for
    offloaded: bool = False  # shards in the host's memory
    taint: Tensor | None = None  # whether SAM's first pass was finite, until a gradient of the second one carries it
    hooks: list[Any] = field(default_factory=list)
    skipped: list[Tensor] = field(default_factory=list)  # need no gradient in SSAM's first pass
    default_seed: bool = False  # nobody has given one


class _Exit:
    """`__exit__` of a Pass: compiled where there is a compiled core. Python code can be interrupted before its first line."""

    def __get__(self, instance: Pass | None, owner: type) -> Callable[..., Any]:
        if instance is None:  # contextlib.ExitStack asks the class
            return lambda instance, *exception: instance.manager.__exit__(*exception)
        return _C.insist(instance.manager.__exit__) if _C is not None else instance.manager.__exit__


class Pass:
    """A perturbed pass as a context manager: contextlib's, and no moment at which an interrupt leaves the weights perturbed."""

    __exit__ = _Exit()

    def __init__(self, owner: Any, manager: contextlib.AbstractContextManager[None]) -> None:
        self.owner, self.manager = owner, manager  # the owner has in_pass and restore()
        self.entered = False

    def __enter__(self) -> None:
        if self.entered:
            raise RuntimeError("a pass is entered once: make another for the next")
        self.entered = True
        clean = not self.owner.in_pass
        try:
            self.manager.__enter__()
        except BaseException:
            if clean:
                self.owner.restore()
            raise


def while_perturbed(owner: Any) -> Iterator[None]:
    """What every perturbed pass is: the owner perturbs, something runs, and whatever happens the owner restores."""
    try:
        owner._enter()
        yield
    finally:
        try:
            owner.restore()
        except BaseException:  # an interrupt between two lines of it
            owner.restore()
            raise


def perturbed_pass(generator: Callable[Concatenate[T, P], Iterator[None]]) -> Callable[Concatenate[T, P], Pass]:
    """Makes a method that perturbs, yields once and restores into one that returns a Pass."""
    manager = contextlib.contextmanager(generator)

    @outside_graphs
    @functools.wraps(generator)
    def begin(self: T, /, *args: P.args, **kwargs: P.kwargs) -> Pass:
        return Pass(self, manager(self, *args, **kwargs))

    return begin


@functools.cache
def _combine(flat: type[Flat], base: type[torch.optim.Optimizer]) -> type[Flat]:
    """The class whose instances are both: isinstance, fused steps, GradScaler's attributes and schedulers all work."""
    return type(
        flat.__name__ + base.__name__,
        (flat, base),
        {"base": base, "flat": flat, "__module__": flat.__module__},
    )


def _rebuild(flat: Any, base: Any) -> Any:
    return object.__new__(_combine(flat, base))


def _check_base(base: Any, others: dict[str, Any]) -> None:
    if base is None and (misnamed := [name for name, value in others.items() if inspect.isclass(value)]):
        raise TypeError(f"the optimizer class that steps is the argument base, not {misnamed[0]}: write base={others[misnamed[0]].__name__}")
    if not (inspect.isclass(base) and issubclass(base, torch.optim.Optimizer)):
        raise TypeError(f"base must be an optimizer class such as torch.optim.SGD, not {base!r}")
    if issubclass(base, (Flat, torch.optim.LBFGS)):
        raise TypeError(f"base must be an optimizer that steps once from p.grad; {base.__name__} does not")


class Flat(torch.optim.Optimizer):
    """The base of every flat-minima optimizer; use `flatops.RWP`, `flatops.SAM` or `flatops.SSAM`."""

    base: Any = None  # the class that steps
    flat: type[Flat]
    run: Run
    grad_scale: Any  # a GradScaler leaves these to fused bases
    found_inf: Any

    def __new__(cls, params: Any = None, base: Any = None, *args: Any, **kwargs: Any) -> Self:
        made: Any = cls
        if cls.base is None:
            _check_base(base, kwargs)
            made = _combine(made, base)
        return object.__new__(made)

    def _construct(self, params: Any, options: dict[str, Any], base_kwargs: dict[str, Any]) -> None:
        """Builds the base optimizer around our options, which live in param_groups beside lr."""
        self.run = Run(default_seed="seed" in options and options["seed"] is None)
        if self.run.default_seed:
            options["seed"] = _default_seed()
        self.options = options = {key: plain(value) for key, value in options.items()}
        self._check_group(options)
        scaler.forget(self)
        self.base.__init__(self, params, **base_kwargs)
        if taken := options.keys() & self.defaults.keys():
            raise ValueError(
                f"base {self.base.__name__} has a hyper-parameter {', '.join(sorted(taken))} of its own: use another"
            )
        if any(options.keys() - group.keys() for group in self.param_groups):
            raise TypeError(
                f"base {self.base.__name__} has the parameter groups of an optimizer inside it: give the inner one to flatops as "
                f"base, and the flatops optimizer to {self.base.__name__}"
            )
        self.defaults.update(options)
        params = self._all_params()
        self.run.given = bool(params) and all(isinstance(p, torch.nn.Parameter) for p in params)

    # --- for the algorithms to say ---------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises for a hyper-parameter out of range."""

    def _check_groups(self) -> None:
        """Raises for a group that no pass can run with: a user or a scheduler may have written to it since it was added."""
        for group in self.param_groups:
            self._check_group(group)

    @abc.abstractmethod
    def _perturb(self) -> None:
        """Changes the weights, each list announced in `run.undo`."""

    @abc.abstractmethod
    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """The whole algorithm up to the step: leaves the gradient in p.grad and returns the loss to report."""

    def _all_params(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    # --- the perturbed pass ------------------------------------------------------------------------------------------------

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are perturbed now; for closures, which run in both passes."""
        return self.run.perturbed

    @property
    def in_pass(self) -> bool:
        """Whether a perturbed pass is under way, of which a clean process of parallel m-RWP has its part too."""
        return self.run.perturbed

    @perturbed_pass
    def perturbed(self) -> Iterator[None]:
        """Perturbs the weights in place for the forward and backward within; they come back bit for bit, whatever happens.

        Example:
            >>> with optimizer.perturbed():
            ...     loss_fn(model(x), y).backward()
            >>> optimizer.step()

        Raises:
            RuntimeError: inside itself.
        """
        if self.run.inside_step:  # the pass that step(closure) has begun, by a closure that begins it itself
            yield
            return
        self._check_clean()
        yield from while_perturbed(self)
        self._passed()

    def _check_clean(self) -> None:
        if self.run.perturbed:
            raise RuntimeError(
                "perturbed() or first_step() while the weights are perturbed: leave the first, or call restore()"
            )

    @outside_graphs
    def _enter(self) -> None:
        self.run.perturbed = True
        params = self._all_params()
        claim(self, params)
        if self.run.modules is None:
            distributed.check_params(params, self.run.given)
            self.run.modules = distributed.sharded_modules() if distributed.any_distributed(params) else []
            self.run.offloaded = distributed.is_offloaded(params)
        if torch.is_grad_enabled():  # without, it may be a look at the loss by one process alone
            if scaler.has_unscaled(self):
                raise RuntimeError(
                    "unscale_() before the perturbed pass, whose gradient is scaled again: leave the first gradient scaled, "
                    "and call unscale_() after perturbed()"
                )
            if not self.run.agreed:
                self._agree()
        self._check_groups()
        self._check_world()
        self._drop_copies()
        with torch.no_grad():
            self._perturb()

    def _check_world(self) -> None:
        """Raises for what does not work with the processes that there are."""

    def _drop_copies(self) -> None:
        """Makes sure that no forward will use, and no copy is reading, weights that are about to change or have just changed."""
        if self.run.offloaded:
            torch.accelerator.synchronize()
        forget_copies(self.run.modules or [])

    def _check_reduced(self, what: str) -> None:
        """Raises where fully_shard holds back gradients that `what` needs."""
        if self.run.modules:
            distributed.check_reduced(self.run.modules, self._all_params(), what)

    def _agree(self) -> None:
        """Makes sure, once, that all processes have the same optimizer. Collective; the host waits for it."""
        if distributed.world()[1] > 1:
            values, own = self._agreement(), self.options["seed"] if self.run.default_seed else None
            if own is not None:
                values["seed"] = ["the default" if seed == own else seed for seed in values["seed"]]
            first = distributed.check_agreement(values, offer=own)
            if own is not None:  # processes may have seeded torch each in its own way: the first one's seed is all of theirs
                for group in self.param_groups:
                    group["seed"] = first if group["seed"] == own else group["seed"]
                self.options["seed"] = first
        self.run.agreed = True

    def _agreement(self) -> dict[str, Any]:
        """What all processes have to have alike."""
        params = [[(*p.shape, p.dtype, p.requires_grad) for p in group["params"]] for group in self.param_groups]
        return {"the optimizer": type(self).__name__, "params": params} | {
            key: [_number(v) if isinstance(v := group[key], Tensor) else v for group in self.param_groups]
            for key in self.options
        }

    def _passed(self) -> None:
        """After a perturbed pass that ended well, with the weights back in place."""
        self.run.ready |= torch.is_grad_enabled()  # or it was a look at the loss, and no gradient came of it

    @outside_graphs
    def restore(self) -> None:
        """Takes the perturbation away, if there is one. perturbed() and second_step() do it for you."""
        run = self.run
        take_back(run.undo)
        for hook in run.hooks:
            hook.remove()
        run.hooks.clear()
        self._drop_copies()
        release(self)
        run.perturbed = False

    def _backup(self, params: list[Tensor]) -> list[Tensor]:
        """Room for the weights, made once a parameter: addresses never change, and a step allocates nothing."""
        kept, backup = self.run.backup, []
        with torch.inference_mode(False):  # an inference tensor has no version
            for p, w in zip(params, distributed.all_local(params)):
                b = kept.get(p)
                if (
                    b is None
                    or b.shape != w.shape
                    or b.dtype != w.dtype
                    or b.device != w.device
                    or b.stride() != w.stride()
                ):
                    b = kept[p] = ops.new_backup([w])[0]
                backup.append(b)
        return backup

    def _trainable(
        self, keys: tuple[str, ...], with_grad: bool = False
    ) -> dict[tuple[Any, ...], tuple[list[Tensor], list[int]]]:
        """(device, *values of keys) -> parameters and their positions: one operator call each, groups that agree merged.

        A tensor agrees with itself alone: to compare values would be to wait for the device.
        """
        parts: dict[tuple[Any, ...], tuple[list[Tensor], list[int]]] = {}
        position = 0
        for group in self.param_groups:
            values = tuple(group.get(key) for key in keys)
            for p in group["params"]:
                if p.requires_grad and not (with_grad and p.grad is None):
                    params, index = parts.setdefault((p.device, *values), ([], []))
                    params.append(p)
                    index.append(position)
                position += 1
        return parts

    # --- stepping -----------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps from p.grad; with a closure, runs the whole algorithm.

        Args:
            closure: zeroes the gradients, runs forward and backward, returns the loss; it is called once a pass, and just
                once if `perturbed()` has already run, or runs inside it. Never through `GradScaler.step`.

        Returns:
            What the closure returned in the clean pass (RWP: in its only pass); None without one.

        Raises:
            RuntimeError: inside `perturbed()`, or with a closure through a GradScaler.
        """
        run = self.run
        if run.perturbed and not (run.lent and closure is not None):
            raise RuntimeError(
                "step() while the weights are perturbed: leave perturbed() first, or call second_step()"
            )
        if closure is None:
            if not run.ready and not run.warned:
                run.warned = True
                warnings.warn(
                    f"{type(self).__name__}.step() without a perturbed pass is plain {self.base.__name__}: put the backward "
                    "in `with optimizer.perturbed():`, or pass a closure",
                    stacklevel=_user_frame(),
                )
            loss = None
        else:
            if not callable(closure):
                raise TypeError(f"closure must be callable, not {closure!r}")
            if hasattr(self, "grad_scale") or scaler.has_unscaled(self):  # inside scaler.step()
                for name in ("grad_scale", "found_inf"):  # a fused base would apply them to its next step
                    self.__dict__.pop(name, None)
                raise RuntimeError(
                    "scaler.step(optimizer, closure) would step on scaled gradients: use perturbed() and scaler.step(optimizer)"
                )
            with torch.enable_grad():
                loss = closure() if run.ready or run.lent else self._evaluate(closure)
            self._not_while_perturbed("step()")  # the closure began a pass and did not end it
        self._before_step()
        self._base_step()
        self._after_step()
        run.ready = False
        return loss

    def _before_step(self) -> None:
        """With the final, unscaled gradient in p.grad."""

    def _after_step(self) -> None:
        """When the base optimizer has made its state."""

    def _base_step(self) -> None:
        # torch wraps step() with hooks; ours is wrapped already, and hooks are to run once.
        step = self.base.step
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)

    @outside_graphs
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights, for loops written for davda54/sam; `second_step` restores them and steps."""
        self._check_clean()
        try:
            self._enter()
        except BaseException:
            self.restore()
            raise
        if zero_grad:
            self.zero_grad()

    @outside_graphs
    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and steps from p.grad.

        Raises:
            RuntimeError: without a first_step, or with a GradScaler whose unscale_() has not been called: the gradient is
                still multiplied by its scale.
        """
        if not self.run.perturbed:
            raise RuntimeError("second_step() without first_step()")
        self.restore()
        self._passed()
        if scaler.has_left_scaled(self):
            raise RuntimeError(
                "second_step() would step on the scaled gradient: call scaler.unscale_(optimizer) before it, or write "
                "perturbed() and scaler.step(optimizer)"
            )
        self.step()
        if zero_grad:
            self.zero_grad()

    # --- groups, checkpoints, copies --------------------------------------------------------------------------------------

    def _not_while_perturbed(self, what: str) -> None:
        if self.run.perturbed:
            raise RuntimeError(f"{what} while the weights are perturbed: leave perturbed() first")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with this optimizer's hyper-parameters where it does not set its own.

        Raises:
            ValueError, TypeError: for a hyper-parameter out of range or a parameter of an unsupported dtype or placement; nothing
                is added.
        """
        self._not_while_perturbed("add_param_group()")
        if isinstance(param_group, dict):  # torch refuses what is none
            for key, value in self.options.items():
                param_group[key] = plain(param_group.get(key, value))
            self._check_group(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for i, p in enumerate(group["params"]):
                if p.dtype not in DTYPES:
                    raise TypeError(f"params[{i}] is {p.dtype}: expected float32, bfloat16, float16, float64 or complex numbers")
                distributed.check_layout(p, f"params[{i}]")
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        self.run.agreed, self.run.modules = False, None
        self.run.given &= all(isinstance(p, torch.nn.Parameter) for p in group["params"])
        for key, default in list(self.options.items()):
            if isinstance(group[key], Tensor) and group["params"]:
                given = group[key]
                group[key] = on(group["params"][0].device, given)
                if given is default:  # groups that share it go on sharing it
                    self.options[key] = group[key]

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and our hyper-parameters, in a form that the base optimizer alone loads too.

        Those that are tensors on a device are written as numbers.

        Raises:
            RuntimeError: inside `perturbed()`.
        """
        self._not_while_perturbed("state_dict()")
        packed = super().state_dict()
        for group in packed["param_groups"]:
            for key in self.options:
                group[key] = _number(group[key]) if isinstance(group[key], Tensor) else plain(group[key])
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from `state_dict()`, or from one of the base optimizer alone: what it lacks stays as it is.

        Raises:
            RuntimeError: inside `perturbed()`.
            ValueError: for other parameter groups.
        """
        self._not_while_perturbed("load_state_dict()")
        kept = [{key: group[key] for key in self.options} for group in self.param_groups]
        # davda54/sam leaves copies of the weights in its state; an entry of nothing else would pass for the base's own.
        state = {k: without(s, "old_p") for k, s in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": {k: s for k, s in state.items() if not isinstance(s, dict) or s}})
        written: dict[Tensor, Any] = {}
        for group, old in zip(self.param_groups, kept):
            for key, value in old.items():
                loaded = group.setdefault(key, value)
                if isinstance(value, Tensor) and loaded is not value:
                    if written.setdefault(value, loaded) != loaded:  # groups shared it and part now
                        value = value.clone()
                    # In place: a captured graph goes on reading it there.
                    group[key] = value.fill_(ops.signed(loaded))
        self.run.ready = self.run.agreed = self.run.default_seed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.flat, self.base), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        self._not_while_perturbed("copying or pickling")
        return {**super().__getstate__(), "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not hasattr(self, "run"):  # load_state_dict comes here too, and proxies know the run that there is
            self.run = Run()
        super().__setstate__(state)


_seeded: tuple[int, int] = (-1, 0)  # torch's seed, and how many optimizers have taken theirs from it since it was set


def _default_seed() -> int:
    """A seed that follows torch's, for the next optimizer: two of them do not draw the same noise."""
    global _seeded
    theirs = torch.initial_seed()
    _seeded = theirs, (_seeded[1] + 1 if _seeded[0] == theirs else 0)
    return int.from_bytes(hashlib.blake2b(repr(_seeded).encode(), digest_size=8).digest(), "little")


def plain(value: Any) -> Any:
    """A number of numpy's as Python's own, which checkpoints hold without numpy; anything else as it is."""
    if isinstance(value, (bool, Tensor)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def without(entry: Any, key: str) -> Any:
    """An entry of `state` without one of its keys; bases also keep entries that are no dict, one for all parameters."""
    return {k: v for k, v in entry.items() if k != key} if isinstance(entry, dict) else entry


def _user_frame() -> int:
    """How far up the first caller outside flatops and torch is, for warnings."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "flatops",
        "torch",
        "contextlib",
    ):
        frame, level = frame.f_back, level + 1
    return level


def on(device: torch.device, value: Any) -> Any:
    """`value` on a device, if it is a tensor. The host waits for nothing but what it is to compute with itself."""
    return value.to(device, non_blocking=device.type != "cpu") if isinstance(value, Tensor) else value


def _number(value: Tensor) -> int | float:
    return (
        value.item() if value.is_floating_point() else value.item() % 2**64
    )  # a seed's upper half is negative there


def check_tensor(name: str, value: Tensor, floating: bool = True) -> None:
    """Raises unless a tensor holds one number of the right kind. Its value lies on the device, and nobody waits for it."""
    kind, right = (
        ("floating-point", value.is_floating_point()) if floating else ("int64", value.dtype == torch.int64)
    )
    if not (value.numel() == 1 and right):
        raise ValueError(
            f"{name} must be one {kind} number, not a tensor of shape {tuple(value.shape)} and {value.dtype}"
        )


def check_range(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> None:
    """Raises unless `value` is a finite number in [low, high]."""
    valid = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (valid and low <= value <= high):
        what = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f">= {low:g}"
        raise ValueError(f"{name} must be a finite number {what}, not {value!r}")


def check_integer(name: str, value: Any) -> None:
    """Raises unless `value` is an integer in [0, 2**64)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) < 2**64:
        raise ValueError(f"{name} must be an integer in [0, 2**64), not {value!r}")


def own(grad: Tensor) -> Tensor:
    """A gradient that nobody else writes to: a view is DistributedDataParallel's, into its buckets."""
    return grad.clone() if grad._is_view() else grad


def unwrap(optimizer: Any) -> Flat:
    """The flatops optimizer inside the wrappers of Lightning, accelerate, timm and others.

    Raises:
        TypeError: if there is none.
    """
    seen: set[int] = set()
    inner = optimizer
    while not isinstance(inner, Flat) or not hasattr(inner, "run"):
        seen.add(id(inner))
        inner = next(
            (
                o
                for o in (getattr(inner, name, None) for name in ("optimizer", "_optimizer", "_base_optimizer"))
                if o is not None and id(o) not in seen
            ),
            None,
        )
        if inner is None:
            raise TypeError(f"{type(optimizer).__name__} holds no flatops optimizer")
    return inner
