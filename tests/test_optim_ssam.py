"""Sparse SAM: equal to the papers' definitions, masks of exactly the stated size, and every feature of SAM."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import test_optim_amp as amp
import test_optim_state as state
import torch
from models import all_bits, assert_same_bits, loss_of, make_batch, make_net, state_tensors
from torch import nn
from torch.nn import functional as F

import flatops
from flatops import checks, ops, reference

SGD = torch.optim.SGD
BATCHES = [make_batch(100 + i) for i in range(3)]  # of 8 samples
SIZE = sum(p.numel() for p in make_net().parameters())


def ssam(model, **options):
    return flatops.SSAM(model.parameters(), SGD, **{"rho": 0.5, "lr": 0.05, "momentum": 0.9, **options})


def refresh(optimizer, model, samples=20, batches=BATCHES, **options):
    if optimizer.param_groups[0]["mask"] == "fisher" and optimizer.param_groups[0]["fisher"] == "samples":
        optimizer.update_mask(model, F.cross_entropy, batches, samples=samples, **options)
    else:
        optimizer.update_mask()


def masked(model=None, **options):
    """A network and an optimizer that has a mask."""
    model = model or make_net()
    optimizer = ssam(model, **options)
    if optimizer.param_groups[0]["mask"] == "dynamic":
        backward(model, 0)
    refresh(optimizer, model)
    optimizer.zero_grad()
    return model, optimizer


def backward(model, i):
    loss_of(model, make_batch(i)).backward()


def passes(model, optimizer, i):
    backward(model, i)
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
        backward(model, i)


def train(model, optimizer, steps):
    for i in steps:
        passes(model, optimizer, i)
        optimizer.step()
        optimizer.zero_grad()


def flat(tensors):
    """All elements in storage order: dim 0 first, then as in memory."""
    return torch.cat([t.permute(0, *sorted(range(1, t.dim()), key=lambda d: -t.stride(d))).flatten() for t in tensors])


def lives(optimizer):
    """The mask as booleans of the parameters' shapes; all True without one."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    live = {p: l for mask in optimizer.masks.values() for p, l in mask.live().items()}
    return [live.get(p, torch.full(p.shape, not live)) for p in params]


def ascended(optimizer, model):
    """Which weights the ascent along the current gradients changes, for each parameter."""
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.perturbed():
        return [p.detach() != b for p, b in zip(model.parameters(), before)]


def k_of(sparsity, n=SIZE):
    return n - math.ceil(sparsity * n)


# --- equal to the papers' definitions ---------------------------------------------------------------------------------


def gradients(model, batch, offsets=None, statistics=False):
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


def sample_fisher(model, samples):
    twin = copy.deepcopy(model).eval()
    total = [torch.zeros_like(p) for p in twin.parameters()]
    for i in range(samples):
        x, y = BATCHES[i // 8]
        for t, g in zip(total, gradients(twin, (x[i % 8 : i % 8 + 1], y[i % 8 : i % 8 + 1]))):
            t += g**2
    return total


def largest(scores, count):
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.sort(descending=True, stable=True).indices[:count]] = True
    return chosen


class Definition:
    """Sparse SAM over a plain optimizer, with its mask as one row of booleans over the concatenated weights."""

    def __init__(self, model, rho, adaptive=False):
        self.model, self.rho, self.adaptive, self.updates = model, rho, adaptive, 0
        self.optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.mask = torch.ones(SIZE, dtype=torch.bool)
        self.params = list(model.parameters())

    def fisher(self, sparsity):
        self.mask = largest(flat(sample_fisher(self.model, 20)), k_of(sparsity))

    def regrow(self, grads, sparsity, drop, grow, rate, total):
        rows = {"gradient": flat(grads).abs(), "weight": flat(self.params).detach().abs()}
        key, draw = torch.tensor(7), torch.tensor(self.updates)
        random = [
            reference._random_scores(self.params, key, draw, range(len(self.params)), 2**32 - 2 + i) for i in (0, 1)
        ]
        dropping = -rows[drop] if drop != "random" else random[0]
        growing = rows[grow] if grow != "random" else random[1]
        count = round(rate * (1 + math.cos(math.pi * self.updates / total)) / 2 * k_of(sparsity))
        gone = largest(dropping.double().masked_fill(~self.mask, -math.inf), count)
        come = largest(growing.double().masked_fill(self.mask, -math.inf), count)
        self.mask = self.mask & ~gone | come
        self.updates += 1

    def step(self, batch, before_ascent=lambda grads: None):
        grads = gradients(self.model, batch, statistics=True)
        before_ascent(grads)
        weighted = [p.detach().abs() * g if self.adaptive else g for p, g in zip(self.params, grads)]
        norm = sum((g.double() ** 2).sum() for g in weighted).sqrt().float()
        pieces = self.mask.split([p.numel() for p in self.params])
        offsets = []
        for p, g, m in zip(self.params, grads, pieces):
            e = self.rho * (p.detach() ** 2 * g if self.adaptive else g) / norm
            live = torch.empty_like(p, dtype=torch.bool)
            order = (0, *sorted(range(1, p.dim()), key=lambda d: -p.stride(d)))
            live.permute(order).copy_(m.view([p.shape[d] for d in order]))
            offsets.append(e * live)
        for p, g in zip(self.params, gradients(self.model, batch, offsets)):
            p.grad = g
        self.optimizer.step()


def assert_close(model, definition):
    for ours, theirs in zip(model.state_dict().values(), definition.model.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])
def test_ssam_f_equals_the_definition(layout, adaptive, vectorize):
    """20 steps with masks before steps 1, 8 and 15: mask, weights and statistics equal the definition's."""
    model = make_net().to(memory_format=layout)
    options = {"rho": 2.0 if adaptive else 0.5, "adaptive": adaptive}
    definition = Definition(copy.deepcopy(model), **options)
    optimizer = ssam(model, sparsity=0.8, **options)
    for i in range(20):
        if i in (0, 7, 14):
            refresh(optimizer, model, vectorize=vectorize)
            definition.fisher(0.8)
        assert torch.equal(flat(lives(optimizer)), definition.mask)
        train(model, optimizer, [i])
        definition.step(make_batch(i))
    assert_close(model, definition)


@pytest.mark.parametrize(
    "drop, grow", [("gradient", "random"), ("weight", "gradient"), ("random", "weight")], ids="-".join
)
@pytest.mark.parametrize("how", ["scheduled", "called"])
def test_ssam_d_equals_the_definition(drop, grow, how):
    """20 steps with updates in steps 8 and 15, by schedule or by hand; the number of ones is always k."""
    model = make_net()
    definition = Definition(copy.deepcopy(model), 0.5)
    options = {"drop": drop, "grow": grow, "drop_rate": 0.6, "total_updates": 3}
    optimizer = ssam(model, mask="dynamic", sparsity=0.7, seed=7, update_every=7 * (how == "scheduled"), **options)
    for i in range(20):
        backward(model, i)
        if how == "called" and i in (7, 14):
            optimizer.update_mask()
        with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
            backward(model, i)
        optimizer.step()
        optimizer.zero_grad()
        if i == 0:  # random, so not part of the definition
            definition.mask = flat(lives(optimizer))
        regrow = lambda grads: definition.regrow(grads, 0.7, drop, grow, 0.6, 3)
        definition.step(make_batch(i), regrow if i in (7, 14) else lambda grads: None)
        assert torch.equal(flat(lives(optimizer)), definition.mask), i
        assert definition.mask.sum() == k_of(0.7)
    assert optimizer.param_groups[0]["updates"] == 2
    assert_close(model, definition)


@pytest.mark.parametrize("form", ["closure", "two steps"])
def test_other_ways_to_run_a_step(form):
    """step(closure) and first_step, second_step give the bits of perturbed()."""
    (model, optimizer), (other, its) = masked(), masked()
    for i in range(3):
        train(model, optimizer, [i])
        if form == "closure":

            def closure():
                its.zero_grad()
                with flatops.freeze_batchnorm_stats(other, enabled=its.is_perturbed):
                    loss = loss_of(other, make_batch(i))
                loss.backward()
                return loss

            its.step(closure)
        else:
            backward(other, i)
            its.first_step(zero_grad=True)
            with flatops.freeze_batchnorm_stats(other):
                backward(other, i)
            its.second_step(zero_grad=True)
    assert_same_bits(model.state_dict().values(), other.state_dict().values())


def test_sparsity_zero_is_sam_bit_for_bit():
    """With a mask of ones, and without a mask, without a warning."""
    results = []
    for kind in ("sam", "fisher", "no mask", "dynamic"):
        model = make_net()
        options = {"rho": 0.5, "lr": 0.05, "momentum": 0.9}
        if kind == "sam":
            optimizer = flatops.SAM(model.parameters(), SGD, **options)
        else:
            optimizer = ssam(model, sparsity=0.0, mask="dynamic" if kind == "dynamic" else "fisher")
        if kind == "fisher":
            refresh(optimizer, model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, range(4))
        results.append([*model.state_dict().values(), *state_tensors(optimizer)])
    for result in results[1:]:
        assert_same_bits(result, results[0])


# --- the size and choice of a mask ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fisher", "dynamic"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_mask_has_exactly_k_ones(kind, sparsity):
    """k = N - ceil(s N), and exactly these weights ascend; the backup has room for k weights."""
    model, optimizer = masked(mask=kind, sparsity=sparsity)
    live = lives(optimizer)
    assert sum(int(l.sum()) for l in live) == k_of(sparsity)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert_same_bits(ascended(optimizer, model), live)
    [mask] = optimizer.masks.values()
    [part] = mask.parts.values()
    assert [b.shape for b in part.backup] == [(k_of(sparsity),)] and not optimizer.run.weights.backups


@pytest.mark.parametrize("kind", ["fisher", "dynamic"])
def test_a_layer_pattern_counts_in_every_tensor(kind):
    """n - ceil(s n) of each tensor, also after updates."""
    model, optimizer = masked(mask=kind, pattern="layer", sparsity=0.7)
    for i in range(2):
        before = lives(optimizer)
        for p, l in zip(model.parameters(), before):
            assert l.sum() == k_of(0.7, p.numel())
        train(model, optimizer, [i])
        backward(model, i)
        refresh(optimizer, model)
        optimizer.zero_grad()
    assert kind == "fisher" or not all(torch.equal(a, b) for a, b in zip(lives(optimizer), before))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_filter_pattern_keeps_whole_filters(layout):
    """F - ceil(s F) filters of the model, those with the largest mean; a one-dimensional tensor is one filter."""
    model = make_net().to(memory_format=layout)
    model, optimizer = masked(model, pattern="filter", sparsity=0.6)
    means, kept = [], []
    for f, l in zip(sample_fisher(make_net(), 20), lives(optimizer)):
        rows = l.reshape(len(l), -1) if l.dim() > 1 else l.reshape(1, -1)
        assert torch.equal(rows.all(1), rows.any(1))
        kept.append(rows.any(1))
        means.append(f.reshape(rows.shape).double().mean(1))
    means, kept = torch.cat(means), torch.cat(kept)
    assert kept.sum() == k_of(0.6, len(kept))
    assert torch.equal(kept, largest(means, int(kept.sum())))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 7), (1, 100), (4, 4)])
def test_an_n_of_m_pattern(n, m, layout):
    """In each group of m along a filter's storage the n largest, ties to the first; ceil(r n / m) of r left."""
    model = make_net().to(memory_format=layout)
    scores = [
        (torch.randint(4, p.shape) / 4.0).to(memory_format=layout) if p.dim() == 4 else torch.randint(4, p.shape) / 4.0
        for p in model.parameters()
    ]
    mask = flatops.optim.masks.choose(scores, f"{n}:{m}", 1 - n / m)
    for s, l in zip(scores, ops.unpack_mask(mask, scores)):
        rows = zip(*(flat([t]).view(len(t) if t.dim() > 1 else 1, -1) for t in (s, l)))
        for score, live in rows:
            for group, chosen in zip(score.split(m), live.split(m)):
                assert torch.equal(chosen, largest(group, -(-len(group) * n // m)))
    optimizer = ssam(model, pattern=f"{n}:{m}")
    assert optimizer.param_groups[0]["sparsity"] == 1 - n / m
    refresh(optimizer, model)
    train(model, optimizer, range(2))


def test_ties_go_to_the_first():
    """A loss that does not use a layer's weights scores them 0: the first of them fill the mask."""
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))]
    optimizer = flatops.SSAM(params, SGD, lr=0.1, sparsity=0.4)
    model = nn.Module()
    model.forward = lambda x: x * params[1][3]
    model.a, model.b = params
    optimizer.update_mask(model, lambda out, y: out.sum(), [(torch.ones(2, 1), torch.ones(2))], samples=2)
    assert [l.tolist() for l in lives(optimizer)] == [[True] * 5, [True, False, False, True] + [False] * 3]


def test_the_first_dynamic_mask_is_random_and_follows_the_seed():
    """Equal for equal seeds, whatever the layout; different for others, with half of it shared by chance."""
    masks = []
    for seed, layout in ((0, torch.contiguous_format), (0, torch.channels_last), (1, torch.contiguous_format)):
        model = nn.Conv2d(32, 32, 3).to(memory_format=layout)
        optimizer = flatops.SSAM(model.parameters(), SGD, lr=0.1, mask="dynamic", seed=seed)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with optimizer.perturbed():
            pass
        masks.append(torch.cat([l.flatten() for l in lives(optimizer)]))
    assert torch.equal(masks[0], masks[1])
    shared = (masks[0] & masks[2]).sum() / masks[0].sum()
    assert 0.46 < shared < 0.54


def test_the_drop_rate_falls_along_a_cosine():
    """round(d(t) k) weights are dropped at update t; none after total_updates; always d0 without it."""
    for total, rates in (
        (4, [0.5, 0.5 * (1 + math.sqrt(0.5)) / 2, 0.25, 0.5 * (1 - math.sqrt(0.5)) / 2, 0, 0]),
        (0, [0.5] * 6),
    ):
        model = make_net()
        optimizer = ssam(model, mask="dynamic", total_updates=total)
        train(model, optimizer, [0])
        for rate in rates:
            backward(model, 1)
            before = flat(lives(optimizer))
            optimizer.update_mask()
            after = flat(lives(optimizer))
            assert (before & ~after).sum() == (after & ~before).sum() == round(rate * k_of(0.5))


@pytest.mark.filterwarnings("ignore:.*no mask yet")
def test_minibatch_fisher_is_the_sum_of_normalised_squares():
    """Of the ascent's own gradients since the last mask; updated by schedule or on request."""
    for every in (0, 3):
        model = make_net()
        optimizer = ssam(model, fisher="minibatch", update_every=every, sparsity=0.8)
        total = 0
        for i in range(3):
            g = flat(gradients(model, make_batch(i)))
            total = total + (g / g.double().norm()).square()
            assert not optimizer.masks
            train(model, optimizer, [i])
        if every:
            train(model, optimizer, [3])
        else:
            optimizer.update_mask()
            assert not any(f.any() for f in optimizer.fisher.values())
        assert torch.equal(flat(lives(optimizer)), largest(total, k_of(0.8)))


# --- a missing mask, or one that does not fit -------------------------------------------------------------------------


def test_without_a_mask_it_is_sam_with_one_warning():
    """A warning at the second step that names update_mask(); the steps are SAM's."""
    model, other = make_net(), make_net()
    optimizer = ssam(model)
    sam = flatops.SAM(other.parameters(), SGD, rho=0.5, lr=0.05, momentum=0.9)
    train(other, sam, range(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, [0])
    with pytest.warns(UserWarning, match=r"no mask yet.*update_mask\(\)") as record:
        train(model, optimizer, range(1, 4))
    assert len(record) == 1 and record[0].filename == __file__
    assert_same_bits(model.state_dict().values(), other.state_dict().values())


@pytest.mark.parametrize("kind", ["fisher", "dynamic"])
def test_missing_gradients(kind):
    """Parameters without one do not ascend, and others ascend by their part of the mask; restored to the bit."""
    model, optimizer = masked(mask=kind)
    params, live = list(model.parameters()), lives(optimizer)
    before = all_bits(params)
    for missing in ((), (0,), (3, 4), (0, 6, 7), (), *((i, j) for i in range(4) for j in range(i))):
        for i, p in enumerate(params):
            p.grad = None if i in missing else torch.ones_like(p)
        wanted = [l & (i not in missing) for i, l in enumerate(live)]
        assert_same_bits(ascended(optimizer, model), wanted)
        assert_same_bits(all_bits(params), before)
    assert len(next(iter(optimizer.masks.values())).parts) < 10


def test_an_update_takes_missing_gradients_as_zero():
    """They are dropped first."""
    model = make_net()
    optimizer = ssam(model, mask="dynamic", drop_rate=0.2)
    train(model, optimizer, [0])
    head = sum(int(l.sum()) for l in lives(optimizer)[-2:])
    backward(model, 1)
    for p in model.head.parameters():
        p.grad = None
    optimizer.update_mask()
    after = lives(optimizer)
    assert head < round(0.2 * k_of(0.5)) and sum(map(torch.count_nonzero, after)) == k_of(0.5)


def test_groups_with_their_own_rho_share_one_mask():
    """Two ascents by two parts of the mask, with separate backups; k counts both."""
    model = make_net()
    groups = [{"params": model.features.parameters()}, {"params": model.head.parameters(), "rho": 0.2}]
    optimizer = flatops.SSAM(groups, SGD, rho=0.5, lr=0.05, sparsity=0.75)
    refresh(optimizer, model)
    single = masked(sparsity=0.75)[1]
    assert_same_bits(lives(optimizer), lives(single))
    before = all_bits(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert_same_bits(ascended(optimizer, model), lives(optimizer))
    assert_same_bits(all_bits(model.parameters()), before)
    [mask] = optimizer.masks.values()
    assert sum(len(part.backup[0]) for part in mask.parts.values()) == k_of(0.75)


@pytest.mark.parametrize("kind", ["fisher", "dynamic"])
def test_added_parameters_ascend_with_the_next_mask(kind):
    """Frozen ones are not counted; thawed and added ones wait for the next mask."""
    model = make_net()
    model.head.weight.requires_grad_(False)
    _, optimizer = masked(model, mask=kind)
    count = lambda: sum(int(l.sum()) for l in lives(optimizer))
    assert count() == k_of(0.5, SIZE - 32)
    added = nn.Parameter(torch.ones(10))
    model.head.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [added]})
    model.added = added
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    names = [name for name, _ in model.named_parameters()]
    moved = dict(zip(names, ascended(optimizer, model)))
    assert not moved["head.weight"].any() and not moved["added"].any()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    refresh(optimizer, model)
    assert count() == k_of(0.5, SIZE + 10)


def test_without_any_gradient_the_error_is_sams():
    """A frozen network cannot ascend either."""
    model, optimizer = masked()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"), optimizer.perturbed():
        pytest.fail("the body ran")


def test_a_change_of_dtype_allocates_a_new_backup():
    """model.to(bfloat16) after the mask was made: the same weights ascend."""
    model, optimizer = masked()
    live = lives(optimizer)
    backward(model, 0)
    ascended(optimizer, model)
    model.bfloat16()
    before = all_bits(model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 10.0)
    optimizer.param_groups[0]["rho"] = 10.0
    assert_same_bits(ascended(optimizer, model), live)
    assert_same_bits(all_bits(model.parameters()), before)


# --- skip_masked: a cheaper first pass --------------------------------------------------------------------------------


def head_only(model, **options):
    """An optimizer whose mask selects the head and part of the last convolution, and nothing below."""
    optimizer = ssam(model, **options)
    live = [torch.zeros_like(p, dtype=torch.bool) for p in model.parameters()]
    for l in (live[3], *live[-2:]):
        l.view(-1)[::2] = True
    text = flatops.optim.masks.encode(live)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["mask_bits"] = text
    optimizer.load_state_dict(saved)
    return optimizer, live


@pytest.mark.parametrize("form", ["explicit", "closure", "closure with perturbed()"])
def test_skip_masked_makes_only_the_gradients_of_the_ascent(form):
    """The first pass makes no other gradients, the norm is over the selected, the second pass has all gradients."""
    (model, optimizer), (other, definition) = [(m, SGD(m.parameters(), 0.05, 0.9)) for m in (make_net(), make_net())]
    optimizer, live = head_only(model, skip_masked=True)
    seen = []
    for i in range(3):

        def forward_backward():
            with flatops.freeze_batchnorm_stats(model, enabled=optimizer.is_perturbed):
                loss = loss_of(model, make_batch(i))
            loss.backward()
            seen.append([p.grad is not None for p in model.parameters()])
            return loss

        def closure():
            optimizer.zero_grad()
            loss = forward_backward()
            if form == "closure with perturbed()":
                with optimizer.perturbed():
                    forward_backward()
            return loss

        if form == "explicit":
            with optimizer.ascent_pass():
                forward_backward()
            assert all(p.requires_grad for p in model.parameters())
            with optimizer.perturbed():
                forward_backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.step(closure)
        grads = gradients(other, make_batch(i), statistics=True)
        norm = sum((g.double() ** 2).sum() for g, l in zip(grads, live) if l.any()).sqrt().float()
        offsets = [0.5 * g / norm * l for g, l in zip(grads, live)]
        for p, g in zip(other.parameters(), gradients(other, make_batch(i), offsets)):
            p.grad = g
        definition.step()
    assert seen == [[bool(l.any()) for l in live], [True] * len(live)] * 3
    for ours, theirs in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs)


def test_skip_masked_without_ascent_pass_and_after_an_error():
    """The norm is the same for every way to run a step; requires_grad is restored whatever happens."""
    (model, other) = make_net(), make_net()
    (optimizer, _), (its, _) = head_only(model, skip_masked=True), head_only(other, skip_masked=True)
    train(other, its, range(3))
    model.head.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="body"), optimizer.ascent_pass():
        assert [p.requires_grad for p in model.parameters()] == [i in (3, 6) for i in range(8)]
        raise ValueError("body")
    assert [p.requires_grad for p in model.parameters()] == [True] * 7 + [False]
    model.head.bias.requires_grad_(True)
    for i in range(3):
        with optimizer.ascent_pass():
            backward(model, i)
        with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
            backward(model, i)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(model.state_dict().values(), other.state_dict().values())


def test_ascent_pass_does_nothing_by_default():
    """Without skip_masked, or before there is a mask."""
    for optimizer in (head_only(make_net())[0], ssam(make_net(), skip_masked=True)):
        with optimizer.ascent_pass():
            assert all(p.requires_grad for p in optimizer.param_groups[0]["params"])


# --- restoring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["fisher", "dynamic"])
def test_restored_bit_for_bit(kind, dtype):
    """Even if the body raises, and over many passes."""
    model = make_net(dtype=dtype)
    optimizer = ssam(model, mask=kind, rho=3.0)
    batch = make_batch(0, dtype)
    if kind == "fisher":
        optimizer.update_mask(model, F.cross_entropy, [batch], samples=8)
    before = all_bits(model.parameters())
    for i in range(3):
        loss_of(model, batch).backward()
        with pytest.raises(ValueError, match="body"), optimizer.perturbed():
            assert not all(torch.equal(a, b) for a, b in zip(all_bits(model.parameters()), before))
            raise ValueError("body")
        assert_same_bits(all_bits(model.parameters()), before)


# --- checkpoints and copies -------------------------------------------------------------------------------------------

BASE = {"rho": 0.5, "lr": 0.05, "momentum": 0.9}
OURS = {
    "ssam-d": {**BASE, "mask": "dynamic", "update_every": 2, "total_updates": 4, "seed": 2**63},
    "ssam-d, by layer": {**BASE, "mask": "dynamic", "update_every": 2, "pattern": "layer"},
    "ssam-f of minibatches": {**BASE, "fisher": "minibatch", "update_every": 2},
    "ssam-f of minibatches, no momentum": {"rho": 0.5, "lr": 0.05, "fisher": "minibatch", "update_every": 2},
}


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    """Runs the tests of checkpoints and copies on SSAM, comparing masks too."""
    monkeypatch.setattr(state, "everything", everything)
    for name, options in OURS.items():
        monkeypatch.setitem(state.KINDS, name, (flatops.SSAM, SGD, options))


def everything(model, optimizer):
    fisher = [optimizer.fisher.get(p, torch.zeros(p.shape)) for p in model.parameters()]
    return [*model.state_dict().values(), *state_tensors(optimizer), *lives(optimizer), *fisher]


def same_masks(ours, theirs):
    assert_same_bits(lives(ours), lives(theirs))


@pytest.mark.parametrize("at", [0, 1, 3, 4])
@pytest.mark.parametrize("kind", OURS)
def test_resume_equals_no_interruption(kind, at):
    """At, before and between updates of the mask."""
    state.test_resume_equals_no_interruption(kind, at)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_resume_between_sampled_masks(layout):
    """The mask is that of the checkpoint until the next update, which both runs make."""
    model, optimizer = masked(make_net().to(memory_format=layout), sparsity=0.9)
    train(model, optimizer, range(3))
    saved = state.through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = make_net(1).to(memory_format=layout)
    its = ssam(other, sparsity=0.1, rho=0.9)
    train(other, its, range(1))
    other.load_state_dict(saved["model"])
    its.load_state_dict(saved["optimizer"])
    for pair in ((model, optimizer), (other, its)):
        train(*pair, range(3, 5))
        refresh(pair[1], pair[0])
        train(*pair, range(5, 7))
    same_masks(optimizer, its)
    assert_same_bits(
        [*model.state_dict().values(), *state_tensors(optimizer)], [*other.state_dict().values(), *state_tensors(its)]
    )


def test_a_mask_loads_into_another_layout():
    """It is saved by position in the tensor, not in memory."""
    _, optimizer = masked(sparsity=0.9)
    _, other = masked(make_net(1).to(memory_format=torch.channels_last))
    other.load_state_dict(optimizer.state_dict())
    same_masks(optimizer, other)


def test_a_checkpoint_without_a_mask_removes_ours():
    """As if that run had continued; a checkpoint of the base optimizer alone, which has no mask, keeps ours."""
    model, optimizer = masked()
    before = lives(optimizer)
    optimizer.load_state_dict(SGD(make_net().parameters(), lr=0.1, momentum=0.9).state_dict())
    assert_same_bits(lives(optimizer), before)
    optimizer.load_state_dict(ssam(make_net()).state_dict())
    assert not optimizer.masks


def test_a_mask_of_another_model_is_refused():
    """A clear ValueError, before anything changes."""
    _, optimizer = masked()
    model = nn.ParameterList([torch.randn(3, 2) for _ in make_net().parameters()])
    other = ssam(model, mask="dynamic", lr=9.0)
    for p in model:
        p.grad = torch.ones_like(p)
    ascended(other, model)
    wanted, before = copy.deepcopy(optimizer.state_dict()), lives(optimizer)
    with pytest.raises(ValueError, match="mask in the checkpoint is for parameters of other shapes"):
        optimizer.load_state_dict(other.state_dict())
    same = optimizer.state_dict()
    assert same["param_groups"] == wanted["param_groups"]
    assert_same_bits(lives(optimizer), before)


@pytest.mark.parametrize("kind", OURS)
def test_plain_values_base_optimizers_and_copies(kind):
    """What holds for checkpoints and copies of every optimizer holds here too."""
    state.test_a_state_dict_holds_plain_values_and_does_not_change(kind)
    state.test_a_failed_load_changes_nothing(kind)
    state.test_a_checkpoint_of_the_base_optimizer_loads(kind)
    for when in ("at the start", "after a step"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state.test_the_base_optimizer_loads_our_checkpoint(kind, when)
    for how in (copy.deepcopy, lambda pair: state.pickle.loads(state.pickle.dumps(pair))):
        for at in (0, 2, 3):
            state.test_copies_continue_identically_and_independently(kind, how, at)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:.*without a perturbed pass:UserWarning")
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("by", ["memory", "disk"])
@pytest.mark.parametrize("kind", OURS)
def test_resume_from_a_distributed_checkpoint(kind, by, flatten):
    """Into a fresh optimizer that has no mask yet."""
    state.test_resume_from_a_distributed_checkpoint(kind, by, flatten)


# --- mixed precision --------------------------------------------------------------------------------------------------


def scaled(base="sgd", **options):
    model = make_net()
    base, base_options = amp.BASES[base]
    optimizer = flatops.SSAM(model.parameters(), base, rho=0.1, **options, **base_options)
    if optimizer.param_groups[0]["mask"] == "fisher" and optimizer.param_groups[0]["fisher"] == "samples":
        refresh(optimizer, model)
    return model, optimizer


KINDS = {
    "fisher": {},
    "dynamic": {"mask": "dynamic", "update_every": 2},
    "minibatch": {"fisher": "minibatch", "update_every": 2},
}


@pytest.mark.parametrize("base", amp.BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_overflow_the_scale_makes_no_difference(kind, base):
    """Weights, momentum, masks and F have the bits of the run without a scaler."""
    (model, optimizer), (plain_model, plain) = (scaled(base, **KINDS[kind]) for _ in range(2))
    amp.train(optimizer, model, amp.scaler_of(2.0**12), 5)
    amp.train(plain, plain_model, amp.GradScaler("cpu", enabled=False), 5)
    assert_same_bits(amp.everything(optimizer, model), amp.everything(plain, plain_model))
    same_masks(optimizer, plain)


@pytest.mark.parametrize("where", ["first", "second"])
@pytest.mark.parametrize("base", ["sgd", "fused adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_skips_the_step_and_backs_off(kind, base, where):
    """Even in the pass that should update the mask: the next pass updates it."""
    model, optimizer = scaled(base, **KINDS[kind])
    scaler = amp.scaler_of(2.0**12)
    amp.train(optimizer, model, scaler, 2)
    weights, base_state = all_bits(model.parameters()), [t.clone() for t in state_tensors(optimizer)]
    live, fisher = lives(optimizer), [f.clone() for f in amp.fisher_of(optimizer)]
    updates = optimizer.param_groups[0]["updates"]
    amp.passes(optimizer, model, scaler, 2, (amp.OVERFLOW, 1.0) if where == "first" else (1.0, amp.OVERFLOW))
    assert_same_bits(all_bits(model.parameters()), weights)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**11
    assert_same_bits(all_bits(model.parameters()), weights)
    assert_same_bits(state_tensors(optimizer), base_state)
    if where == "first":
        assert_same_bits(lives(optimizer), live)
        assert_same_bits(amp.fisher_of(optimizer), fisher)
        assert optimizer.param_groups[0]["updates"] == updates
    amp.train(optimizer, model, scaler, 1, first=3)
    assert scaler.get_scale() == 2.0**11
    assert optimizer.param_groups[0]["updates"] == 1
    assert all(torch.isfinite(t).all() for t in amp.everything(optimizer, model))
    assert not torch.equal(all_bits(model.parameters())[0], weights[0])


def test_float16_autocast_under_a_scaler():
    """float16 training with a loss scale stays close to float32 training without."""
    results = []
    for scaler, enabled in ((amp.scaler_of(2.0**10), True), (amp.GradScaler("cpu", enabled=False), False)):
        model, optimizer = scaled()
        start = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            amp.train(optimizer, model, scaler, 3)
        results.append(torch.cat([(p - s).flatten() for p, s in zip(model.parameters(), start)]))
    half, full = results
    assert (half - full).norm() < 0.05 * full.norm()


# --- update_mask leaves no trace --------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout, BatchNorm in two modes, a frozen layer, one that the loss does not use."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(6), nn.BatchNorm1d(6)])
        self.layers = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(2, 2)])
        self.dropout = nn.Dropout(0.5)
        self.layers[1].weight.requires_grad_(False)
        self.train()
        self.norms[1].eval()

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers):
            x = self.dropout(norm(layer(x)))
        return self.layers[2](x)


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_update_mask_leaves_no_trace(vectorize, fails, grad_mode):
    """Buffers, gradients, generators, modes and requires_grad are unchanged, even after an error."""
    torch.manual_seed(0)
    model = Noisy()
    optimizer = ssam(model)
    dataset = torch.utils.data.TensorDataset(torch.randn(20, 5), torch.randint(3, (20,)))
    loader = torch.utils.data.DataLoader(dataset, 6, shuffle=True)
    model(torch.randn(4, 5)).sum().backward()
    everything = lambda: [
        *model.state_dict().values(),
        *(torch.tensor(0.0) if p.grad is None else p.grad for p in model.parameters()),
        torch.get_rng_state(),
        torch.tensor([m.training for m in model.modules()]),
        torch.tensor([p.requires_grad for p in model.parameters()]),
    ]
    before = [t.clone() for t in everything()]
    grads = [p.grad for p in model.parameters()]
    with grad_mode():
        if fails:
            with pytest.raises(ValueError, match="20 samples and 21"):
                optimizer.update_mask(model, F.cross_entropy, loader, samples=21, vectorize=vectorize)
        else:
            optimizer.update_mask(model, F.cross_entropy, loader, samples=16, vectorize=vectorize)
    assert_same_bits(everything(), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads))
    assert bool(optimizer.masks) != fails
    if not fails:
        model(torch.randn(4, 5)).sum().backward()
        with optimizer.perturbed():
            model(torch.randn(4, 5)).sum().backward()


def test_update_mask_accepts_batches_of_loaders():
    """Lists and dicts of tensors, more batches than needed, an endless iterator."""
    model = nn.Linear(4, 3)
    optimizer = ssam(model)
    drawn = []

    def endless():
        while True:
            drawn.append(1)
            yield [{"x": torch.randn(5, 4), "name": "any"}], {"y": torch.randint(3, (5,))}

    class Unpacking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, inputs):
            return self.inner(inputs[0]["x"])

    for vectorize in (False, True):
        optimizer.update_mask(
            Unpacking(), lambda out, y: F.cross_entropy(out, y["y"]), endless(), samples=12, vectorize=vectorize
        )
    assert len(drawn) == 6 and sum(map(torch.count_nonzero, lives(optimizer))) == k_of(0.5, 15)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        *(({"sparsity": s}, "sparsity") for s in (-0.1, 1.0, 1.5, math.nan, math.inf, "0.5", True)),
        *(({"pattern": p}, "pattern") for p in ("filters", "2-4", "", None, 2, "4:", "-1:4", "2:4 ")),
        *(({"pattern": p}, r"n must lie in \[1, m\]") for p in ("5:4", "0:4", "0:0")),
        ({"pattern": "2:4", "sparsity": 0.5}, "sparsity is fixed by pattern"),
        ({"mask": "fishy"}, "mask must be one of 'fisher', 'dynamic'"),
        ({"fisher": "batch"}, "fisher must be one of"),
        ({"mask": "dynamic", "fisher": "minibatch"}, "fisher"),
        ({"mask": "dynamic", "pattern": "filter"}, "pattern 'filter' is for mask='fisher'"),
        ({"mask": "dynamic", "pattern": "2:4"}, "pattern '2:4' is for mask='fisher'"),
        ({"update_every": 5}, "update_every needs"),
        *(({"mask": "dynamic", "update_every": v}, "update_every") for v in (-1, 0.5, None)),
        *(({"total_updates": v}, "total_updates") for v in (-1, 0.5, None)),
        *(({"drop_rate": v}, "drop_rate") for v in (-0.1, 1.1, math.nan, None)),
        *(({"drop": v}, "drop must be one of") for v in ("grad", None)),
        ({"grow": "weights"}, "grow must be one of"),
        *(({"seed": v}, "seed") for v in (-1, 2**64, 0.5)),
        ({"rho": -1.0}, "rho"),
        ({"skip_masked": 1}, "skip_masked"),
        ({"skip_masked": True, "fisher": "minibatch"}, "skip_masked computes no gradients"),
        ({"skip_masked": True, "mask": "dynamic", "grow": "gradient"}, "skip_masked computes no gradients"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    """A ValueError that names the option."""
    with pytest.raises(ValueError, match=message):
        ssam(make_net(), **options)


def test_options_are_for_the_whole_model():
    """Except rho and adaptive; a group that differs is refused initially, when added, and when written to."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for name, other in (("sparsity", 0.9), ("seed", 3), ("drop", "weight")):
        with pytest.raises(ValueError, match=f"{name} is for the whole model"):
            flatops.SSAM([{"params": [first]}, {"params": [second], name: other}], SGD, lr=0.1)
        optimizer = flatops.SSAM([first], SGD, lr=0.1)
        with pytest.raises(ValueError, match=name):
            optimizer.add_param_group({"params": [second], name: other})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second], "rho": 0.3})
    optimizer.param_groups[1]["sparsity"] = 0.9
    first.grad = torch.ones(3)
    with pytest.raises(ValueError, match="sparsity"), optimizer.perturbed():
        pytest.fail("the body ran")


@pytest.mark.parametrize(
    "batches, error, message",
    [
        ([], ValueError, "batches is empty"),
        ([make_batch(0)], ValueError, "8 samples and 20"),
        ([make_batch(0)[0]], TypeError, "pairs"),
        ([(1, 2)], TypeError, "first dimension"),
        ([(torch.tensor(1.0), torch.tensor(2.0))], TypeError, "first dimension"),
    ],
    ids=["empty", "short", "no pairs", "no tensors", "scalars"],
)
def test_unsuitable_batches(batches, error, message):
    """The right error, and the mask unchanged."""
    model, optimizer = masked()
    before = lives(optimizer)
    with pytest.raises(error, match=message):
        refresh(optimizer, model, batches=batches)
    assert_same_bits(lives(optimizer), before)
    assert model.training


def test_update_mask_at_the_wrong_moment_or_with_the_wrong_arguments():
    """Clear errors, and the mask unchanged."""
    model, optimizer = masked()
    before = lives(optimizer)
    for arguments in ((), (model,), (model, F.cross_entropy)):
        with pytest.raises(ValueError, match=r"needs update_mask\(model, loss_fn, batches\)"):
            optimizer.update_mask(*arguments)
    for samples in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match="samples"):
            refresh(optimizer, model, samples=samples)
    backward(model, 0)
    with optimizer.perturbed(), pytest.raises(RuntimeError, match=r"update_mask\(\) while"):
        refresh(optimizer, model)
    assert_same_bits(lives(optimizer), before)
    for options in ({"mask": "dynamic"}, {"fisher": "minibatch"}):
        model = make_net()
        optimizer = ssam(model, **options)
        with pytest.raises(ValueError, match="takes no arguments"):
            optimizer.update_mask(model, F.cross_entropy, BATCHES)
        with pytest.raises(RuntimeError, match="gradient|nothing to make one from"):
            optimizer.update_mask()
        assert not optimizer.masks


@pytest.mark.parametrize("kind", ["fisher", "dynamic"])
def test_gradients_that_are_nan(kind):
    """A ValueError, and the mask unchanged."""
    model, optimizer = masked(mask=kind)
    before = lives(optimizer)
    backward(model, 0)
    model.head.bias.grad.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        refresh(optimizer, model, batches=[(torch.full_like(x, math.nan), y) for x, y in BATCHES])
    assert_same_bits(lives(optimizer), before)


# --- several processes ------------------------------------------------------------------------------------------------


def work(rank, folder):
    """One of two processes: each has half of the samples, gradients are averaged; the masks are written to files."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, y = BATCHES[0]
    half = x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4]
    for kind, options in KINDS.items():
        wrapped = nn.parallel.DistributedDataParallel(make_net())
        optimizer = ssam(wrapped, **options)
        if kind == "fisher":
            optimizer.update_mask(wrapped, F.cross_entropy, [half], samples=4)
        for _ in range(3 if kind != "fisher" else 0):
            with wrapped.no_sync():  # each with its own ascent
                loss_of(wrapped, half).backward()
            with optimizer.perturbed():
                loss_of(wrapped, half).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.save(lives(optimizer), f"{folder}/{kind}{rank}")
    dist.destroy_process_group()


def test_two_processes_have_the_same_masks(tmp_path):
    """SSAM-F: that of one process with all samples. Also if every process ascends along its own gradient."""
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    for kind in KINDS:
        first, second = (torch.load(tmp_path / f"{kind}{rank}") for rank in (0, 1))
        assert_same_bits(first, second)
        assert sum(map(torch.count_nonzero, first)) == k_of(0.5)
        if kind == "fisher":
            model = make_net()
            optimizer = ssam(model)
            refresh(optimizer, model, samples=8)
            assert_same_bits(lives(optimizer), first)


def test_parameters_may_come_from_a_generator():
    model = make_net()
    optimizer = flatops.SSAM([{"params": model.parameters()}], torch.optim.SGD, skip_masked=True, lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
