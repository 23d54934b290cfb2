"""PyTorch's tools together: AMP with a scaler, accumulation, clipping, a schedule, EMA, a compiled model."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from documentation import run_snippets
from models import all_bits, assert_same_bits, loss_of, make_batch, make_net, state_tensors
from plain import plain_loop
from test_distributed import groupnorm
from test_optim_restore import knows_the_opcodes, mixed_arwp, moments_that_go_wrong, rwp, sam
from torch import nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from workers import run

import flatops
from flatops.optim.run import Stage

pytestmark = pytest.mark.usefixtures("one_thread")
SGD = torch.optim.SGD
METHODS = {
    "sam": (flatops.SAM, {"rho": 0.1}),
    "ssam": (flatops.SSAM, {"rho": 0.1, "mask": "dynamic", "update_every": 2}),
    "rwp": (flatops.RWP, {"sigma": 0.05}),
    "mrwp": (flatops.RWP, {"sigma": 0.05, "lam": 0.5}),
    "marwp": (flatops.RWP, {"sigma": 0.05, "lam": 0.5, "eta": 1.0}),
}


def make(method):
    model = make_net()
    flat, options = METHODS[method]
    optimizer = flat(model.parameters(), SGD, **options, lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    return model, optimizer, schedule, GradScaler("cpu", init_scale=2.0**10)


def with_everything(method, steps, factors):
    torch._dynamo.reset()
    model, optimizer, schedule, scaler = make(method)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for i in range(2 * steps):
        for one_pass in flatops.passes(optimizer, compiled, loss_scale=lambda: scaler.get_scale() / 2):
            with one_pass, torch.autocast("cpu", dtype=torch.float16):
                loss = factors.get(i, 1.0) * loss_of(compiled, make_batch(i)) / 2
                scaler.scale(loss).backward()
        if i % 2 == 1:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
            ema.update_parameters(model)
    return model, optimizer, scaler, list(ema.module.parameters()), len(graphs)


def by_hand(method, steps, factors):
    """The same in eager mode, with gradients and averages computed by hand."""
    model, optimizer, schedule, scaler = make(method)
    average = []

    def backward(i):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = factors.get(i, 1.0) * loss_of(model, make_batch(i)) / 2
        scaler.scale(loss).backward()
        return loss.item()

    def after_step():
        schedule.step()
        if not average:
            average.extend(p.detach().clone() for p in model.parameters())
        for a, p in zip(average, model.parameters()):
            a.lerp_(p.detach(), 0.1)

    plain_loop(model, optimizer, backward, 2 * steps, scaler, accumulate=2, clip=0.5, after_step=after_step)
    return model, optimizer, scaler, average


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("factors", [{}, {2: 1e38}], ids=["", "overflow"])
@pytest.mark.parametrize("method", METHODS)
def test_all_tools_together(method, factors):
    """To the bit: weights, running statistics, momentum, the moving average, the loss scale; at most two graphs."""
    model, optimizer, scaler, average, graphs = with_everything(method, 4, factors)
    twin, theirs, expected, by_lerp = by_hand(method, 4, factors)
    assert_same_bits(model.state_dict().values(), twin.state_dict().values())
    assert_same_bits(state_tensors(optimizer), state_tensors(theirs))
    assert_same_bits(getattr(optimizer, "fisher", {}).values(), getattr(theirs, "fisher", {}).values())
    torch.testing.assert_close(average, by_lerp, rtol=1e-6, atol=1e-7)
    assert scaler.get_scale() == expected.get_scale() == (2.0**9 if factors else 2.0**10)
    assert graphs <= 2


# --- errors and interrupts -----------------------------------------------------------------------------


@knows_the_opcodes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", [rwp, sam, mixed_arwp])
def test_an_interrupt_at_any_moment_of_a_pass_restores_the_weights(kind):
    """As with perturbed(): weights are restored before any handler runs."""

    class Passes:
        def __init__(self, params):
            self.optimizer = kind(params)

        in_pass = property(lambda self: self.optimizer.in_pass)

        def perturbed(self):
            *_, last = flatops.passes(self.optimizer)
            return last

    wrong = moments_that_go_wrong(Passes, KeyboardInterrupt)
    assert not wrong, f"{len(wrong)} places: " + ", ".join(wrong)


@pytest.mark.parametrize("method", ["sam", "rwp"])
def test_harmful_closures_are_refused(method):
    """Without a backward SAM has no gradient to step with; with an open pass it would step from perturbed weights."""
    model, optimizer, *_ = make(method)
    before = all_bits(model.parameters())

    def closure():
        loss = loss_of(model, make_batch(0))
        if not optimizer.is_perturbed:
            loss.backward()
        return loss

    if method == "sam":
        with pytest.raises(RuntimeError, match="no gradient in the perturbed pass"):
            optimizer.step(closure)
    with optimizer.perturbed() if method == "rwp" else contextlib.nullcontext():
        pass
    loss_of(model, make_batch(0)).backward()
    optimizer.run.stage = Stage.READY
    with pytest.raises(RuntimeError, match="perturbed"):
        optimizer.step(optimizer.first_step)
    optimizer.restore()
    assert_same_bits(all_bits(model.parameters()), before)


# --- replicas ------------------------------------------------------------------------------------------


def on_replicas(method, view):
    """Two processes, two micro-batches per step, the first without an all-reduce, against the same by hand."""
    rank = dist.get_rank()
    flat, options = METHODS[method]
    options = options | ({"seed": 0, "stream": 0} if flat is flatops.RWP else {})
    net, twin = make_net(norm=groupnorm), make_net(norm=groupnorm)
    model = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=view)
    optimizer, by_hand = (flat(m.parameters(), SGD, lr=0.05, momentum=0.9, **options) for m in (net, twin))

    def mean_gradients(batches, weight=1.0):
        """Of the twin, over these batches."""
        twin.zero_grad()
        (sum(weight * loss_of(twin, b) for b in batches) / len(batches)).backward()
        return [p.grad.clone() for p in twin.parameters()]

    for step in range(3):
        micro = [[make_batch(4 * step + 2 * i + r) for r in range(2)] for i in range(2)]
        for i, batches in enumerate(micro):
            with model.no_sync() if i == 0 else contextlib.nullcontext():
                for one_pass in flatops.passes(optimizer, model):
                    with one_pass:
                        loss_of(model, batches[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = None
        for i, batches in enumerate(micro):
            # Without an all-reduce each process ascends alone, with one all ascend together.
            alone = [[b] for b in batches] if i == 0 and method == "sam" else [batches]
            for part in alone:
                parts = []
                if method == "sam":
                    mean_gradients(part)
                elif method == "mrwp":
                    parts.append(mean_gradients(part, by_hand.clean_weight))
                with by_hand.perturbed():
                    parts.append(mean_gradients(part, getattr(by_hand, "perturbed_weight", 1.0)))
                for g in parts:
                    g = [x / len(alone) for x in g]
                    total = g if total is None else [a + b for a, b in zip(total, g)]
        for p, g in zip(twin.parameters(), total):
            p.grad = g
        by_hand.step()
        by_hand.zero_grad()
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        other = p.detach().clone()
        dist.broadcast(other, src=0)
        assert_same_bits([p], [other])


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("method", ["sam", "rwp", "mrwp"])
def test_passes_on_replicas(method, view):
    run(on_replicas, 2, method, view)


def test_an_average_of_a_model_is_evaluated_under_noise():
    """AveragedModel is an ordinary module; update_bn computes its statistics."""
    model = make_net()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ema.update_parameters(model)
    update_bn([make_batch(0)[0]], ema)
    with torch.inference_mode(), flatops.perturb(ema, 0.1):
        noisy = loss_of(ema.eval(), make_batch(1))
    assert noisy != loss_of(ema, make_batch(1))


@pytest.mark.parametrize("method", METHODS)
def test_a_failed_micro_batch_loses_no_other_gradients(method):
    """Out of memory in any pass: accumulated gradients are kept, even after m-RWP has added its clean part to them."""
    model, optimizer, *_ = make(method)
    for one_pass in flatops.passes(optimizer, model):
        with one_pass:
            loss_of(model, make_batch(0)).backward()
    before = [p.grad.clone() for p in model.parameters()]
    for last in (False, True):
        with pytest.raises(MemoryError):
            for one_pass in flatops.passes(optimizer, model):
                with one_pass:
                    if not last or optimizer.is_perturbed:
                        raise MemoryError
                    loss_of(model, make_batch(1)).backward()
        if last and method in ("mrwp", "marwp"):
            assert all(p.grad is not None for p in model.parameters())
        else:
            assert_same_bits([p.grad for p in model.parameters()], before)
    assert not optimizer.in_pass


@pytest.mark.parametrize("method", METHODS)
def test_passes_refuse_other_optimizers(method):
    with pytest.raises(TypeError, match="no flatops optimizer"):
        next(flatops.passes(SGD(make_net().parameters(), lr=0.1)))


def test_the_snippets_of_the_documentation_run():
    run_snippets("pytorch.md")
