"""A forward and backward pass as mixed precision, accumulation and several processes want it, so that methods are their formulas."""

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
    """What a forward pass gives: the loss (scalar) and the logits (B, classes)."""

    loss: Tensor
    logits: Tensor


class Gradient:
    """Calling it adds a batch's gradient to `p.grad`, under the loss scale if there is one.

    With `accumulate` it takes the batch in so many pieces; replicas exchange gradients with the last one alone.

    Args:
        network: what runs in training, such as a DistributedDataParallel.
        model: what runs in evaluation, with the weights of `network`.
        device: where both are.
        config: amp, accumulate, label_smoothing.
        clock: counts the time.
    """

    def __init__(
        self, network: nn.Module, model: nn.Module, device: torch.device, config: TrainConfig, clock: Clock
    ) -> None:
        self.network, self.model, self.device, self.config, self.clock = network, model, device, config, clock
        self.scaler = GradScaler(device.type, enabled=config.amp == "fp16")

    def __call__(self, batch: Batch, weight: float = 1.0) -> Output:
        """Add the gradient of weight · (mean loss of the batch); the output is that of the whole batch, unweighed."""
        with self.clock("passes"):
            count = self.config.accumulate
            pieces = list(zip(*(tensor.chunk(count) for tensor in batch)))
            outputs = []
            for number, part in enumerate(pieces, 1):
                with self._exchanging(number == len(pieces)):
                    output = self.forward(part)
                    self.scaler.scale(output.loss * (weight / count)).backward()
                outputs.append(Output(output.loss.detach(), output.logits.detach()))
            if count == 1:
                return outputs[0]
            losses, logits = zip(*outputs)
            return Output(torch.stack(losses).mean(), torch.cat(logits))

    def forward(self, batch: Batch, model: nn.Module | None = None) -> Output:
        """Loss and logits, by another network than the one that trains if `model` is given."""
        images, labels = batch
        # DistributedDataParallel would hand on buffers in every evaluation batch too, of which processes have unlike numbers.
        network = model or (self.network if self.model.training else self.model)
        dtype = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=self.config.amp != "none"):
            logits = network(images)
        # Mixed labels are smoothed already.
        smoothing = self.config.label_smoothing if self.model.training and labels.dim() == 1 else 0.0
        return Output(F.cross_entropy(logits.float(), labels, label_smoothing=smoothing), logits)

    def loss_scale(self, weight: float) -> Tensor | None:
        """What a loss of that weight is multiplied by, for m-ARWP's F; None where that is the weight itself."""
        if not self.scaler.is_enabled() or weight == 0:
            return None
        return self.scaler.scale(torch.tensor(weight, device=self.device))

    def _exchanging(self, last: bool) -> AbstractContextManager:
        if last or not isinstance(self.network, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()
