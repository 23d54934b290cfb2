"""Lightning: a callback, or a mixin that adds it, that runs the passes of flatops optimizers.

Without it, Lightning's automatic optimization is wrong in most cases: under a GradScaler it calls the closure once and
outside of step(), which reduces SAM to its base optimizer; under gradient accumulation only the last micro-batch is
perturbed; and the logged loss is the perturbed one.
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

# They flatten parameters, which loses the filters, or replace PyTorch's backward.
REFUSED = ("FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy", "XLAFSDPStrategy")


class FlatMinima(Callback):
    """Runs the perturbed passes of a LightningModule's flatops optimizer.

    In automatic optimization every micro-batch gets all passes: RWP runs `training_step` at the perturbed weights; SAM,
    SSAM and m-RWP run it a second time, with `self.log` muted and BatchNorm's running statistics frozen. The loss that
    Lightning logs and passes to callbacks is the clean pass's (RWP only has a perturbed one). Mixed precision, with or
    without a GradScaler, `accumulate_grad_batches` and `gradient_clip_val` work as usual: gradients are unscaled and
    clipped once, before the step. Under accumulation SAM ascends for each micro-batch separately (m-sharpness).

    RWP's pass lasts from `training_step` to the end of the backward: hooks in between see perturbed weights, no others.
    The callback moves to the front of `trainer.callbacks`: when an exception interrupts a pass, it restores the weights
    before another callback's `on_exception` can save them.

    In manual optimization you run the passes, with `flatops.passes` or `perturbed()`; a step without them is an error.

    Example:
        >>> class Net(LightningModule):
        ...     def configure_optimizers(self):
        ...         return flatops.SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> Trainer(callbacks=[FlatMinima()], precision="16-mixed", accumulate_grad_batches=2).fit(net, loader)

    Raises:
        TypeError: training starts with another optimizer.
        ValueError: a strategy that flattens parameters (FSDP1, DeepSpeed, XLA), more than one FlatMinima, or a
            training_step that takes dataloader_iter, which cannot repeat a batch.
        RuntimeError: in manual optimization, a step without a perturbed pass.
    """

    def __init__(self) -> None:
        self.open = contextlib.ExitStack()  # the current pass, or the next
        self.rest: Iterator[Any] = iter(())  # the passes after it
        self.batch: tuple[Any, ...] = ()

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Move to the front: the pass ends before other callbacks' on_exception and on_after_backward."""
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if {kind.__name__ for kind in type(trainer.strategy).__mro__} & set(REFUSED):
            strategy = type(trainer.strategy).__name__
            raise ValueError(f"strategy {strategy} is not supported: use DDPStrategy or ModelParallelStrategy (FSDP2)")
        if sum(isinstance(callback, FlatMinima) for callback in trainer.callbacks) > 1:
            raise ValueError("callbacks has more than one FlatMinima: keep one")
        if not module.automatic_optimization:
            return
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ValueError("training_step takes dataloader_iter, but both passes need the same batch: take batch")
        try:
            unwrap(trainer.optimizers[0]).passes_in_step = False
        except TypeError as error:
            message = "FlatMinima is for flatops optimizers: return one from configure_optimizers"
            raise TypeError(f"{message}; {error}") from None

    # --- the passes over a micro-batch ----------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not module.automatic_optimization:
            return
        flat = unwrap(trainer.optimizers[0])
        if trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward:
            return  # StochasticWeightAveraging updates BatchNorm's running statistics, without a backward
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        self.batch = (batch, batch_idx) if takes_index else (batch,)
        scaler, parts = _scaler(trainer), trainer.accumulate_grad_batches
        self.rest = passes(flat, module, loss_scale=lambda: (1 if scaler is None else scaler.get_scale()) / parts)
        if not flat.has_clean_pass:
            self._begin_with_forward(trainer.strategy)

    def _begin_with_forward(self, strategy: Any) -> None:
        """Begin RWP's pass when training_step is called, after all on_train_batch_start hooks."""

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.open.close()
            self.open.enter_context(next(self.rest))
            return strategy.training_step(*args, **kwargs)

        self.open.callback(vars(strategy).pop, "training_step", None)
        strategy.training_step = training_step

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: torch.Tensor) -> None:
        # Not earlier: Lightning zeroes gradients between the forward and the backward.
        if module.automatic_optimization and unwrap(trainer.optimizers[0]).has_clean_pass:
            self.open.enter_context(next(self.rest))

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        if not module.automatic_optimization:
            return
        self.open.close()
        for second in self.rest:
            with second, _muted(module):
                # The strategy's training_step, for autocast and DDP; the module's backward, so that hooks run once.
                output = trainer.strategy.training_step(*self.batch)
                loss = output["loss"] if isinstance(output, Mapping) else output
                if loss is None:
                    raise RuntimeError(
                        "training_step returned a loss in the clean pass, but None in the perturbed one: always return "
                        "the loss, and let a GradScaler skip steps that are not finite"
                    )
                loss = loss / trainer.accumulate_grad_batches
                scaler = _scaler(trainer)
                module.backward(loss if scaler is None else scaler.scale(loss))

    # --- other exits: training_step returned None, on_train_batch_start returned -1, an exception -----------

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.open.close()
        flat = _flat(optimizer)
        if flat is not None and not (module.automatic_optimization or flat.run.is_ready):
            raise RuntimeError(
                f"{type(flat).__name__}.step() was called without a perturbed pass: in manual optimization, run "
                "`for one_pass in flatops.passes(optimizer, self)` or `flatops.unwrap(optimizer).perturbed()` first"
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
                flat.restore()  # Ctrl-C may come before `open` has the pass
                flat.passes_in_step = True


class FlatMinimaMixin:
    """Makes a LightningModule add FlatMinima itself, whatever the Trainer.

    Example:
        >>> class Net(FlatMinimaMixin, LightningModule):
        ...     def configure_optimizers(self):
        ...         return flatops.SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> Trainer().fit(Net(), loader)
    """

    def configure_callbacks(self) -> list[Callback]:
        """The module's other callbacks, and FlatMinima, which replaces the Trainer's."""
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
    """Make self.log and self.log_dict do nothing: the clean pass is already logged."""
    module.log = module.log_dict = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del module.log, module.log_dict
