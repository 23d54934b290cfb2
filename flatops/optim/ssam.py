"""Sparse sharpness-aware minimisation: SAM whose ascent a mask confines to a part of the weights."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flatops import distributed, ops
from flatops.backend import outside_graphs
from flatops.distributed import all_reduce, broadcast, local, real_shape
from flatops.optim import masks
from flatops.optim.fisher import KeepsFisher, sample_fisher
from flatops.optim.flat import _user_frame, announce, check_integer, check_range, on, plain
from flatops.optim.masks import Mask
from flatops.optim.sam import SAM

CHOICES = {
    "mask": ("fisher", "dynamic"),
    "fisher": ("samples", "minibatch"),
    "drop": ("gradient", "weight", "random"),
    "grow": ("gradient", "weight", "random"),
}
PER_GROUP = {
    "rho",
    "adaptive",
    "updates",
    "passes",
    "mask_bits",
}  # the other options are the whole optimizer's


class SSAM(KeepsFisher, SAM):
    """SSAM: SAM that climbs with some of the weights only, those that a 0/1 mask lets through.

    e = rho m g / ||g||_2, the norm that of the full gradient, with exactly k = N - ceil(sparsity N) ones in the mask m over the
    N trainable weights. It is driven as SAM is; `update_mask` makes the mask, every few epochs anew.

    SSAM-F (`mask="fisher"`): the k largest of the empirical Fisher, the sum of g^2 over single samples. Until the first
    update_mask() it is SAM, all weights climbing.
    SSAM-D (`mask="dynamic"`): random at first, drawn by the first perturbed pass; then update_mask() drops the round(d k) live
    weights of the lowest score and grows as many dead ones, d = drop_rate (1 + cos(pi t / total_updates)) / 2 at the t-th update,
    counted from 0.

    Patterns (which weights k counts, and what is chosen together):
        'global': the whole model at once.
        'layer': n - ceil(sparsity n) weights of every tensor of n.
        'filter': whole filters, slices along dim 0, by their mean score; F - ceil(sparsity F) of the model's F filters, so that
            k is not exact. A tensor of one dimension or none is one filter.
        'n:m', such as '2:4': of every m consecutive elements of a filter in storage order the n largest, ties to the first; of
            r left over, ceil(r n / m). It fixes the sparsity at 1 - n/m.

    Args:
        params: parameters or groups, which may set their own rho and adaptive.
        base: the optimizer class that steps, such as torch.optim.SGD.
        rho: the radius, >= 0; default 0.05. A number, or a tensor of one on the parameters' device.
        sparsity: share of the weights that do not climb, in [0, 1); default 0.5, for n:m 1 - n/m. Written to param_groups, it
            takes effect with the next mask; of a dynamic mask the number of ones never changes.
        mask: 'fisher' (default) or 'dynamic'.
        pattern: 'global' (default), 'layer', 'filter' or 'n:m'; dynamic masks know the first two.
        adaptive: ASAM's ascent; default False.
        fisher: whence the Fisher comes: 'samples' (default), which update_mask() is given; or 'minibatch', the squares of the
            first passes' gradients since the last update, each over its norm, so that a loss scale does not matter. That costs
            no pass, but 4 bytes a weight.
        drop_rate: d at the start, in [0, 1]; default 0.5.
        drop, grow: scores of a dynamic mask, 'gradient', 'weight' or 'random'; default to drop by gradient, to grow at random.
            A missing gradient counts as 0.
        total_updates: T of the cosine, after which nothing moves; default 0: d stays drop_rate.
        update_every: perturbed passes between updates, made on entering the next one; default 0: update_mask() alone. For
            what needs no samples, dynamic masks and fisher='minibatch'. A pass that overflows puts the update off.
        skip_masked: spare the first pass the gradients of tensors of which nothing climbs; `ascent_pass` tells how. The norm is
            then over the other tensors' gradients alone: not the papers' algorithm. Default False.
        seed: of what is random, in [0, 2**64). Default: it follows `torch.manual_seed`, as RWP's does.
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

    The weights that climb alone are backed up. Parameters that were frozen or absent when the mask was made do not climb until
    the next; where they changed, a dynamic mask is drawn anew. Lists of gradients that vary from step to step cost an unpacking
    of the mask whenever one is new. The mask is in checkpoints as text in `param_groups`, the same on all processes.

    References:
        Mi et al.: Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach. arXiv 2210.05177.
        Mi et al.: Systematic Investigation of Sparse Perturbed Sharpness-Aware Minimization Optimizer. arXiv 2306.17504.
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
        self.masks: dict[torch.device, Mask] = {}
        n_of_m = masks.n_of_m(pattern)
        if n_of_m and sparsity is not None:
            raise ValueError(f"sparsity follows from pattern {pattern!r}: leave it out")
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
            "updates": 0,  # of the mask so far
            "passes": 0,  # perturbed ones since the last
            "mask_bits": "",  # where checkpoints hold the mask
        }
        self._construct(params, options, kwargs)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_range("sparsity", group["sparsity"], high=1.0)
        if group["sparsity"] == 1:
            raise ValueError("sparsity must be less than 1: nothing would climb")
        n_of_m = masks.n_of_m(group["pattern"])
        if n_of_m and group["sparsity"] != 1 - n_of_m[0] / n_of_m[1]:
            raise ValueError(f"sparsity follows from pattern {group['pattern']!r}: leave it as it is")
        check_range("drop_rate", group["drop_rate"], high=1.0)
        for name, known in CHOICES.items():
            if group[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {group[name]!r}")
        for name in ("total_updates", "update_every", "seed"):
            check_integer(name, group[name])
        if not isinstance(group["skip_masked"], bool):
            raise ValueError(f"skip_masked must be True or False, not {group['skip_masked']!r}")
        if group["skip_masked"] and (group["fisher"] == "minibatch" or group["grow"] == "gradient"):
            raise ValueError(
                "skip_masked leaves no gradients to choose the next mask by: not with fisher='minibatch' or grow='gradient'"
            )
        if group["mask"] == "dynamic":
            if group["pattern"] not in ("global", "layer"):
                raise ValueError(
                    f"pattern {group['pattern']!r} is for mask='fisher': dynamic masks are 'global' or 'layer'"
                )
            if group["fisher"] != "samples":
                raise ValueError(f"fisher={group['fisher']!r} is for mask='fisher'")
        elif group["update_every"] and group["fisher"] == "samples":
            raise ValueError("update_every needs mask='dynamic' or fisher='minibatch': it has no samples")

    def _check_groups(self) -> None:
        super()._check_groups()
        first, *others = self.param_groups
        for group in others:
            for name in self.options.keys() - PER_GROUP:
                if group[name] != first[name]:
                    raise ValueError(
                        f"{name} is for the whole model: {group[name]!r} in a group and {first[name]!r} in another"
                    )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_groups()
        except ValueError:
            del self.param_groups[-1]
            raise
        self.param_groups[-1].update({name: self.param_groups[0][name] for name in ("updates", "passes")})

    # --- making masks ------------------------------------------------------------------------------------------------------

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

        For mask='fisher' from samples: F = sum over single samples of g^2, at the weights as they are, the model in evaluation
        mode. Buffers such as BatchNorm's statistics, gradients, torch's generators and modes are left as they were. Mixed
        precision is the caller's: without a loss scale, leave float16 autocast off.
        For mask='dynamic' and fisher='minibatch', without arguments: from p.grad, and from what the passes gathered.

        Under torch.distributed F is summed over all processes, each with its own samples, and all get the first one's mask.
        Under FSDP2 all processes give the same samples; the scores are gathered in the first one's memory, 4 bytes a weight.

        Args:
            model: whose parameters the optimizer has.
            loss_fn: called as loss_fn(model(inputs), targets).
            batches: a loader, or any iterable of pairs (inputs, targets): tensors, or nested lists and dicts of them, with the
                samples along their first dimension. It may be longer than needed.
            samples: how many, >= 1; default 128, in the paper 16 to 1024.
            vectorize: all samples of a batch at once by torch.func, where the model lets itself be vmapped: faster, for as
                many times the memory of the gradients as a batch has samples; default False.
            progress: show a bar on a terminal when it takes long; default True.

        Raises:
            ValueError: for no or too few samples, arguments that are missing or not needed, gradients that are NaN.
            TypeError: for batches that are no pairs of tensors.
            RuntimeError: inside perturbed(), or without a gradient where one is needed. The mask is as it was after any.
        """
        self._not_while_perturbed("update_mask()")
        self._check_groups()
        first = self.param_groups[0]
        if first["mask"] == "dynamic" or first["fisher"] == "minibatch":
            if not (model is None and loss_fn is None and batches is None):
                raise ValueError("update_mask() takes no arguments here: it needs no samples")
            fisher = None
        elif model is None or loss_fn is None or batches is None:
            raise ValueError("mask='fisher' needs update_mask(model, loss_fn, batches)")
        elif not (isinstance(samples := plain(samples), int) and samples >= 1):
            raise ValueError(f"samples must be an integer >= 1, not {samples!r}")
        else:
            parts = [params for params, _ in self._trainable(()).values()]
            with distributed.together():
                fisher = sample_fisher(parts, model, loss_fn, batches, samples, vectorize, progress)
        with torch.inference_mode(False), torch.no_grad():
            self._update(fisher)

    def _check_world(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        if self.param_groups[0]["skip_masked"] and distributed.any_distributed(params):
            raise ValueError("skip_masked does not go with fully_shard, where each process sees its own shards alone")

    def _update(self, fisher: dict[Tensor, Tensor] | None = None) -> None:
        """The next mask, from a Fisher or from what is at hand."""
        self._follow()
        first = self.param_groups[0]
        if first["mask"] == "dynamic":
            self._regrow()
        else:
            if fisher is None:
                if first["passes"] == 0:
                    raise RuntimeError(
                        "no perturbed pass since the last mask: there is nothing to make one from"
                    )
                fisher = {p: local(self._fisher(p)) for params, _ in self._trainable(()).values() for p in params}
            if not self._is_sharded():  # shards have the sum already
                all_reduce(fisher.values())
            self._install(self._largest(fisher))
            for f in self.fisher.values():
                local(f).zero_()
        self._write(updates=first["updates"] + 1, passes=0)

    def _largest(self, scores: dict[Tensor, Tensor]) -> dict[torch.device, Mask]:
        """The masks of the largest scores, over all devices and shards together."""
        first = self.param_groups[0]
        params = [p for part, _ in self._trainable(()).values() for p in part]
        if self._is_sharded():
            whole = self._whole(scores)
            return self._from_first(lambda: masks.choose(whole, first["pattern"], first["sparsity"]))
        together = [on(params[0].device, scores[p]) for p in params]
        bits = masks.choose(together, first["pattern"], first["sparsity"])
        if len(self._trainable(())) == 1:
            return {params[0].device: Mask(params, bits)}
        return self._spread(dict(zip(params, ops.unpack_mask(bits, together))))

    def _is_sharded(self) -> bool:
        parts = self._trainable(()).values()
        return any(distributed.by_group(params).keys() != {None} for params, _ in parts)

    def _whole(self, mine: dict[Tensor, Tensor]) -> list[Tensor]:
        """All of what each process has a shard of, one tensor after the other, in the memory of the first process's host; empty
        on the others. Collective."""
        whole = []
        for params, _ in self._trainable(()).values():
            for p in params:
                t = distributed.whole(p, mine[p])
                whole += [t.cpu()] if distributed.world()[0] == 0 else []
        return whole

    def _from_first(self, make: Callable[[], Tensor]) -> dict[torch.device, Mask]:
        """The masks for this process's shards, of one over whole parameters that the first process makes. Collective."""
        params = [p for part, _ in self._trainable(()).values() for p in part]
        like = [torch.empty(real_shape(p), dtype=torch.bool, device="cpu") for p in params]
        size = ops.mask_size(like)
        bits = distributed.from_first(make, (size,), torch.int32, params[0].device).cpu()
        return self._spread({p: distributed.shard_of(p, l) for p, l in zip(params, ops.unpack_mask(bits, like))})

    def _spread(self, live: dict[Tensor, Tensor]) -> dict[torch.device, Mask]:
        """The masks in which these booleans are set, a device each."""

        def of(p: Tensor) -> Tensor:
            if p in live:
                return on(p.device, live[p]).contiguous() if distributed.is_distributed(p) else on(p.device, live[p])
            return torch.zeros_like(local(p), dtype=torch.bool, requires_grad=False)

        return {
            device: Mask(params, ops.pack_mask([of(p) for p in params]))
            for (device,), (params, _) in self._trainable(()).items()
        }

    def _draw(self) -> None:
        """A random mask: the largest of as many normals."""
        first = self.param_groups[0]
        scores = {}
        for (device,), (params, index) in self._trainable(()).items():
            for p, i in zip(params, index):
                z = ops.normal(real_shape(p), seed=first["seed"], draw=first["updates"], tensor=i, device=device)
                z = distributed.shard_of(p, z.abs_())
                scores[p] = torch.empty_like(local(p), dtype=torch.float32).copy_(z)
        self._install(self._largest(scores))

    def _regrow(self) -> None:
        first = self.param_groups[0]
        parts = self._trainable(())
        if "gradient" in (first["drop"], first["grow"]) and not self._trainable((), with_grad=True):
            raise RuntimeError(
                "no parameter has a gradient to score it by: call update_mask() after a backward"
            )
        if parts.keys() != {(device,) for device in self.masks} or not all(
            self.masks[device].is_over(params) for (device,), (params, _) in parts.items()
        ):
            self._draw()
        t, total = first["updates"], first["total_updates"]
        rate = first["drop_rate"] * ((1 + math.cos(math.pi * min(t, total) / total)) / 2 if total else 1)
        if self._is_sharded():
            self._install(self._regrow_shards(rate))
            return
        new = {}
        with distributed.together():
            for (device,), (params, index) in parts.items():
                drop, grow = (self._scores(first[by], params) for by in ("drop", "grow"))
                like = distributed.all_local(params)
                new[device] = Mask(params, self._moved(self.masks[device].bits, like, index, drop, grow, rate))
        self._install(new)

    def _regrow_shards(self, rate: float) -> dict[torch.device, Mask]:
        """As on one process, in the memory of the first one's host."""
        first = self.param_groups[0]
        params, index = map(list, zip(*((p, i) for ps, at in self._trainable(()).values() for p, i in zip(ps, at))))
        live = self._whole({p: l for mask in self.masks.values() for p, l in mask.live().items()})
        drop, grow = (
            None if scores is None else self._whole(dict(zip(params, scores)))
            for scores in (self._scores(first[by], params) for by in ("drop", "grow"))
        )
        like = drop or grow or [torch.empty(l.shape, device="cpu") for l in live]
        return self._from_first(lambda: self._moved(ops.pack_mask(live), like, index, drop, grow, rate))

    @staticmethod
    def _scores(kind: str, params: list[Tensor]) -> list[Tensor] | None:
        if kind == "random":
            return None
        if kind == "weight":
            return distributed.all_local(params)
        return [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in params]

    def _moved(
        self, bits: Tensor, like: list[Tensor], index: list[int], drop: Any, grow: Any, rate: float
    ) -> Tensor:
        """A mask over `like` some steps on, by the scores for dropping and growing."""
        first = self.param_groups[0]

        def move(mask: Tensor, which: slice) -> Tensor:
            ops.regrow_mask_(
                mask,
                like[which],
                round(rate * ops.count_mask(mask, like[which])),
                drop=drop and drop[which],
                grow=grow and grow[which],
                seed=first["seed"],
                draw=first["updates"],
                index=index[which],
            )
            return mask

        if first["pattern"] == "global":
            return move(bits.clone(), slice(None))
        each = [move(mask, slice(i, i + 1)) for i, mask in enumerate(masks.split(bits, like))]
        return masks.join(each, like)

    def _install(self, new: dict[torch.device, Mask], shared: bool = True) -> None:
        """Puts masks in place, the first process's; in the memory of those that there are, where they are over the same."""
        if shared and not self._is_sharded():
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

    # --- the first pass ----------------------------------------------------------------------------------------------------

    @outside_graphs
    @contextlib.contextmanager
    def ascent_pass(self, model: nn.Module | None = None) -> Iterator[None]:
        """As SAM's; with `skip_masked` tensors of which nothing climbs get no gradient besides.

        Autograd then neither makes their gradients nor goes below the lowest tensor of which something climbs. That pays with
        structured masks, pattern='filter' most of all. step(closure) does it by itself. Under DistributedDataParallel it
        needs `model`: an all-reduce would wait for what is skipped.

        Example:
            >>> with optimizer.ascent_pass():
            ...     loss_fn(model(x), y).backward()
            >>> with optimizer.perturbed():
            ...     loss_fn(model(x), y).backward()
        """
        with super().ascent_pass(model):
            self.run.skipped += [p for p in self._dead() if p.requires_grad]
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

    def _dead(self) -> list[Tensor]:
        """What `skip_masked` passes by; nothing if that were all there is."""
        if not self.param_groups[0]["skip_masked"]:
            return []
        dead = [p for mask in self.masks.values() for p in mask.dead()]
        return dead if len(dead) < sum(len(mask.params) for mask in self.masks.values()) else []

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        if self.param_groups[0]["skip_masked"] and distributed.world()[1] > 1:
            raise RuntimeError(
                "step(closure) with skip_masked does not know the model whose all-reduce to leave out: write "
                "ascent_pass(model) and perturbed() out"
            )

        def evaluate() -> Any:
            with contextlib.nullcontext() if self.is_perturbed else self.ascent_pass():
                return closure()

        return super()._evaluate(evaluate)

    def _norm(self, parts: dict[Any, Any], grads: dict[Any, Any]) -> Tensor:
        dead = set(self._dead())
        if not dead:
            return super()._norm(parts, grads)
        kept = {key: [i for i, p in enumerate(params) if p not in dead] for key, (params, _) in parts.items()}
        if any(kept.values()):
            parts = {
                key: ([parts[key][0][i] for i in places], places) for key, places in kept.items() if places
            }
            grads = {key: [grads[key][i] for i in kept[key]] for key in parts}
        return super()._norm(parts, grads)

    # --- the ascent --------------------------------------------------------------------------------------------------------

    def _perturb(self) -> None:
        self._unskip()  # where a closure begins the perturbed pass itself
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor has no version
            self._follow()
        super()._perturb()

    def _before_ascent(self, norm: Tensor) -> None:
        first = self.param_groups[0]
        with torch.inference_mode(False), torch.no_grad():
            if first["mask"] == "dynamic" and not self.masks:
                self._draw()
            if 0 < first["update_every"] <= first["passes"]:
                overflows = (~norm.isfinite()).int()
                all_reduce([overflows])  # all processes update, or none
                if not overflows:
                    self._update()
            if self._keeps_fisher(first):
                self._gather(norm)
        if not self.masks and first["passes"] == 1 and first["sparsity"] > 0 and not first["update_every"]:
            warnings.warn(
                f"{type(self).__name__} has no mask yet and climbs with all weights, as SAM does: call update_mask()",
                stacklevel=_user_frame(),
            )
        self._write(passes=first["passes"] + 1)

    def _follow(self) -> None:
        """Takes the masks to where the parameters are now."""
        if any(p.device != device for device, mask in self.masks.items() for p in mask.params):
            live: dict[Tensor, Tensor] = {}
            for mask in self.masks.values():
                like = [torch.empty_like(local(p), dtype=torch.bool, device=mask.bits.device) for p in mask.params]
                live.update(zip(mask.params, ops.unpack_mask(mask.bits, like)))
            self.masks.clear()
            self._install(self._spread(live), shared=False)

    def _gather(self, norm: Tensor) -> None:
        """F <- F + (g / norm)^2, unless the norm is not finite."""
        scale = torch.where(norm.isfinite() & (norm > 0), norm.reciprocal(), 0.0)
        for (device,), (params, _) in self._trainable((), with_grad=True).items():
            scale = on(device, scale)
            for p in params:
                local(self._fisher(p)).add_(torch.where(scale > 0, local(p.grad).float() * scale, 0.0).square_())

    def _ascend(self, params: list[Tensor], grads: list[Tensor], rho: float | Tensor, **how: Any) -> None:
        if not self.masks:
            super()._ascend(params, grads, rho, **how)
        elif mask := self.masks.get(params[0].device):
            part = mask.part(params)
            if part.params:
                grads = [g for p, g in zip(params, grads) if p in mask.place]
                mine = distributed.all_local(part.params)
                undo: dict[str, Any] = {"backup": part.backup, "mask": part.mask}
                announce(self.run.undo, mine, part.backup[0], **undo)
                ops.ascend_(mine, grads, rho, **undo, **how)

    # --- checkpoints and copies --------------------------------------------------------------------------------------------

    def _keeps_fisher(self, group: dict[str, Any]) -> bool:
        return group["fisher"] == "minibatch"

    def _new_fisher(self, p: Tensor) -> Tensor:
        like = p if distributed.is_distributed(p) else local(p)
        return torch.zeros_like(like, dtype=torch.float32, requires_grad=False)  # sharded as p is

    def state_dict(self) -> dict[str, Any]:
        """As SAM's, with the mask as text in `param_groups`. Under FSDP2 all processes call it together: shards of the mask are gathered."""
        self._follow()
        packed = super().state_dict()
        live = {p: distributed.whole(p, l) for mask in self.masks.values() for p, l in mask.live().items()}
        for group, ours in zip(packed["param_groups"], self.param_groups if live else []):
            group["mask_bits"] = masks.encode(
                [live[p] if p in live else torch.zeros(real_shape(p), dtype=torch.bool, device="cpu") for p in ours["params"]]
            )
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
            self._install(self._spread(live) if live else {}, shared=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "masks": self.masks}
