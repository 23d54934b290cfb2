"""timm: its registry, its parameter groups, and its training script's loop, to the bit."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import timm
import torch
from documentation import run_snippets
from models import assert_same_bits, state_tensors
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch.amp import GradScaler

import flatops
from flatops.integrations.timm import METHODS, FlatScaler, register

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
    """With timm's groups, its defaults of the base and its way of passing options."""
    assert set(NAMES) <= set(list_optimizers()) and len(NAMES) == 18
    for name in NAMES:
        optimizer = create_optimizer_v2(make_model(), name, lr=0.1, weight_decay=0.1)
        method = next(m for m in sorted(METHODS, key=len, reverse=True) if name.startswith(m))
        flat, options = METHODS[method]
        assert isinstance(optimizer, flat)
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


def test_lookahead_around_it():
    """timm's 'lookahead_' wraps it; its passes are found inside."""
    model = make_model()
    optimizer = create_optimizer_v2(model, "lookahead_samsgd", lr=0.1)
    x, y = make_data(0)
    for one_pass in flatops.passes(optimizer, model):
        with one_pass:
            torch.nn.functional.cross_entropy(model(x), y).backward()
    before = model.fc.weight.clone()
    optimizer.step()
    assert not torch.equal(model.fc.weight, before)


def timms_loop(name, precision, accumulate, clip, ours):
    """train_one_epoch of timm's train.py; `ours`: with FlatScaler, else with two passes written out."""
    model = make_model()
    model.train()
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = create_optimizer_v2(model, name, lr=0.05, weight_decay=1e-4)
    fp16 = precision == "fp16"
    amp_autocast = partial(torch.autocast, "cpu", dtype=torch.float16) if fp16 else contextlib.nullcontext
    loss_scaler = FlatScaler(model, "cpu", enabled=fp16)
    loss_scaler._scaler = scaler = GradScaler("cpu", init_scale=2.0**10, enabled=fp16)
    losses, total = [], {}
    optimizer.zero_grad()
    for i in range(4):
        x, y = make_data(i)
        need_update = (i + 1) % accumulate == 0

        def _forward():
            with amp_autocast():
                loss = torch.nn.functional.cross_entropy(model(x), y)
            return loss / accumulate if accumulate > 1 else loss

        if ours:
            loss = loss_scaler(
                _forward, optimizer, clip_grad=clip, parameters=model.parameters(), need_update=need_update
            )
            losses.append(loss.item())
        else:
            weights = (1, 1) if "sam" in name else (optimizer.clean_weight, optimizer.perturbed_weight)
            one = name.startswith(("rwp", "arwp"))
            if not one:
                loss = _forward()
                losses.append(loss.item())
                scaler.scale(loss).backward()
                for p in model.parameters():
                    if "sam" not in name:
                        total[p] = weights[0] * p.grad + total.get(p, 0)
                        p.grad = None
            with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model, not one):
                loss = _forward()
                scaler.scale(loss).backward()
            if one:
                losses.append(loss.item())
            for p in model.parameters():
                total[p] = weights[1] * p.grad + total.get(p, 0)
                p.grad = None
            if need_update:
                for p in model.parameters():
                    p.grad = total.pop(p)
                if clip is not None:
                    scaler.unscale_(optimizer)
                    dispatch_clip_grad(model.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
        if need_update:
            optimizer.zero_grad()
            ema.update(model, step=i)
    return losses, [*model.state_dict().values(), *ema.state_dict().values(), *state_tensors(optimizer)]


@pytest.mark.parametrize("accumulate, clip", [(1, None), (2, 0.5)], ids=["", "accumulated and clipped"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["samsgd", "asammomentum", "ssamsgd", "rwpsgd", "mrwpadamw", "arwpsgd"])
def test_the_training_scripts_loop(name, precision, accumulate, clip):
    (losses, state), (expected, other) = (
        timms_loop(name, precision, accumulate, clip, ours) for ours in (True, False)
    )
    assert losses == expected
    assert_same_bits(state, other)


def test_f_does_not_depend_on_what_the_loss_is_divided_by():
    """ARWP's F under a scaler and four micro-batches, which are four updates, is that of four losses as they are."""
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
    assert sum(f.max() > 0 for f in seen[0]) > len(seen[0]) / 2  # a residual branch that begins at zero has no gradients


def test_a_loss_in_the_place_of_the_forward_is_refused():
    model = make_model()
    with pytest.raises(TypeError, match="function that computes the loss"):
        FlatScaler(model, "cpu")(torch.ones(()), create_optimizer_v2(model, "samsgd", lr=0.1))


def test_clipping_needs_parameters():
    model = make_model()
    x, y = make_data(0)
    with pytest.raises(TypeError, match="parameters"):
        forward = lambda: torch.nn.functional.cross_entropy(model(x), y)
        FlatScaler(model, "cpu", enabled=False)(
            forward, create_optimizer_v2(model, "samsgd", lr=0.1), clip_grad=1.0
        )


def test_the_snippets_of_the_documentation_run():
    run_snippets("timm.md", 2)
