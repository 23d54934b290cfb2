"""Sparse sharpness-aware minimisation: SAM whose ascent is limited to the weights selected by a mask."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flatops import distributed, ops
from flatops.backend import outside_graphs
from flatops.distributed import all_reduce, broadcast, local, real_shape
from flatops.optim import masks
from flatops.optim.base import user_frame
from flatops.optim.fisher import sample_fisher
from flatops.optim.maskers import Masker, Masks, check_options
from flatops.optim.sam import SAM
from flatops.optim.state import KeepsFisher
from flatops.scalars import on, plain

PER_GROUP = {"rho", "adaptive", "updates", "passes", "mask_bits"}  # the other options must be equal in all groups


class SSAM(KeepsFisher, SAM):
    """SSAM: SAM that perturbs only the weights selected by a 0/1 mask.

    e = rho m g / ||g||_2, with the norm of the full gradient and exactly k = N - ceil(sparsity N) ones in the mask m
    over the N trainable weights. Use it like SAM, and call `update_mask` for a new mask every few epochs.

    SSAM-F (`mask="fisher"`): the k largest of the empirical Fisher, the sum of g^2 over single samples. Before the
    first update_mask() it is SAM.
    SSAM-D (`mask="dynamic"`): the first perturbed pass draws a random mask; then update_mask() drops the round(d k)
    selected weights of the lowest score and grows as many others; at update t, counted from 0,
    d = drop_rate (1 + cos(pi t / total_updates)) / 2.

    Patterns:
        'global': k weights of the whole model.
        'layer': n - ceil(sparsity n) weights of every tensor of n.
        'filter': whole filters (slices along dim 0) by their mean score, F - ceil(sparsity F) of the model's F filters,
            so that k is not exact. A tensor with at most one dimension is one filter.
        'n:m', such as '2:4': the n largest of every m consecutive elements of a filter in storage order, ties to the
            first; ceil(r n / m) of a remainder of r. Sparsity is 1 - n/m.

    Args:
        params: parameters or groups, which may set their own rho and adaptive.
        base: the optimizer class, such as torch.optim.SGD.
        rho: the radius, >= 0; default 0.05. A number, or a one-element tensor on the parameters' device.
        sparsity: share of the weights that are not perturbed, in [0, 1); default 0.5, for n:m 1 - n/m. A change in
            param_groups takes effect with the next mask; a dynamic mask never changes its number of ones.
        mask: 'fisher' (default) or 'dynamic'.
        pattern: 'global' (default), 'layer', 'filter' or 'n:m'; for dynamic masks 'global' or 'layer'.
        adaptive: ASAM's ascent; default False.
        fisher: 'samples' (default): F from the samples given to update_mask(). 'minibatch': F = the sum of (g /
            ||g||)^2 over the first passes since the last update, whatever the loss scale; no extra passes, but 4 bytes
            per weight.
        drop_rate: d at the start, in [0, 1]; default 0.5.
        drop, grow: scores of a dynamic mask, 'gradient', 'weight' or 'random'; default drop='gradient', grow='random'.
            A missing gradient counts as 0.
        total_updates: updates until d reaches 0; default 0: d stays drop_rate.
        update_every: perturbed passes between updates, made on entering the next one; default 0: only by update_mask().
            For dynamic masks and fisher='minibatch'. A pass that overflows postpones the update.
        skip_masked: compute no gradients in the first pass for tensors without a selected weight; see `ascent_pass`.
            The norm is then over the other tensors only, unlike in the papers. Default False.
        seed: of random masks, in [0, 2**64). Default: derived from `torch.manual_seed`, as for RWP.
        **kwargs: for the base optimizer.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> optimizer = flatops.SSAM(model.parameters(), torch.optim.SGD, rho=0.05, sparsity=0.5, lr=0.1, momentum=0.9)
        >>> for epoch in range(epochs):
        ...     optimizer.update_mask(model, loss_fn, loader, samples=128)
        ...     for x, y in loader:
        ...         loss_fn(model(x), y).backward()
        ...         with optimizer.perturbed():
        ...             loss_fn(model(x), y).backward()
        ...         optimizer.step(); optimizer.zero_grad()

    Only selected weights are backed up. Parameters that were frozen or absent when the mask was made are not perturbed
    until the next one; when the list of parameters changes, a dynamic mask is drawn anew. Every new set of parameters
    with gradients costs an unpacking of the mask. Checkpoints hold the mask as text in `param_groups`, the same on all
    processes.

    References:
        Mi et al.: Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach. arXiv 2210.05177.
        Mi et al.: Systematic Investigation of Sparse Perturbed Sharpness-Aware Minimization Optimizer. arXiv 2306.17504
    """

    def __init__(
        self,
        params: Any,
        base: type[torch.optim.Optimizer],
        *,
        rho: float | Tensor = 0.05,
        sparsity: float | None = None,
        mask: str = "fisher",
        pattern: str = "global",
        adaptive: bool = False,
        fisher: str = "samples",
        drop_rate: float = 0.5,
        drop: str = "gradient",
        grow: str = "random",
        total_updates: int = 0,
        update_every: int = 0,
        skip_masked: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ):
        self.masks: Masks = {}
        n_of_m = masks.n_of_m(pattern)
        if n_of_m and sparsity is not None:
            raise ValueError(f"sparsity is fixed by pattern {pattern!r}: leave it out")
        options = {
            "rho": rho,
            "adaptive": adaptive,
            "sparsity": 1 - n_of_m[0] / n_of_m[1] if n_of_m else 0.5 if sparsity is None else sparsity,
            "mask": mask,
            "pattern": pattern,
            "fisher": fisher,
            "drop_rate": drop_rate,
            "drop": drop,
            "grow": grow,
            "total_updates": total_updates,
            "update_every": update_every,
            "skip_masked": skip_masked,
            "seed": seed,
            "updates": 0,  # of the mask
            "passes": 0,  # perturbed passes since the last update
            "mask_bits": "",  # the mask, in checkpoints only
        }
        self._construct(params, options, kwargs)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_options(group)

    def _check_groups(self) -> None:
        super()._check_groups()
        first, *others = self.param_groups
        for group in others:
            for name in self.options.keys() - PER_GROUP:
                if group[name] != first[name]:
                    raise ValueError(f"{name} is for the whole model: it cannot be {first[name]!r} and {group[name]!r}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.param_groups[-1].update({name: self.param_groups[0][name] for name in ("updates", "passes")})

    # --- making masks -------------------------------------------------------------------------------------------------

    @outside_graphs
    def update_mask(
        self,
        model: nn.Module | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        batches: Iterable[tuple[Any, Any]] | None = None,
        *,
        samples: int = 128,
        vectorize: bool = False,
        progress: bool = True,
    ) -> None:
        """Makes the next mask, between steps.

        With fisher='samples': from F = sum of g^2 over single samples, at the clean weights, the model in evaluation
        mode. Buffers such as running statistics, gradients, torch's generators and modes do not change. There is no
        loss scale, so leave float16 autocast off.
        With mask='dynamic' or fisher='minibatch', without arguments: from p.grad, or from the F of the last passes.

        Under torch.distributed F is summed over all processes, each with its own samples, and all get rank 0's mask.
        Under FSDP2 all processes pass the same samples; scores are gathered in rank 0's memory, 4 bytes per weight.

        Args:
            model: whose parameters the optimizer has.
            loss_fn: called as loss_fn(model(inputs), targets).
            batches: a loader, or any iterable of pairs (inputs, targets): tensors, or nested lists and dicts of them,
                with the samples along their first dimension. It may be longer than needed.
            samples: how many, >= 1; default 128; the paper uses 16 to 1024.
            vectorize: all samples of a batch at once by torch.func.vmap, if the model supports it: faster, but holds
                the gradients of all samples of a batch in memory; default False.
            progress: show a progress bar on a terminal if it takes long; default True.

        Raises:
            ValueError: for no or too few samples, arguments that are missing or not needed, or NaN gradients.
            TypeError: for batches that are not pairs of tensors.
            RuntimeError: inside perturbed(), or without a gradient if one is needed. After an error the mask is
                unchanged.
        """
        self._not_while_perturbed("update_mask()")
        self._check_groups()
        first = self.param_groups[0]
        if first["mask"] == "dynamic" or first["fisher"] == "minibatch":
            if not (model is None and loss_fn is None and batches is None):
                raise ValueError("update_mask() takes no arguments with mask='dynamic' or fisher='minibatch'")
            fisher = None
        elif model is None or loss_fn is None or batches is None:
            raise ValueError("mask='fisher' needs update_mask(model, loss_fn, batches)")
        elif not (isinstance(samples := plain(samples), int) and samples >= 1):
            raise ValueError(f"samples must be an integer >= 1, not {samples!r}")
        else:
            parts = [params for params, _ in self._masker().parts.values()]
            with distributed.together():
                fisher = sample_fisher(parts, model, loss_fn, batches, samples, vectorize, progress)
        with torch.inference_mode(False), torch.no_grad():
            self._update(fisher)

    def _check_world(self) -> None:
        if self.param_groups[0]["skip_masked"] and distributed.any_distributed(self._all_params()):
            raise ValueError("skip_masked does not work with fully_shard, where each process sees only its own shards")

    def _masker(self) -> Masker:
        return Masker({device: part for (device,), part in self._trainable(()).items()}, self.param_groups[0])

    def _update(self, fisher: dict[Tensor, Tensor] | None = None) -> None:
        """Makes the next mask from this Fisher, or from gradients and the minibatch Fisher."""
        self._move_masks()
        first, masker = self.param_groups[0], self._masker()
        if first["mask"] == "dynamic":
            if "gradient" in (first["drop"], first["grow"]) and all(p.grad is None for p in masker.params):
                raise RuntimeError("no parameter has a gradient to score it by: call update_mask() after a backward")
            if not masker.fits(self.masks):
                self._install(masker.random())
            self._install(masker.moved(self.masks))
        else:
            if fisher is None:
                if first["passes"] == 0:
                    raise RuntimeError("no perturbed pass since the last mask, so nothing to make one from: run a step")
                fisher = {p: local(self._fisher(p)) for p in masker.params}
            if not masker.sharded:  # the gradients of shards are already reduced over processes
                all_reduce(fisher.values())
            self._install(masker.largest(fisher))
            for f in self.fisher.values():
                local(f).zero_()
        self._write(updates=first["updates"] + 1, passes=0)

    def _install(self, new: Masks, shared: bool = True) -> None:
        """Replaces the masks, in place if they are over the same parameters; if `shared`, with those of rank 0."""
        if shared and not self._masker().sharded:
            broadcast(mask.bits for mask in new.values())
        for device in self.masks.keys() - new.keys():
            del self.masks[device]
        for device, mask in new.items():
            old = self.masks.get(device)
            if old is not None and old.is_over(mask.params):
                old.bits.copy_(mask.bits)
            else:
                self.masks[device] = mask

    def _write(self, **values: Any) -> None:
        for group in self.param_groups:
            group.update(values)

    # --- the first pass -----------------------------------------------------------------------------------------------

    @outside_graphs
    @contextlib.contextmanager
    def ascent_pass(self, model: nn.Module | None = None) -> Iterator[None]:
        """As `SAM.ascent_pass`; with `skip_masked`, tensors without a selected weight also get no gradient.

        Autograd then computes nothing for them, and stops at the lowest tensor with a selected weight: a gain with
        structured masks, above all pattern='filter'. step(closure) does this itself. Under DistributedDataParallel it
        needs `model`: an all-reduce would wait for the skipped gradients.
        """
        with super().ascent_pass(model):
            self.run.skipped += [p for p in self._skippable() if p.requires_grad]
            for p in self.run.skipped:
                p.requires_grad_(False)
            try:
                yield
            finally:
                self._unskip()

    def _unskip(self) -> None:
        while self.run.skipped:
            self.run.skipped[-1].requires_grad_(True)
            self.run.skipped.pop()

    def _skippable(self) -> list[Tensor]:
        """The parameters that `skip_masked` skips; none if that were all."""
        if not self.param_groups[0]["skip_masked"]:
            return []
        skipped = [p for mask in self.masks.values() for p in mask.unselected()]
        return skipped if len(skipped) < sum(len(mask.params) for mask in self.masks.values()) else []

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        if self.param_groups[0]["skip_masked"] and distributed.world()[1] > 1:
            raise RuntimeError(
                "step(closure) with skip_masked cannot skip the all-reduce: use ascent_pass(model) and perturbed()"
            )

        def evaluate() -> Any:
            with contextlib.nullcontext() if self.is_perturbed else self.ascent_pass():
                return closure()

        return super()._evaluate(evaluate)

    def _norm(self, lists: list[tuple[list[Tensor], list[Tensor], bool]]) -> Tensor:
        skipped = set(self._skippable())
        kept: list[tuple[list[Tensor], list[Tensor], bool]] = []
        for params, along, adaptive in lists if skipped else ():
            if pairs := [(p, g) for p, g in zip(params, along) if p not in skipped]:
                kept.append(([p for p, _ in pairs], [g for _, g in pairs], adaptive))
        return super()._norm(kept or lists)

    # --- the ascent ---------------------------------------------------------------------------------------------------

    def _perturb(self) -> None:
        self._unskip()  # if a closure began the perturbed pass inside ascent_pass()
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor has no version
            self._move_masks()
        super()._perturb()

    def _before_ascent(self, norm: Tensor) -> None:
        first = self.param_groups[0]
        with torch.inference_mode(False), torch.no_grad():
            if first["mask"] == "dynamic" and not self.masks:
                self._install(self._masker().random())
            if 0 < first["update_every"] <= first["passes"]:
                overflows = (~norm.isfinite()).int()
                all_reduce([overflows])  # so that all processes update, or none
                if not overflows:
                    self._update()
            if self._keeps_fisher(first):
                self._add_squares(norm)
        if not self.masks and first["passes"] == 1 and first["sparsity"] > 0 and not first["update_every"]:
            warnings.warn(
                f"{type(self).__name__} has no mask yet and perturbs all weights, as SAM does: call update_mask()",
                stacklevel=user_frame(),
            )
        self._write(passes=first["passes"] + 1)

    def _move_masks(self) -> None:
        """Moves the masks to the parameters' devices, if these have changed."""
        if any(p.device != device for device, mask in self.masks.items() for p in mask.params):
            live: dict[Tensor, Tensor] = {}
            for mask in self.masks.values():
                like = [torch.empty_like(local(p), dtype=torch.bool, device=mask.bits.device) for p in mask.params]
                live.update(zip(mask.params, ops.unpack_mask(mask.bits, like)))
            self.masks.clear()
            self._install(self._masker().of(live), shared=False)

    def _add_squares(self, norm: Tensor) -> None:
        """F <- F + (g / norm)^2, if the norm is finite and not 0."""
        scale = torch.where(norm.isfinite() & (norm > 0), norm.reciprocal(), 0.0)
        for (device,), (params, _) in self._trainable((), with_grad=True).items():
            scale = on(device, scale)
            for p in params:
                local(self._fisher(p)).add_(torch.where(scale > 0, local(p.grad).float() * scale, 0.0).square_())

    def _ascend(
        self, params: list[Tensor], index: list[int], along: list[Tensor], rho: float | Tensor, **how: Any
    ) -> None:
        if not self.masks:
            super()._ascend(params, index, along, rho, **how)
        elif mask := self.masks.get(params[0].device):
            part = mask.part(params)
            if part.params:
                along = [g for p, g in zip(params, along) if p in mask.place]
                self.run.weights.ascend(part.params, along, rho, backup=part.backup, mask=part.mask, **how)

    # --- checkpoints and copies ---------------------------------------------------------------------------------------

    def _keeps_fisher(self, group: dict[str, Any]) -> bool:
        return group["fisher"] == "minibatch"

    def _new_fisher(self, p: Tensor) -> Tensor:
        like = p if distributed.is_distributed(p) else local(p)
        return torch.zeros_like(like, dtype=torch.float32, requires_grad=False)  # sharded as p is

    def state_dict(self) -> dict[str, Any]:
        """As SAM's, with the mask as text in `param_groups`. Collective under FSDP2, to gather the mask."""
        self._move_masks()
        packed = super().state_dict()
        live = {p: distributed.whole(p, l) for mask in self.masks.values() for p, l in mask.live().items()}
        for group, ours in zip(packed["param_groups"], self.param_groups if live else []):
            for p in ours["params"]:
                if p not in live:
                    live[p] = torch.zeros(real_shape(p), dtype=torch.bool, device="cpu")
            group["mask_bits"] = masks.encode([live[p] for p in ours["params"]])
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = [group.get("mask_bits") for group in state_dict["param_groups"]]
        live: dict[Tensor, Tensor] = {}
        for text, group in zip(saved, self.param_groups):
            if text:
                live.update(zip(group["params"], masks.decode(text, group["params"])))
        super().load_state_dict(state_dict)
        self._write(mask_bits="")
        if any(text is not None for text in saved):
            self._install(self._masker().of(live) if live else {}, shared=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "masks": self.masks}
