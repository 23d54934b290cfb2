"""PyTorch's own test inputs for every optimizer of torch.optim, with every class of flatops.

An optimizer's twin is its base over the same parameters. It is given the gradients of our passes, so weights and state
have to be equal to the bit after every step; weights that were not restored, gradients taken elsewhere or another kind
of step would show. Where torch raises an error, flatops raises the same one.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import inspect
import io
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import flatops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def classes_of(module, kind):
    """Name -> class, for the classes of a kind in a module, except the kind itself."""
    found = {c.__name__: c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, kind)}
    return {name: found[name] for name in sorted(found) if name.strip("_") != kind.__name__}


# name -> (class, options)
METHODS = {
    "rwp": (flatops.RWP, {"sigma": 0.05, "seed": 0}),
    "arwp": (flatops.RWP, {"sigma": 0.05, "seed": 0, "eta": 1.0}),
    "m-rwp": (flatops.RWP, {"sigma": 0.05, "seed": 0, "lam": 0.5}),
    "sam": (flatops.SAM, {"rho": 0.1}),
    "asam": (flatops.SAM, {"rho": 0.5, "adaptive": True}),
    "ssam": (flatops.SSAM, {"rho": 0.1, "seed": 0, "mask": "dynamic", "drop": "random", "update_every": 1}),
}
SAMS = ("sam", "asam", "ssam")
DENSE_ONLY = ("arwp", *SAMS)  # F and the norm need dense gradients
BASES = classes_of(torch.optim, torch.optim.Optimizer)

# Unsupported combinations: methods, base, error, text of the error.
EXCLUDED = [
    (METHODS, "LBFGS", TypeError, "steps once"),  # it calls its closure many times per step, each time at other weights
    (SAMS, "Adadelta", ValueError, "rho"),  # its own rho is a decay
    (DENSE_ONLY, "SparseAdam", TypeError, "sparse"),  # it takes sparse gradients only
]  # fmt: skip

# What torch's own class cannot step: base -> the parameters that it takes.
TAKES = {"Muon": lambda p: p.dim() == 2, "Adafactor": lambda p: p.numel() > 0}

LEFT_OUT = {(method, base): (error, match) for methods, base, error, match in EXCLUDED for method in methods}
CASES = [(method, base) for method in METHODS for base in BASES if (method, base) not in LEFT_OUT]
every_case = pytest.mark.parametrize("method, base", CASES)


def every_case_with(flag):
    """The cases whose base takes this argument."""
    return pytest.mark.parametrize(
        "method, base", [(m, b) for m, b in CASES if flag in inspect.signature(BASES[b]).parameters]
    )


@functools.cache
def info(base):
    """PyTorch's test data for an optimizer. Importing it takes seconds and freezes the flags of torch.backends."""
    forbid, torch.backends.disable_global_flags = torch.backends.disable_global_flags, lambda: None
    try:
        from torch.testing._internal.common_optimizers import optim_db
    finally:
        torch.backends.disable_global_flags = forbid
    known = [i for i in optim_db if i.optim_cls.__name__ == base]
    return known[0] if known else pytest.skip(f"PyTorch's suite has no inputs for {base}")


@pytest.fixture(autouse=True)
def capturable_anywhere(monkeypatch):
    """torch refuses capturable=True on a CPU, which captures no graphs; the arithmetic is the same."""
    for base in BASES.values():
        module, name = inspect.getmodule(base), "_get_capturable_supported_devices"
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda *_, **__: ["cpu", "cuda"])


class Input(NamedTuple):
    what: str
    kwargs: dict
    turn: int  # tests with several variants choose by it, so that inputs and methods alternate between them


def inputs(method, base):
    """Every input of PyTorch's suite; its inputs for CUDA are those for a CPU and more.

    Implementations take turns, so that every input meets each of them in one RWP and one SAM method.
    """
    # A differentiable step is tested separately.
    flags = [None, *(flag for flag in info(base).supported_impls if flag != "differentiable")]
    for turn, given in enumerate(info(base).optim_inputs_func("cuda"), start=list(METHODS).index(method)):
        flag = flags[turn % len(flags)]
        yield Input(f"{given.desc}, {flag}", {**given.kwargs, **({flag: True} if flag else {})}, turn)


def over_inputs(test):
    """Runs a test for every input, and names the inputs that fail."""

    @functools.wraps(test)
    def run(method, base, **parameters):
        failed = {}
        for given in inputs(method, base):
            try:
                test(method, base, **parameters, given=given)
            except Exception as error:
                failed[given.what] = error
        if failed:
            raise AssertionError(f"{len(failed)} inputs: {failed}") from next(iter(failed.values()))

    del run.__wrapped__  # hides the additional argument from pytest
    run.__signature__ = inspect.Signature([p for p in inspect.signature(test).parameters.values() if p.name != "given"])
    return run


# --- an optimizer and its twin ---------------------------------------------------------------------------


def same(a, b):
    """Equal, not merely close."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(*(t.to_dense() if t.is_sparse else t for t in (a, b)))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if type(a) is type(b) and isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def outcome(act):
    """The error that it raises, or None."""
    try:
        act()
    except Exception as error:
        return error


def make(method, base, strength=True, **kwargs):
    """The optimizer's class with everything but the parameters."""
    flat, options = METHODS[method]
    if not strength:
        options = {key: 0.0 if key in ("sigma", "rho") else value for key, value in options.items()}
    return functools.partial(flat, base=BASES.get(base, base), **options, **copy.deepcopy(kwargs))


def parameters(kind, base):
    """The same at every call, in many shapes, layouts and dtypes. The loss does not use the first."""
    generator, c64, c128 = torch.Generator().manual_seed(0), torch.complex64, torch.complex128
    draw = lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)
    made = {
        "real": lambda: [draw(4, 3), draw(5), draw(), draw(2, 3, 2, 2).to(memory_format=torch.channels_last),
                         draw(3, 2, 2)[..., 0], draw(0, 3), draw(2, 3, dtype=torch.float64), draw(3, 2).bfloat16()],
        "complex": lambda: [draw(4, 3, dtype=c64), draw(5, dtype=c64), draw(3, 2, 2, dtype=c64)[..., 0],
                            draw(2, 3, dtype=c128), draw(4, 3)],
        "sparse": lambda: [draw(6, 3), draw(4, 2)],
        "plain": lambda: [draw(4, 3), draw(5), draw(3, 2, 2, 2)],
    }[kind]()  # fmt: skip
    return [p.requires_grad_() for p in (draw(2, 3), *filter(TAKES.get(base, lambda p: True), made))]


def backward(params, i, weight=1.0, sparse=False):
    """A loss over all parameters but the first, in batch i, times a weight."""
    rows = torch.tensor([0, 0, 1, 1 + i % 3], device=DEVICE)
    wanted = [p for p in params[1:] if p.requires_grad]
    losses = [(F.embedding(rows, p, sparse=True) if sparse else p).sin() for p in wanted]
    torch.autograd.backward(losses, [torch.full_like(loss, weight * (1 + i)) for loss in losses])
    return 1.0 + i


def by_passes(optimizer, backward):
    optimizer.zero_grad()
    for one_pass in flatops.passes(optimizer):
        with one_pass:
            backward()
    optimizer.step()


def by_closure(optimizer, backward):
    def closure():
        optimizer.zero_grad()
        return backward()

    optimizer.step(closure)


def by_hand(optimizer, backward):
    optimizer.zero_grad()
    if isinstance(optimizer, flatops.SAM):
        backward()
    elif optimizer.clean_weight:
        backward(optimizer.clean_weight)
    optimizer.first_step(zero_grad=isinstance(optimizer, flatops.SAM))
    backward(getattr(optimizer, "perturbed_weight", 1.0))
    optimizer.second_step()


FORMS = (by_passes, by_closure, by_hand)


class Pair:
    """An optimizer of flatops and its base, in two groups of which one has its own options."""

    def __init__(self, method, base, kind="real", strength=True, named=False, **kwargs):
        self.method, self.kind, self.strength, self.named = method, kind, strength, named
        self.again = functools.partial(Pair, method, base, kind, strength, **copy.deepcopy(kwargs))
        base_class = BASES.get(base, base)
        self.own = {"lr": 0.02, **({"sigma": 0.2, "rho": 0.2} if strength else {})}
        if "weight_decay" in inspect.signature(base_class).parameters and kind != "sparse":
            self.own["weight_decay"] = 0.05
        self.ours, self.theirs = parameters(kind, base), parameters(kind, base)
        flat, base_class = (
            make(method, base, strength, **kwargs),
            functools.partial(base_class, **copy.deepcopy(kwargs)),
        )
        self.agree(
            outcome(lambda: setattr(self, "optimizer", flat(self.groups(self.ours)))),
            outcome(lambda: setattr(self, "twin", base_class(self.groups(self.theirs)))),
        )

    def groups(self, params):
        given = [(f"p{i}", p) for i, p in enumerate(params)] if self.named else params
        return [{"params": given[:2], **self.own}, {"params": given[2:]}]

    def agree(self, ours, theirs):
        """Whether torch, and therefore flatops, raised an error."""
        if repr(ours) != repr(theirs):
            raise AssertionError(f"{ours!r}, and of the base {theirs!r}") from ours
        self.refused = theirs

    def both(self):
        return (self.ours, self.optimizer), (self.theirs, self.twin)

    def step(self, i, scale=1.0):
        """A step of both in batch i, run in one of three ways."""
        before, seen = [p.detach().clone() for p in self.ours], []

        def evaluate(weight=1.0):
            seen.append([p.detach().clone() for p in self.ours])
            return backward(self.ours, i, weight * scale, self.kind == "sparse")

        ours = outcome(lambda: FORMS[i % 3](self.optimizer, evaluate))
        self.twin.zero_grad()
        for values, weight in zip(seen[::-1], (0.5, 0.5) if self.method == "m-rwp" else (1.0,)):
            place(self.theirs, values)
            backward(self.theirs, i, weight * scale, self.kind == "sparse")
        place(self.theirs, before)
        self.agree(ours, outcome(self.twin.step))
        self.check()
        climbing = [p.grad is not None and p.numel() > 0 for p in self.ours]
        moved = [not same(value, was) for value, was, climbs in zip(seen[-1], before, climbing) if climbs]
        if self.strength and (scale or self.method not in SAMS):
            assert (any if self.method == "ssam" else all)(moved), f"not perturbed: {moved}"
        else:
            assert same(seen[-1], before), "perturbed"

    def check(self):
        assert same(self.ours, self.theirs), "weights differ"
        states = [state_of(optimizer) for _, optimizer in self.both()]
        assert same(*states), f"state {states[0]}, and of the base {states[1]}"
        others = {*self.optimizer.options, "sigma", "rho", "params"}
        groups = [without(others, optimizer.param_groups) for _, optimizer in self.both()]
        assert same(*groups), f"{groups[0]}, and of the base {groups[1]}"

    def loaded(self, change=copy.deepcopy, swap=False):
        """A new pair that continues from this one's state dicts, changed or swapped; named if this one is not."""
        fresh = self.again(named=not self.named)
        states = [optimizer.state_dict() for _, optimizer in self.both()]
        kept = copy.deepcopy(states)
        for (params, optimizer), (values, _), state in zip(fresh.both(), self.both(), states[:: -1 if swap else 1]):
            place(params, values)
            optimizer.load_state_dict(change(copy.deepcopy(state)))
        assert same(states, kept), "loading changed the state dict"
        return fresh


@torch.no_grad()
def place(params, values):
    for p, value in zip(params, values):
        p.copy_(value)


def without(names, groups):
    return [{name: value for name, value in group.items() if name not in names} for group in groups]


def state_of(optimizer):
    """What the base keeps in `state`, with parameters by position."""
    place = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    kept = {place.get(id(key), key): entry for key, entry in optimizer.state.items()}
    kept = {
        key: {n: v for n, v in entry.items() if n != "fisher"} if isinstance(entry, dict) else entry
        for key, entry in kept.items()
    }
    return {key: entry for key, entry in kept.items() if entry or not isinstance(entry, dict)}


# --- steps -----------------------------------------------------------------------------------------------

# kind of parameters and gradients -> whether torch steps them
KINDS = {
    "real": lambda known, kwargs: not known.only_supports_sparse_grads,
    "complex": lambda known, kwargs: known.supports_complex and "fused" not in kwargs,
    "sparse": lambda known, kwargs: (
        known.only_supports_sparse_grads or known.supports_sparse and not kwargs.keys() & NOT_SPARSE
    ),
}
NOT_SPARSE = {"fused", "weight_decay"}
STEPS = [(m, b, kind, True) for m, b in CASES for kind in KINDS if kind != "sparse" or m not in DENSE_ONLY]
STEPS += [(m, b, "real", False) for m, b in CASES]


@pytest.mark.parametrize("method, base, kind, strength", STEPS)
@over_inputs
def test_every_step_equals_the_bases(method, base, kind, strength, given):
    """With the gradients that the passes saw; without a perturbation it is the base alone.

    On the way a parameter is frozen, and a group added.
    """
    pair = Pair(method, base, kind, strength, **given.kwargs)
    # Adagrad of older torch versions creates its state at once, and none for a new group.
    grows = not pair.refused and not pair.twin.state
    for i in range(3):
        if pair.refused:
            break
        for params, optimizer in pair.both():
            params[2].requires_grad_(i != 1)
            if i == 2 and grows:
                params.append(params[2].detach().clone().requires_grad_())
                optimizer.add_param_group({"params": [params[-1]], **pair.own})
        pair.step(i)
    assert bool(pair.refused) != KINDS[kind](info(base), given.kwargs), pair.refused


@every_case
def test_gradients_of_zero(method, base):
    """SAM has no ascent, RWP perturbs; the step is the base's, which may decay."""
    pair = Pair(method, base, "sparse" if base == "SparseAdam" else "real")
    for i in range(3):
        pair.step(i, scale=0.0)


@every_case
def test_without_gradients_nothing_moves(method, base):
    """Nothing is trainable, the closure makes no gradient: RWP steps as the base does, SAM raises."""
    params = [p.requires_grad_(False) for p in parameters("real", base)]
    before = copy.deepcopy(params)
    error = outcome(lambda: make(method, base)(params).step(lambda: 1.0))
    assert "no parameter has a gradient" in str(error) if method in SAMS else error is None
    assert same(params, before)


@pytest.mark.parametrize("method, base", LEFT_OUT)
def test_unsupported_combinations_are_refused(method, base):
    """Before a weight changes, when the optimizer is made or by its first step."""
    params = parameters("sparse", base)
    before, (error, match) = copy.deepcopy(params), LEFT_OUT[method, base]
    with pytest.raises(error, match=match):
        by_passes(make(method, base)(params), functools.partial(backward, params, 0, sparse=True))
    assert same(params, before)


@every_case
def test_wrong_input_is_refused_as_the_base_refuses_it(method, base):
    """With the same error or warning, when the optimizer is made or by its step."""
    for wrong in info(base).optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = wrong.optimizer_error_input

        def use(optimizer_class):
            optimizer = optimizer_class(copy.deepcopy(given.params), **given.kwargs)
            for p in optimizer.param_groups[0]["params"]:
                p.requires_grad_()
            if hasattr(optimizer, "first_step"):
                optimizer.first_step()
                optimizer.second_step()
            else:
                optimizer.step()

        if issubclass(wrong.error_type, Warning):
            with pytest.warns(wrong.error_type, match=wrong.error_regex):
                make(method, base)(given.params, **given.kwargs)
        else:
            ours, theirs = outcome(lambda: use(make(method, base))), outcome(lambda: use(BASES[base]))
            assert isinstance(theirs, wrong.error_type), given.desc
            assert repr(ours) == repr(theirs), given.desc


@every_case_with("maximize")
def test_maximize_minimizes_the_negated_loss(method, base):
    """In one of two groups, whose ascent then has the opposite sign."""
    kind, results = "sparse" if base == "SparseAdam" else "real", []
    for maximize in (True, False):
        params = parameters(kind, base)
        optimizer = make(method, base)([{"params": params[:3], "maximize": maximize}, {"params": params[3:]}])
        for p in params[:3] if not maximize else ():
            p.register_hook(torch.neg)
        for i, form in enumerate(FORMS):
            form(optimizer, functools.partial(backward, params, i, sparse=kind == "sparse"))
        results.append(params)
    assert same(*results)


@pytest.mark.parametrize("method", METHODS)
def test_a_complex_parameter_is_pairs_of_reals(method):
    """Noise, norm, F and mask equal those of its view_as_real: every pass sees the same weights."""
    params = parameters("complex", "SGD")
    as_real = lambda: [torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for p in params]
    pairs = [p.clone().requires_grad_() for p in as_real()]
    optimizers, seen = [make(method, "SGD", lr=0.1)(ps) for ps in (params, pairs)], []

    def evaluate(weight=1.0):
        seen.append([p.clone() for p in as_real()])
        backward(params, 1, weight)

    def evaluate_pairs(weight=1.0):
        assert same(seen.pop(0), [p.detach().clone() for p in pairs])
        backward([torch.view_as_complex(pair) if p.is_complex() else pair for p, pair in zip(params, pairs)], 1, weight)

    for form in FORMS:
        place(pairs, as_real())  # torch's steps of complex numbers round differently
        form(optimizers[0], evaluate)
        form(optimizers[1], evaluate_pairs)
    assert not seen


@every_case_with("differentiable")
def test_gradients_flow_through_a_differentiable_step(method, base):
    """To the weights before it and to the given gradients, as through the base's."""
    for given in info(base).optim_inputs_func("cpu"):
        results = []
        for optimizer_class in (make(method, base), BASES[base]):
            w, g = (
                t.requires_grad_()
                for t in torch.rand(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            )
            p = w.clone()
            optimizer = optimizer_class([p], **given.kwargs, differentiable=True)
            p.grad = g.detach()
            with optimizer.perturbed() if hasattr(optimizer, "perturbed") else contextlib.nullcontext():
                p.grad = g
            optimizer.step()
            results.append([p, *torch.autograd.grad(p.sin().sum(), [w, g], allow_unused=True)])
        assert same(*results), given.desc


@every_case_with("fused")
def test_a_fused_step_uses_the_values_of_a_grad_scaler(method, base):
    """found_inf makes it skip, grad_scale divides; F follows both."""
    for scale, found in ((2.0, 0.0), (None, 1.0)):
        pair = Pair(method, base, fused=True)
        before = copy.deepcopy(pair.ours)
        for _, optimizer in pair.both():
            optimizer.grad_scale = scale and torch.tensor(scale, device=DEVICE)
            optimizer.found_inf = torch.tensor(found, device=DEVICE)
        pair.step(0)
        assert same(pair.ours, before) == bool(found)


# --- state dicts, copies, hooks --------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def of_an_older_torch(base, state):
    return {**state, "param_groups": without(info(base).not_og_supported_flags, state["param_groups"])}


def steps_as_numbers(state):
    number = lambda k, v: v.item() if k == "step" and isinstance(v, Tensor) else v
    entries = {key: {k: number(k, v) for k, v in entry.items()} for key, entry in state["state"].items()}
    return {**state, "state": entries}


# How a pair may continue elsewhere, as it would have here ...
AS_HERE = [
    lambda pair, base: pair.loaded(through_a_file),
    lambda pair, base: copy.deepcopy(pair),
    lambda pair, base: pickle.loads(pickle.dumps(pair)),
    lambda pair, base: pair.loaded(steps_as_numbers),
]
# ... or differently: a base has no F, mask or draw to give, and flags that an older torch did not save are off.
OTHERWISE = [
    lambda pair, base: pair.loaded(swap=True),
    lambda pair, base: pair.loaded(functools.partial(of_an_older_torch, base)),
]


@every_case
@over_inputs
def test_it_continues_elsewhere_as_the_base_does(method, base, given):
    """From a file or state dict, its own or the other's, with parameter names or without, of an older torch; a copy."""
    kind = "sparse" if base == "SparseAdam" else "real"
    pair = Pair(method, base, kind, named=given.turn % 2 == 1, **given.kwargs)
    steps = 1 + (method == "ssam")  # a mask that has been regrown
    for i in range(steps):
        pair.step(i)
    elsewhere = (AS_HERE + OTHERWISE)[given.turn % 6]
    other = elsewhere(pair, base)
    assert type(other.optimizer) is type(pair.optimizer) and repr(other.optimizer).startswith(
        type(pair.optimizer).__name__
    )
    assert public(other.optimizer) == public(pair.optimizer)
    other.check()
    other.step(steps)
    pair.step(steps)  # from state that the copy has not changed
    if elsewhere in AS_HERE:  # torch casts loaded state to the parameter's dtype, including numbers of ASGD and NAdam
        assert same(*([p for p in params if p.dtype == torch.float32] for params in (other.ours, pair.ours)))


def public(optimizer):
    return {name for name in vars(optimizer) if name[0] != "_"}


@every_case
def test_hooks_of_state_dicts(method, base):
    """Of all four kinds, in torch's order. Their entries in `state` besides parameters harm no steps and no copies."""

    def change(state, lr):
        state["param_groups"][0]["lr"] = lr

    pair = Pair(method, base, "sparse" if base == "SparseAdam" else "real")
    for _, optimizer in pair.both():
        optimizer.register_state_dict_pre_hook(lambda o: o.state.update(saved=True))
        optimizer.register_state_dict_post_hook(lambda o, state: {**state, "hooked": state["state"]["saved"]})
        optimizer.register_load_state_dict_pre_hook(lambda o, state: change(state, 0.002))
        optimizer.register_load_state_dict_pre_hook(
            lambda o, state: change(state := copy.deepcopy(state), 0.003) or state, prepend=True
        )
        optimizer.register_load_state_dict_post_hook(lambda o: o.state.update(loaded=torch.ones(())))
    for i in range(3):
        pair.step(i)
        for _, optimizer in pair.both():
            state = optimizer.state_dict()
            assert state["hooked"] and state["state"]["saved"]
            optimizer.load_state_dict(copy.deepcopy(state))
            assert optimizer.state["loaded"] and optimizer.param_groups[0]["lr"] == 0.002
        pair.check()
    copy.deepcopy(pair).step(0)


@every_case
def test_hooks_of_steps(method, base):
    """All run once per step, in torch's order, for every way to run a step."""
    pair = Pair(method, base, "sparse" if base == "SparseAdam" else "real")
    ran = {pair.optimizer: [], pair.twin: []}
    note = lambda what: lambda optimizer, args, kwargs: ran[optimizer].append(what)
    handles = [
        register_optimizer_step_pre_hook(note("all, before")),
        register_optimizer_step_post_hook(note("all, after")),
    ]
    for _, optimizer in pair.both():
        handles += [optimizer.register_step_pre_hook(note("before")), optimizer.register_step_post_hook(note("after"))]
    try:
        for i in range(3):
            pair.step(i)
            wanted = ["all, before", "before", "after", "all, after"] * (i + 1)
            assert ran[pair.optimizer] == ran[pair.twin] == wanted
    finally:
        for handle in handles:
            handle.remove()
    pair.step(0)
    assert len(ran[pair.optimizer]) == 12


# --- other people's optimizers ---------------------------------------------------------------------------


class CountingSGD(torch.optim.SGD):
    """A user's optimizer: with its own argument, and a count in `state` besides the parameters' entries."""

    def __init__(self, params, lr=0.1, *, every, **options):
        super().__init__(params, lr, **options)
        self.every = every

    def step(self, closure=None):
        self.state["count"] = self.state.get("count", 0) + 1
        for group in self.param_groups:
            group["lr"] /= 1 + (self.state["count"] % self.every == 0)
        return super().step(closure)


# base -> its options, and the reason to test it
OTHERS = {
    "CountingSGD": {"every": 2, "momentum": 0.9},
    "timm.optim.Adafactor": {},  # factored moments
    "timm.optim.Mars": {},  # the previous gradient
    "pytorch_optimizer.AdaShift": {},  # queues of gradients
    "pytorch_optimizer.MADGRAD": {},  # a tensor in `state` besides the parameters' entries; writes to the gradients
    "pytorch_optimizer.Prodigy": {},  # what it learns is stored in param_groups
    "pytorch_optimizer.ScheduleFreeAdamW": {},  # different weights for training and evaluation
    "pytorch_optimizer.SOAP": {},  # lists of matrices; its first step moves nothing
    "pytorch_optimizer.SPAM": {},  # numbers in `state` besides the parameters' entries
}


def other(name):
    library, _, name = name.rpartition(".")
    if not library:
        return globals()[name]
    return getattr(pytest.importorskip(library), name, None) or pytest.skip(f"{library} has no {name}")


@pytest.mark.parametrize("strength", [True, False])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("method", METHODS)
def test_bases_with_unusual_state(method, name, strength):
    pair = Pair(method, other(name), "plain", strength, **OTHERS[name])
    for i in range(3):
        pair.step(i)
    elsewhere = pair.loaded()
    for i in range(3):
        elsewhere.step(i)


@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_around_another_is_refused(method):
    """Its groups belong to the other optimizer: a clear error, not a KeyError in the first pass."""
    magma = other("pytorch_optimizer.Magma")
    with pytest.raises((TypeError, ValueError), match="Magma"):
        make(method, magma)(parameters("plain", magma))


# --- schedulers ------------------------------------------------------------------------------------------

ARGUMENTS = {
    "LambdaLR": {"lr_lambda": lambda step: 0.9**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 5},
    "SWALR": {"swa_lr": 0.05, "anneal_epochs": 3},
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": {"patience": 0},
}
SCHEDULERS = {"SWALR": swa_utils.SWALR, **classes_of(lr_scheduler, lr_scheduler.LRScheduler)}


def steps_alike(pair, chain, steps=4):
    """Both of a pair, by a chain of schedulers each."""
    schedulers = [scheduled(optimizer) for _, optimizer in pair.both() for scheduled in chain]
    for i in range(steps):
        pair.step(i)
        for scheduler in schedulers:
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(1.0 + i)
            else:
                scheduler.step()
        pair.check()


@pytest.mark.filterwarnings("error:Detected call of")
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_scheduler(method, scheduler, lr):
    """Learning rates, numbers or tensors, and momenta equal the base's, without a warning about the order of steps."""
    arguments = ARGUMENTS.get(scheduler, {})
    try:
        made = arguments if callable(arguments) else functools.partial(SCHEDULERS[scheduler], **arguments)
        made(torch.optim.SGD(parameters("real", "SGD"), lr=0.1, momentum=0.9))
    except TypeError as error:
        pytest.skip(f"of a later torch: {error}")
    steps_alike(Pair(method, "SGD", lr=lr, momentum=0.9), [made])


@pytest.mark.filterwarnings("error:Detected call of")
@every_case
def test_the_schedulers_of_pytorchs_suite(method, base):
    for chain in info(base).scheduler_inputs:
        steps_alike(Pair(method, base, "sparse" if base == "SparseAdam" else "real"), chain)
