"""The loss of a network on fixed batches, as a function of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flatops import distributed

LossFn = Callable[[Any, Any], Tensor]
Pairs = Iterable[tuple[Any, Any]]


class Probe:
    """A network in evaluation mode, as a context manager that restores modes and buffers.

    BatchNorm always uses its running statistics and dropout is off: the loss is a function of the weights alone.

    Args:
        model: on one device, not sharded.
        loss_fn: called as loss_fn(model(inputs), targets); a mean over the samples.
        batches: pairs (inputs, targets) on the model's device; the samples are along the targets' first dimension.
        on_pass: called after every pass over the batches.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, batches: Pairs, on_pass: Callable[[], None] = lambda: None
    ) -> None:
        self.model, self.loss_fn, self.batches, self.on_pass = model, loss_fn, list(batches), on_pass
        try:
            self.samples = sum(len(targets) for _, targets in self.batches)
        except (TypeError, ValueError) as error:
            raise TypeError(
                "batches must hold pairs (inputs, targets), the samples along the first dimension"
            ) from error
        if not self.samples:
            raise ValueError("batches has no samples")
        if distributed.any_distributed(list(model.parameters())):
            raise ValueError("model is sharded: gather its weights first")

    def __enter__(self) -> Probe:
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.model.eval()
        return self

    def __exit__(self, *exception: object) -> None:
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        for module, training in self.modes:
            module.training = training

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that require a gradient, or ValueError if there are none."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        if not params:
            raise ValueError("model has no parameter that requires a gradient")
        return params

    @torch.no_grad()
    def loss(self) -> float:
        """The mean over all samples at the current weights; may be inf or NaN."""
        return float(sum(self._losses()))  # one host sync

    def gradient(self) -> list[Tensor]:
        """The gradient of the mean loss, one tensor for each of `trainable`; p.grad is not touched."""
        params = self.trainable
        total = [torch.zeros_like(p) for p in params]
        with torch.enable_grad():
            for loss in self._losses():
                torch._foreach_add_(total, torch.autograd.grad(loss, params, materialize_grads=True))
        return total

    def hessian_times(self, vector: list[Tensor]) -> list[Tensor]:
        """The Hessian of the mean loss times a vector, both one tensor for each of `trainable`."""
        params = self.trainable
        total = [torch.zeros_like(v) for v in vector]
        # Fused attention cannot be differentiated twice.
        with torch.enable_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            for loss in self._losses():
                grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
                along = sum((grad * v).sum() for grad, v in zip(grads, vector))
                if along.requires_grad:  # not if the loss is linear
                    torch._foreach_add_(total, torch.autograd.grad(along, params, materialize_grads=True))
        return total

    def _losses(self) -> Iterable[Tensor]:
        """Each batch's share of the mean, in float64."""
        torch.clear_autocast_cache()  # it has low-precision copies of the previous weights
        for inputs, targets in self.batches:
            yield self.loss_fn(self.model(inputs), targets).double() * (len(targets) / self.samples)
        self.on_pass()
