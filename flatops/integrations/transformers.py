"""Hugging Face's Trainer: a mixin that runs the passes of flatops optimizers. accelerate only needs `flatops.passes`.

Without it the Trainer runs one backward per step and calls step() without a closure, which reduces every flatops
optimizer to its base optimizer, with one warning.
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType
from torch import Tensor, nn

from flatops.optim.passes import passes, unwrap

REFUSED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class FlatMinimaMixin:
    """Makes a Trainer run the perturbed passes of its flatops optimizer.

    `training_step`, called for every micro-batch, runs RWP's perturbed pass, or both passes of SAM, SSAM and m-RWP. The
    loss that the Trainer logs is the clean pass's (RWP only has a perturbed one). Mixed precision, with or without a
    GradScaler, `gradient_accumulation_steps`, `max_grad_norm`, and resuming from a checkpoint, also in mid-epoch, work
    as usual. Under gradient accumulation SAM ascends for each micro-batch separately (m-sharpness).

    Example:
        >>> class FlatTrainer(FlatMinimaMixin, transformers.Trainer):
        ...     pass
        >>> optimizer = flatops.SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-4)
        >>> FlatTrainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()

        or, with the Trainer's parameter groups for weight decay,

        >>> options = {"base": torch.optim.AdamW, "rho": 0.05, "lr": 1e-4}
        >>> FlatTrainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(flatops.SAM, options)).train()

    Raises:
        TypeError: training starts with another optimizer.
        ValueError: DeepSpeed, Megatron or XLA, which replace the weights or the backward.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(FlatMinimaMixin)]
        if any("training_step" in vars(kind) and not issubclass(kind, FlatMinimaMixin) for kind in before):
            raise TypeError(f"{cls.__name__}: FlatMinimaMixin must come before the Trainer among the base classes")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run the passes over one micro-batch; return the first one's loss."""
        accelerator = self.accelerator
        if accelerator.distributed_type in REFUSED:
            raise ValueError(f"{accelerator.distributed_type.value} is not supported: use DDP or FSDP2")
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
