"""SAM, ASAM, RWP, m-RWP, ARWP and m-ARWP follow their papers: comparison with plain PyTorch loops."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import all_bits, assert_same_bits, bits, loss_of, make_batch, make_net, state_tensors
from torch import nn

import flatops
from flatops import ops

SEED, STEPS = 7, 20

ALGORITHMS = {
    "sam": (flatops.SAM, {"rho": 0.1}),
    "asam": (flatops.SAM, {"rho": 1.0, "adaptive": True}),
    "rwp": (flatops.RWP, {"sigma": 0.05, "seed": SEED}),
    "mrwp": (flatops.RWP, {"sigma": 0.05, "seed": SEED, "lam": 0.4}),
    "arwp": (flatops.RWP, {"sigma": 0.05, "seed": SEED, "eta": 3.0, "beta": 0.9}),
    "marwp": (flatops.RWP, {"sigma": 0.05, "seed": SEED, "eta": 3.0, "beta": 0.9, "lam": 0.4}),
}
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 0.005, "weight_decay": 0.1, "eps": 1e-4}),
}


# --- the definitions -----------------------------------------------------------------------------------


def noise_of(p, draw, index):
    """The contract's normals in the shape of `p`: one filter per slice along dim 0, each in storage order."""
    if p.dim() < 2:
        return ops.normal(p.shape, seed=SEED, draw=draw, tensor=index).to(p.dtype)
    order = [0, *sorted(range(1, p.dim()), key=lambda d: -p.stride(d))]
    z = ops.normal([p.shape[d] for d in order], seed=SEED, draw=draw, tensor=index)
    return z.permute([order.index(d) for d in range(p.dim())]).to(p.dtype)


def over_filters(x):
    """The sum over every slice along dim 0, shaped to broadcast; for one dimension, over the whole tensor."""
    return x.sum(tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else x.sum()


def random_offsets(params, draw, sigma, eta=0.0, fisher=None, **_):
    offsets = []
    for i, p in enumerate(params):
        w = p.detach()
        scale = sigma * over_filters(w.double() ** 2).sqrt().to(w.dtype)
        if eta:
            scale = scale / (1 + eta * fisher[i].to(w.dtype)).sqrt()
        offsets.append(scale * noise_of(p, draw, i))
    return offsets


def ascent_offsets(params, grads, rho, adaptive=False):
    weighted = [p.detach().abs() * g if adaptive else g for p, g in zip(params, grads)]
    norm = sum((t.double() ** 2).sum() for t in weighted).sqrt().to(grads[0].dtype)
    return [rho * (p.detach() ** 2 * g if adaptive else g) / norm for p, g in zip(params, grads)]


def gradients(model, batch, offsets=None, statistics=False):
    """Gradients at w + offsets on a copy, whose running statistics are kept only if asked for."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    with torch.no_grad():
        for p, e in zip(twin.parameters(), offsets or []):
            p.add_(e)
    loss_of(twin, batch).backward()
    if statistics:
        for ours, theirs in zip(model.buffers(), twin.buffers()):
            ours.copy_(theirs)
    return [p.grad for p in twin.parameters()]


class Definition:
    """One algorithm over a plain optimizer. `step` takes the batches of the clean and of the perturbed pass."""

    def __init__(self, algorithm, model, base, base_options):
        self.flat, self.options = ALGORITHMS[algorithm]
        self.model, self.optimizer, self.draw = model, base(model.parameters(), **base_options), 0
        self.fisher = [torch.zeros_like(p) if p.dim() < 2 else p.new_zeros(p.shape[0], *[1] * (p.dim() - 1))
                       for p in model.parameters()]  # fmt: skip

    def step(self, first, second):
        params = list(self.model.parameters())
        if self.flat is flatops.SAM:
            offsets = ascent_offsets(params, gradients(self.model, first, statistics=True), **self.options)
            mixed = gradients(self.model, first, offsets)
        else:
            lam = self.options.get("lam", 1.0)
            perturbed = gradients(
                self.model, second, random_offsets(params, self.draw, fisher=self.fisher, **self.options), lam == 1
            )
            self.draw += 1
            for f, g in zip(self.fisher, perturbed):
                f.mul_(self.options.get("beta", 0.0)).add_(over_filters(g**2) if g.dim() > 1 else g**2)
            mixed = perturbed
            if lam < 1:
                clean = gradients(self.model, first, statistics=True)
                mixed = [lam * p + (1 - lam) * c for p, c in zip(perturbed, clean)]
        for p, g in zip(params, mixed):
            p.grad = g
        self.optimizer.step()


# --- ways to run a step --------------------------------------------------------------------------------


def has_clean_pass(optimizer):
    return isinstance(optimizer, flatops.SAM) or optimizer.perturbed_weight < 1


def clean_backward(optimizer, model, first):
    weight = 1.0 if isinstance(optimizer, flatops.SAM) else optimizer.clean_weight
    if has_clean_pass(optimizer):
        (weight * loss_of(model, first)).backward()


def perturbed_backward(optimizer, model, first, second):
    with flatops.freeze_batchnorm_stats(model, enabled=has_clean_pass(optimizer)):
        if isinstance(optimizer, flatops.SAM):
            loss_of(model, first).backward()
        else:
            (optimizer.perturbed_weight * loss_of(model, second)).backward()


def explicit(optimizer, model, first, second):
    clean_backward(optimizer, model, first)
    with optimizer.perturbed():
        perturbed_backward(optimizer, model, first, second)
    optimizer.step()
    optimizer.zero_grad()


def by_closure(optimizer, model, first, second):
    def closure():
        optimizer.zero_grad()
        perturbed = optimizer.is_perturbed
        with flatops.freeze_batchnorm_stats(model, enabled=perturbed and has_clean_pass(optimizer)):
            batch = second if perturbed and not isinstance(optimizer, flatops.SAM) else first
            loss = loss_of(model, batch)
            loss.backward()
        return loss

    optimizer.step(closure)


def two_steps(optimizer, model, first, second):
    clean_backward(optimizer, model, first)
    optimizer.first_step(zero_grad=isinstance(optimizer, flatops.SAM))
    perturbed_backward(optimizer, model, first, second)
    optimizer.second_step(zero_grad=True)


FORMS = {"explicit": explicit, "closure": by_closure, "two steps": two_steps}


# --- equal to their definitions ------------------------------------------------------------------------

# Relative to a tensor's largest weight. A filter's scale and F are float32 even for float64 weights.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-7}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "dtype, layout, base, form",
    [
        (torch.float64, torch.contiguous_format, "sgd", "explicit"),
        (torch.float64, torch.contiguous_format, "sgd", "closure"),
        (torch.float64, torch.contiguous_format, "sgd", "two steps"),
        (torch.float64, torch.channels_last, "adamw", "explicit"),
        (torch.float32, torch.contiguous_format, "sgd", "explicit"),
        (torch.float32, torch.channels_last, "sgd", "two steps"),
        (torch.float32, torch.contiguous_format, "adamw", "closure"),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_twenty_steps_equal_the_definition(algorithm, dtype, layout, base, form):
    """Weights and running statistics after 20 steps equal the definition's, for every way to run a step."""
    base, base_options = BASES[base]
    model = make_net(dtype=dtype).to(memory_format=layout)
    definition = Definition(algorithm, copy.deepcopy(model), base, base_options)
    flat, options = ALGORITHMS[algorithm]
    optimizer = flat(model.parameters(), base, **options, **base_options)
    start = [p.detach().clone() for p in model.parameters()]
    for i in range(STEPS):
        first, second = make_batch(2 * i, dtype), make_batch(2 * i + 1, dtype)
        FORMS[form](optimizer, model, first, second)
        definition.step(first, second)
    tolerance = 1e-11 if dtype == torch.float64 and flat is flatops.SAM else TOLERANCE[dtype]
    for (name, ours), theirs in zip(model.state_dict().items(), definition.model.state_dict().values()):
        if name.endswith("num_batches_tracked"):
            assert ours.item() == theirs.item() == STEPS
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item(), msg=name)
    assert all((p - s).abs().max() > 100 * tolerance * s.abs().max() for p, s in zip(model.parameters(), start))


@pytest.mark.parametrize("algorithm", ["arwp", "marwp"])
def test_fisher_is_one_number_per_filter(algorithm):
    """F is beta F + g^2 of the perturbed gradient, summed over a filter, and per element in one dimension."""
    model = make_net(dtype=torch.float64)
    definition = Definition(algorithm, copy.deepcopy(model), *BASES["sgd"])
    optimizer = flatops.RWP(model.parameters(), torch.optim.SGD, **ALGORITHMS[algorithm][1], **BASES["sgd"][1])
    for i in range(5):
        explicit(optimizer, model, make_batch(i, torch.float64), make_batch(10 + i, torch.float64))
        definition.step(make_batch(i, torch.float64), make_batch(10 + i, torch.float64))
    for p, expected in zip(model.parameters(), definition.fisher):
        ours = optimizer.fisher[p]
        assert ours.shape == p.shape[:1] and ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected.reshape(-1).float(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("restore", ["exact", "regenerate"])
@pytest.mark.parametrize("stream", [0, 3])
def test_every_pass_draws_the_noise_of_its_draw(stream, restore):
    """w + e has the bits of ops.perturb_ at draw 0, 1, 2, ..., with or without a step in between."""
    model = make_net()
    optimizer = flatops.RWP(model.parameters(), torch.optim.SGD, lr=0.1, sigma=0.1, seed=SEED, stream=stream,
                             restore=restore)  # fmt: skip
    for draw in range(3):
        expected = [p.detach().clone() for p in model.parameters()]
        ops.perturb_(expected, 0.1, seed=SEED, draw=draw, stream=stream)
        with optimizer.perturbed():
            assert_same_bits(model.parameters(), expected)


@pytest.mark.parametrize("algorithm", ["sam", "asam"])
def test_without_a_gradient_there_is_no_ascent(algorithm):
    """If all gradients are zero, the weights stay unchanged."""
    flat, options = ALGORITHMS[algorithm]
    p = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = flat([p], torch.optim.SGD, lr=0.1, **options)
    before, p.grad = bits(p), torch.zeros_like(p)
    with optimizer.perturbed():
        assert torch.equal(bits(p), before)


# --- the base optimizer alone at zero ------------------------------------------------------------------

ZEROS = {
    "sam": (flatops.SAM, {"rho": 0.0}),
    "asam": (flatops.SAM, {"rho": 0.0, "adaptive": True}),
    "rwp": (flatops.RWP, {"sigma": 0.0}),
    "mrwp": (flatops.RWP, {"sigma": 0.0, "lam": 0.5}),
    "arwp": (flatops.RWP, {"sigma": 0.0, "eta": 1.0}),
    "lam 0": (flatops.RWP, {"sigma": 0.1, "lam": 0.0}),
    "lam 0, arwp": (flatops.RWP, {"sigma": 0.1, "lam": 0.0, "eta": 1.0}),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zero", ZEROS)
def test_zero_is_the_base_optimizer_to_the_bit(zero, form, base):
    """With rho = 0, sigma = 0 or lam = 0, weights, statistics and momentum have the base optimizer's bits."""
    base, base_options = BASES[base]
    flat, options = ZEROS[zero]
    model = make_net()
    plain = copy.deepcopy(model)
    optimizer = flat(model.parameters(), base, **options, **base_options)
    reference = base(plain.parameters(), **base_options)
    for i in range(3):
        FORMS[form](optimizer, model, make_batch(i), make_batch(i))
        reference.zero_grad()
        loss_of(plain, make_batch(i)).backward()
        reference.step()
    assert_same_bits(model.state_dict().values(), plain.state_dict().values())
    assert_same_bits(state_tensors(optimizer), state_tensors(reference))


@pytest.mark.parametrize("algorithm, key", [("sam", "rho"), ("asam", "rho"), ("rwp", "sigma"), ("arwp", "sigma")])
def test_zero_in_one_group_leaves_that_group_unperturbed(algorithm, key):
    """A group with rho = 0 or sigma = 0 keeps its bits in the perturbed pass; others are perturbed as usual."""
    flat, options = ALGORITHMS[algorithm]
    model, whole = make_net(), make_net()
    head, features = list(model.head.parameters()), list(model.features.parameters())
    optimizer = flat([{"params": features, key: 0.0}, {"params": head}], torch.optim.SGD, lr=0.1, **options)
    # SAM's radius counts only groups that ascend; RWP's noise depends only on the position.
    others = list(whole.head.parameters()) if key == "rho" else [*whole.features.parameters(), *whole.head.parameters()]
    together = flat(others, torch.optim.SGD, lr=0.1, **options)
    loss_of(model, make_batch(0)).backward()
    loss_of(whole, make_batch(0)).backward()
    before = all_bits(features)
    with optimizer.perturbed(), together.perturbed():
        assert_same_bits(all_bits(features), before)
        assert_same_bits(head, whole.head.parameters())


# --- regenerating --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["rwp", "mrwp", "arwp", "marwp"])
@pytest.mark.parametrize("form", FORMS)
def test_regenerating_drifts_no_more_than_documented(algorithm, form):
    """restore='regenerate' subtracts the same noise: the drift is about 1.5e-8 sqrt(steps)."""
    exact, again = make_net(), make_net()
    options = {**ALGORITHMS[algorithm][1], "lr": 0.0, "momentum": 0.9}  # the weights move by drift alone
    start = [p.detach().clone() for p in exact.parameters()]
    optimizers = [
        flatops.RWP(exact.parameters(), torch.optim.SGD, **options),
        flatops.RWP(again.parameters(), torch.optim.SGD, restore="regenerate", **options),
    ]
    for i in range(STEPS):
        for optimizer, model in zip(optimizers, (exact, again)):
            FORMS[form](optimizer, model, make_batch(i), make_batch(i + STEPS))
    assert_same_bits(exact.parameters(), start)
    drift = [(p - s).norm() / s.norm() for p, s in zip(again.parameters(), start) if s.norm() > 0]
    assert max(drift) < 3 * 1.5e-8 * STEPS**0.5
    assert max(drift) > 0  # or nothing was regenerated
    assert optimizers[0].state_dict()["param_groups"][0]["draw"] == STEPS
    assert optimizers[1].state_dict()["param_groups"][0]["draw"] == STEPS


# --- properties ----------------------------------------------------------------------------------------

shapes = st.lists(st.lists(st.integers(1, 5), max_size=4).map(tuple), min_size=2, max_size=5)


@settings(max_examples=30, deadline=None)
@given(shapes=shapes, seed=st.integers(0, 2**64 - 1), swap=st.randoms(use_true_random=False))
def test_noise_depends_only_on_the_position(shapes, seed, swap):
    """Noise depends on the position in the optimizer, not on groups, other parameters or frozen ones."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in shapes]

    def perturbed(groups, frozen=()):
        params = [nn.Parameter(w.clone(), requires_grad=i not in frozen) for i, w in enumerate(weights)]
        optimizer = flatops.RWP([{"params": [params[i] for i in g]} for g in groups], torch.optim.SGD, lr=0.1,
                                sigma=0.1, seed=seed)  # fmt: skip
        with optimizer.perturbed():
            return [p.detach().clone() for p in params]

    everything = perturbed([range(len(weights))])
    cut, frozen = swap.randrange(1, len(weights)), swap.randrange(len(weights))
    assert_same_bits(perturbed([range(cut), range(cut, len(weights))]), everything)
    apart = perturbed([range(len(weights))], frozen={frozen})
    expected = [weights[i] if i == frozen else e for i, e in enumerate(everything)]
    assert_same_bits(apart, expected)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-3, 1e3), rho=st.floats(1e-3, 10.0))
def test_the_ascent_has_length_rho_whatever_the_gradients(scale, rho):
    """||e||_2 = rho over all parameters together, whatever the scale of the loss."""
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in [(4, 3), (5,), ()]]
    optimizer = flatops.SAM(params, torch.optim.SGD, lr=0.1, rho=rho)
    start = [p.detach().clone() for p in params]
    for p in params:
        p.grad = scale * torch.randn_like(p)
    with optimizer.perturbed():
        length = sum(((p - s) ** 2).sum() for p, s in zip(params, start)).sqrt().item()
    assert length == pytest.approx(rho, rel=1e-9)
