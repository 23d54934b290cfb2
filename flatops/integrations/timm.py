"""timm: flatops optimizers by name in its registry, and a loss scaler for its training script."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.optim._optim_factory import default_registry
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import nn

from flatops.methods import METHODS
from flatops.optim.passes import passes


def register(*bases: str) -> list[str]:
    """Puts flatops optimizers into timm's registry, for `timm.optim.create_optimizer_v2` and its scripts' `--opt`.

    The names are method + base, such as 'samsgd', 'rwpadamw', 'ssamsgd' (a dynamic mask, moved every 1000 steps). They
    have no underscore, because timm reads what stands before one as the name of a wrapper.

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
        for prefix, method in METHODS.items():
            if method.timm is None:
                continue
            names.append(prefix + name)
            default_registry.register(
                dataclasses.replace(
                    info,
                    name=names[-1],
                    opt_class=functools.partial(method.optimizer, base=base),
                    description=f"flatops: {method.optimizer.__name__} over {info.description}",
                    defaults={**(info.defaults or {}), **method.fixed, **method.timm},
                )
            )
    return names


class FlatScaler(NativeScaler):
    """timm's NativeScaler, given the forward instead of its loss: runs all passes of a micro-batch, and the step if it is due.

    For every method and precision: with `enabled=False` it scales nothing, as bfloat16 and float32 want it. Its checkpoints are
    NativeScaler's; a run that goes on in float16 begins with a fresh scale if there was none.

    Args:
        model: whose BatchNorm statistics are to come from the clean pass alone.
        device: of the GradScaler; default 'cuda'.
        enabled: whether to scale; default True.
        accum_steps: what `forward` divides the loss by; only ARWP with lam < 1 has to know. Default 1.

    Example:
        >>> loss_scaler = FlatScaler(model, device.type, enabled=loss_scaler is not None)  # where the script would scale
        >>> loss, result = loss_scaler(_forward, optimizer, clip_grad=args.clip_grad, parameters=params, need_update=need_update)

        in the place of `loss, result = _forward(); loss_scaler(loss, optimizer, ...)`.
    """

    def __init__(
        self, model: nn.Module | None = None, device: str = "cuda", enabled: bool = True, accum_steps: int = 1
    ) -> None:
        self.model, self.accum_steps = model, accum_steps
        self._scaler = torch.amp.GradScaler(device, enabled=enabled)

    def state_dict(self) -> dict[str, Any]:
        """The scale; that of a scaler about to begin where this one is disabled: the empty one of torch is taken by none."""
        return super().state_dict() or torch.amp.GradScaler("cpu").state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from `state_dict()`; from an empty one, a disabled GradScaler's, with the scale that there is."""
        if state_dict:
            super().load_state_dict(state_dict)

    def __call__(
        self,
        forward: Callable[[], Any],
        optimizer: Any,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Any = None,
        create_graph: bool = False,
        need_update: bool = True,
    ) -> Any:
        """Runs `forward` and its backward once a pass; returns what the first pass's returned.

        Args:
            forward: computes the loss, divided by the number of accumulated micro-batches if there are more than one; returns it,
                or a tuple in which it is the first.
            optimizer: a flatops optimizer.
            clip_grad, clip_mode, parameters, create_graph, need_update: as NativeScaler's.

        Raises:
            TypeError: for a loss in the place of `forward`: it is there once, and SAM needs two.
        """
        if not callable(forward):
            raise TypeError(
                "FlatScaler takes the function that computes the loss, not the loss: SAM has to call it twice"
            )
        first = None
        for one_pass in passes(optimizer, self.model, loss_scale=lambda: self._scaler.get_scale() / self.accum_steps):
            with one_pass:
                output = forward()
                loss = output[0] if isinstance(output, tuple) else output
                self._scaler.scale(loss).backward(create_graph=create_graph)
            first = output if first is None else first
        if need_update:
            if clip_grad is not None:
                if parameters is None:
                    raise TypeError("clip_grad needs parameters to clip the gradients of")
                self._scaler.unscale_(optimizer)
                dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)
            self._scaler.step(optimizer)
            self._scaler.update()
        return first
