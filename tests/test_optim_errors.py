"""Bad input: the right error, naming the argument, before anything changes."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import torch
from models import all_bits, assert_same_bits, loss_of, make_batch, make_net
from torch import nn

import flatops
from flatops import CosineRamp

SGD = torch.optim.SGD
NAN, INF = math.nan, math.inf
ONES = torch.ones(2)


def weights(dtype=torch.float32):
    return [nn.Parameter(torch.ones(3, 2, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]


def sam(params=None, base=SGD, **options):
    return flatops.SAM(weights() if params is None else params, base, **{"lr": 0.1, **options})


def rwp(params=None, base=SGD, **options):
    return flatops.RWP(weights() if params is None else params, base, **{"lr": 0.1, **options})


# --- what the constructors and groups take -------------------------------------------------------------

OPTIONS = [
    *((sam, "rho", bad) for bad in (-0.1, NAN, INF, -INF, "0.1", None, True, ONES, ONES[0].int())),
    *((rwp, "sigma", bad) for bad in (-0.1, NAN, INF, -INF, "0.1", None, True, ONES, ONES[0].int())),
    *((rwp, "eta", bad) for bad in (-0.1, NAN, INF, None, ONES[0])),
    *((rwp, "lam", bad) for bad in (-0.1, 1.1, NAN, INF, None, ONES[0])),
    *((rwp, "beta", bad) for bad in (-0.1, 1.1, NAN, INF, None, ONES[0])),
    *((rwp, "seed", bad) for bad in (-1, 2**64, 0.5, "0", ONES[0], ONES.long())),
    *((rwp, "restore", bad) for bad in ("EXACT", "", None, 1)),
]


@pytest.mark.parametrize("make, name, bad", OPTIONS, ids=lambda v: getattr(v, "__name__", None) or repr(v))
def test_a_hyperparameter_out_of_range(make, name, bad):
    """For the whole optimizer, for a group, and for a group added later: a ValueError with its name."""
    with pytest.raises(ValueError, match=name):
        make(**{name: bad})
    with pytest.raises(ValueError, match=name):
        first, second = weights()
        make([{"params": [first]}, {"params": [second], name: bad}])
    optimizer = make()
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": weights(), name: bad})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("bad", [-1, 2**31, 0.5])
def test_a_stream_out_of_range(bad):
    """A ValueError with its name: streams are integers of 31 bits."""
    with pytest.raises(ValueError, match="stream"):
        rwp(stream=bad)


@pytest.mark.parametrize("make", [sam, rwp])
@pytest.mark.parametrize(
    "base",
    [
        "SGD",
        None,
        SGD(weights(), lr=0.1),
        functools.partial(SGD, momentum=0.9),
        nn.Linear,
        torch.optim.lr_scheduler.StepLR,
        torch.optim.LBFGS,
        flatops.SAM,
        type(flatops.SAM(weights(), SGD, lr=0.1)),
    ],
    ids=["name", "none", "instance", "partial", "module", "scheduler", "LBFGS", "SAM", "SAMSGD"],
)
def test_a_base_that_is_not_an_optimizer_class(make, base):
    """An instance is the likeliest mistake; LBFGS and our own classes do not step once from p.grad."""
    with pytest.raises(TypeError, match="base"):
        make(base=base)


@pytest.mark.parametrize("make", [sam, rwp])
@pytest.mark.parametrize("params", [[], (), iter(())], ids=["list", "tuple", "iterator"])
def test_no_parameters(make, params):
    """An empty list, or an exhausted generator: a ValueError about parameters."""
    with pytest.raises(ValueError, match="parameter"):
        make(params)


@pytest.mark.parametrize("make", [sam, rwp])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex32, torch.float8_e4m3fn], ids=str)
def test_parameters_of_unsupported_dtypes(make, dtype):
    """Integers and complex halves, initially or in a group added later: a TypeError with position and dtype."""
    bad = nn.Parameter(torch.zeros(3).to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"params\[1\] is {dtype}"):
        make([weights()[0], bad])
    optimizer = make()
    with pytest.raises(TypeError, match=rf"params\[0\] is {dtype}"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("make", [sam, rwp])
def test_params_of_the_wrong_type(make):
    """One tensor instead of a list, numbers, groups that are not dicts: a TypeError about params."""
    for params in (torch.ones(3), [1.0, 2.0]):
        with pytest.raises(TypeError, match="param"):
            make(params)
    with pytest.raises(TypeError, match="param_group"):
        make().add_param_group(weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_regenerating_low_precision(dtype):
    """The low bits would be lost: a TypeError naming the option, initially and in a later group."""
    with pytest.raises(TypeError, match="restore='regenerate'"):
        rwp(weights(dtype), restore="regenerate")
    optimizer = rwp(restore="regenerate")
    with pytest.raises(TypeError, match="restore='regenerate'"):
        optimizer.add_param_group({"params": weights(dtype)})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": weights(dtype), "restore": "exact"})


@pytest.mark.parametrize("make", [sam, rwp])
def test_unknown_options(make):
    """A misspelt option is passed to the base optimizer, which does not know it either."""
    with pytest.raises(TypeError, match="sigmaa"):
        make(sigmaa=0.1)


# --- at the wrong moment -------------------------------------------------------------------------------

WHILE_PERTURBED = {
    "perturbed": lambda o: o.perturbed().__enter__(),
    "first_step": lambda o: o.first_step(),
    "step": lambda o: o.step(),
    "step with a closure": lambda o: o.step(lambda: pytest.fail("the closure ran")),
    "state_dict": lambda o: o.state_dict(),
    "load_state_dict": lambda o: o.load_state_dict({"state": {}, "param_groups": []}),
    "add_param_group": lambda o: o.add_param_group({"params": weights()}),
    "deepcopy": lambda o: copy.deepcopy(o),
    "copy": lambda o: copy.copy(o),
    "pickle": lambda o: pickle.dumps(o),
}


@pytest.mark.parametrize("way", ["perturbed", "first_step"])
@pytest.mark.parametrize("what", WHILE_PERTURBED)
@pytest.mark.parametrize("kind", ["sam", "rwp"])
def test_calls_that_are_refused_while_weights_are_perturbed(kind, what, way):
    """A clear RuntimeError; the pass continues, and leaving it restores weights, state and groups."""
    model = make_net()
    flat = {"sam": flatops.SAM, "rwp": flatops.RWP}[kind]
    optimizer = flat(model.parameters(), SGD, lr=0.1, momentum=0.9)
    loss_of(model, make_batch(0)).backward()
    before = all_bits(model.parameters())
    if way == "perturbed":
        with optimizer.perturbed():
            inside = all_bits(model.parameters())
            with pytest.raises(RuntimeError, match="perturbed"):
                WHILE_PERTURBED[what](optimizer)
            assert optimizer.is_perturbed
            assert_same_bits(all_bits(model.parameters()), inside)
    else:
        optimizer.first_step()
        inside = all_bits(model.parameters())
        with pytest.raises(RuntimeError, match="perturbed"):
            WHILE_PERTURBED[what](optimizer)
        assert_same_bits(all_bits(model.parameters()), inside)
        optimizer.restore()
    assert_same_bits(all_bits(model.parameters()), before)
    assert not optimizer.is_perturbed and not optimizer.state and len(optimizer.param_groups) == 1


@pytest.mark.parametrize("make", [sam, rwp])
def test_second_step_without_first_step(make):
    """A RuntimeError that names first_step(), and no step."""
    optimizer = make()
    before = all_bits(optimizer.param_groups[0]["params"])
    with pytest.raises(RuntimeError, match=r"first_step\(\)"):
        optimizer.second_step()
    assert_same_bits(all_bits(optimizer.param_groups[0]["params"]), before)


@pytest.mark.parametrize(
    "enter", [lambda o: o.perturbed().__enter__(), lambda o: o.first_step()], ids=["perturbed", "first_step"]
)
def test_sam_without_gradients(enter):
    """Without a direction: a RuntimeError that says what to do first; afterwards it works."""
    optimizer = sam()
    params = optimizer.param_groups[0]["params"]
    before = all_bits(params)
    with pytest.raises(RuntimeError, match="gradient"):
        enter(optimizer)
    assert_same_bits(all_bits(params), before)
    for p in params:
        p.grad = torch.ones_like(p)
    with optimizer.perturbed():
        assert optimizer.is_perturbed


@pytest.mark.parametrize("make", [sam, rwp])
@pytest.mark.parametrize("closure", [1.0, torch.ones(()), "closure"], ids=["number", "loss", "string"])
def test_a_closure_that_is_not_callable(make, closure):
    """step(loss) is a mistake: a TypeError naming the closure, and no step."""
    optimizer = make(momentum=0.9)
    params = optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = torch.ones_like(p)
    before = all_bits(params)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(closure)
    assert_same_bits(all_bits(params), before)
    assert not optimizer.state


@pytest.mark.parametrize(
    "arguments, name",
    [
        (("sigmaa", 0.1, 0.2, 10), "key"),
        (("sigma", -0.1, 0.2, 10), "start"),
        (("sigma", 0.1, NAN, 10), "end"),
        (("sigma", NAN, 0.1, 10), "start"),
        (("sigma", 0.1, INF, 10), "end"),
        (("sigma", 0.1, 0.2, 0), "total_steps"),
        (("sigma", 0.1, 0.2, -5), "total_steps"),
    ],
)
def test_invalid_ramps(arguments, name):
    """A ValueError naming the argument; the groups keep their values."""
    optimizer = rwp(sigma=0.3)
    with pytest.raises(ValueError, match=name):
        CosineRamp(optimizer, *arguments)
    assert optimizer.param_groups[0]["sigma"] == 0.3


@pytest.mark.parametrize("make", [flatops.SAM, flatops.RWP, flatops.SSAM])
def test_base_optimizer_instead_of_base(make):
    """Other libraries call it base_optimizer: the error gives the name used here."""
    with pytest.raises(TypeError, match="is the argument base, not base_optimizer: write base=SGD"):
        make(weights(), base_optimizer=SGD, lr=0.1)
    with pytest.raises(TypeError, match="base must be an optimizer class"):
        make(weights())
