"""Hugging Face's Trainer: one mixin that gives flatops optimizers their passes. accelerate's own loop needs `flatops.passes` alone.

Without it the Trainer runs one backward a step and calls step() without a closure: every flatops optimizer is its base, with one warning.
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType
from torch import Tensor, nn

from flatops.optim.passes import passes, unwrap

REFUSED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class FlatMinimaMixin:
    """Mixed into a Trainer, gives its flatops optimizer the perturbed passes.

    Every call of `training_step`, one micro-batch, runs RWP's one pass at the perturbed weights, or both passes of SAM, SSAM and
    m-RWP. The loss that the Trainer logs is the clean pass's (RWP has no other than the perturbed one). Mixed precision with or
    without a GradScaler, `gradient_accumulation_steps`, `max_grad_norm`, and resuming from a checkpoint, in mid-epoch too, mean
    what they always mean; under accumulation SAM climbs for every micro-batch by itself (m-sharpness).

    Example:
        >>> class FlatTrainer(FlatMinimaMixin, transformers.Trainer):
        ...     pass
        >>> optimizer = flatops.SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-4)
        >>> FlatTrainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()

        or, with the Trainer's groups for the weight decay,

        >>> options = {"base": torch.optim.AdamW, "rho": 0.05, "lr": 1e-4}
        >>> FlatTrainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(flatops.SAM, options)).train()

    Raises:
        TypeError: when training starts with another optimizer.
        ValueError: under DeepSpeed, Megatron or XLA, whose weights and backwards are their own.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(FlatMinimaMixin)]
        if any("training_step" in vars(kind) and not issubclass(kind, FlatMinimaMixin) for kind in before):
            raise TypeError(f"{cls.__name__}: FlatMinimaMixin has to come before the Trainer that it is mixed into")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The passes over one micro-batch; returns the first one's loss."""
        accelerator = self.accelerator
        if accelerator.distributed_type in REFUSED:
            raise ValueError(
                f"FlatMinimaMixin does not go with {accelerator.distributed_type.value}: use DDP, or FSDP2"
            )
        try:
            flat = unwrap(self.optimizer)
        except TypeError as error:
            raise TypeError(f"FlatMinimaMixin is for flatops optimizers: give the Trainer one; {error}") from None
        scaler = accelerator.scaler

        def scale() -> float:
            return (scaler.get_scale() if scaler else 1.0) / self.current_gradient_accumulation_steps

        losses = []
        for one_pass in passes(flat, model, loss_scale=scale):
            with one_pass:
                losses.append(super().training_step(model, dict(inputs), *args, **kwargs))
        return losses[0]
