"""Hyperparameters as tensors, which stay on the device and change there, so that no step needs a host sync."""

from __future__ import annotations

import copy

import pytest
import torch
from models import assert_same_bits, loss_of, make_batch, make_net, state_tensors
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flatops
from flatops import CosineRamp, ops
from flatops.checks import signed

KINDS = {
    "sam": (flatops.SAM, {"rho": 0.1}),
    "asam": (flatops.SAM, {"rho": 1.0, "adaptive": True}),
    "rwp": (flatops.RWP, {"sigma": 0.05, "seed": 2**63 + 5}),
    "mrwp": (flatops.RWP, {"sigma": 0.05, "seed": 7, "lam": 0.5, "stream": 3}),
    "arwp": (flatops.RWP, {"sigma": 0.05, "eta": 3.0}),
    "regenerating": (flatops.RWP, {"sigma": 0.05, "restore": "regenerate"}),
}
KEYS = [("sam", "rho"), ("rwp", "sigma")]


def tensors(options):
    """sigma and rho as float64 and seed as int64 tensors; other options unchanged."""
    as_tensor = {
        "sigma": lambda v: torch.tensor(v, dtype=torch.float64),
        "rho": lambda v: torch.tensor(v, dtype=torch.float64),
        "seed": lambda v: torch.tensor(signed(v)),
    }
    return {key: as_tensor[key](value) if key in as_tensor else value for key, value in options.items()}


def make(kind, model, as_tensors=True, **changed):
    flat, options = KINDS[kind]
    options = {**options, **changed}
    groups = [{"params": model.features.parameters()}, {"params": model.head.parameters(), "lr": 0.02}]
    return flat(groups, SGD, lr=0.05, momentum=0.9, **(tensors(options) if as_tensors else options))


def step(optimizer, model, i, scaler=None):
    scale = scaler.scale if scaler else lambda loss: loss
    two = isinstance(optimizer, flatops.SAM) or optimizer.perturbed_weight < 1
    weights = (0.5, 0.5) if getattr(optimizer, "perturbed_weight", 1) < 1 else (1.0, 1.0)
    if two:
        scale(weights[0] * loss_of(model, make_batch(i))).backward()
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model, enabled=two):
        scale(weights[1] * loss_of(model, make_batch(i + 50))).backward()
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad()


def everything(optimizer, model):
    return [*model.state_dict().values(), *state_tensors(optimizer), *getattr(optimizer, "fisher", {}).values()]


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_equals_a_number(kind, scaled):
    """Weights, statistics, momentum and F have equal bits; under a GradScaler too."""
    runs = []
    for as_tensors in (False, True):
        model = make_net()
        optimizer = make(kind, model, as_tensors)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
        for i in range(3):
            step(optimizer, model, i, scaler)
        runs.append(everything(optimizer, model))
    assert_same_bits(*runs)


@pytest.mark.parametrize("kind, key", KEYS)
def test_float32_tensors_work(kind, key):
    """torch.tensor(0.01) is one; it is converted, and a tensor that is written to stays the user's."""
    value = torch.tensor(0.25)
    model, twin = make_net(), make_net()
    flat, _ = KINDS[kind]
    optimizers = [flat(m.parameters(), SGD, lr=0.1, **{key: v}) for m, v in ((model, value), (twin, 0.125))]
    value.fill_(0.125)
    for o, m in zip(optimizers, (model, twin)):
        step(o, m, 0)
    assert_same_bits(model.parameters(), twin.parameters())


class NoValueIsRead(TorchDispatchMode):
    """Fails if a tensor's value becomes a Python number: on a GPU, this would be a host sync."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return func(*args, **(kwargs or {}))


def test_reading_a_value_is_detected():
    t = torch.ones(())
    for read in (t.item, lambda: bool(t), lambda: float(t), lambda: t == 0 or None):
        with pytest.raises(AssertionError, match="a value was read"), NoValueIsRead():
            read()


@pytest.mark.parametrize("form", ["explicit", "closure", "two steps"])
@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_reads_a_value(kind, as_tensors, form):
    """From the perturbation to the base optimizer's step, for hyperparameters as numbers or tensors."""
    model, batch = make_net(), make_batch(0)
    optimizer = make(kind, model, as_tensors)
    ramp = CosineRamp(optimizer, "rho" if "sam" in kind else "sigma", 0.1, 0.01, total_steps=4)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    with NoValueIsRead():
        for _ in range(2):
            closure()
            if form == "closure":
                optimizer.step(closure)
            elif form == "explicit":
                with optimizer.perturbed():
                    loss_of(model, batch).backward()
                optimizer.step()
            else:
                optimizer.first_step(zero_grad=True)
                loss_of(model, batch).backward()
                optimizer.second_step(zero_grad=True)
            ramp.step()


class NothingCrosses(NoValueIsRead):
    """Also fails if an operation uses tensors of the host and of a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        seen = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        assert len(seen) < 2, f"{func} goes between {seen}"
        return out


class Still(SGD):
    """Its step does nothing: a fused step requires a real GPU."""

    def step(self, closure=None):
        assert self.grad_scale is not None


DEVICES = [
    *((kind, grouped, "cuda:1") for kind in KINDS for grouped in (False, True)),
    *((kind, True, "cpu") for kind in ("rwp", "mrwp", "regenerating")),  # SAM's single norm has to be copied across
]


@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("kind, grouped, other", DEVICES)
def test_no_step_copies_between_host_and_gpus(kind, grouped, other, as_tensors):
    """On GPUs simulated by FakeTensorMode: data shared between parts is copied between GPUs, or already present."""
    with FakeTensorMode(), flatops.backend("reference"):
        params = [nn.Parameter(torch.empty(4, 3, device=device)) for device in ("cuda:0", other) * 2]
        groups = [{"params": params[::2]}, {"params": params[1::2]}] if grouped else params
        flat, options = KINDS[kind]
        options = tensors(options) if as_tensors else options
        optimizer = flat(groups, Still, lr=0.1, **options)
        # As a GradScaler leaves them for a fused base.
        optimizer.grad_scale = optimizer.found_inf = torch.ones((), device="cuda:0")
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            with NothingCrosses():
                with optimizer.perturbed():
                    for p in params:
                        p.grad = torch.ones_like(p)
                optimizer.step()


def test_crossing_is_detected():
    with FakeTensorMode():
        on_gpu = torch.empty(3, device="cuda:0")
        for cross in (on_gpu.cpu, on_gpu.cpu().cuda, lambda: on_gpu + on_gpu.sum().cpu()):
            with pytest.raises(AssertionError, match="goes between"), NothingCrosses():
                cross()


@pytest.mark.parametrize("kind, key", KEYS)
def test_a_tensor_given_on_the_host_moves_once_and_is_shared(kind, key):
    """By all groups on a device: they remain one operator call."""
    with FakeTensorMode():
        devices = ("cuda:0", "cuda:0", "cuda:1")
        groups = [{"params": [nn.Parameter(torch.empty(3, device=device))]} for device in devices]
        optimizer = KINDS[kind][0](groups, SGD, lr=0.1, **{key: torch.empty(())})
        first, second, elsewhere = (group[key] for group in optimizer.param_groups)
        assert first is second and str(first.device) == "cuda:0" and str(elsewhere.device) == "cuda:1"


# --- groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, key, operator", [("sam", "rho", "ascend_"), ("rwp", "sigma", "perturb_")])
def test_groups_that_share_a_tensor_are_one_operator_call(monkeypatch, kind, key, operator):
    """Equal tensors are not shared ones: comparing their values would need a host sync."""
    model, calls = make_net(), []
    original = getattr(ops, operator)
    monkeypatch.setattr(ops, operator, lambda *a, **k: (calls.append(len(a[0])), original(*a, **k))[1])
    for tensor, expected in ((None, [8]), (torch.tensor(0.3), [2, 6])):
        groups = [{"params": model.features.parameters()}, {"params": model.head.parameters()}]
        if tensor is not None:
            groups[0][key], groups[1][key] = tensor, tensor.clone()
        optimizer = KINDS[kind][0](groups, SGD, lr=0.1, **{key: torch.tensor(0.3)})
        step(optimizer, model, 0)
        assert sorted(calls) == expected
        calls.clear()


@pytest.mark.parametrize("kind, key", KEYS)
def test_a_ramp_writes_to_tensors_in_place(kind, key):
    """The tensor remains the one that a captured graph reads; a group at 0 stays at 0; numbers stay numbers."""
    model = make_net()
    a, b, c = model.features[0].parameters(), model.features[1].parameters(), model.head.parameters()
    own, zero = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.0)
    groups = [{"params": a, key: own}, {"params": b, key: zero}, {"params": c, key: 0.3}]
    optimizer = KINDS[kind][0](groups, SGD, lr=0.1)
    ramp = CosineRamp(optimizer, key, 0.1, 0.2, total_steps=3)
    for _ in range(3):
        assert own.item() == ramp.value and zero.item() == 0.0
        assert optimizer.param_groups[0][key] is own and optimizer.param_groups[2][key] == ramp.value
        ramp.step()
    assert own.item() == 0.2


# --- checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved, loaded", [(False, True), (True, False), (True, True)])
def test_checkpoints_of_numbers_and_of_tensors_are_the_same(kind, saved, loaded):
    """Each loads the other's and continues with equal bits; tensors are written to in place."""
    model, optimizer = make_net(), None
    optimizer = make(kind, model, saved)
    step(optimizer, model, 0)
    fresh_model = make_net(1)
    fresh = make(kind, fresh_model, loaded, **{"rho" if "sam" in kind else "sigma": 0.7})
    step(fresh, fresh_model, 5)  # a past that loading must erase
    live = [{k: v for k, v in g.items() if k in fresh.options and torch.is_tensor(v)} for g in fresh.param_groups]
    fishers = list(getattr(fresh, "fisher", {}).values())
    fresh_model.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group, tensors_before in zip(fresh.param_groups, live):
        assert all(group[key] is value for key, value in tensors_before.items())
    assert all(f is g for f, g in zip(fishers, getattr(fresh, "fisher", {}).values()))
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for o, m in ((optimizer, model), (fresh, fresh_model)):
        step(o, m, 1)
    assert_same_bits(everything(optimizer, model), everything(fresh, fresh_model))


@pytest.mark.parametrize("kind, key", KEYS)
def test_groups_that_share_a_tensor_separate_if_the_checkpoint_differs(kind, key):
    """One tensor cannot hold two values: the second group gets its own."""
    model, other = make_net(), make_net()
    optimizer, different = make(kind, model), make(kind, other, as_tensors=False)
    shared = optimizer.param_groups[0][key]
    assert optimizer.param_groups[1][key] is shared
    different.param_groups[1][key] = 0.5
    optimizer.load_state_dict(different.state_dict())
    assert optimizer.param_groups[0][key] is shared
    values = [float(group[key]) for group in optimizer.param_groups]
    assert values == [group[key] for group in different.param_groups]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: o.state_dict()], ids=["deepcopy", "state_dict"])
@pytest.mark.parametrize("kind, key", KEYS)
def test_a_copy_does_not_follow_the_tensor(kind, key, how):
    """Neither a copy of the optimizer nor a state_dict changes when the live tensor does."""
    optimizer = make(kind, make_net())
    taken = how(optimizer)
    groups = taken["param_groups"] if isinstance(taken, dict) else taken.param_groups
    before = float(groups[0][key])
    optimizer.param_groups[0][key].fill_(0.9)
    assert float(groups[0][key]) == before != 0.9
