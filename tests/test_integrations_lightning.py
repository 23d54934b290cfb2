"""Lightning's trainer against a plain loop, to the bit: precision, loss scale, accumulation, clipping, manual loops."""

from __future__ import annotations

import copy

import lightning.pytorch as lightning
import pytest
import torch
from documentation import run_snippets
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from models import all_bits, assert_same_bits, loss_of, make_batch, make_net, state_tensors
from plain import plain_loop
from torch.amp import GradScaler

import flatops
from flatops.integrations.lightning import FlatMinima, FlatMinimaMixin

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # Lightning's advice
SGD = torch.optim.SGD
METHODS = {
    "sam": (flatops.SAM, {"rho": 0.1}),
    "ssam": (flatops.SSAM, {"rho": 0.1, "mask": "dynamic", "pattern": "layer"}),
    "rwp": (flatops.RWP, {"sigma": 0.05}),
    "mrwp": (flatops.RWP, {"sigma": 0.05, "lam": 0.5}),
    "marwp": (flatops.RWP, {"sigma": 0.05, "lam": 0.5, "eta": 1.0}),
}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 2.0**12


def make(method, model, **options):
    flat, ours = METHODS[method]
    return flat(model.parameters(), SGD, **ours, **{"lr": 0.05, "momentum": 0.9, **options})


class Net(lightning.LightningModule):
    def __init__(self, method="sam", factors=None):
        super().__init__()
        self.net, self.method, self.factors = make_net(), method, factors or {}
        self.losses, self.runs = [], 0

    def configure_optimizers(self):
        return make(self.method, self.net)

    def training_step(self, batch, batch_idx):
        self.runs += 1
        loss = loss_of(self.net, batch)
        self.log("loss", loss)
        return loss * self.factors.get(batch_idx, 1.0)


class Seen(lightning.Callback):
    """Records what Lightning logs and passes on, and how often hooks run."""

    def __init__(self):
        self.logged, self.outputs, self.backwards, self.steps, self.clean = [], [], 0, 0, True

    def on_after_backward(self, trainer, module):
        self.backwards += 1

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps += 1
        self.clean &= not flatops.unwrap(optimizer).is_perturbed

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.logged.append(trainer.callback_metrics["loss"].item())
        self.outputs.append(outputs["loss"].item())


def batches_of(count):
    return [make_batch(i) for i in range(count)]


def fit(module, batches, precision="fp32", callbacks=None, epochs=1, checkpoint=None, **options):
    plugins = []
    if PRECISIONS[precision] is not None:
        scaler = GradScaler("cpu", init_scale=SCALE) if precision == "fp16" else None
        plugins = [MixedPrecision("16-mixed" if scaler else "bf16-mixed", "cpu", scaler)]
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, plugins=plugins, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[FlatMinima()] if callbacks is None else callbacks,
        **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    is_loader = hasattr(batches, "state_dict")
    loader = batches if is_loader else torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def plain(method, batches, precision="fp32", accumulate=1, clip=None, factors=None):
    """The plain loop: the two passes of every micro-batch, with gradients added up."""
    model = make_net()
    optimizer = make(method, model)
    scaler = GradScaler("cpu", init_scale=SCALE, enabled=precision == "fp16")
    dtype = PRECISIONS[precision]

    def backward(i):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
            loss = loss_of(model, batches[i])
            scaled = loss * (factors or {}).get(i, 1.0) / accumulate
        scaler.scale(scaled).backward()
        return loss.item()

    losses = plain_loop(model, optimizer, backward, len(batches), scaler, accumulate, clip)
    return model, optimizer, losses, scaler


@pytest.mark.parametrize("accumulate, clip", [(1, None), (2, 0.5)], ids=["", "accumulated and clipped"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_automatic_optimization_equals_a_plain_loop(method, precision, accumulate, clip):
    """Weights, running statistics, momentum to the bit; clean losses are logged; hooks run once a backward or step."""
    batches = batches_of(4)
    model, optimizer, losses, _ = plain(method, batches, precision, accumulate, clip)
    module, seen = Net(method), Seen()
    trainer = fit(
        module, batches, precision, [FlatMinima(), seen], accumulate_grad_batches=accumulate, gradient_clip_val=clip
    )
    assert_same_bits(module.net.state_dict().values(), model.state_dict().values())
    ours = flatops.unwrap(trainer.optimizers[0])
    assert_same_bits(state_tensors(ours), state_tensors(optimizer))
    assert_same_bits(getattr(ours, "fisher", {}).values(), getattr(optimizer, "fisher", {}).values())
    assert seen.logged == losses
    assert seen.outputs == [pytest.approx(loss / accumulate, rel=1e-6) for loss in losses]
    assert (seen.backwards, seen.steps, seen.clean) == (4, 4 // accumulate, True)
    assert module.runs == (4 if method == "rwp" else 8)


@pytest.mark.parametrize("method", METHODS)
def test_an_overflow_skips_the_step(method):
    """The loss scale is reduced, and everything equals the plain loop."""
    batches, factors = batches_of(3), {1: 1e38}
    model, optimizer, _, expected = plain(method, batches, "fp16", factors=factors)
    module = Net(method, factors)
    trainer = fit(module, batches, "fp16")
    scaler = trainer.precision_plugin.scaler
    assert scaler.get_scale() == expected.get_scale() == SCALE / 2
    assert_same_bits(module.net.state_dict().values(), model.state_dict().values())
    assert_same_bits(state_tensors(flatops.unwrap(trainer.optimizers[0])), state_tensors(optimizer))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["sam", "rwp", "mrwp"])
@pytest.mark.parametrize("own", [False, True], ids=["passes", "perturbed"])
def test_manual_optimization_equals_a_plain_loop(method, precision, own):
    """With flatops.passes, and with perturbed() directly."""

    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            flat = flatops.unwrap(optimizer)
            if not own:
                for one_pass in flatops.passes(optimizer, self):
                    with one_pass:
                        self.manual_backward(loss_of(self.net, batch))
            elif method == "rwp":
                with flat.perturbed():
                    self.manual_backward(loss_of(self.net, batch))
            else:
                weights = (1, 1) if method == "sam" else (flat.clean_weight, flat.perturbed_weight)  # powers of two
                self.manual_backward(weights[0] * loss_of(self.net, batch))
                with flat.perturbed(), flatops.freeze_batchnorm_stats(self):
                    self.manual_backward(weights[1] * loss_of(self.net, batch))
            optimizer.step()
            optimizer.zero_grad()

        def __init__(self):
            super().__init__(method)
            self.automatic_optimization = False

    batches = batches_of(3)
    model, optimizer, _, _ = plain(method, batches, precision)
    module = Manual()
    trainer = fit(module, batches, precision)
    assert_same_bits(module.net.state_dict().values(), model.state_dict().values())
    assert_same_bits(state_tensors(flatops.unwrap(trainer.optimizers[0])), state_tensors(optimizer))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("method", ["sam", "rwp"])
def test_a_manual_step_without_a_pass_is_refused(method, precision):
    """Lightning passes step() a closure that does nothing: the result would be a plain step, or none."""

    class Manual(Net):
        def __init__(self):
            super().__init__(method)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(loss_of(self.net, batch))
            self.optimizers().step()

    module = Manual()
    with pytest.raises(RuntimeError, match="without a perturbed pass"):
        fit(module, batches_of(1), precision)
    assert_same_bits(module.net.parameters(), make_net().parameters())
    if method == "sam" and precision == "fp32":  # without the callback
        with pytest.raises(RuntimeError, match="no gradient in the perturbed pass"):
            fit(Manual(), batches_of(1), callbacks=[])


@pytest.mark.parametrize("method", ["sam", "rwp"])
def test_resume_from_lightnings_checkpoint(method, tmp_path):
    """Two epochs at once, or one and then the other from its checkpoint: the same bits."""
    batches = batches_of(3)
    whole = Net(method)
    fit(whole, batches, epochs=2)
    first = Net(method)
    fit(first, batches, epochs=1).save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    second = Net(method)
    fit(second, batches, epochs=2, checkpoint=tmp_path / "one.ckpt")
    assert_same_bits(second.net.state_dict().values(), whole.net.state_dict().values())


class StatefulLoader:
    """Saves and restores its position, like torchdata's StatefulDataLoader."""

    def __init__(self, batches):
        self.batches, self.next = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.next %= len(self.batches)
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


@pytest.mark.parametrize("method, accumulate", [("sam", 2), ("marwp", 1)])
def test_resume_mid_epoch_with_a_stateful_loader(method, accumulate, tmp_path):
    """From a checkpoint after four of six batches in the second of three epochs: the same bits."""
    file = tmp_path / "middle.ckpt"

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 3):
                trainer.save_checkpoint(file, weights_only=False)

    options = {"epochs": 3, "accumulate_grad_batches": accumulate}
    whole, resumed = Net(method), Net(method)
    one = fit(whole, StatefulLoader(batches_of(6)), callbacks=[FlatMinima(), Save()], **options)
    other = fit(resumed, StatefulLoader(batches_of(6)), checkpoint=file, **options)
    assert resumed.runs == 2 * (2 + 6)
    assert_same_bits(resumed.net.state_dict().values(), whole.net.state_dict().values())
    ours, theirs = (flatops.unwrap(trainer.optimizers[0]) for trainer in (other, one))
    assert_same_bits(state_tensors(ours), state_tensors(theirs))
    assert_same_bits(getattr(ours, "fisher", {}).values(), getattr(theirs, "fisher", {}).values())


@pytest.mark.parametrize("method", ["rwp", "sam"])
def test_weight_averaging_takes_batchnorm_statistics_at_clean_weights(method):
    """Statistics of the average of the weights at the start of the last two epochs; their epoch runs no passes."""

    class Keep(lightning.Callback):
        def __init__(self):
            self.weights = []

        def on_train_epoch_end(self, trainer, module):
            self.weights.append([p.detach().clone() for p in module.net.parameters()])

    batches, keep, module = batches_of(3), Keep(), Net(method)
    fit(module, batches, callbacks=[FlatMinima(), StochasticWeightAveraging(0.05, swa_epoch_start=2), keep], epochs=3)
    assert module.runs == 3 * 3 * (1 if method == "rwp" else 2) + 3
    average = make_net()
    with torch.no_grad():
        for p, first, second in zip(average.parameters(), *keep.weights[:2]):
            p.copy_((first + second) / 2)
    torch.optim.swa_utils.update_bn((x for x, _ in batches), average)
    torch.testing.assert_close(list(module.net.buffers()), list(average.buffers()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", ["sam", "rwp"])
def test_a_skipped_batch(method, accumulate, precision):
    """training_step returns None or on_train_batch_start returns -1: weights are restored, and training continues."""

    class Sparse(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

    module = Sparse(method)
    trainer = fit(module, batches_of(4), precision, epochs=2, accumulate_grad_batches=accumulate)
    flat = flatops.unwrap(trainer.optimizers[0])
    assert not flat.is_perturbed and flat.passes_in_step is not False
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.parametrize("method", ["sam", "rwp"])
def test_an_exception_in_either_pass(method, run, error):
    """The weights are those of the last step."""

    class Failing(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.runs == run:
                raise error
            return loss

    module = Failing(method)
    with pytest.raises((error, SystemExit)):
        fit(module, batches_of(3))
    before = plain(method, batches_of(1))[0] if (method, run) == ("rwp", 2) else make_net()
    assert_same_bits(module.net.parameters(), before.parameters())


class PassObserver(lightning.Callback):
    """Records at which hooks the weights are perturbed, and fails in the `fail`-th call of one hook."""

    def __init__(self, at=None, fail=None):
        self.at, self.fail, self.perturbed = at, fail, {}

    def observe(self, hook, module):
        flat = flatops.unwrap(module.optimizers())
        clean = all(map(torch.equal, all_bits(module.net.parameters()), self.weights))
        assert clean is not flat.is_perturbed
        self.perturbed.setdefault(hook, []).append(not clean)
        if hook == self.at and len(self.perturbed[hook]) == self.fail:
            raise KeyboardInterrupt

    def on_train_start(self, trainer, module):
        self.weights = all_bits(module.net.parameters())

    def on_train_batch_start(self, trainer, module, *args):
        self.observe("on_train_batch_start", module)

    def on_before_backward(self, trainer, module, loss):
        self.observe("on_before_backward", module)

    def on_after_backward(self, trainer, module):
        self.observe("on_after_backward", module)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.observe("on_before_optimizer_step", module)

    def on_train_batch_end(self, trainer, module, *args):
        self.weights = all_bits(module.net.parameters())
        self.observe("on_train_batch_end", module)

    def on_exception(self, trainer, module, exception):
        self.observe("on_exception", module)
        trainer.save_checkpoint(trainer.default_root_dir + "/observer.ckpt", weights_only=False)


class NetWithMixin(FlatMinimaMixin, Net):
    pass


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("at", ["on_train_batch_start", "on_before_backward", "on_after_backward", "training_step"])
@pytest.mark.parametrize("method, kind", [("rwp", Net), ("rwp", NetWithMixin), ("mrwp", Net), ("sam", Net)])
def test_no_callback_sees_or_saves_perturbed_weights(method, kind, at, precision, tmp_path):
    """Not even callbacks before ours, after an interrupted pass: only hooks within RWP's forward and backward do."""

    class Module(kind):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if at == "training_step" and flatops.unwrap(self.optimizers()).is_perturbed and self.runs > 2:
                raise MemoryError
            return loss

    observer = PassObserver(at, 2)
    savers = [OnExceptionCheckpoint(tmp_path, "last"), ModelCheckpoint(tmp_path, "model", save_on_exception=True)]
    callbacks = [observer, *savers, *([FlatMinima()] if kind is Net else [])]
    module = Module(method)
    with pytest.raises((MemoryError, SystemExit)):
        fit(module, batches_of(3), precision, callbacks, default_root_dir=tmp_path, enable_checkpointing=True)
    within = observer.perturbed.pop("on_before_backward")
    assert set(within) == {method == "rwp"}
    assert not any(any(seen) for seen in observer.perturbed.values()) and observer.perturbed["on_exception"] == [False]
    assert_same_bits(all_bits(module.net.parameters()), observer.weights)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    for file in files:
        saved = torch.load(file, weights_only=False)["state_dict"]
        assert_same_bits(
            [all_bits([saved[f"net.{name}"]])[0] for name, _ in module.net.named_parameters()], observer.weights
        )
    assert "training_step" not in vars(module.trainer.strategy)
    ready = flatops.unwrap(module.optimizers()).run.is_ready  # an interrupted pass does not count
    assert ready is (at == "on_after_backward")


def test_unsupported_settings_are_refused():
    """One error, before the first step."""

    class Plain(Net):
        def configure_optimizers(self):
            return SGD(self.net.parameters(), lr=0.1)

    with pytest.raises(TypeError, match="configure_optimizers"):
        fit(Plain(), batches_of(1))

    class Iterating(Net):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(ValueError, match="dataloader_iter"):
        fit(Iterating(), batches_of(1))

    class FSDPStrategy:
        pass

    class Trainer:
        strategy, optimizers = FSDPStrategy(), []

    with pytest.raises(ValueError, match="FSDPStrategy"):
        FlatMinima().on_train_start(Trainer(), Net())


def test_the_callback_can_be_copied():
    copy.deepcopy(FlatMinima())


def test_importing_flatops_imports_no_framework():
    import subprocess
    import sys

    frameworks = ("lightning", "transformers", "accelerate", "timm")
    code = f"import sys, flatops; print([m for m in {frameworks} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_the_snippets_of_the_documentation_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_snippets("lightning.md", 2)
