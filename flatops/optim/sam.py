"""Sharpness-aware minimisation, and its adaptive form."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flatops import distributed
from flatops.backend import outside_graphs
from flatops.distributed import all_local, local
from flatops.optim.base import Flat
from flatops.optim.batchnorm import freeze_batchnorm_stats
from flatops.restore import Pass
from flatops.scalars import check_range, check_tensor, on
from flatops.weights import norm as global_norm


class SAM(Flat):
    """SAM: the gradient at the worst weights nearby, the step at the clean weights.

    e = rho g / ||g||_2 over all parameters together, the gradient taken at w + e, the base optimizer's step at w.
    ASAM (`adaptive`): e = rho w^2 g / ||w g||_2.
    With the base's `maximize`, e has the other sign. Complex weights are pairs of real ones.

    Args:
        params: parameters or groups, which may set their own rho and adaptive.
        base: the optimizer class, such as torch.optim.SGD.
        rho: the radius, >= 0; default 0.05, typically 0.05 to 0.2, ten times that with `adaptive`. A number, or a
            one-element tensor on the parameters' device, which a captured CUDA graph reads at every replay. Groups
            whose rho is the number 0 are left out of the norm; reading a tensor's value would be a host sync.
        adaptive: ASAM; default False.
        **kwargs: for the base optimizer.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> optimizer = flatops.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        >>> loss_fn(model(x), y).backward()
        >>> with optimizer.perturbed():  # zeroes the gradients too
        ...     loss_fn(model(x), y).backward()
        >>> optimizer.step(); optimizer.zero_grad()

    Under a GradScaler scale both losses and leave the first gradient scaled, since it is divided by its norm. If the
    first pass overflows, there is no ascent and the second gradient becomes NaN, so that the scaler skips the step and
    backs off.

    References:
        Foret et al.: Sharpness-Aware Minimization for Efficiently Improving Generalization. arXiv 2010.01412.
        Kwon et al.: ASAM: Adaptive Sharpness-Aware Minimization. arXiv 2102.11600.
    """

    def __init__(
        self,
        params: Any,
        base: type[torch.optim.Optimizer],
        *,
        rho: float | Tensor = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ):
        self._construct(params, {"rho": rho, "adaptive": adaptive}, kwargs)

    def _check_group(self, group: dict[str, Any]) -> None:
        (check_tensor if isinstance(group["rho"], Tensor) else check_range)("rho", group["rho"])
        if not isinstance(group["adaptive"], bool):
            raise ValueError(f"adaptive must be True or False, not {group['adaptive']!r}")

    @outside_graphs
    def perturbed(self) -> Pass:
        """Context manager that moves the weights to w + e and zeroes the gradients; on exit it restores every bit.

        Raises:
            RuntimeError: on entry, if the weights are already perturbed, or without a gradient from a first pass.
            TypeError: on entry, for a sparse gradient.
        """
        return super().perturbed()

    def _begin(self) -> bool:
        began = super()._begin()
        for p in self._all_params():
            p.grad = None
        return began

    def _direction(self, params: list[Tensor]) -> list[Tensor | None]:
        """The ascent direction of each of these parameters; those with None do not move.

        Directions that `maximize` has negated, such as a momentum buffer, must be negated back. A method without a
        clean pass also overrides has_clean_pass, _passes and _evaluate.
        """
        return [p.grad for p in params]

    def _perturb(self) -> None:
        self._check_reduced(self.flat.__name__)
        parts: dict[Any, tuple[list[Tensor], list[int], list[Tensor]]] = {}
        for key, (params, index) in self._trainable(("rho", "adaptive", "maximize")).items():
            directions = self._direction(params)
            if some := [(p, i, d) for p, i, d in zip(params, index, directions) if d is not None]:
                parts[key] = [p for p, _, _ in some], [i for _, i, _ in some], [d for _, _, d in some]
        if not parts:
            raise RuntimeError("no parameter has a gradient: run a backward at the clean weights before perturbed()")
        for d in itertools.chain(*(directions for _, _, directions in parts.values())):
            if d.layout != torch.strided:  # before all_local, which fails for sparse ones
                raise TypeError(f"a gradient of shape {tuple(d.shape)} is {d.layout}: SAM needs dense gradients")
        reached = [p for params, _, _ in parts.values() for p in params]
        # Groups with rho = 0 are left out of the norm, unless all are.
        parts = {key: part for key, part in parts.items() if isinstance(key[1], Tensor) or key[1] > 0} or parts
        parts = {key: (params, index, all_local(along)) for key, (params, index, along) in parts.items()}
        norm = self._norm([(params, along, key[2]) for key, (params, _, along) in parts.items()])
        self._before_ascent(norm)
        for (device, rho, adaptive, maximize), (params, index, along) in parts.items():
            if isinstance(rho, Tensor) or rho > 0:
                radius = on(device, -rho if maximize else rho)
                self._ascend(params, index, along, radius, norm=on(device, norm), adaptive=adaptive)
        self._pass_overflow_on(reached, norm)

    def _norm(self, lists: list[tuple[list[Tensor], list[Tensor], bool]]) -> Tensor:
        """The norm that directions are divided by; `flatops.weights.norm` of them."""
        return global_norm(lists)

    def _before_ascent(self, norm: Tensor) -> None:
        """Called with the gradients of the first pass in p.grad, before any weight changes."""

    def _ascend(
        self, params: list[Tensor], index: list[int], along: list[Tensor], rho: float | Tensor, **how: Any
    ) -> None:
        self.run.weights.ascend(params, along, rho, backup=self.run.weights.backup(params, index), **how)

    def _pass_overflow_on(self, params: list[Tensor], norm: Tensor) -> None:
        """Makes the second gradient NaN, before any all-reduce, if the first overflowed.

        One parameter's gradient is enough for a GradScaler to skip the step. Where no hook runs (sharded parameters,
        torch.func), `_end` does it.
        """
        self.run.finite = finite = norm < math.inf  # one kernel launch; isfinite() takes four

        def hook(grad: Tensor) -> Tensor | None:
            if self.run.finite is None:
                return None
            self.run.finite = None
            return torch.where(on(grad.device, finite), grad, math.nan)

        for p in params:
            if not distributed.is_distributed(p):
                self.run.hooks.append(p.register_hook(hook))  # one by one: an interrupt loses none of them

    def _end(self, well: bool) -> None:
        finite, self.run.finite = self.run.finite, None
        if well:
            self._check_reduced(self.flat.__name__)
        super()._end(well)
        for p in self._all_params() if well and finite is not None else ():
            if p.grad is not None and p.grad.layout == torch.strided and local(p.grad).numel():
                with torch.no_grad():
                    local(p.grad).add_(torch.where(on(p.grad.device, finite), 0.0, math.nan).to(local(p.grad).dtype))
                break

    @outside_graphs
    @contextlib.contextmanager
    def ascent_pass(self, model: nn.Module | None = None) -> Iterator[None]:
        """Context manager for the first forward and backward: local ascent under DistributedDataParallel.

        Every process ascends along its own gradient (the SAM paper's m-sharpness), which saves one of the two
        all-reduces. Without `model`, or with one that is not distributed, it does nothing.

        Example:
            >>> with optimizer.ascent_pass(model):
            ...     loss_fn(model(x), y).backward()
            >>> with optimizer.perturbed():
            ...     loss_fn(model(x), y).backward()

        Raises:
            RuntimeError: inside perturbed().
            ValueError: for a model under fully_shard, where no process has its own gradient, or with static_graph=True.
        """
        self._not_while_perturbed("ascent_pass()")
        model = distributed.undecorated(model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            if model.static_graph:
                raise ValueError(
                    "with static_graph=True the first pass cannot skip the all-reduce: build the model without it, or "
                    "use ascent_pass() without the model"
                )
            with model.no_sync():
                yield
            return
        if model is not None and distributed.is_sharded_module(model):
            raise ValueError("under fully_shard no process has its own gradient: use ascent_pass() without the model")
        yield

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        if not self.run.is_ready:  # unless the closure has run perturbed() itself
            with self.perturbed():
                closure()
            if all(p.grad is None for p in self._all_params()):
                raise RuntimeError(
                    "the closure made no gradient in the perturbed pass: it must run the backward itself (in "
                    "Lightning's manual optimization run perturbed() before optimizer.step())"
                )
        return loss

    def _passes(self, model: nn.Module | None, loss_scale: Any) -> Iterator[contextlib.AbstractContextManager[None]]:
        earlier: dict[Tensor, Tensor] = {}  # gradients of earlier micro-batches: the ascent is along this one's alone
        yield self._without(earlier)
        frozen = [] if model is None else [freeze_batchnorm_stats(model)]
        yield Pass(self, self._with(earlier), *frozen)

    @contextlib.contextmanager
    def _without(self, earlier: dict[Tensor, Tensor]) -> Iterator[None]:
        """A clean pass with the earlier gradients moved from p.grad to `earlier`."""
        for p in self._all_params():
            if p.grad is not None:
                earlier[p], p.grad = distributed.own(p.grad), None
        try:
            with self.ascent_pass():
                yield
        except BaseException:  # only this micro-batch is lost
            for p, g in earlier.items():
                p.grad = g
            raise

    @contextlib.contextmanager
    def _with(self, earlier: dict[Tensor, Tensor]) -> Iterator[None]:
        """A perturbed pass that adds to the earlier gradients, so that DistributedDataParallel reduces their sum."""
        for p, g in earlier.items():
            p.grad = g
        yield
