"""Lightning: one callback, or a mixin that brings it, that gives flatops optimizers their passes.

Without it Lightning's automatic optimization is right in the simplest case alone: under a GradScaler it calls the closure once,
outside of step(), so that SAM is its base optimizer; with accumulation only the last micro-batch is perturbed; and the loss it
logs is the perturbed one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from flatops.optim.base import Flat
from flatops.optim.passes import passes, unwrap

# Their parameters are no longer the model's: filters are flattened away, or the backward is not PyTorch's.
REFUSED = ("FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy", "XLAFSDPStrategy")


class FlatMinima(Callback):
    """Gives the flatops optimizer of a LightningModule its perturbed passes.

    In automatic optimization every micro-batch is a step's worth of passes: RWP runs `training_step` at the perturbed weights;
    SAM, SSAM and m-RWP run it a second time, with `self.log` muted and BatchNorm's statistics frozen. What Lightning logs,
    shows and returns to callbacks is the clean pass's (RWP has no other than the perturbed one). Mixed precision with or
    without a GradScaler, `accumulate_grad_batches` and `gradient_clip_val` mean what they always mean: gradients are unscaled
    and clipped once, before the step; under accumulation SAM climbs for every micro-batch by itself (m-sharpness).

    RWP's pass is open from `training_step` to the end of the backward: hooks between see perturbed weights, and no others do. The
    callback moves to the front of `trainer.callbacks`: when an exception breaks a pass off, it restores the weights before any
    other's `on_exception`, which may save them.

    In manual optimization the passes are yours, by `flatops.passes` or `perturbed()`; the callback sees to it that no step is
    made without.

    Example:
        >>> class Net(LightningModule):
        ...     def configure_optimizers(self):
        ...         return flatops.SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> Trainer(callbacks=[FlatMinima()], precision="16-mixed", accumulate_grad_batches=2).fit(net, loader)

    Raises:
        TypeError: when training starts with another optimizer.
        ValueError: for a strategy that flattens parameters (FSDP of the first kind, DeepSpeed, XLA), or a training_step that
            takes dataloader_iter, whose batch cannot be seen twice.
        RuntimeError: in manual optimization, for a step without a perturbed pass.
    """

    def __init__(self) -> None:
        self.open = contextlib.ExitStack()  # the pass that is under way, or about to begin
        self.rest: Iterator[Any] = iter(())  # the passes after it
        self.batch: tuple[Any, ...] = ()

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Goes to the front: what others do in on_exception and on_after_backward comes after the pass has ended."""
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if {kind.__name__ for kind in type(trainer.strategy).__mro__} & set(REFUSED):
            raise ValueError(
                f"FlatMinima does not go with {type(trainer.strategy).__name__}: use DDPStrategy, or ModelParallelStrategy (FSDP2)"
            )
        if sum(isinstance(callback, FlatMinima) for callback in trainer.callbacks) > 1:
            raise ValueError("callbacks has more than one FlatMinima: each would run the passes")
        if not module.automatic_optimization:
            return
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                "training_step takes dataloader_iter, and a second pass needs the same batch: let it take batch"
            )
        try:
            unwrap(trainer.optimizers[0]).passes_in_step = False
        except TypeError as error:
            message = (
                "FlatMinima is for flatops optimizers: let configure_optimizers return flatops.SAM(...) or another"
            )
            raise TypeError(f"{message}; {error}") from None

    # --- the passes over a micro-batch --------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not module.automatic_optimization:
            return
        flat = unwrap(trainer.optimizers[0])
        if trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward:
            return  # StochasticWeightAveraging computes BatchNorm's statistics, without a backward
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        self.batch = (batch, batch_idx) if takes_index else (batch,)
        scaler, parts = _scaler(trainer), trainer.accumulate_grad_batches
        self.rest = passes(flat, module, loss_scale=lambda: (1 if scaler is None else scaler.get_scale()) / parts)
        if not flat.has_clean_pass:
            self._begin_with_forward(trainer.strategy)

    def _begin_with_forward(self, strategy: Any) -> None:
        """Begins RWP's pass when training_step is called, after the last hook of on_train_batch_start."""

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.open.close()
            self.open.enter_context(next(self.rest))
            return strategy.training_step(*args, **kwargs)

        self.open.callback(vars(strategy).pop, "training_step", None)
        strategy.training_step = training_step

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: torch.Tensor) -> None:
        # Not earlier: Lightning zeroes gradients between forward and backward.
        if module.automatic_optimization and unwrap(trainer.optimizers[0]).has_clean_pass:
            self.open.enter_context(next(self.rest))

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        if not module.automatic_optimization:
            return
        self.open.close()
        for second in self.rest:
            with second, _muted(module):
                # The strategy's, so that autocast and DistributedDataParallel are as they were; the module's own backward,
                # so that no hook runs twice.
                output = trainer.strategy.training_step(*self.batch)
                loss = output["loss"] if isinstance(output, Mapping) else output
                if loss is None:
                    raise RuntimeError(
                        "training_step returned None in the perturbed pass and a loss in the clean one: let it return the loss, "
                        "and a GradScaler skip what is not finite"
                    )
                loss = loss / trainer.accumulate_grad_batches
                scaler = _scaler(trainer)
                module.backward(loss if scaler is None else scaler.scale(loss))

    # --- other ways out: training_step returned None, on_train_batch_start returned -1, an exception -----------------------

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.open.close()
        flat = _flat(optimizer)
        if flat is not None and not (module.automatic_optimization or flat.run.is_ready):
            raise RuntimeError(
                f"{type(flat).__name__}.step() without a perturbed pass would be a plain step: in manual optimization run "
                "`for one_pass in flatops.passes(optimizer, self)` or `flatops.unwrap(optimizer).perturbed()` before it"
            )

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self.batch = ()
        self.open.close()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.open.close()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        for flat in filter(None, map(_flat, trainer.optimizers)):
            flat.passes_in_step = True

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        try:
            self.open.__exit__(type(exception), exception, exception.__traceback__)
        finally:
            for flat in filter(None, map(_flat, trainer.optimizers)):
                flat.restore()  # an interrupt may have come before the pass was noted
                flat.passes_in_step = True


class FlatMinimaMixin:
    """Mixed into a LightningModule, brings FlatMinima along, so that no Trainer has to be told.

    Example:
        >>> class Net(FlatMinimaMixin, LightningModule):
        ...     def configure_optimizers(self):
        ...         return flatops.SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> Trainer().fit(Net(), loader)
    """

    def configure_callbacks(self) -> list[Callback]:
        """The module's own callbacks, and FlatMinima, which takes the place of one that the Trainer has."""
        others = super().configure_callbacks()
        return [*(others if isinstance(others, Sequence) else [others]), FlatMinima()]


def _flat(optimizer: Any) -> Flat | None:
    try:
        return unwrap(optimizer)
    except TypeError:
        return None


def _scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    return getattr(trainer.precision_plugin, "scaler", None)


@contextlib.contextmanager
def _muted(module: LightningModule) -> Iterator[None]:
    """self.log and self.log_dict do nothing: they have logged the clean pass."""
    module.log = module.log_dict = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del module.log, module.log_dict
