"""How good a network is on the test images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flatops import distributed

from .order import IGNORED

BINS = 15  # of confidence, as in Guo et al., arXiv 1706.04599


class Metrics:
    """Sums over batches, on the device.

    Args:
        device: where the batches are.
        classes: with more than five of them, top-5 accuracy is counted too.
    """

    def __init__(self, device: torch.device, classes: int) -> None:
        self.top5 = classes > 5
        self.sums = torch.zeros(4, device=device)  # losses, right answers, those among five, images
        self.gaps = torch.zeros(BINS, device=device)  # of each bin, confidence minus right answers

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch with its mean loss, without waiting for the device."""
        valid = labels != IGNORED
        count = valid.sum()
        confidence, best = logits.float().softmax(1).max(1)
        right = best == labels
        among = (logits.topk(5).indices == labels[:, None]).any(1) if self.top5 else right
        # A batch of images none of which can be read has no mean.
        loss = torch.where(count > 0, loss, 0.0)
        self.sums += torch.stack([loss * count, right.sum(), among.sum(), count])
        bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        # A product, since sums by index have no fixed order on a GPU.
        self.gaps += ((confidence - right.float()) * valid) @ F.one_hot(bins, BINS).float()

    def result(self) -> dict[str, float]:
        """Mean loss, accuracy, top-5 accuracy and expected calibration error over all processes. Collective.

        Raises:
            ValueError: there was no image that could be read.
        """
        distributed.all_reduce([self.sums, self.gaps])
        count = self.sums[3]
        if not count:
            raise ValueError("not one of the test images can be read")
        loss, accuracy, top5, _ = (self.sums / count).tolist()
        more = {"top5": top5} if self.top5 else {}
        return {"loss": loss, "accuracy": accuracy, **more, "ece": float(self.gaps.abs().sum() / count)}
