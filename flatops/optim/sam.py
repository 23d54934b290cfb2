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
from flatops.weights import norm


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

    @outside_graphs
    def perturbed(self) -> Pass:
        """Climbs to w + e along p.grad and zeroes the gradients; the weights come back bit for bit, whatever happens.

        Raises:
            RuntimeError: inside itself, or without a gradient from a first pass.
            TypeError: for a sparse gradient.
        """
        return super().perturbed()

    def _begin(self) -> bool:
        began = super()._begin()
        for p in self._all_params():
            p.grad = None
        return began

    def _direction(self, params: list[Tensor]) -> list[Tensor | None]:
        """What to climb along, for each of these parameters; those that have None stay where they are."""
        return [p.grad for p in params]

    def _perturb(self) -> None:
        self._check_reduced(self.flat.__name__)
        climbing: dict[Any, tuple[list[Tensor], list[int], list[Tensor]]] = {}
        for key, (params, index) in self._trainable(("rho", "adaptive", "maximize")).items():
            directions = self._direction(params)
            if some := [(p, i, d) for p, i, d in zip(params, index, directions) if d is not None]:
                climbing[key] = [p for p, _, _ in some], [i for _, i, _ in some], [d for _, _, d in some]
        if not climbing:
            raise RuntimeError(
                "no parameter has a gradient: run a backward at the weights themselves before perturbed()"
            )
        for d in itertools.chain(*(directions for _, _, directions in climbing.values())):
            if d.layout != torch.strided:  # before any is taken apart, which sparse ones do not allow
                raise TypeError(f"a gradient of shape {tuple(d.shape)} is {d.layout}: SAM needs dense gradients")
        reached = [p for params, _, _ in climbing.values() for p in params]
        # A group with rho = 0 has no part in the norm, unless no other is left.
        climbing = {key: part for key, part in climbing.items() if isinstance(key[1], Tensor) or key[1] > 0} or climbing
        climbing = {key: (params, index, all_local(along)) for key, (params, index, along) in climbing.items()}
        length = self._norm([(params, along, key[2]) for key, (params, _, along) in climbing.items()])
        self._before_ascent(length)
        for (device, rho, adaptive, maximize), (params, index, along) in climbing.items():
            if isinstance(rho, Tensor) or rho > 0:
                radius = on(device, -rho if maximize else rho)
                self._ascend(params, index, along, radius, norm=on(device, length), adaptive=adaptive)
        self._taint(reached, length)

    def _norm(self, lists: list[tuple[list[Tensor], list[Tensor], bool]]) -> Tensor:
        """What the directions are divided by."""
        return norm(lists)

    def _before_ascent(self, norm: Tensor) -> None:
        """With the gradients of the first pass in p.grad and their norm known, before any weight changes."""

    def _ascend(
        self, params: list[Tensor], index: list[int], along: list[Tensor], rho: float | Tensor, **how: Any
    ) -> None:
        self.run.weights.climb(params, along, rho, backup=self.run.weights.backup(params, index), **how)

    def _taint(self, params: list[Tensor], norm: Tensor) -> None:
        """Carries an overflow of the first pass into the second one's gradient, before any all-reduce.

        The first gradient to be made is enough: a GradScaler skips the step for one NaN. Where no hook runs, for sharded
        gradients or those that torch.func makes, `_end` does it.
        """
        self.run.finite = finite = norm < math.inf  # one operation, where isfinite() is four

        def hook(grad: Tensor) -> Tensor | None:
            if self.run.finite is None:
                return None
            self.run.finite = None
            return torch.where(on(grad.device, finite), grad, math.nan)

        self.run.hooks += [p.register_hook(hook) for p in params if not distributed.is_distributed(p)]

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
        if not self.run.is_ready:  # unless the closure went through perturbed() itself
            with self.perturbed():
                closure()
            if all(p.grad is None for p in self._all_params()):
                raise RuntimeError(
                    "the closure made no gradient in the perturbed pass, so that no step would ever move a weight: it has to run "
                    "the backward itself (in Lightning's manual optimization run perturbed() before optimizer.step())"
                )
        return loss

    def _passes(self, model: nn.Module | None, loss_scale: Any) -> Iterator[contextlib.AbstractContextManager[None]]:
        earlier: dict[Tensor, Tensor] = {}  # gradients of earlier micro-batches: the climb is along this one's alone
        yield self._apart(earlier)
        frozen = [] if model is None else [freeze_batchnorm_stats(model)]
        yield Pass(self, self._together(earlier), *frozen)

    @contextlib.contextmanager
    def _apart(self, earlier: dict[Tensor, Tensor]) -> Iterator[None]:
        """A clean pass whose gradient stands alone in p.grad."""
        for p in self._all_params():
            if p.grad is not None:
                earlier[p], p.grad = distributed.own(p.grad), None
        try:
            with self.ascent_pass():
                yield
        except BaseException:  # the micro-batch is lost, and nothing else
            for p, g in earlier.items():
                p.grad = g
            raise

    @contextlib.contextmanager
    def _together(self, earlier: dict[Tensor, Tensor]) -> Iterator[None]:
        """A perturbed pass that adds to the earlier gradients, so that DistributedDataParallel reduces all of it."""
        for p, g in earlier.items():
            p.grad = g
        yield
