"""Sharpness-aware minimisation, and its adaptive form."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flatops import distributed, ops
from flatops.distributed import all_local, local
from flatops.optim.flat import Flat, announce, check_range, check_tensor, on, perturbed_pass


class SAM(Flat):
    """SAM: the gradient at the worst weights nearby, the step at the weights themselves.

    e = rho g / ||g||_2 over all parameters of the optimizer, the gradient taken at w + e, the base optimizer's step at w.
    ASAM (`adaptive`): e = rho w^2 g / ||w g||_2.

    Args:
        params: parameters or groups, which may set their own rho and adaptive.
        base: the optimizer class that steps, such as torch.optim.SGD.
        rho: the radius, >= 0; default 0.05, typically 0.05 to 0.2, ten times that with `adaptive`. A number, or a tensor of
            one on the parameters' device, which a captured CUDA graph reads anew at every replay.
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

    Under a GradScaler scale both losses and leave the first gradient scaled: its length does not matter. A first pass that
    overflows ascends nowhere, and makes the second pass's gradient NaN, so that the scaler skips the step and backs off.

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
        if group.get("maximize"):
            raise ValueError("maximize=True would climb the wrong way: minimise the negated loss")

    @perturbed_pass
    def perturbed(self) -> Iterator[None]:
        """Climbs to w + e along p.grad and zeroes the gradients; the weights come back bit for bit, whatever happens.

        Raises:
            RuntimeError: inside itself, or without a gradient from a first pass.
            TypeError: for a sparse gradient.
        """
        with super().perturbed():
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None
            yield

    def _perturb(self) -> None:
        parts = self._trainable(("rho", "adaptive"), with_grad=True)
        if not parts:
            raise RuntimeError(
                "no parameter has a gradient: run a backward at the weights themselves before perturbed()"
            )
        grads = {key: all_local(p.grad for p in params) for key, (params, _) in parts.items()}
        for g in itertools.chain(*grads.values()):
            if g.layout != torch.strided:
                raise TypeError(
                    f"a gradient of shape {tuple(g.shape)} is {g.layout}: SAM needs dense gradients"
                )
        norm = self._norm(parts, grads)
        self._before_ascent(norm)
        for (device, rho, adaptive), (params, _) in parts.items():
            if isinstance(rho, Tensor) or rho > 0:
                part = grads[device, rho, adaptive]
                self._ascend(params, part, on(device, rho), norm=on(device, norm), adaptive=adaptive)
        self._taint(parts, norm)

    def _before_ascent(self, norm: Tensor) -> None:
        """With the gradients of the first pass in p.grad and their norm known, before any weight changes."""

    def _ascend(self, params: list[Tensor], grads: list[Tensor], rho: float | Tensor, **how: Any) -> None:
        mine, backup = all_local(params), self._backup(params)
        announce(self.run.undo, mine, backup[-1], backup=backup)
        ops.ascend_(mine, grads, rho, backup=backup, **how)

    def _norm(self, parts: dict[Any, Any], grads: dict[Any, Any]) -> Tensor:
        """The norm over all parameters and all their shards, float64, on the first one's device."""
        norms: dict[Any, list[Tensor]] = {}  # by the process group that has the rest of it
        for key, (params, _) in parts.items():
            for group, places in distributed.by_group(params).items():
                weights = distributed.all_local(params[i] for i in places) if key[-1] else None
                norms.setdefault(group, []).append(ops.grad_norm([grads[key][i] for i in places], weights))
        if list(norms) == [None] and len(norms[None]) == 1:
            return norms[None][0]
        device = next(iter(norms.values()))[0].device
        squares = []
        for group, of in norms.items():
            square = torch.stack([on(device, n) for n in of]).square().sum()
            if group is not None:
                torch.distributed.all_reduce(square, group=group)
            squares.append(square)
        return torch.stack(squares).sum().sqrt()

    def _taint(self, parts: dict[Any, Any], norm: Tensor) -> None:
        """Carries an overflow of the first pass into the second one's gradient, before any all-reduce.

        The first gradient to be made is enough: a GradScaler skips the step for one NaN. Sharded gradients have no hooks, but
        all processes have the same norm.
        """
        finite = norm < math.inf  # one operation, where isfinite() is four
        params = [p for params, _ in parts.values() for p in params]
        shards = list(filter(distributed.is_distributed, params)) if distributed.any_distributed(params) else []
        self.run.taint = (shards, finite) if shards else None
        pending = [True]

        def hook(grad: Tensor) -> Tensor | None:
            if not pending:
                return None
            pending.clear()
            return torch.where(on(grad.device, finite), grad, math.nan)

        self.run.hooks += [p.register_hook(hook) for p in params if not (shards and distributed.is_distributed(p))]

    def _passed(self) -> None:
        super()._passed()
        if self.run.taint is None:
            return
        shards, finite = self.run.taint
        self.run.taint = None
        for p in shards:
            if p.grad is not None and local(p.grad).numel():
                local(p.grad).add_(torch.where(finite, 0.0, math.nan).to(p.grad.dtype))
                break

    @contextlib.contextmanager
    def ascent_pass(self, model: nn.Module | None = None) -> Iterator[None]:
        """Around the first forward and backward: with a DistributedDataParallel model every process climbs by its own gradient.

        That is the m-sharpness of the SAM paper, and saves one of the two all-reduces. Without `model`, or with one that is not
        distributed, it does nothing.

        Example:
            >>> with optimizer.ascent_pass(model):
            ...     loss_fn(model(x), y).backward()
            >>> with optimizer.perturbed():
            ...     loss_fn(model(x), y).backward()

        Raises:
            RuntimeError: inside perturbed().
            ValueError: for a model under fully_shard, whose processes have no gradient of their own, or with static_graph=True.
        """
        self._not_while_perturbed("ascent_pass()")
        model = distributed.undecorated(model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            if model.static_graph:
                raise ValueError(
                    "static_graph=True fixes what the first pass does, so it cannot leave out the all-reduce: build the model "
                    "without it, or climb by the shared gradient with ascent_pass() and no model"
                )
            with model.no_sync():
                yield
            return
        if model is not None and distributed.is_sharded_module(model):
            raise ValueError(
                "under fully_shard no process has a gradient of its own to climb by: use ascent_pass() without the model"
            )
        yield

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        if not self.run.ready:  # unless the closure went through perturbed() itself
            with self.perturbed():
                closure()
            if all(p.grad is None for group in self.param_groups for p in group["params"]):
                raise RuntimeError(
                    "the closure made no gradient in the perturbed pass, so that no step would ever move a weight: it has to run "
                    "the backward itself (in Lightning's manual optimization run perturbed() before optimizer.step())"
                )
        return loss
