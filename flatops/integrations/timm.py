"""timm: flatops optimizers by name in its registry, and a loss scaler for its training script."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.optim._optim_factory import default_registry
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import Tensor, nn

import flatops
from flatops.optim.passes import passes

# prefix -> (optimizer, what it differs in from its defaults). A training script calls no update_mask().
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sam": (flatops.SAM, {}),
    "asam": (flatops.SAM, {"adaptive": True, "rho": 0.5}),
    "ssam": (flatops.SSAM, {"mask": "dynamic", "update_every": 1000}),
    "rwp": (flatops.RWP, {}),
    "mrwp": (flatops.RWP, {"lam": 0.5}),
    "arwp": (flatops.RWP, {"eta": 0.1}),
}


def register(*bases: str) -> list[str]:
    """Puts flatops optimizers into timm's registry, for `timm.optim.create_optimizer_v2` and its scripts' `--opt`.

    The names are method + base, such as 'samsgd', 'ssamsgd', 'rwpadamw': sam, asam, ssam (dynamic masks, new every 1000 steps),
    rwp, mrwp and arwp, before each base. timm takes what precedes an underscore for something else, hence none.

    Args:
        *bases: names of optimizers that timm knows; default 'sgd', 'momentum' and 'adamw'.

    Returns:
        The names.

    Raises:
        ValueError: for a base that timm does not know.

    Example:
        >>> flatops.integrations.timm.register()
        >>> optimizer = timm.optim.create_optimizer_v2(model, "samsgd", lr=0.1, weight_decay=2e-5, rho=0.1)
    """
    names = []
    for name in bases or ("sgd", "momentum", "adamw"):
        info = default_registry.get_optimizer_info(name)
        base = default_registry.get_optimizer_class(info, bind_defaults=False)
        for method, (flat, options) in METHODS.items():
            names.append(method + name)
            default_registry.register(
                dataclasses.replace(
                    info,
                    name=names[-1],
                    opt_class=functools.partial(flat, base=base),
                    description=f"flatops: {flat.__name__} over {info.description}",
                    defaults={**(info.defaults or {}), **options},
                )
            )
    return names


class FlatScaler(NativeScaler):
    """timm's NativeScaler, given the forward instead of its loss: runs all passes of a micro-batch, and the step if it is due.

    For every method and precision: with `enabled=False` it scales nothing, as bfloat16 and float32 want it.

    Args:
        model: whose BatchNorm statistics are to come from the clean pass alone.
        device: of the GradScaler; default 'cuda'.
        enabled: whether to scale; default True.
        accum_steps: what `forward` divides the loss by; only ARWP with lam < 1 has to know. Default 1.

    Example:
        >>> loss_scaler = FlatScaler(model, device.type, enabled=amp_dtype == torch.float16)
        >>> loss = loss_scaler(_forward, optimizer, clip_grad=args.clip_grad, parameters=params, need_update=need_update)

        in the place of `loss = _forward(); loss_scaler(loss, optimizer, ...)`.
    """

    def __init__(
        self, model: nn.Module | None = None, device: str = "cuda", enabled: bool = True, accum_steps: int = 1
    ) -> None:
        self.model, self.accum_steps = model, accum_steps
        self._scaler = torch.amp.GradScaler(device, enabled=enabled)

    def __call__(
        self,
        forward: Callable[[], Tensor],
        optimizer: Any,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Any = None,
        create_graph: bool = False,
        need_update: bool = True,
    ) -> Tensor:
        """Runs `forward` and its backward once a pass; returns the first pass's loss.

        Args:
            forward: computes the loss, divided by the number of accumulated micro-batches if there are more than one.
            optimizer: a flatops optimizer.
            clip_grad, clip_mode, parameters, create_graph, need_update: as NativeScaler's.

        Raises:
            TypeError: for a loss in the place of `forward`: it is there once, and SAM needs two.
        """
        if not callable(forward):
            raise TypeError(
                "FlatScaler takes the function that computes the loss, not the loss: SAM has to call it twice"
            )
        losses = []
        for one_pass in passes(optimizer, self.model, loss_scale=lambda: self._scaler.get_scale() / self.accum_steps):
            with one_pass:
                losses.append(forward())
                self._scaler.scale(losses[-1]).backward(create_graph=create_graph)
        if need_update:
            if clip_grad is not None:
                if parameters is None:
                    raise TypeError("clip_grad needs parameters to clip the gradients of")
                self._scaler.unscale_(optimizer)
                dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)
            self._scaler.step(optimizer)
            self._scaler.update()
        return losses[0]
