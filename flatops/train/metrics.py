"""Metrics on the test images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flatops import distributed

from .order import IGNORED

BINS = 15  # confidence bins of the calibration error, as in Guo et al., arXiv 1706.04599


class Metrics:
    """Sums over batches, on the device.

    Args:
        device: where the batches are.
        classes: number of classes; with more than five, top-5 accuracy is measured too.
    """

    def __init__(self, device: torch.device, classes: int) -> None:
        self.top5 = classes > 5
        self.sums = torch.zeros(4, device=device)  # loss, correct, correct among the top 5, images
        self.gaps = torch.zeros(BINS, device=device)  # confidence minus correct, summed in each bin

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch with its mean loss, without a host sync."""
        valid = labels != IGNORED
        count = valid.sum()
        confidence, best = logits.float().softmax(1).max(1)
        correct = best == labels
        in_top5 = (logits.topk(5).indices == labels[:, None]).any(1) if self.top5 else correct
        # The mean loss is NaN if no image of the batch can be read.
        loss = torch.where(count > 0, loss, 0.0)
        self.sums += torch.stack([loss * count, correct.sum(), in_top5.sum(), count])
        bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        # A matrix product, because index_add_ sums in no fixed order on a GPU.
        self.gaps += ((confidence - correct.float()) * valid) @ F.one_hot(bins, BINS).float()

    def result(self) -> dict[str, float]:
        """Mean loss, accuracy, top-5 accuracy and expected calibration error over all processes. Collective.

        Raises:
            ValueError: no image could be read.
        """
        distributed.all_reduce([self.sums, self.gaps])
        count = self.sums[3]
        if not count:
            raise ValueError("none of the test images can be read")
        loss, accuracy, top5, _ = (self.sums / count).tolist()
        more = {"top5": top5} if self.top5 else {}
        return {"loss": loss, "accuracy": accuracy, **more, "ece": float(self.gaps.abs().sum() / count)}
