"""Mixed precision: scaled losses, overflows, clipping, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from models import all_bits, assert_same_bits, loss_of, make_batch, make_net, state_tensors
from torch import nn
from torch.amp import GradScaler

import flatops

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "fused sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "fused": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "fused adamw": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
}
ALGORITHMS = {
    "sam": (flatops.SAM, {"rho": 0.1}),
    "asam": (flatops.SAM, {"rho": 1.0, "adaptive": True}),
    "rwp": (flatops.RWP, {"sigma": 0.05}),
    "mrwp": (flatops.RWP, {"sigma": 0.05, "lam": 0.5}),
    "arwp": (flatops.RWP, {"sigma": 0.05, "eta": 3.0}),
    "marwp": (flatops.RWP, {"sigma": 0.05, "lam": 0.5, "eta": 3.0}),
}
ONE_PASS = ("rwp", "arwp")  # in these tests their only pass counts as the second
OVERFLOW = 1e38  # a factor of the loss that, with the loss scale, makes gradients infinite


def make(algorithm, base):
    model = make_net()
    flat, options = ALGORITHMS[algorithm]
    base, base_options = BASES[base]
    return model, flat(model.parameters(), base, **options, **base_options)


def scaler_of(scale):
    """A power of two, so that scaled and unscaled runs agree to the bit."""
    return GradScaler("cpu", init_scale=scale, growth_interval=1000)


def passes(optimizer, model, scaler, i, factors=(1.0, 1.0)):
    """Both passes of one step; the factors multiply their losses."""
    sam = isinstance(optimizer, flatops.SAM)
    weights = (1.0, 1.0) if sam else (optimizer.clean_weight, optimizer.perturbed_weight)
    two = sam or optimizer.perturbed_weight < 1
    if two:
        scaler.scale(factors[0] * weights[0] * loss_of(model, make_batch(i))).backward()
    mixed_fisher = two and not sam and optimizer.param_groups[0]["eta"] > 0
    options = {"loss_scale": scaler.get_scale() * weights[1]} if mixed_fisher else {}
    with optimizer.perturbed(**options), flatops.freeze_batchnorm_stats(model, enabled=two):
        scaler.scale(factors[1] * weights[1] * loss_of(model, make_batch(i + 100))).backward()


def train(optimizer, model, scaler, steps, first=0, clip=None):
    for i in range(first, first + steps):
        passes(optimizer, model, scaler, i)
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def fisher_of(optimizer):
    return list(getattr(optimizer, "fisher", {}).values())


def everything(optimizer, model):
    return [*model.state_dict().values(), *state_tensors(optimizer), *fisher_of(optimizer)]


# --- no overflow: the scale makes no difference --------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clipped"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_overflow_the_scale_makes_no_difference(algorithm, base, clip):
    """Weights, statistics, momentum and F have the bits of the run without a scaler, clipped or not."""
    model, optimizer = make(algorithm, base)
    plain_model, plain = make(algorithm, base)
    scaler = scaler_of(2.0**12)
    train(optimizer, model, scaler, 3, clip=clip)
    train(plain, plain_model, GradScaler("cpu", enabled=False), 3, clip=clip)
    assert scaler.get_scale() == 2.0**12
    assert_same_bits(everything(optimizer, model), everything(plain, plain_model))
    assert not fisher_of(optimizer) or all(f.sum() > 0 for f in fisher_of(optimizer)[-2:])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_float16_autocast_under_a_scaler(algorithm):
    """float16 training with a loss scale stays close to float32 training without, and the loss falls."""
    results = []
    for scaler, enabled in ((scaler_of(2.0**10), True), (GradScaler("cpu", enabled=False), False)):
        model, optimizer = make(algorithm, "sgd")
        start = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            train(optimizer, model, scaler, 3)
        results.append(torch.cat([(p - s).flatten() for p, s in zip(model.parameters(), start)]))
    half, full = results
    assert (half - full).norm() < 0.03 * full.norm()
    assert not torch.equal(half, full)


# --- overflow ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "algorithm, where", [*((a, "second") for a in ALGORITHMS), *((a, "first") for a in ALGORITHMS if a not in ONE_PASS)]
)
def test_an_overflow_skips_the_step_and_backs_off(algorithm, base, where):
    """In either pass: weights, momentum and F keep their bits; statistics count the clean pass only."""
    model, optimizer = make(algorithm, base)
    scaler = scaler_of(2.0**12)
    train(optimizer, model, scaler, 2)
    twin = copy.deepcopy(model)  # sees the clean pass only
    two = algorithm not in ONE_PASS
    loss_of(twin, make_batch(2 if two else 102))
    weights, state, fisher = all_bits(model.parameters()), state_tensors(optimizer), fisher_of(optimizer)
    state, fisher = [t.clone() for t in state], [f.clone() for f in fisher]

    factors = (OVERFLOW, 1.0) if where == "first" else (1.0, OVERFLOW)
    passes(optimizer, model, scaler, 2, factors)
    assert_same_bits(all_bits(model.parameters()), weights)
    assert all(torch.isfinite(f).all() for f in fisher_of(optimizer))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**11
    assert_same_bits(all_bits(model.parameters()), weights)
    assert_same_bits(state_tensors(optimizer), state)
    if algorithm == "arwp" or (algorithm == "marwp" and where == "second"):
        assert_same_bits(fisher_of(optimizer), fisher)
    if two:
        assert_same_bits(model.buffers(), twin.buffers())

    train(optimizer, model, scaler, 1, first=3)
    assert scaler.get_scale() == 2.0**11
    assert all(torch.isfinite(t).all() for t in everything(optimizer, model))
    assert not torch.equal(all_bits(model.parameters())[0], weights[0])


@pytest.mark.parametrize("base", BASES)
def test_an_overflow_in_one_filter_does_not_change_fisher(base):
    """A skipped step leaves all of F unchanged, even if a fused optimizer is called anyway."""
    model, optimizer = make("arwp", base)
    scaler = scaler_of(2.0**12)
    train(optimizer, model, scaler, 2)
    fisher = [f.clone() for f in fisher_of(optimizer)]
    passes(optimizer, model, scaler, 2)
    model.head.weight.grad[1, 2] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert_same_bits(fisher_of(optimizer), fisher)


@pytest.mark.parametrize("base", BASES)
def test_a_skipped_step_leaves_no_trace(base):
    """For SAM, which draws no noise, a skipped step leaves no trace in weights and momentum."""
    model, optimizer = make("sam", base)
    other, untouched = make("sam", base)
    scaler = scaler_of(2.0**12)
    train(optimizer, model, scaler, 1)
    train(untouched, other, scaler_of(2.0**12), 1)
    passes(optimizer, model, scaler, 5, (OVERFLOW, 1.0))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    train(optimizer, model, scaler, 2, first=1)
    train(untouched, other, scaler_of(2.0**12), 2, first=1)
    assert_same_bits(model.parameters(), other.parameters())
    assert_same_bits(state_tensors(optimizer), state_tensors(untouched))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_in_rows_that_the_second_pass_does_not_use(adaptive, bad):
    """Rows that overflow in pass 1 and are missing in pass 2: no ascent, and the step is skipped."""
    torch.manual_seed(0)
    embedding = nn.Embedding(4, 3)
    optimizer = flatops.SAM(embedding.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, adaptive=adaptive)
    scaler = scaler_of(2.0**10)
    before = all_bits(embedding.parameters())
    scaler.scale(bad * embedding(torch.tensor([0, 1])).sum()).backward()
    with optimizer.perturbed():
        assert_same_bits(all_bits(embedding.parameters()), before)
        scaler.scale(embedding(torch.tensor([2, 3])).sum()).backward()
        assert embedding.weight.grad.isnan().any()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_same_bits(all_bits(embedding.parameters()), before)


def test_the_taint_reaches_every_later_reducer():
    """The gradient is NaN before hooks that run after accumulation, such as an all-reduce."""
    p = nn.Parameter(torch.ones(3))
    seen = []
    p.register_post_accumulate_grad_hook(lambda q: seen.append(q.grad.clone()))
    optimizer = flatops.SAM([p], torch.optim.SGD, lr=0.1)
    (p.sum() * float("inf")).backward()
    with optimizer.perturbed():
        p.sum().backward()
        p.sum().backward()
    assert seen[1].isnan().all() and seen[2].isnan().all()
    p.grad = None
    p.sum().backward()
    assert seen[3].isfinite().all()  # gone after the pass


def test_a_finite_first_pass_taints_nothing():
    """The hook does not change a gradient, not even by rounding."""
    p = nn.Parameter(torch.ones(3))
    optimizer = flatops.SAM([p], torch.optim.SGD, lr=0.1, rho=0.5)
    p.grad = torch.ones(3)
    with optimizer.perturbed():
        (p * torch.tensor([1.0, -0.0, 1e-40])).sum().backward()
    assert_same_bits([p.grad], [torch.tensor([1.0, -0.0, 1e-40])])


# --- autocast's cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sam", "rwp"])
@pytest.mark.parametrize("enter", ["perturbed", "two steps"])
def test_both_passes_in_one_autocast_block_use_their_own_weights(algorithm, enter):
    """Autocast caches cast weights: the losses before, in and after a pass equal those of separate blocks."""
    losses = {}
    for blocks in ("one", "three"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        x = torch.randn(8, 16)
        flat = {"sam": flatops.SAM, "rwp": flatops.RWP}[algorithm]
        optimizer = flat(
            model.parameters(), torch.optim.SGD, lr=0.1, **({"rho": 1.0} if algorithm == "sam" else {"sigma": 0.5})
        )

        def loss():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = model(x).float().square().mean()
            value.backward()
            return value.item()

        def three_losses():
            clean = loss()
            if enter == "perturbed":
                with optimizer.perturbed():
                    perturbed = loss()
            else:
                optimizer.first_step()
                perturbed = loss()
                optimizer.restore()
            return clean, perturbed, loss()

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=blocks == "one"):
            losses[blocks] = three_losses()
    assert losses["one"] == losses["three"]
    clean, perturbed, after = losses["one"]
    assert clean == after != perturbed


# --- closures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("algorithm", ["sam", "rwp"])
def test_a_closure_through_the_scaler_is_refused(algorithm, base, scheduled):
    """By position and by keyword: it would step on scaled gradients. None counts as no closure."""
    model, optimizer = make(algorithm, base)
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    scaler = scaler_of(2.0**10)

    def closure():
        pytest.fail("the closure ran")

    before = all_bits(model.parameters())
    for args, kwargs in (((closure,), {}), ((), {"closure": closure})):
        passes(optimizer, model, scaler, 0)
        with pytest.raises(RuntimeError, match="closure|Closure"):
            scaler.step(optimizer, *args, **kwargs)
        assert_same_bits(all_bits(model.parameters()), before)
        optimizer.zero_grad()
        scaler = scaler_of(2.0**10)
        for name in ("grad_scale", "found_inf"):  # torch does not remove them when step() raises
            optimizer.__dict__.pop(name, None)
    passes(optimizer, model, scaler, 0)
    scaler.step(optimizer, None)
    scaler.update()
    assert not torch.equal(all_bits(model.parameters())[0], before[0])


def test_a_closure_works_next_to_a_scaler():
    """step(closure) without the scaler is allowed, even inside a wrapper of it."""
    model, optimizer = make("sam", "sgd")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, make_batch(0))
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0


# --- ARWP's F ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
def test_fisher_divides_by_the_loss_weight_or_loss_scale(as_tensor):
    """m-ARWP divides its gradient by perturbed_weight, or by loss_scale, a number or a tensor: the same F."""
    fishers = []
    for scale in (1.0, 2.0**10):
        model, optimizer = make("marwp", "sgd")
        loss_scale = None if scale == 1.0 else scale * optimizer.perturbed_weight
        if as_tensor and loss_scale is not None:
            loss_scale = torch.tensor(loss_scale)
        with optimizer.perturbed(loss_scale=loss_scale):
            (scale * optimizer.perturbed_weight * loss_of(model, make_batch(0))).backward()
        fishers.append(fisher_of(optimizer))
    assert_same_bits(*fishers)
    assert all(f.sum() > 0 for f in fishers[0][-2:])


def test_the_clean_gradient_is_not_in_fisher_and_is_kept():
    """For m-ARWP, F uses the perturbed gradient only; p.grad is the sum of both, even if the body raises."""
    model, optimizer = make("marwp", "sgd")
    alone, other = make("marwp", "sgd")
    for p in model.parameters():
        p.grad = torch.full_like(p, 1000.0)
    for m, o in ((model, optimizer), (alone, other)):
        with o.perturbed():
            (o.perturbed_weight * loss_of(m, make_batch(0))).backward()
    assert_same_bits(fisher_of(optimizer), fisher_of(other))
    for p, q in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(p.grad, q.grad + 1000.0)
    kept = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="body"), optimizer.perturbed():
        raise ValueError("body")
    assert_same_bits([p.grad for p in model.parameters()], kept)


# --- unscaled too early, or not at all -----------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sam", "mrwp", "rwp"])
def test_unscaling_before_the_perturbed_pass_is_refused(algorithm):
    """The second gradient would be added, or stepped on, still scaled. The error comes before any change."""
    model, optimizer = make(algorithm, "sgd")
    scaler = scaler_of(2.0**16)
    before = all_bits(model.parameters())
    for _ in range(2):
        scaler.scale(loss_of(model, make_batch(0))).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(RuntimeError, match="unscale_\\(\\) before the perturbed pass"):
            with optimizer.perturbed():
                pytest.fail("the pass began")
        assert_same_bits(all_bits(model.parameters()), before)
        with torch.no_grad(), flatops.perturb(model, 0.1):  # an evaluation under noise is allowed
            loss_of(model, make_batch(0))
        optimizer.zero_grad()
        scaler.update()
    passes(optimizer, model, scaler, 0)
    scaler.step(optimizer)
    assert not torch.equal(all_bits(model.parameters())[0], before[0])


def test_two_steps_need_an_unscaled_gradient():
    """second_step() does not know its caller's scaler; after unscale_() it steps."""
    model, optimizer = make("sam", "sgd")
    twin, plain = make("sam", "sgd")
    scaler = scaler_of(2.0**16)

    def backward(scale, model=model):
        scale(loss_of(model, make_batch(0))).backward()

    before = all_bits(model.parameters())
    backward(scaler.scale)
    optimizer.first_step(zero_grad=True)
    backward(scaler.scale)
    with pytest.raises(RuntimeError, match="second_step\\(\\) would step on the scaled gradient"):
        optimizer.second_step()
    assert_same_bits(all_bits(model.parameters()), before)
    assert not optimizer.is_perturbed
    optimizer.zero_grad()
    backward(scaler.scale)
    optimizer.first_step(zero_grad=True)
    backward(scaler.scale)
    scaler.unscale_(optimizer)
    optimizer.second_step()
    scaler.update()
    backward(lambda loss: loss, twin)
    plain.first_step(zero_grad=True)
    backward(lambda loss: loss, twin)
    del scaler  # of this caller
    plain.second_step()
    assert_same_bits(model.parameters(), twin.parameters())


def test_two_steps_next_to_an_unrelated_scaler():
    """A scaler that this caller does not use scales something else."""
    model, optimizer = make("sam", "sgd")

    def elsewhere():
        scaler = scaler_of(2.0**16)
        scaler.scale(torch.ones(1))
        yield scaler

    keeps = elsewhere()
    next(keeps)
    loss_of(model, make_batch(0)).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, make_batch(0)).backward()
    optimizer.second_step()
    keeps.close()


@pytest.mark.parametrize("algorithm", ["sam", "rwp"])
def test_a_disabled_scaler_has_no_effect(algorithm):
    """It passes everything through, including a closure by position."""
    model, optimizer = make(algorithm, "sgd")
    twin, plain = make(algorithm, "sgd")
    scaler = GradScaler("cpu", enabled=False)

    def closure_of(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = scaler.scale(loss_of(model, make_batch(0)))
            loss.backward()
            return loss

        return closure

    scaler.step(optimizer, closure_of(model, optimizer))
    scaler.update()
    plain.step(closure_of(twin, plain))
    assert_same_bits(model.parameters(), twin.parameters())


def test_an_overflow_is_carried_without_a_backward():
    """Gradients of torch.func run no parameter hooks; the scaler still skips the step."""
    model, optimizer = make("sam", "sgd")
    model.eval()  # torch.func refuses to write statistics
    scaler = scaler_of(2.0**10)
    before = all_bits(model.parameters())
    scaler.scale(OVERFLOW * loss_of(model, make_batch(0))).backward()
    with optimizer.perturbed():
        params = {name: p.detach() for name, p in model.named_parameters()}
        grads = torch.func.grad(
            lambda q: scaler.scale(
                nn.functional.cross_entropy(torch.func.functional_call(model, q, (make_batch(0)[0],)), make_batch(0)[1])
            )
        )(params)
        for name, p in model.named_parameters():
            p.grad = grads[name]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**10
    assert_same_bits(all_bits(model.parameters()), before)
