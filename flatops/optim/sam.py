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
from flatops.backend import outside_graphs
from flatops.distributed import all_local, local
from flatops.optim.flat import Flat, announce, check_range, check_tensor, on, perturbed_pass


class SAM(Flat):
    """SAM: the gradient at the worst weights nearby, the step at the weights themselves.

    e = rho g / ||g||_2 over all parameters that climb, the gradient taken at w + e, the base optimizer's step at w.
    ASAM (`adaptive`): e = rho w^2 g / ||w g||_2. With the base's `maximize` e has the other sign. Complex weights climb as pairs of
    real ones.

    Args:
        params: parameters or groups, which may set their own rho and adaptive.
        base: the optimizer class that steps, such as torch.optim.SGD.
        rho: the radius, >= 0; default 0.05, typically 0.05 to 0.2, ten times that with `adaptive`. A number, or a tensor of
            one on the parameters' device, which a captured CUDA graph reads anew at every replay. Where groups have radii of
            their own, those of 0 are left out of the norm; a tensor never is, for nobody waits for its value.
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

    @perturbed_pass
    def perturbed(self) -> Iterator[None]:
        """Climbs to w + e along p.grad and zeroes the gradients; the weights come back bit for bit, whatever happens.

        Raises:
            RuntimeError: inside itself, or without a gradient from a first pass.
            TypeError: for a sparse gradient.
        """
        with super().perturbed():
            for p in self._all_params():
                p.grad = None
            yield

    def _perturb(self) -> None:
        self._check_reduced(self.flat.__name__)
        parts = self._trainable(("rho", "adaptive", "maximize"), with_grad=True)
        if not parts:
            raise RuntimeError(
                "no parameter has a gradient: run a backward at the weights themselves before perturbed()"
            )
        given = {key: [p.grad for p in params if p.grad is not None] for key, (params, _) in parts.items()}
        for g in itertools.chain(*given.values()):  # before any is taken apart, which sparse ones do not allow
            if g.layout != torch.strided:
                raise TypeError(f"a gradient of shape {tuple(g.shape)} is {g.layout}: SAM needs dense gradients")
        grads = {key: all_local(gs) for key, gs in given.items()}
        climbing = {key: part for key, part in parts.items() if isinstance(key[1], Tensor) or key[1] > 0}
        norm = self._norm(climbing or parts, grads)
        self._before_ascent(norm)
        for (device, rho, adaptive, maximize), (params, _) in climbing.items():
            part = grads[device, rho, adaptive, maximize]
            radius = on(device, -rho if maximize else rho)
            self._ascend(params, part, radius, norm=on(device, norm), adaptive=adaptive)
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
                weights = distributed.all_local(params[i] for i in places) if key[2] else None
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

        The first gradient to be made is enough: a GradScaler skips the step for one NaN. Where no hook runs, for sharded
        gradients or those that torch.func makes, `_passed` does it.
        """
        finite = norm < math.inf  # one operation, where isfinite() is four
        params = [p for params, _ in parts.values() for p in params]
        self.run.taint = finite

        def hook(grad: Tensor) -> Tensor | None:
            if self.run.taint is None:
                return None
            self.run.taint = None
            return torch.where(on(grad.device, finite), grad, math.nan)

        self.run.hooks += [p.register_hook(hook) for p in params if not distributed.is_distributed(p)]

    def _passed(self) -> None:
        self._check_reduced(self.flat.__name__)
        super()._passed()
        finite, self.run.taint = self.run.taint, None
        for p in self._all_params() if finite is not None else ():
            if p.grad is not None and p.grad.layout == torch.strided and local(p.grad).numel():
                with torch.no_grad():
                    local(p.grad).add_(torch.where(on(p.grad.device, finite), 0.0, math.nan).to(local(p.grad).dtype))
                break

    @outside_graphs
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
            if all(p.grad is None for p in self._all_params()):
                raise RuntimeError(
                    "the closure made no gradient in the perturbed pass, so that no step would ever move a weight: it has to run "
                    "the backward itself (in Lightning's manual optimization run perturbed() before optimizer.step())"
                )
        return loss
