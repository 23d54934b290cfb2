"""A forward and backward pass with mixed precision, gradient accumulation and several processes, for all methods."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler

from .clock import Clock
from .config import TrainConfig
from .order import Batch


class Output(NamedTuple):
    """The loss (scalar) and the logits (B, classes) of a forward pass."""

    loss: Tensor
    logits: Tensor


class Gradient:
    """Adds a batch's gradient to `p.grad` when called, times the loss scale if there is one.

    `accumulate` is the number of micro-batches per batch; DDP all-reduces gradients only with the last one.

    Args:
        network: the module to run in training, such as a DistributedDataParallel.
        model: the module to run in evaluation, with the same weights.
        device: where both are.
        config: amp, accumulate, label_smoothing.
        clock: measures the time.
    """

    def __init__(
        self, network: nn.Module, model: nn.Module, device: torch.device, config: TrainConfig, clock: Clock
    ) -> None:
        self.network, self.model, self.device, self.config, self.clock = network, model, device, config, clock
        self.scaler = GradScaler(device.type, enabled=config.amp == "fp16")

    def __call__(self, batch: Batch, weight: float = 1.0) -> Output:
        """Add the gradient of weight · (mean loss of the batch); return the whole batch's unweighted output."""
        with self.clock("passes"):
            count = self.config.accumulate
            micro_batches = list(zip(*(tensor.chunk(count) for tensor in batch)))
            outputs = []
            for number, part in enumerate(micro_batches, 1):
                with self._sync(number == len(micro_batches)):
                    output = self.forward(part)
                    self.scaler.scale(output.loss * (weight / count)).backward()
                outputs.append(Output(output.loss.detach(), output.logits.detach()))
            if count == 1:
                return outputs[0]
            losses, logits = zip(*outputs)
            return Output(torch.stack(losses).mean(), torch.cat(logits))

    def forward(self, batch: Batch, model: nn.Module | None = None) -> Output:
        """Loss and logits, of `model` if it is given instead of the network in training."""
        images, labels = batch
        # In evaluation DDP would broadcast buffers with every batch, but processes have unequal numbers of batches.
        network = model or (self.network if self.model.training else self.model)
        dtype = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=self.config.amp != "none"):
            logits = network(images)
        # Mixup's labels are already smoothed.
        smoothing = self.config.label_smoothing if self.model.training and labels.dim() == 1 else 0.0
        return Output(F.cross_entropy(logits.float(), labels, label_smoothing=smoothing), logits)

    def loss_scale(self, weight: float) -> Tensor | None:
        """The factor of a loss with this weight under the GradScaler, for m-ARWP's F; None if it is just the weight."""
        if not self.scaler.is_enabled() or weight == 0:
            return None
        return self.scaler.scale(torch.tensor(weight, device=self.device))

    def _sync(self, last: bool) -> AbstractContextManager:
        if last or not isinstance(self.network, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()
