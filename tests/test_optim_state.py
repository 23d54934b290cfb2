"""Checkpoints and copies: training that stops and resumes equals training that does not stop, to the bit."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile

import pytest
import torch
from models import assert_same_bits, loss_of, make_batch, make_net, state_tensors
from torch import nn

import flatops

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
KINDS = {
    "sam": (flatops.SAM, SGD, {"rho": 0.1, "lr": 0.05, "momentum": 0.9}),
    "asam": (flatops.SAM, ADAMW, {"rho": 1.0, "adaptive": True, "lr": 0.01}),
    "rwp": (flatops.RWP, SGD, {"sigma": 0.05, "seed": 2**63 + 5, "lr": 0.05, "momentum": 0.9}),
    "arwp, no momentum": (flatops.RWP, SGD, {"sigma": 0.05, "eta": 3.0, "lr": 0.05}),
    "arwp": (flatops.RWP, ADAMW, {"sigma": 0.05, "eta": 3.0, "lr": 0.01}),
    "marwp": (flatops.RWP, SGD, {"sigma": 0.05, "lam": 0.5, "eta": 3.0, "lr": 0.05, "momentum": 0.9}),
    "sam, rho on the device": (
        flatops.SAM,
        SGD,
        {"rho": torch.tensor(0.1, dtype=torch.float64), "lr": 0.05, "momentum": 0.9},
    ),
    "rwp, sigma and seed on the device": (
        flatops.RWP,
        SGD,
        {"sigma": torch.tensor(0.05, dtype=torch.float64), "seed": torch.tensor(-5), "lr": 0.05, "momentum": 0.9},
    ),
    "regenerating": (flatops.RWP, SGD, {"sigma": 0.05, "restore": "regenerate", "lr": 0.05, "momentum": 0.9}),
}


def make(kind, net=0, **changed):
    model = make_net(net)
    flat, base, options = KINDS[kind]
    groups = [{"params": model.features.parameters()}, {"params": model.head.parameters(), "lr": 0.02}]
    return model, flat(groups, base, **{**copy.deepcopy(options), **changed})


def passes(model, optimizer, i):
    two = isinstance(optimizer, flatops.SAM) or optimizer.perturbed_weight < 1
    weights = (0.5, 0.5) if getattr(optimizer, "perturbed_weight", 1) < 1 else (1.0, 1.0)
    if two:
        (weights[0] * loss_of(model, make_batch(i))).backward()
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model, enabled=two):
        (weights[1] * loss_of(model, make_batch(i + 50))).backward()


def train(model, optimizer, steps):
    for i in steps:
        passes(model, optimizer, i)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["arwp", "arwp, no momentum"])
def test_loading_its_own_state_changes_nothing(kind):
    model, optimizer = make(kind)
    train(model, optimizer, range(2))
    before = [f.clone() for f in optimizer.fisher.values()]
    optimizer.load_state_dict(optimizer.state_dict())
    assert before and all(f.any() for f in before)
    assert_same_bits(before, optimizer.fisher.values())


def everything(model, optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    fisher = getattr(optimizer, "fisher", {})
    return [
        *model.state_dict().values(),
        *state_tensors(optimizer),
        *(fisher.get(p, torch.zeros(p.shape[:1])) for p in params),  # an F that has not been accumulated is zero
    ]


def options_of(optimizer):
    """Everything in param_groups except the parameters."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [{k: v.item() if torch.is_tensor(v) else v for k, v in group.items()} for group in groups]


def assert_continues_like(ours, theirs, first=3):
    """Two (model, optimizer) pairs are equal now and after further steps."""
    for _ in range(2):
        assert_same_bits(everything(*ours), everything(*theirs))
        assert options_of(ours[1]) == options_of(theirs[1])
        train(*ours, range(first, first + 2))
        train(*theirs, range(first, first + 2))
    assert_same_bits(everything(*ours), everything(*theirs))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- resume --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_equals_no_interruption(kind, at):
    """Saved at any time, loaded into a fresh model and optimizer with other settings: the same bits."""
    model, optimizer = make(kind)
    train(model, optimizer, range(at))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = {"rho": 0.7} if isinstance(optimizer, flatops.SAM) else {"sigma": 0.7, "seed": 9}
    for key, value in other.items():
        if isinstance(was := KINDS[kind][2].get(key), torch.Tensor):
            other[key] = torch.tensor(value, dtype=was.dtype)
    fresh_model, fresh = make(kind, net=1, lr=1.0, **other)
    train(fresh_model, fresh, range(1))  # a past that loading must erase
    fresh_model.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    assert_continues_like((fresh_model, fresh), (model, optimizer))


def test_resume_between_the_pass_and_the_step():
    """The draw counts passes: a checkpoint after a skipped step does not draw the same noise again."""
    model, optimizer = make("rwp")
    passes(model, optimizer, 0)
    optimizer.zero_grad()
    state = optimizer.state_dict()
    assert [group["draw"] for group in state["param_groups"]] == [1, 1]
    fresh_model, fresh = make("rwp")
    fresh_model.load_state_dict(model.state_dict())
    fresh.load_state_dict(state)
    with optimizer.perturbed(), fresh.perturbed():
        assert_same_bits(model.parameters(), fresh_model.parameters())


def test_loading_erases_an_earlier_pass():
    """A pass before load_state_dict does not count for the next step: step(closure) perturbs."""
    model, optimizer = make("sam")
    passes(model, optimizer, 0)
    optimizer.load_state_dict(optimizer.state_dict())
    calls = []

    def closure():
        calls.append(optimizer.is_perturbed)
        optimizer.zero_grad()
        loss = loss_of(model, make_batch(0))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert calls == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_holds_plain_values_and_does_not_change(kind):
    """Hyperparameters and draw are numbers and strings in it, and later steps do not change them."""
    model, optimizer = make(kind)
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    groups = copy.deepcopy(state["param_groups"])
    for group in groups:
        for key in optimizer.options:
            assert type(group[key]) in (int, float, str, bool), key
    train(model, optimizer, range(1, 3))
    optimizer.param_groups[0]["lr"] = 0.5
    assert state["param_groups"] == groups


def test_loading_shares_no_memory_with_the_checkpoint():
    """Training after loading changes neither the F in the loaded state_dict nor the one in its source."""
    model, optimizer = make("arwp, no momentum")
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    before, fishers = copy.deepcopy(state), [f.clone() for f in optimizer.fisher.values()]
    other_model, other = make("arwp, no momentum")
    other.load_state_dict(state)
    train(other_model, other, range(2))
    torch.testing.assert_close(state["state"], before["state"], rtol=0, atol=0)
    assert_same_bits(optimizer.fisher.values(), fishers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_load_changes_nothing(kind):
    """A checkpoint with other groups is a ValueError, and training continues as if nothing had been loaded."""
    ours, theirs = make(kind), make(kind)
    for pair in (ours, theirs):
        train(*pair, range(2))
    model = make_net()
    bad = KINDS[kind][0](model.parameters(), KINDS[kind][1], **{**KINDS[kind][2], "lr": 9.0}).state_dict()
    with pytest.raises(ValueError, match="group"):
        ours[1].load_state_dict(bad)
    assert_continues_like(ours, theirs)


def test_runtime_state_survives_a_load():
    """Proxies that copied the optimizer's attributes still see its changes after load_state_dict."""
    _, optimizer = make("rwp")
    proxy = object.__new__(type(optimizer))
    proxy.__dict__ = dict(optimizer.__dict__)
    optimizer.load_state_dict(optimizer.state_dict())
    with optimizer.perturbed():
        assert proxy.is_perturbed


def test_state_ids_are_names_not_positions():
    """A state_dict's ids are opaque, and names in distributed checkpoints: F is matched by them like momentum."""
    model, optimizer = make("arwp")
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    rename = {i: f"name {i}" for group in state["param_groups"] for i in group["params"]}
    renamed = {
        "state": {rename[i]: entry for i, entry in state["state"].items()},
        "param_groups": [{**g, "params": [rename[i] for i in g["params"]]} for g in state["param_groups"]],
    }
    fresh_model, fresh = make("arwp")
    fresh_model.load_state_dict(model.state_dict())
    fresh.load_state_dict(renamed)
    assert_continues_like((fresh_model, fresh), (model, optimizer))


# --- from and to the base optimizer --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_the_base_optimizer_loads(kind):
    """Momentum and lr are loaded; rho, sigma, seed and draw keep this optimizer's values."""
    model, optimizer = make(kind, **({} if "sam" in kind else {"seed": 5}))
    flat, base, options = KINDS[kind]
    ours = {k: v for k, v in options_of(optimizer)[0].items() if k in optimizer.options}
    plain_model = make_net()
    groups = [{"params": plain_model.features.parameters()}, {"params": plain_model.head.parameters()}]
    plain = base(groups, **{k: v for k, v in options.items() if k in ("momentum",)}, lr=0.03)
    for i in range(2):
        loss_of(plain_model, make_batch(i)).backward()
        plain.step()
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    assert_same_bits(state_tensors(optimizer), state_tensors(plain))
    for group in options_of(optimizer):
        assert group["lr"] == 0.03 and ours == {k: group[k] for k in ours}
    train(model, optimizer, range(2))


@pytest.mark.filterwarnings("ignore:.*without a perturbed pass:UserWarning")
@pytest.mark.parametrize("when", ["at the start", "after a step"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_optimizer_loads_our_checkpoint(kind, when):
    """Whenever it was saved, even if a parameter had no gradient: the base optimizer steps as ours would."""
    model, optimizer = make(kind)
    unused = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [unused]})
    if when == "after a step":
        train(model, optimizer, range(2))
    plain_model, plain_unused = copy.deepcopy(model), nn.Parameter(torch.ones(3))
    flat, base, options = KINDS[kind]
    groups = [{"params": m.parameters()} for m in (plain_model.features, plain_model.head)]
    plain = base([*groups, {"params": [plain_unused]}], lr=9.0)
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    for m, o, p in ((model, optimizer, unused), (plain_model, plain, plain_unused)):
        loss_of(m, make_batch(7)).backward()
        p.grad = torch.ones(3)
        o.step()
    assert_same_bits([*model.parameters(), unused], [*plain_model.parameters(), plain_unused])


# --- copies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_continue_identically_and_independently(kind, how, at):
    """A copy of (model, optimizer) at any time: the same class, the same future steps, no shared memory."""
    pair = make(kind)
    train(*pair, range(at))
    twin = how(pair)
    assert type(twin[1]) is type(pair[1])
    assert twin[1].param_groups[1]["params"][0] is next(twin[0].head.parameters())
    before = [t.clone() for t in everything(*pair)]
    train(*twin, range(at, at + 1))
    assert_same_bits(everything(*pair), before)
    train(*pair, range(at, at + 1))
    assert_continues_like(twin, pair)


def test_a_copy_keeps_its_stream():
    """Replicas differ by their stream; a copy draws the noise of the original."""
    model = make_net()
    optimizer = flatops.RWP(model.parameters(), SGD, lr=0.1, sigma=0.1, stream=4)
    twin_model, twin = copy.deepcopy((model, optimizer))
    with optimizer.perturbed(), twin.perturbed():
        assert_same_bits(model.parameters(), twin_model.parameters())


# --- distributed checkpoints ---------------------------------------------------------------------------

state_dict_api = pytest.importorskip("torch.distributed.checkpoint.state_dict")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:.*without a perturbed pass:UserWarning")  # it initialises state by a step with lr 0
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("by", ["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_from_a_distributed_checkpoint(kind, by, flatten):
    """With get_ and set_optimizer_state_dict; with dcp.save and dcp.load into a fresh optimizer's template."""
    options = state_dict_api.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = make(kind)
    train(model, optimizer, range(3))
    state = state_dict_api.get_optimizer_state_dict(model, optimizer, options=options)
    fresh_model, fresh = make(kind, net=1)
    fresh_model.load_state_dict(model.state_dict())
    if by == "disk":
        import torch.distributed.checkpoint as dcp

        with tempfile.TemporaryDirectory() as folder:
            dcp.save({"optimizer": state}, checkpoint_id=folder, no_dist=True)
            template = {"optimizer": state_dict_api.get_optimizer_state_dict(fresh_model, fresh, options=options)}
            dcp.load(template, checkpoint_id=folder, no_dist=True)
        state = template["optimizer"]
    state_dict_api.set_optimizer_state_dict(fresh_model, fresh, copy.deepcopy(state), options=options)
    assert_continues_like((fresh_model, fresh), (model, optimizer))
