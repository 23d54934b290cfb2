"""The loops that users write: closures, two steps, schedulers, hooks, accumulation, torch.compile."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import all_bits, assert_same_bits, loss_of, make_batch, make_net
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import flatops

KINDS = {
    "sam": (flatops.SAM, {"rho": 0.1}),
    "rwp": (flatops.RWP, {"sigma": 0.05}),
    "mrwp": (flatops.RWP, {"sigma": 0.05, "lam": 0.5}),
}


def make(kind, model, base=SGD, **changed):
    flat, options = KINDS[kind]
    return flat(
        model.parameters(), base, **{**options, "lr": 0.05, **({"momentum": 0.9} if base is SGD else {}), **changed}
    )


def closure_for(optimizer, model, i=0, calls=None):
    def closure():
        if calls is not None:
            calls.append(optimizer.is_perturbed)
        optimizer.zero_grad()
        loss = loss_of(model, make_batch(i))
        loss.backward()
        return loss

    return closure


def explicit(optimizer, model, i=0):
    loss_of(model, make_batch(i)).backward()
    with optimizer.perturbed():
        loss_of(model, make_batch(i)).backward()
    optimizer.step()
    optimizer.zero_grad()


def by_closure(optimizer, model, i=0):
    optimizer.step(closure_for(optimizer, model, i))


def two_steps(optimizer, model, i=0):
    loss_of(model, make_batch(i)).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, make_batch(i)).backward()
    optimizer.second_step(zero_grad=True)


FORMS = {"explicit": explicit, "closure": by_closure, "two steps": two_steps}


# --- classes and wrappers ------------------------------------------------------------------------------


def test_an_optimizer_is_both_its_classes():
    """isinstance holds for the algorithm and for the base; the class is created once and named after both."""
    first, second = make("sam", make_net()), make("sam", make_net())
    assert isinstance(first, flatops.SAM) and isinstance(first, SGD) and isinstance(first, torch.optim.Optimizer)
    assert type(first) is type(second) and type(first).__name__ == "SAMSGD"
    assert not isinstance(make("rwp", make_net(), torch.optim.AdamW), (SGD, flatops.SAM))
    assert "rho: 0.1" in repr(first)


class Wrapper:
    def __init__(self, optimizer, name="optimizer"):
        setattr(self, name, optimizer)


def test_unwrap_finds_the_optimizer_in_its_wrappers():
    """Through chains of .optimizer and ._optimizer, and through wrappers that delegate attributes."""

    class Delegating(Wrapper):
        def __getattr__(self, name):
            return getattr(self.__dict__["optimizer"], name)

    optimizer = make("sam", make_net())
    posing = object.__new__(type(optimizer))  # an instance of the class, but never initialised
    posing.optimizer = optimizer
    for wrapped in (
        optimizer,
        Wrapper(optimizer),
        Wrapper(Wrapper(optimizer, "_optimizer")),
        Delegating(optimizer),
        posing,
    ):
        assert flatops.unwrap(wrapped) is optimizer


def test_unwrap_says_what_it_was_given():
    """Without a flatops optimizer, even in a cycle of wrappers: a TypeError."""
    circle = Wrapper(None)
    circle.optimizer = circle
    for wrapped in (SGD(make_net().parameters(), lr=0.1), Wrapper(SGD(make_net().parameters(), lr=0.1)), circle, None):
        with pytest.raises(TypeError, match=type(wrapped).__name__):
            flatops.unwrap(wrapped)


# --- closures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, expected", [("sam", {False, True}), ("rwp", {True}), ("mrwp", {False, True})])
def test_a_closure_runs_once_a_pass_and_returns_the_clean_loss(kind, expected):
    """With gradients enabled, even in no_grad; for RWP the loss is that of its only pass."""
    model = make_net()
    optimizer = make(kind, model)
    losses, calls = [], []

    def closure():
        losses.append((optimizer.is_perturbed, closure_for(optimizer, model, calls=calls)()))
        return losses[-1][1]

    with torch.no_grad():
        returned = optimizer.step(closure)
    assert len(calls) == len(expected) and set(calls) == expected
    assert returned is dict(losses)[kind == "rwp"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_runs_once_after_a_pass(kind):
    """step(closure) after perturbed() evaluates once, at the restored weights; the next one runs all passes."""
    model = make_net()
    optimizer, calls = make(kind, model), []
    loss_of(model, make_batch(0)).backward()
    with optimizer.perturbed():
        loss_of(model, make_batch(0)).backward()
    optimizer.step(closure_for(optimizer, model, calls=calls))
    assert calls == [False]
    optimizer.step(closure_for(optimizer, model, calls=calls))
    assert len(calls) == 1 + (1 if kind == "rwp" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_may_contain_the_pass(kind):
    """A closure that uses perturbed() itself runs once, and does what its lines do outside step()."""

    def both_passes(optimizer, model):
        optimizer.zero_grad()
        if kind != "rwp":
            (getattr(optimizer, "clean_weight", 1.0) * loss_of(model, make_batch(0))).backward()
        with optimizer.perturbed():
            loss = loss_of(model, make_batch(1))
            (getattr(optimizer, "perturbed_weight", 1.0) * loss).backward()
        return loss

    model, twin, calls = make_net(), make_net(), []
    optimizer, explicit = make(kind, model), make(kind, twin)
    for _ in range(2):
        optimizer.step(lambda: (calls.append(1), both_passes(optimizer, model))[1])
        both_passes(explicit, twin)
        explicit.step()
    assert len(calls) == 2
    assert_same_bits(model.parameters(), twin.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failing", [0, 1])
def test_after_a_closure_that_raised_the_next_step_is_whole(kind, failing):
    """A batch that fails in any pass leaves no half-done step: the next step runs every pass."""
    model = make_net()
    optimizer, calls = make(kind, model), []
    before = all_bits(model.parameters())

    def closure():
        if len(calls) == failing:
            raise ValueError("this batch")
        return closure_for(optimizer, model, calls=calls)()

    if kind == "rwp" and failing == 1:
        calls.append("one pass only: fails at once")
    with pytest.raises(ValueError, match="this batch"):
        optimizer.step(closure)
    assert_same_bits(all_bits(model.parameters()), before)
    calls.clear()
    optimizer.step(closure_for(optimizer, model, calls=calls))
    assert len(calls) == (1 if kind == "rwp" else 2)


def test_evaluating_under_noise_is_not_a_training_pass():
    """After an evaluation in perturbed() and no_grad, step(closure) still perturbs."""
    model = make_net()
    optimizer, calls = make("rwp", model), []
    with torch.no_grad(), optimizer.perturbed():
        loss_of(model, make_batch(0))
    optimizer.step(closure_for(optimizer, model, calls=calls))
    assert calls == [True]


@pytest.mark.parametrize("form", ["two steps", "closure"])
def test_loops_written_for_davda54_sam_run_unchanged(form):
    """Both forms of its README give our weights; its closure does not zero gradients and follows a backward."""
    model, twin = make_net(), make_net()
    optimizer, ours = make("sam", model), make("sam", twin)

    def loss_function(output, answer):
        return nn.functional.cross_entropy(output, answer)

    for i in range(3):
        input, answer = make_batch(i)
        if form == "two steps":
            loss = loss_function(model(input), answer)
            loss.backward()
            optimizer.first_step(zero_grad=True)
            loss_function(model(input), answer).backward()
            optimizer.second_step(zero_grad=True)
        else:

            def closure():
                loss = loss_function(model(input), answer)
                loss.backward()
                return loss

            loss = loss_function(model(input), answer)
            loss.backward()
            optimizer.step(closure)
            optimizer.zero_grad()
        explicit(ours, twin, i)
    assert_same_bits(model.parameters(), twin.parameters())


# --- warnings, hooks, profiler -------------------------------------------------------------------------


def test_a_step_without_a_pass_warns_once_and_points_at_the_caller():
    """step() without perturbed() is plain SGD: one warning, at the user's line, and none after a pass."""
    model = make_net()
    optimizer = make("sam", model)
    lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    loss_of(model, make_batch(0)).backward()
    with pytest.warns(UserWarning, match=r"SAMSGD.step\(\) without a perturbed pass is plain SGD") as record:
        optimizer.step()
        optimizer.step()
    assert [w.filename for w in record] == [__file__]
    other = make("sam", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in FORMS.values():
            form(other, model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_run_once_a_step(kind, form):
    """Global and own hooks run once, before and after; pre-hooks see clean weights, post-hooks new ones."""
    model = make_net()
    SGD(make_net().parameters(), lr=0.1)  # torch hooks a class's step when it is first used
    optimizer = make(kind, model)
    before, seen = all_bits(model.parameters()), []

    def hook(name):
        def record(hooked, args, kwargs):
            assert hooked is optimizer and not optimizer.is_perturbed
            seen.append((name, torch.equal(all_bits(model.parameters())[0], before[0])))

        return record

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    optimizer.register_step_pre_hook(hook("pre"))
    optimizer.register_step_post_hook(hook("post"))
    try:
        FORMS[form](optimizer, model)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("global pre", True), ("pre", True), ("post", False), ("global post", False)]


def test_the_profiler_sees_one_step_by_its_name():
    """One record of Optimizer.step#SAMSGD.step, and none of the base class's."""
    model = make_net()
    optimizer = make("sam", model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        explicit(optimizer, model)
    steps = [e.name for e in profile.events() if e.name.startswith("Optimizer.step#")]
    assert steps == ["Optimizer.step#SAMSGD.step"]


# --- schedules -----------------------------------------------------------------------------------------

SCHEDULES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=6),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_schedulers_work_as_on_the_base(kind, schedule, form):
    """The same lr and momentum after every step, and no warning about the order of steps."""
    model, plain_model = make_net(), make_net()
    optimizer, plain = make(kind, model), SGD(plain_model.parameters(), lr=0.05, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [SCHEDULES[schedule](o) for o in (optimizer, plain)]
        for i in range(4):
            FORMS[form](optimizer, model, i)
            plain.step()
            for scheduler in schedulers:
                scheduler.step(*([1.0] if schedule == "plateau" else []))
            for key in ("lr", "momentum"):
                assert optimizer.param_groups[0][key] == plain.param_groups[0][key]
    assert plain.param_groups[0]["lr"] != 0.05


# --- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_equal_one_big_batch(kind):
    """Two half batches per pass, without BatchNorm, give the step of the whole batch."""
    model, whole = (make_net(dtype=torch.float64, norm=nn.Identity), make_net(dtype=torch.float64, norm=nn.Identity))
    optimizer, big = make(kind, model), make(kind, whole)
    for i in range(3):
        x, y = make_batch(i, torch.float64)
        halves = [(x[:4], y[:4]), (x[4:], y[4:])]
        for half in halves:
            (loss_of(model, half) / 2).backward()
        with optimizer.perturbed():
            for half in halves:
                (loss_of(model, half) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(whole, (x, y)).backward()
        with big.perturbed():
            loss_of(whole, (x, y)).backward()
        big.step()
        big.zero_grad()
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=1e-11, atol=1e-13)


def test_sam_zeroes_the_first_gradient_and_rwp_adds_to_it():
    """For SAM, perturbed() zeroes gradients; for m-RWP, the two gradients are to be summed."""
    for kind in ("sam", "mrwp"):
        p = nn.Parameter(torch.ones(3))
        optimizer = flatops.SAM([p], SGD, lr=0.1) if kind == "sam" else flatops.RWP([p], SGD, lr=0.1, lam=0.5)
        p.grad = torch.full((3,), 10.0)
        with optimizer.perturbed():
            (2 * p).sum().backward()
        assert torch.equal(p.grad, torch.full((3,), 2.0 if kind == "sam" else 12.0))


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("form", [explicit, by_closure])
@pytest.mark.parametrize("kind, changed", [("sam", {}), ("rwp", {}), ("mrwp", {}), ("mrwp", {"eta": 3.0})])
def test_gradients_that_are_views_of_buckets(process_group, kind, changed, form):
    """DistributedDataParallel writes every backward into one buffer, which may hold no other gradient."""
    model, twin = make_net(), make_net()
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer, alone = make(kind, model, **changed), make(kind, twin, **changed)
    for i in range(3):
        form(optimizer, wrapped, i)
        form(alone, twin, i)
    assert_same_bits(model.state_dict().values(), twin.state_dict().values())


# --- torch.compile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_in_the_loop(kind):
    """The weights of the eager loop; one graph for each mode of BatchNorm, no recompilation in later steps."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, twin = make_net(), make_net()
    compiled = torch.compile(model, backend=backend)
    optimizer, eager = make(kind, model), make(kind, twin)
    for i in range(4):
        for network, o in ((compiled, optimizer), (twin, eager)):
            loss_of(network, make_batch(i)).backward()
            with o.perturbed(), flatops.freeze_batchnorm_stats(network):
                loss_of(network, make_batch(i)).backward()
            o.step()
            o.zero_grad()
    assert_same_bits(model.state_dict().values(), twin.state_dict().values())
    assert len(graphs) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step():
    """torch.compile of optimizer.step gives the weights of the eager step, within rounding."""
    torch._dynamo.reset()
    model, twin = make_net(), make_net()
    optimizer, eager = make("rwp", model), make("rwp", twin)
    steps = [torch.compile(optimizer.step, backend="eager"), eager.step]
    for i in range(3):
        for network, o, step in zip((model, twin), (optimizer, eager), steps):
            with o.perturbed():
                loss_of(network, make_batch(i)).backward()
            step()
            o.zero_grad()
    # torch 2.11 compiles SGD itself to foreach operations, which round differently.
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# --- gradients without a backward, threads -------------------------------------------------------------


def test_m_rwp_refuses_gradients_that_it_cannot_weight():
    """Gradients of torch.func that the loop writes to p.grad are refused; those of autograd.grad are weighted."""
    model, batch = make_net(), make_batch(0)
    optimizer = flatops.RWP(model.parameters(), SGD, sigma=0.0, lam=0.25, lr=0.1)
    model.eval()  # for the same statistics in both passes
    loss_of(model, batch).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()

    def by_func():
        params = {name: p.detach() for name, p in model.named_parameters()}
        call = torch.func.functional_call
        grads = torch.func.grad(lambda q: nn.functional.cross_entropy(call(model, q, (batch[0],)), batch[1]))(params)
        return grads.values()

    def by_autograd():
        return torch.autograd.grad(loss_of(model, batch), list(model.parameters()))

    def run(gradients):
        for one_pass in flatops.passes(optimizer):
            with one_pass:
                for p, g in zip(model.parameters(), gradients()):
                    p.grad = g if p.grad is None else p.grad + g

    with pytest.raises(RuntimeError, match="written to p.grad without a backward"):
        run(by_func)
    optimizer.zero_grad()
    run(by_autograd)
    for p, g in zip(model.parameters(), plain):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("kind", ["perturb", "optimizer"])
def test_a_second_thread_is_refused(kind):
    """It would restore the first one's noise. Other weights, and the same thread again, are allowed."""
    from concurrent.futures import ThreadPoolExecutor

    model, other = make_net(), make_net(1)
    before = all_bits([*model.parameters(), *other.parameters()])

    def enter(m):
        if kind == "perturb":
            return flatops.perturb(m, 0.1)
        return flatops.RWP(m.parameters(), SGD, sigma=0.1, seed=0, lr=0.1).perturbed()

    def evaluate(m):
        with torch.no_grad(), enter(m):
            return loss_of(m, make_batch(0))

    with ThreadPoolExecutor(1) as pool:
        with enter(model):
            noisy = all_bits(model.parameters())
            with pytest.raises(RuntimeError, match="another thread is perturbing these weights"):
                pool.submit(evaluate, model).result()
            pool.submit(evaluate, other).result()
            assert_same_bits(all_bits(model.parameters()), noisy)
            evaluate(model)
        pool.submit(evaluate, model).result()
    assert_same_bits(all_bits([*model.parameters(), *other.parameters()]), before)
