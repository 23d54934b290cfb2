"""timm: its registry, its parameter groups, and the loop of its training script, to the bit."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import timm
import torch
from documentation import run_snippets
from models import assert_same_bits, state_tensors
from plain import plain_loop
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch.amp import GradScaler

import flatops
from flatops.integrations.timm import FlatScaler, register
from flatops.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = register()


def make_model():
    torch.manual_seed(0)
    block = timm.models.resnet.BasicBlock
    return timm.models.ResNet(block, (1, 1, 1, 1), num_classes=4, channels=(4, 4, 8, 8), stem_width=4)


def make_data(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.randint(4, (4,), generator=generator)


def test_every_name_makes_its_optimizer():
    """With timm's groups, its defaults for the base optimizer and its way of passing options."""
    assert set(NAMES) <= set(list_optimizers())
    assert len(NAMES) == 3 * sum(method.timm is not None for method in METHODS.values())
    for name in NAMES:
        optimizer = create_optimizer_v2(make_model(), name, lr=0.1, weight_decay=0.1)
        method = METHODS[next(m for m in sorted(METHODS, key=len, reverse=True) if name.startswith(m))]
        options = method.fixed | method.timm
        assert isinstance(optimizer, method.optimizer)
        assert isinstance(optimizer, torch.optim.AdamW if name.endswith("adamw") else torch.optim.SGD)
        assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]
        for group in optimizer.param_groups:
            assert options.items() <= group.items()
            assert group.get("nesterov") == (
                True if name.endswith("sgd") else False if name.endswith("momentum") else None
            )


def test_options_and_other_bases():
    assert "samlamb" in register("lamb")
    optimizer = create_optimizer_v2(make_model(), "samlamb", lr=0.1, rho=0.2, layer_decay=0.75)
    assert {group["rho"] for group in optimizer.param_groups} == {0.2}
    assert isinstance(optimizer, timm.optim.Lamb)
    with pytest.raises(ValueError, match="nosuch"):
        register("nosuch")


def test_lookahead_wraps_it():
    """timm's 'lookahead_' wraps it; passes find the optimizer inside."""
    model = make_model()
    optimizer = create_optimizer_v2(model, "lookahead_samsgd", lr=0.1)
    x, y = make_data(0)
    for one_pass in flatops.passes(optimizer, model):
        with one_pass:
            torch.nn.functional.cross_entropy(model(x), y).backward()
    before = model.fc.weight.clone()
    optimizer.step()
    assert not torch.equal(model.fc.weight, before)


def start(name, precision):
    model = make_model()
    model.train()
    optimizer = create_optimizer_v2(model, name, lr=0.05, weight_decay=1e-4)
    fp16 = precision == "fp16"
    autocast = partial(torch.autocast, "cpu", dtype=torch.float16) if fp16 else contextlib.nullcontext
    return model, optimizer, ModelEmaV3(model, decay=0.9), autocast, GradScaler("cpu", init_scale=2.0**10, enabled=fp16)


def training_script_loop(name, precision, accumulate, clip, form):
    """timm's train.py with the edits of the page: in float32 and bfloat16 it has no loss scaler."""
    model, optimizer, ema, amp_autocast, scaler = start(name, precision)
    task = lambda x, y: {"loss": torch.nn.functional.cross_entropy(model(x), y)}
    if form == "loss, result":
        tasks = pytest.importorskip("timm.task", reason="timm before 1.0.23 has no tasks")
        task = tasks.ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    loss_scaler = NativeScaler("cpu") if scaler.is_enabled() else None
    loss_scaler = FlatScaler(model, "cpu", enabled=loss_scaler is not None, accum_steps=accumulate)
    assert loss_scaler._scaler.is_enabled() is scaler.is_enabled()
    loss_scaler._scaler = scaler  # whose initial scale is small enough for a step
    losses = []
    optimizer.zero_grad()
    for i in range(4):
        x, y = make_data(i)
        need_update = (i + 1) % accumulate == 0

        def _forward():
            with amp_autocast():
                result = task(x, y)
                loss = result["loss"]
            if accumulate > 1:
                loss /= accumulate
            return (loss, result) if form == "loss, result" else loss

        def _backward(closure):
            return loss_scaler(
                closure, optimizer, clip_grad=clip, parameters=model.parameters(), need_update=need_update
            )

        if form == "loss, result":
            loss, result = _backward(_forward)
            assert result["output"].shape == (4, 4) and result["loss"].item() == loss.item()
        else:
            loss = _backward(_forward)
        losses.append(loss.item())
        if need_update:
            optimizer.zero_grad()
            ema.update(model, step=i)
    return losses, [*model.state_dict().values(), *ema.state_dict().values(), *state_tensors(optimizer)]


def by_hand(name, precision, accumulate, clip):
    model, optimizer, ema, autocast, scaler = start(name, precision)

    def backward(i):
        x, y = make_data(i)
        with autocast():
            loss = torch.nn.functional.cross_entropy(model(x), y)
        loss = loss / accumulate
        scaler.scale(loss).backward()
        return loss.item()

    steps = iter(range(accumulate - 1, 4, accumulate))
    losses = plain_loop(
        model, optimizer, backward, 4, scaler, accumulate, clip, after_step=lambda: ema.update(model, step=next(steps))
    )
    return losses, [*model.state_dict().values(), *ema.state_dict().values(), *state_tensors(optimizer)]


@pytest.mark.parametrize("form", ["loss, result", "loss"])
@pytest.mark.parametrize("accumulate, clip", [(1, None), (2, 0.5)], ids=["", "accumulated and clipped"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["samsgd", "asammomentum", "ssamsgd", "rwpsgd", "mrwpadamw", "arwpsgd"])
def test_the_loop_of_the_training_script(name, precision, accumulate, clip, form):
    """As since timm 1.0.23, whose forward returns a pair, and as before: the same bits as a plain loop."""
    losses, state = training_script_loop(name, precision, accumulate, clip, form)
    expected, other = by_hand(name, precision, accumulate, clip)
    assert losses == expected
    assert_same_bits(state, other)


SCALERS = {
    "none": lambda model: None,
    "timm's": lambda model: NativeScaler("cpu"),
    "enabled": lambda model: FlatScaler(model, "cpu"),
    "disabled": lambda model: FlatScaler(model, "cpu", enabled=False),
}


@pytest.mark.parametrize("loaded", SCALERS)
@pytest.mark.parametrize("saved", SCALERS)
def test_resume_in_another_precision(saved, loaded, tmp_path):
    """From timm's own checkpoints: the loss scale is kept if both runs have one, and otherwise starts anew."""

    def new(kind):
        model = make_model()
        return model, create_optimizer_v2(model, "samsgd", lr=0.05), SCALERS[kind](model)

    model, optimizer, scaler = new(saved)
    scaled = scaler is not None and scaler._scaler.is_enabled()
    if scaled:
        scaler._scaler = GradScaler("cpu", init_scale=8.0)
    saver = CheckpointSaver(
        model, optimizer, amp_scaler=scaler, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(3)
    model, optimizer, scaler = new(loaded)
    assert timm.models.resume_checkpoint(model, str(tmp_path / "last.pth.tar"), optimizer, scaler, log_info=False) == 4
    if scaler is not None and scaler._scaler.is_enabled():
        assert scaler._scaler.get_scale() == (8.0 if scaled else 2.0**16)


def test_the_empty_state_of_a_disabled_scaler_loads():
    scaler = FlatScaler(make_model(), "cpu")
    scaler.load_state_dict(GradScaler("cpu", enabled=False).state_dict())
    assert scaler._scaler.get_scale() == 2.0**16


def test_f_does_not_depend_on_the_divisor_of_the_loss():
    """ARWP's F under a scaler with four micro-batches, which are four updates, equals that of four unscaled losses."""
    seen = []
    for accumulate, enabled in ((1, False), (4, True)):
        model = make_model()
        optimizer = flatops.RWP(model.parameters(), torch.optim.SGD, sigma=0.0, lam=0.5, eta=1.0, lr=0.1)
        scaler = FlatScaler(model, "cpu", enabled=enabled, accum_steps=accumulate)
        x, y = make_data(0)
        for _ in range(4):
            forward = lambda: torch.nn.functional.cross_entropy(model(x), y) / accumulate
            scaler(forward, optimizer, need_update=False)
        seen.append(list(optimizer.fisher.values()))
    torch.testing.assert_close(*seen)
    # Residual branches that start at zero have no gradients.
    assert sum(f.max() > 0 for f in seen[0]) > len(seen[0]) / 2


def test_a_loss_instead_of_a_function_is_refused():
    model = make_model()
    with pytest.raises(TypeError, match="function that computes the loss"):
        FlatScaler(model, "cpu")(torch.ones(()), create_optimizer_v2(model, "samsgd", lr=0.1))


def test_clipping_needs_parameters():
    model = make_model()
    x, y = make_data(0)
    with pytest.raises(TypeError, match="parameters"):
        forward = lambda: torch.nn.functional.cross_entropy(model(x), y)
        FlatScaler(model, "cpu", enabled=False)(forward, create_optimizer_v2(model, "samsgd", lr=0.1), clip_grad=1.0)


def test_the_snippets_of_the_documentation_run():
    names = run_snippets("timm.md", 2)
    assert not names["loss_scaler"]._scaler.is_enabled()  # float32 on a CPU
    assert names["result"]["output"].shape == (4, 4)
