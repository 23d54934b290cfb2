"""Random weight perturbation: RWP, m-RWP and ARWP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flatops import distributed, ops
from flatops.backend import outside_graphs
from flatops.distributed import all_local, local, own
from flatops.optim.batchnorm import freeze_batchnorm_stats
from flatops.optim.run import Stage
from flatops.optim.state import KeepsFisher
from flatops.optim.weighing import remove, weighted_gradients
from flatops.restore import Pass
from flatops.scalars import check_integer, check_range, check_tensor, on, plain
from flatops.weights import check_regenerate


class RWP(KeepsFisher):
    """RWP: the gradient at randomly perturbed weights, the step at the clean weights.

    eps_f ~ N(0, (sigma ||w_f||_2)^2 I) for every filter f (slice along dim 0). Complex weights are pairs of real ones.

    m-RWP (lam < 1): the gradient is lam g(w + eps; B2) + (1 - lam) g(w; B1), on two different batches.
    ARWP (eta > 0): eps_f is divided by sqrt(1 + eta F_f), F <- beta F + g^2 with the perturbed gradient, one number per
    filter. With lam = 1, F is updated in the step, from the gradient after clipping.

    Parallel m-RWP (`parallel`): some replicas compute the perturbed gradient, the others (rank 0 among them) the clean
    one, and the usual all-reduce mixes the two, in the time of plain training.

    Args:
        params: parameters or groups, which may set their own sigma, eta and beta.
        base: the optimizer class, such as torch.optim.SGD.
        sigma: noise relative to the filter's norm, >= 0; default 0.01 (CIFAR), 0.005 for ImageNet. A number, or a
            one-element tensor on the parameters' device, which a captured CUDA graph reads at every replay.
        lam: weight of the perturbed gradient, in [0, 1]; default 1 (RWP), 0.5 for m-RWP.
        eta: strength of the adaptation, >= 0; default 0 (off), typically 0.1 to 1.
        beta: decay of F, in [0, 1]; default 0.99.
        seed: of the noise, in [0, 2**64). A number, or a one-element int64 tensor. Default: derived from
            `torch.manual_seed`, another for each optimizer, the same (rank 0's) on all processes. It is in
            `param_groups` and checkpoints.
        stream: selects the noise of this replica; default: the replica's number. Under DistributedDataParallel each
            process is a replica, under FSDP2 all shards together are one.
        parallel: parallel m-RWP, for two replicas or more; the last half perturb (of 2 n + 1 the last n); default
            False. ARWP then updates F from the mixed gradient.
        restore: 'exact' (default) keeps a backup of the weights during the perturbed pass; 'regenerate' keeps one
            number per filter, and drifts by about 1.5e-8 sqrt(steps). It is refused for bfloat16 and float16, and for
            replicas with different noise, which would drift apart.
        **kwargs: for the base optimizer.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> optimizer = flatops.RWP(model.parameters(), torch.optim.SGD, sigma=0.01, lr=0.1, momentum=0.9)
        >>> with optimizer.perturbed():
        ...     loss_fn(model(x), y).backward()
        >>> optimizer.step(); optimizer.zero_grad()

        m-RWP, where the two losses are weighted:

        >>> (optimizer.clean_weight * loss_fn(model(x1), y1)).backward()
        >>> with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
        ...     (optimizer.perturbed_weight * loss_fn(model(x2), y2)).backward()

        Parallel m-RWP, the same code on every replica:

        >>> with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model, optimizer.is_perturbed):
        ...     (optimizer.perturbed_weight * loss_fn(model(x), y)).backward()

    References:
        Li et al.: Efficient Generalization Improvement Guided by Random Weight Perturbation. arXiv 2211.11489.
        Li et al.: Revisiting Random Weight Perturbation for Efficiently Improving Generalization. arXiv 2404.00357.
    """

    def __init__(
        self,
        params: Any,
        base: type[torch.optim.Optimizer],
        *,
        sigma: float | Tensor = 0.01,
        lam: float = 1.0,
        eta: float = 0.0,
        beta: float = 0.99,
        seed: int | Tensor | None = None,
        stream: int | None = None,
        parallel: bool = False,
        restore: str = "exact",
        **kwargs: Any,
    ):
        self.aside: list[tuple[Tensor, Tensor]] = []  # clean gradients set aside during the perturbed pass
        self.weighing: list[Any] = []  # hooks that weight gradients
        self.loss_scale: float | Tensor | None = None
        self.parallel = parallel
        self.stream = plain(stream)
        if stream is not None:
            check_integer("stream", self.stream, bits=31)
        options = {"sigma": sigma, "lam": lam, "eta": eta, "beta": beta, "seed": seed, "restore": restore, "draw": 0}
        self._construct(params, options, kwargs)

    def _check_group(self, group: dict[str, Any]) -> None:
        (check_tensor if isinstance(group["sigma"], Tensor) else check_range)("sigma", group["sigma"])
        check_range("lam", group["lam"], high=1.0)
        check_range("eta", group["eta"])
        check_range("beta", group["beta"], high=1.0)
        if isinstance(group["seed"], Tensor):
            check_tensor("seed", group["seed"], floating=False)
        else:
            check_integer("seed", group["seed"])
        if group["restore"] not in ("exact", "regenerate"):
            raise ValueError(f"restore must be 'exact' or 'regenerate', not {group['restore']!r}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group, first = self.param_groups[-1], self.param_groups[0]
        if group["lam"] != first["lam"]:
            del self.param_groups[-1]
            raise ValueError(f"lam must be the same in all groups, not {first['lam']} and {group['lam']}")
        # The draw is on the device and is incremented there, without a host sync.
        draw = first["draw"]
        device = group["params"][0].device if group["params"] else "cpu"
        if isinstance(draw, Tensor):
            group["draw"] = draw.to(device, torch.int64, copy=True)
        else:
            group["draw"] = torch.full((), draw, dtype=torch.int64, device=device)

    def _check_groups(self) -> None:
        super()._check_groups()
        for group in self.param_groups:
            if group["restore"] == "regenerate":
                check_regenerate(group["params"])

    def _replica(self) -> tuple[int, int]:
        """This process's replica and their number, from the layout of a parameter, a sharded one if there is any."""
        if distributed.world()[1] == 1:
            return 0, 1
        params = self._all_params()
        at = distributed.layout(next(filter(distributed.is_distributed, params), params[0]))
        return at.replica, at.replicas

    @property
    def perturbs(self) -> bool:
        """Whether `perturbed()` changes the weights of this process: False only on clean replicas of parallel m-RWP."""
        if not self._takes_roles():
            return True
        replica, replicas = self._replica()
        return replica >= replicas - replicas // 2

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are perturbed now; for closures, which run in both passes."""
        return self.in_pass and self.perturbs

    def _takes_roles(self) -> bool:
        return self.parallel and self.param_groups[0]["lam"] < 1

    @property
    def perturbed_weight(self) -> float:
        """The factor for the loss inside `perturbed()`: lam.

        In parallel m-RWP, for gradients averaged over R replicas, n of which perturb: R lam / n where this one does,
        R (1 - lam) / (R - n) where it does not.
        """
        lam = self.param_groups[0]["lam"]
        if not self._takes_roles():
            return lam
        replicas = self._replica()[1]
        half = replicas // 2
        return replicas * lam / max(half, 1) if self.perturbs else replicas * (1 - lam) / (replicas - half)

    @property
    def clean_weight(self) -> float:
        """The factor for the loss of the clean pass: 1 - lam; 0 in parallel m-RWP, which has no clean pass."""
        return 0.0 if self.parallel else 1.0 - self.param_groups[0]["lam"]

    @property
    def has_clean_pass(self) -> bool:
        """Whether a step has a clean pass before the perturbed pass: that of m-RWP has, unless it is parallel."""
        return self.clean_weight > 0

    def role_group(self) -> Any:
        """The process group of the replicas with this one's role in parallel m-RWP, for SyncBatchNorm. Collective.

        Example:
            >>> nn.SyncBatchNorm.convert_sync_batchnorm(model, optimizer.role_group())
        """
        rank, size = distributed.world()
        roles = distributed.gather_objects(self.perturbs)
        groups = {
            role: torch.distributed.new_group([r for r in range(size) if roles[r] == role])
            for role in sorted(set(roles))
        }
        return groups[roles[rank]]

    @outside_graphs
    def perturbed(self, loss_scale: float | Tensor | None = None) -> Pass:
        """Context manager that adds the noise in place; on exit, also by an exception, it restores the weights.

        Args:
            loss_scale: factor of the loss inside, default `perturbed_weight`; ARWP with lam < 1 under a GradScaler
                needs `scaler.get_scale() * optimizer.perturbed_weight`.

        Raises:
            RuntimeError: on entry, if the weights are already perturbed.
            ValueError: for a loss_scale that is not positive.
        """
        if isinstance(loss_scale, (int, float)) and not loss_scale > 0:
            raise ValueError(f"loss_scale must be > 0, not {loss_scale}")
        return Pass(self, loss_scale=loss_scale)

    def _begin(self, loss_scale: float | Tensor | None = None) -> bool:
        began = super()._begin()
        if began:
            self.loss_scale = loss_scale
        else:
            remove(self.weighing)  # a closure that calls perturbed() weights its loss itself
        return began

    def _check_world(self) -> None:
        if self._takes_roles() and self._replica()[1] < 2:
            raise ValueError(
                "parallel m-RWP needs two replicas or more, and there is one: leave parallel out, and give both passes "
                "half a batch, which takes the same time"
            )
        if self._regenerates() and (self.stream is None or self.mixes_fisher()) and self._replica()[1] > 1:
            raise ValueError(
                "restore='regenerate' drifts with the noise, so replicas with different noise would drift apart: use "
                "'exact', or the same stream on all and no mixed ARWP (lam < 1), whose F may differ between steps"
            )

    def _regenerates(self) -> bool:
        return any(group["restore"] == "regenerate" for group in self.param_groups)

    def _agreement(self) -> dict[str, Any]:
        stream = self.stream if self._regenerates() else None
        return {**super()._agreement(), "parallel": self.parallel, "stream": stream}

    def _perturb(self) -> None:
        if not self.perturbs:
            return
        if self.mixes_fisher():  # F needs the perturbed gradient alone, so the clean one is set aside
            self._check_reduced("ARWP with lam < 1")
            self._add_aside()
            params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            self.aside += [(p, own(p.grad)) for p in params]
            for p in params:
                p.grad = None
        parts = self._trainable(("sigma", "eta", "seed", "restore"))
        for (device, sigma, eta, seed, how), (params, index) in parts.items():
            if not isinstance(sigma, Tensor) and sigma == 0:
                continue
            noise = {"seed": on(device, seed), "draw": self._draw_on(device), "stream": self._stream()}
            self.run.weights.add_noise(
                params, index, on(device, sigma), restore=how, eta=eta, fisher=self._fisher, **noise
            )

    def _stream(self) -> int:
        return self._replica()[0] if self.stream is None else self.stream

    def _draw_on(self, device: torch.device) -> Tensor:
        """The draw, which is equal in all groups, on a device."""
        draws = [group["draw"] for group in self.param_groups]
        return on(device, next((draw for draw in draws if draw.device == device), draws[0]))

    @outside_graphs
    def restore(self) -> None:
        drawn = self.in_pass
        super().restore()
        if drawn:
            for group in self.param_groups:
                group["draw"].add_(1)

    def _end(self, well: bool) -> None:
        mixed = well and self.mixes_fisher()
        if mixed:
            self._check_reduced("ARWP with lam < 1")
        super()._end(well)
        if mixed:
            self._update_fisher(1.0 / (self.perturbed_weight if self.loss_scale is None else self.loss_scale))
        self._add_aside()

    def _add_aside(self) -> None:
        while self.aside:
            p, g = self.aside.pop()
            p.grad = g if p.grad is None else p.grad.add_(g)

    def _keeps_fisher(self, group: dict[str, Any]) -> bool:
        return group["eta"] > 0

    def _new_fisher(self, p: Tensor) -> Tensor:
        if not distributed.is_distributed(p):
            w = local(p)
            return torch.zeros(w.shape[:1] if w.dim() else (1,), dtype=torch.float32, device=p.device)
        row = p.detach()
        while row.dim() > 1:
            row = row.select(1, 0)
        return torch.zeros_like(row, dtype=torch.float32)  # sharded as p is

    def mixes_fisher(self) -> bool:
        """Whether F is updated at the end of the pass, because p.grad will mix both gradients: serial m-ARWP."""
        lam = self.param_groups[0]["lam"]
        return 0 < lam < 1 and not self.parallel and any(group["eta"] > 0 for group in self.param_groups)

    def _before_step(self) -> None:
        if not any(map(self._keeps_fisher, self.param_groups)):
            return
        # With lam = 1, p.grad is the perturbed gradient; in parallel m-RWP only the mixed one is left.
        if self.run.is_ready and (self.parallel or self.param_groups[0]["lam"] == 1):
            scale: Any = 1.0
            if getattr(self, "grad_scale", None) is not None:  # a fused base has yet to unscale it
                scale = self.grad_scale.double().reciprocal()
            if getattr(self, "found_inf", None) is not None:
                scale = torch.where(self.found_inf > 0, torch.nan, scale).double()  # NaN leaves F unchanged
            self._update_fisher(scale)
        elif self.mixes_fisher() and self._replica()[1] > 1:
            self._average_fisher()

    @torch.no_grad()
    def _average_fisher(self) -> None:
        """Makes F the same on all replicas: under no_sync each has updated it with its own micro-batches."""
        for (_, eta), (params, _) in self._trainable(("eta",)).items():
            fisher = [self._fisher(p) for p in params if eta > 0 and not distributed.is_distributed(p)]
            if fisher:
                means = torch.cat(fisher) / distributed.world()[1]  # not the replicas alone: shards have it too
                distributed.all_reduce([means])
                torch._foreach_copy_(fisher, means.split([len(f) for f in fisher]))

    @torch.no_grad()
    def _update_fisher(self, scale: float | Tensor) -> None:
        for (device, eta, beta), (params, _) in self._trainable(("eta", "beta"), with_grad=True).items():
            if eta > 0:
                fisher, grads = all_local(map(self._fisher, params)), all_local(p.grad for p in params)
                ops.filter_fisher_(fisher, grads, beta, scale=on(device, scale))

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        lam = self.param_groups[0]["lam"]
        if lam == 1 or self.parallel:
            with self.perturbed(), self.weighted(self.perturbed_weight if self._takes_roles() else 1.0):
                self.run.stage = Stage.IN_STEP
                return closure()
        loss = closure()
        if self.run.is_ready:  # the closure has run perturbed() itself
            return loss
        params = self._all_params()
        clean = {p: own(p.grad) for p in params if p.grad is not None}
        for p in clean:
            p.grad = None
        with self.perturbed(loss_scale=1.0):
            closure()
        for p in params:
            g = clean.get(p)
            if p.grad is not None:
                p.grad.mul_(lam)
            if g is not None:
                p.grad = g.mul_(1 - lam) if p.grad is None else p.grad.add_(g, alpha=1 - lam)
        return loss

    def _passes(self, model: nn.Module | None, loss_scale: Any) -> Iterator[contextlib.AbstractContextManager[None]]:
        if self.has_clean_pass:
            yield self.weighted(self.clean_weight)
        # Running statistics come from the clean pass; in parallel m-RWP from the clean replicas.
        freeze = self.has_clean_pass or (self.parallel and self.perturbs)
        frozen = [freeze_batchnorm_stats(model)] if model is not None and freeze else []
        weight, scale = self.perturbed_weight, None
        if self.mixes_fisher():
            scale = weight * (loss_scale() if callable(loss_scale) else loss_scale)
        yield Pass(self, self.weighted(weight), *frozen, loss_scale=scale)

    def weighted(self, weight: float) -> contextlib.AbstractContextManager[None]:
        """Context manager that weights gradients, for losses that are not weighted; see `weighted_gradients`."""
        return weighted_gradients([p for p in self._all_params() if p.requires_grad], weight, self.weighing)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"stream": self.stream, "parallel": self.parallel, "aside": self.aside}
        return {**super().__getstate__(), **kept, "loss_scale": None, "weighing": []}
