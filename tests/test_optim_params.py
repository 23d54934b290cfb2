"""Which parameters an optimizer accepts: frozen, without gradient, sparse, shared, moved, added later."""

from __future__ import annotations

import copy

import pytest
import torch
from models import all_bits, assert_same_bits, bits, loss_of, make_batch, make_net, state_tensors
from torch import nn

import flatops
from flatops import ops

SGD = torch.optim.SGD


def some_params():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in [(4, 3), (5,), (2, 3, 2, 2), ()]]


def fill_gradients(params):
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)


def make(kind, params, **options):
    if kind == "sam":
        return flatops.SAM(params, SGD, **{"rho": 0.5, "lr": 0.1, **options})
    return flatops.RWP(params, SGD, **{"sigma": 0.1, "lr": 0.1, **options})


def changes(optimizer, params):
    """The parameters that differ in the perturbed pass."""
    before = all_bits(params)
    with optimizer.perturbed():
        changed = [not torch.equal(bits(p), b) for p, b in zip(params, before)]
    assert_same_bits(all_bits(params), before)
    return changed


# --- forms of passing them -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sam", "rwp"])
def test_every_form_of_passing_parameters_gives_the_same_weights(kind):
    """Lists, generators, groups, groups of generators, named parameters: the same weights after two steps."""
    forms = {
        "list": lambda m: list(m.parameters()),
        "generator": lambda m: m.parameters(),
        "group": lambda m: [{"params": list(m.parameters())}],
        "groups": lambda m: [{"params": m.features.parameters()}, {"params": m.head.parameters()}],
        "named": lambda m: m.named_parameters(),
        "named groups": lambda m: [{"params": list(m.features.named_parameters())},
                                   {"params": list(m.head.named_parameters())}],
    }  # fmt: skip
    results = {}
    for name, form in forms.items():
        model = make_net()
        optimizer = make(kind, form(model), momentum=0.9)
        for i in range(2):
            loss_of(model, make_batch(i)).backward()
            with optimizer.perturbed():
                loss_of(model, make_batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results[name] = list(model.parameters())
    for name in forms:
        assert_same_bits(results[name], results["list"])
    optimizer = make(kind, make_net().named_parameters())
    assert optimizer.param_groups[0]["param_names"][0] == "features.0.weight"
    assert optimizer.state_dict()["param_groups"][0]["param_names"][-1] == "head.bias"


@pytest.mark.parametrize("operator, kind, key", [("perturb_", "rwp", "sigma"), ("ascend_", "sam", "rho")])
def test_groups_that_agree_are_one_operator_call(monkeypatch, operator, kind, key):
    """Three groups with two values make two calls; lr does not count."""
    params, calls = some_params(), []
    original = getattr(ops, operator)
    monkeypatch.setattr(ops, operator, lambda *args, **kwargs: (calls.append(len(args[0])), original(*args, **kwargs)))
    optimizer = make(
        kind, [{"params": params[:1], "lr": 1.0}, {"params": params[1:2], key: 0.3}, {"params": params[2:]}]
    )
    fill_gradients(params)
    assert all(changes(optimizer, params))
    assert sorted(calls) == [1, 3]


# --- frozen, without gradient, sparse ------------------------------------------------------------------


def test_frozen_parameters_stay_in_every_pass():
    """A frozen parameter gets no noise and no ascent; it takes part while it is thawed."""
    for kind in ("sam", "rwp"):
        params = some_params()
        optimizer = make(kind, params)
        for frozen in (0, 2, None, 1):
            for i, p in enumerate(params):
                p.requires_grad_(i != frozen)
            fill_gradients(params)
            assert changes(optimizer, params) == [i != frozen for i in range(4)]


def test_without_a_gradient_there_is_noise_but_no_ascent_and_no_step():
    """A parameter that the loss does not use: SAM ignores it, RWP perturbs it, the step skips it."""
    for kind, in_pass in (("sam", [True, False]), ("rwp", [True, True])):
        used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        optimizer = make(kind, [used, unused], momentum=0.9)
        used.grad = torch.tensor([1.0, -2.0, 3.0])
        assert changes(optimizer, [used, unused]) == in_pass
        used.grad = torch.ones(3)
        optimizer.step()
        assert not torch.equal(used, torch.ones(3)) and torch.equal(unused, torch.ones(3))
        assert list(optimizer.state) == [used]


@pytest.mark.parametrize("order", [0, 1])
def test_sam_refuses_a_sparse_gradient(order):
    """Anywhere in the list: a clear TypeError, before any weight or gradient changes."""
    torch.manual_seed(0)
    layers = [nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)]
    params = [p for layer in layers[:: 1 - 2 * order] for p in layer.parameters()]
    optimizer = make("sam", params)
    layers[1](layers[0](torch.tensor([1, 2]))).sum().backward()
    before = all_bits(params)
    with pytest.raises(TypeError, match="sparse"), optimizer.perturbed():
        pytest.fail("the body ran")
    assert_same_bits(all_bits(params), before)
    assert not optimizer.is_perturbed and all(p.grad is not None for p in params)


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_arwp_refuses_a_sparse_gradient(lam):
    """F is a sum over dense rows: a TypeError before the step, and no weight changed."""
    torch.manual_seed(0)
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = make("rwp", embedding.parameters(), eta=1.0, lam=lam)
    before = bits(embedding.weight)
    with pytest.raises(TypeError, match="sparse"):
        with optimizer.perturbed():
            embedding(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    assert torch.equal(bits(embedding.weight), before)


@pytest.mark.parametrize("form", ["explicit", "closure"])
@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_rwp_steps_on_sparse_gradients(form, lam):
    """Noise needs no gradient, so an optimizer for sparse ones works as its base, as with dense gradients."""
    weights = {}
    for sparse in (True, False):
        torch.manual_seed(0)
        embedding = nn.Embedding(6, 3, sparse=sparse)
        optimizer = make("rwp", embedding.parameters(), lam=lam)
        rows = [torch.tensor([1, 2, 2]), torch.tensor([2, 4])]

        def closure():
            optimizer.zero_grad()
            loss = embedding(rows[optimizer.is_perturbed]).square().sum()
            loss.backward()
            return loss

        if form == "closure":
            optimizer.step(closure)
        else:
            (optimizer.clean_weight * embedding(rows[0]).square().sum()).backward()
            with optimizer.perturbed():
                (optimizer.perturbed_weight * embedding(rows[1]).square().sum()).backward()
            optimizer.step()
        weights[sparse] = embedding.weight
    torch.testing.assert_close(weights[True], weights[False], rtol=1e-6, atol=1e-7)


# --- groups --------------------------------------------------------------------------------------------


def test_groups_have_their_own_sigma_eta_and_seed():
    """w + e of a group equals ops.perturb_ with its values and its positions in the optimizer."""
    params = some_params()
    own = [{"sigma": 0.2, "seed": 3}, {"sigma": 0.05, "eta": 2.0}]
    optimizer = make("rwp", [{"params": params[:2], **own[0]}, {"params": params[2:], **own[1]}], beta=0.5)
    for p in params:
        optimizer._fisher(p).fill_(1.5)
    expected = [p.detach().clone() for p in params]
    ops.perturb_(expected[:2], 0.2, seed=3, draw=0)
    ops.perturb_(expected[2:], 0.05, seed=0, draw=0, index=[2, 3], eta=2.0,
                 fisher=[torch.full(p.shape[:1] or (1,), 1.5) for p in params[2:]])  # fmt: skip
    with optimizer.perturbed():
        assert_same_bits(params, expected)


def test_groups_have_their_own_rho_under_one_norm():
    """e = rho_group g / ||g||, with the norm over the parameters of all groups."""
    params = some_params()
    optimizer = make("sam", [{"params": params[:2], "rho": 0.3}, {"params": params[2:]}], rho=0.7)
    fill_gradients(params)
    norm = torch.cat([p.grad.flatten() for p in params]).norm()
    expected = [p + rho * p.grad / norm for p, rho in zip(params, (0.3, 0.3, 0.7, 0.7))]
    with optimizer.perturbed():
        torch.testing.assert_close(list(params), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind, key", [("sam", "rho"), ("rwp", "sigma")])
def test_a_group_added_later_is_like_one_from_the_start(kind, key):
    """It takes the optimizer's values where it has none, noise by position, and the draw of the others."""
    early, late = some_params(), some_params()
    whole = make(kind, [{"params": early[:2]}, {"params": early[2:], key: 0.2}])
    grown = make(kind, late[:2])
    fill_gradients(early)
    fill_gradients(late)
    with whole.perturbed(), grown.perturbed():
        pass
    grown.add_param_group({"params": late[2:], key: 0.2})
    assert grown.param_groups[1].keys() == whole.param_groups[1].keys()
    fill_gradients(early)
    fill_gradients(late)
    with whole.perturbed(), grown.perturbed():
        assert_same_bits(late, early)
    grown.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert grown.param_groups[2][key] == whole.defaults[key]
    assert kind == "sam" or [group["draw"] for group in grown.state_dict()["param_groups"]] == [2, 2, 2]


# --- shared memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sam", "rwp"])
def test_a_tied_parameter_is_one_parameter(kind):
    """Two layers that share a parameter perturb it once, and step it once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = make(kind, model.parameters())
    model(torch.ones(2, 4)).square().sum().backward()
    expected = model[0].weight.detach().clone()
    if kind == "rwp":
        ops.perturb_([expected], 0.1, seed=0, draw=0)
    else:
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        expected += 0.5 * model[0].weight.grad / norm
    before = all_bits(model.parameters())
    with optimizer.perturbed():
        torch.testing.assert_close(model[1].weight.detach(), expected, rtol=1e-6, atol=1e-7)
    assert_same_bits(all_bits(model.parameters()), before)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("kind", ["sam", "rwp"])
@pytest.mark.parametrize("how", ["same tensor", "same memory", "overlapping memory"])
def test_memory_shared_between_parameters_never_loses_weights(kind, how):
    """A weight perturbed twice could be lost: a clear error before anything changes, or it is restored."""
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(4, 4))
    b = {"same tensor": lambda: a, "same memory": lambda: nn.Parameter(a.data),
         "overlapping memory": lambda: nn.Parameter(a.data[2:])}[how]()  # fmt: skip
    before = bits(a)
    fill_gradients([a, b])
    try:
        with make(kind, [a, b]).perturbed():
            pass
    except ValueError as error:
        assert any(word in str(error) for word in ("twice", "share", "memory"))
    assert torch.equal(bits(a), before)


@pytest.mark.parametrize("kind, key", [("sam", "rho"), ("rwp", "sigma")])
def test_memory_shared_between_groups_never_loses_weights(kind, key):
    """Two operator calls change the same weights: undone in reverse order, or refused, they are restored."""
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(4, 4))
    b = nn.Parameter(a.data)
    before = bits(a)
    fill_gradients([a, b])
    try:
        with make(kind, [{"params": [a]}, {"params": [b], key: 0.3}]).perturbed():
            pass
    except ValueError as error:
        assert "memory" in str(error)
    assert torch.equal(bits(a), before)


# --- parameters that change under the optimizer --------------------------------------------------------


@pytest.mark.parametrize("kind", ["sam", "rwp"])
@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: [setattr(p, "data", torch.randn_like(p)) for p in m.parameters()],
        lambda m: [setattr(p, "data", torch.randn(*p.shape, 2)) for p in m.parameters()],
    ],
    ids=["channels_last", "float64", "bfloat16", "new data", "new shape"],
)
def test_parameters_may_be_replaced_between_passes(kind, move):
    """Another layout, dtype, address or shape of the same parameter: perturbed, and restored to the bit."""
    model = make_net()
    optimizer = make(kind, model.parameters())
    params = list(model.parameters())
    fill_gradients(params)
    assert all(changes(optimizer, [p for p in params if p.abs().sum() > 0]))
    for p in params:
        p.grad = None
    move(model)
    for p in params:
        p.grad = torch.randn_like(p)
    assert changes(optimizer, params)[0]


@pytest.mark.parametrize("how", ["model.bfloat16()", "param_groups"])
def test_regenerating_is_refused_where_it_became_impossible(how):
    """Weights that became bfloat16 after the optimizer was made: refused before they change, not after."""
    model = make_net()
    optimizer = make("rwp", model.parameters(), restore="exact" if how == "param_groups" else "regenerate")
    model.bfloat16()
    optimizer.param_groups[0]["restore"] = "regenerate"
    before = all_bits(model.parameters())
    try:
        with optimizer.perturbed():
            pass
    except TypeError as error:
        assert "bfloat16" in str(error)
    assert_same_bits(all_bits(model.parameters()), before)
    assert not optimizer.is_perturbed


# --- bases ---------------------------------------------------------------------------------------------


class OwnSGD(torch.optim.SGD):
    """A user's optimizer, whose step calls the inherited one."""

    def step(self, closure=None):
        self.own_steps = getattr(self, "own_steps", 0) + 1
        return super().step(closure)


BASES = [
    (torch.optim.SGD, {"nesterov": True, "momentum": 0.9}),
    (torch.optim.SGD, {"foreach": True, "momentum": 0.9}),
    (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
    (OwnSGD, {"momentum": 0.9}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.RMSprop, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Adafactor, {}),
]


@pytest.mark.parametrize("kind", ["sam", "rwp"])
@pytest.mark.parametrize("base, options", BASES, ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(v))
def test_the_step_is_the_base_optimizers(kind, base, options):
    """With the gradient of the perturbed pass, weights and state equal the base optimizer's, to the bit."""
    model, plain = make_net(), make_net()
    flat = {"sam": flatops.SAM, "rwp": flatops.RWP}[kind]
    optimizer = flat(model.parameters(), base, lr=0.01, **options)
    reference = base(plain.parameters(), lr=0.01, **options)
    for i in range(3):
        loss_of(model, make_batch(i)).backward()
        with optimizer.perturbed():
            loss_of(model, make_batch(i)).backward()
        for p, q in zip(model.parameters(), plain.parameters()):
            q.grad = copy.deepcopy(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    assert_same_bits(model.parameters(), plain.parameters())
    assert_same_bits(state_tensors(optimizer), state_tensors(reference))
    if base is OwnSGD:
        assert optimizer.own_steps == 3


class TemperedSGD(torch.optim.SGD):
    """A user's optimizer with its own sigma."""

    def __init__(self, params, lr, sigma=1.0):
        super().__init__(params, lr)
        for group in self.param_groups:
            group.setdefault("sigma", sigma)
        self.defaults["sigma"] = sigma


class ForwardingAdadelta(torch.optim.Adadelta):
    """A user's optimizer that forwards its options."""

    def __init__(self, params, **options):
        super().__init__(params, **options)


@pytest.mark.parametrize(
    "flat, base, name",
    [
        (flatops.SAM, torch.optim.Adadelta, "rho"),
        (flatops.SAM, ForwardingAdadelta, "rho"),
        (flatops.RWP, TemperedSGD, "sigma"),
    ],
)
def test_a_base_with_a_hyperparameter_of_our_name_is_refused(flat, base, name):
    """Adadelta's rho is a decay: one entry of param_groups cannot silently be both."""
    with pytest.raises(ValueError, match=name):
        flat(some_params(), base, lr=0.1)


# --- complex weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("make_optimizer", [
    lambda p: flatops.SAM(p, SGD, rho=0.5, lr=0.1),
    lambda p: flatops.SAM(p, SGD, rho=0.5, adaptive=True, lr=0.1),
    lambda p: flatops.SSAM(p, SGD, rho=0.5, mask="dynamic", seed=0, lr=0.1),
    lambda p: flatops.RWP(p, SGD, sigma=0.1, seed=0, lr=0.1),
    lambda p: flatops.RWP(p, SGD, sigma=0.1, eta=1.0, seed=0, lr=0.1),
], ids=["sam", "asam", "ssam", "rwp", "arwp"])  # fmt: skip
def test_complex_weights_are_pairs_of_real_ones(make_optimizer, dtype):
    """Perturbed, restored and saved in checkpoints as their view_as_real would be, to the bit."""
    shapes = [(4, 3), (5,), (2, 3, 2), (), (0, 2)]
    complexes = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    reals = [nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in complexes]
    optimizer, twin = make_optimizer(complexes), make_optimizer(reals)

    def same():
        assert_same_bits(map(torch.view_as_real, complexes), reals)

    def gradients(seed):
        generator = torch.Generator().manual_seed(seed)
        for p, r in zip(complexes, reals):
            p.grad = torch.randn(p.shape, dtype=dtype, generator=generator)
            r.grad = torch.view_as_real(p.grad).clone()

    before = [p.detach().clone() for p in complexes]
    for i in range(2):
        gradients(2 * i)
        with optimizer.perturbed(), twin.perturbed():
            same()
            assert any(not torch.equal(p, b) for p, b in zip(complexes, before))
            gradients(2 * i + 1)
        optimizer.step()
        twin.step()
        with torch.no_grad():  # the bases round complex numbers differently
            for p, r in zip(complexes, reals):
                torch.testing.assert_close(torch.view_as_real(p), r)
                r.copy_(torch.view_as_real(p))
    copied = make_optimizer([nn.Parameter(p.detach().clone()) for p in complexes])
    copied.load_state_dict(optimizer.state_dict())
    if isinstance(optimizer, flatops.SSAM):
        masks, loaded = optimizer.masks.values(), copied.masks.values()
        assert_same_bits([m.bits for m in masks], [m.bits for m in loaded])
        assert_same_bits([m.bits for m in masks], [m.bits for m in twin.masks.values()])


def test_noise_without_an_optimizer_in_complex_weights():
    w = torch.randn(4, 3, dtype=torch.complex64)
    r, before = torch.view_as_real(w).clone(), w.clone()
    with flatops.perturb([w], 0.1, seed=3), flatops.perturb([r], 0.1, seed=3):
        assert_same_bits([torch.view_as_real(w)], [r])
        assert not torch.equal(w, before)
    assert torch.equal(w, before)


# --- maximize ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rho", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("masked", [False, True])
def test_maximize_is_minimising_the_negated_loss(adaptive, rho, masked):
    """To the bit, and in only one of two groups."""
    results = []
    for sign in (1, -1):
        model = make_net()
        groups = [{"params": list(model.features.parameters()), "maximize": sign == -1}]
        groups += [{"params": list(model.head.parameters()), "rho": 0.2, "maximize": sign == -1}]
        options = {"mask": "dynamic", "seed": 5} if masked else {}
        cls = flatops.SSAM if masked else flatops.SAM
        optimizer = cls(groups, SGD, rho=rho, adaptive=adaptive, lr=0.1, momentum=0.9, **options)
        for i in range(3):
            (sign * loss_of(model, make_batch(i))).backward()
            with optimizer.perturbed():
                (sign * loss_of(model, make_batch(i))).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(list(model.parameters()))
    assert_same_bits(*results)


# --- the radius counts what ascends --------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_group_that_does_not_ascend_is_not_in_the_norm(adaptive):
    """Its gradient, however large, does not affect the others' radius; without any ascent the base steps."""
    params = some_params()
    groups = [{"params": params[:2]}, {"params": params[2:], "rho": 0.0}]
    optimizer = flatops.SAM(groups, SGD, rho=0.5, adaptive=adaptive, lr=0.1)
    fill_gradients(params)
    for p in params[2:]:
        p.grad *= 1e6
    before, alone = [p.detach().clone() for p in params], [nn.Parameter(p.detach().clone()) for p in params[:2]]
    twin = flatops.SAM(alone, SGD, rho=0.5, adaptive=adaptive, lr=0.1)
    fill_gradients(alone)
    with optimizer.perturbed(), twin.perturbed():
        assert_same_bits(params[:2], alone)
        assert_same_bits(params[2:], before[2:])
        if not adaptive:
            moved = sum((p.detach() - b).double().square().sum() for p, b in zip(params, before)).sqrt()
            assert moved.item() == pytest.approx(0.5, rel=1e-5)


# --- numbers of NumPy, seeds, and torch's defaults ------------------------------------------------------


def test_numpy_numbers_are_accepted():
    """Wherever torch accepts them; what is stored and saved are Python numbers."""
    np = pytest.importorskip("numpy")
    p = some_params()
    options = {"sigma": np.float32(0.25), "seed": np.int64(3), "lam": np.float64(1), "stream": np.int32(1)}
    rwp = flatops.RWP(p, SGD, lr=0.1, **options)
    sam = flatops.SAM(p, SGD, rho=np.float16(0.5), lr=0.1)
    rwp.param_groups[0]["sigma"] = np.float32(0.125)  # as a schedule would write it
    for optimizer in (rwp, sam):
        fill_gradients(p)
        with optimizer.perturbed():
            pass
        saved = optimizer.state_dict()["param_groups"][0]
        assert all(type(saved[key]) in (int, float, bool, str) for key in optimizer.options)
    twin = some_params()
    with flatops.perturb(p, np.float32(0.25), seed=np.uint64(2**63), draw=np.int64(3)):
        with flatops.perturb(twin, 0.25, seed=2**63, draw=3):
            assert_same_bits(p, twin)
    scores = [torch.rand(9)]
    assert torch.equal(ops.topk_mask(scores, np.int64(3)), ops.topk_mask(scores, 3))
    ops.regrow_mask_(ops.topk_mask(scores, 3), scores, np.int32(1), seed=np.int8(0), draw=np.int8(0))
    for bad in (True, 0.5, np.float32(1)):
        with pytest.raises((TypeError, ValueError), match="k must be an integer|seed must be an integer"):
            ops.topk_mask(scores, bad) if bad is not True else flatops.RWP(p, SGD, seed=bad, lr=0.1)


@pytest.fixture
def real_default_seed(monkeypatch):
    monkeypatch.undo()  # conftest's fixture, which gives every optimizer the same
    monkeypatch.setattr("flatops.optim.groups._seeded", (-1, 0))


@pytest.mark.parametrize("make_optimizer", [
    lambda p, **o: flatops.RWP(p, SGD, lr=0.1, **o), lambda p, **o: flatops.SSAM(p, SGD, lr=0.1, **o)
], ids=["rwp", "ssam"])  # fmt: skip
def test_the_default_seed_follows_torchs(real_default_seed, make_optimizer):
    """Two optimizers differ, two seeds of torch differ, the same seed repeats; a given one is kept."""

    def seeds(torchs):
        torch.manual_seed(torchs)
        return [make_optimizer(some).param_groups[0]["seed"] for some in ([p], [p])]

    p = some_params()[0]
    first, other, again = seeds(1), seeds(2), seeds(1)
    assert first == again and len({*first, *other}) == 4
    assert make_optimizer([p], seed=0).param_groups[0]["seed"] == 0
    saved = make_optimizer([p])
    loaded = make_optimizer([p])
    loaded.load_state_dict(saved.state_dict())
    assert loaded.param_groups[0]["seed"] == saved.param_groups[0]["seed"]


@pytest.mark.parametrize("default", [
    lambda: torch.set_default_device("meta"), lambda: torch.set_default_dtype(torch.float64)
], ids=["device", "dtype"])  # fmt: skip
def test_torchs_defaults_do_not_matter(default):
    """Our tensors are made on the parameters' device, with the dtype that they need."""
    results = []
    for change in (lambda: None, default):
        models = [make_net() for _ in range(4)]
        batch = make_batch(0)
        change()
        try:
            optimizers = [
                flatops.SAM(models[0].parameters(), SGD, rho=0.1, lr=0.1),
                flatops.RWP(models[1].parameters(), SGD, sigma=0.1, eta=1.0, lam=0.5, seed=0, lr=0.1),
                flatops.SSAM(models[2].parameters(), SGD, rho=0.1, mask="dynamic", update_every=1, seed=0, lr=0.1),
                flatops.SSAM(models[3].parameters(), SGD, rho=0.1, pattern="2:4", seed=0, lr=0.1),
            ]
            optimizers[3].update_mask(models[3], nn.functional.cross_entropy, [batch], samples=2)
            for model, optimizer in zip(models, optimizers):
                for _ in range(2):
                    for one_pass in flatops.passes(optimizer, model):
                        with one_pass:
                            loss_of(model, batch).backward()
                    optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
                with flatops.perturb(model, 0.1), torch.no_grad():
                    loss_of(model, batch)
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        results.append([p for model in models for p in model.parameters()])
    assert_same_bits(*results)
