"""timm: flatops optimizers in its registry, and a loss scaler for its training script."""

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
    """Register flatops optimizers with timm, for `timm.optim.create_optimizer_v2` and its scripts' `--opt`.

    Names are method + base, such as 'samsgd', 'rwpadamw' or 'ssamsgd' (dynamic mask, updated every 1000 steps), without
    an underscore, because timm takes the part before one as the name of a wrapper.

    Args:
        *bases: names of optimizers in timm's registry; default 'sgd', 'momentum' and 'adamw'.

    Returns:
        The names.

    Raises:
        ValueError: a base that timm does not know.

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
    """timm's NativeScaler with the forward in place of the loss: runs all passes of a micro-batch, and the step if due.

    It works with every method and precision; for bfloat16 and float32, `enabled=False` turns scaling off. Checkpoints
    are NativeScaler's; a run resumed in float16 from one without a scale starts with a new scale.

    Args:
        model: the model, whose BatchNorm statistics are frozen in perturbed passes.
        device: device of the GradScaler; default 'cuda'.
        enabled: whether to scale the loss; default True.
        accum_steps: the divisor of the loss in `forward`; only ARWP with lam < 1 needs it. Default 1.

    Example:
        >>> loss_scaler = FlatScaler(model, device.type, enabled=loss_scaler is not None)
        >>> loss, result = loss_scaler(_forward, optimizer, clip_grad=1.0, parameters=params, need_update=need_update)

        in place of `loss, result = _forward(); loss_scaler(loss, optimizer, ...)`.
    """

    def __init__(
        self, model: nn.Module | None = None, device: str = "cuda", enabled: bool = True, accum_steps: int = 1
    ) -> None:
        self.model, self.accum_steps = model, accum_steps
        self._scaler = torch.amp.GradScaler(device, enabled=enabled)

    def state_dict(self) -> dict[str, Any]:
        """The scale; a new scaler's if this one is disabled, because GradScaler refuses to load an empty state."""
        return super().state_dict() or torch.amp.GradScaler("cpu").state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; an empty one, a disabled GradScaler's, leaves the scale as it is."""
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
        """Run `forward` and its backward once per pass; return the first pass's output.

        Args:
            forward: computes the loss, divided by the number of micro-batches if gradients are accumulated; returns it
                or a tuple that begins with it.
            optimizer: a flatops optimizer.
            clip_grad, clip_mode, parameters, create_graph, need_update: as for NativeScaler.

        Raises:
            TypeError: `forward` is a loss instead of a function, or clip_grad comes without parameters.
        """
        if not callable(forward):
            raise TypeError("forward must be the function that computes the loss, not the loss: SAM calls it twice")
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
                    raise TypeError("clip_grad needs parameters, whose gradients it clips")
                self._scaler.unscale_(optimizer)
                dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)
            self._scaler.step(optimizer)
            self._scaler.update()
        return first
