"""perturbed() restores the weights to the bit: any dtype, layout and way out, any interrupt."""

from __future__ import annotations

import dis
import functools
import random
import signal
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from models import all_bits, assert_same_bits, bits, loss_of, make_batch, make_net
from torch import nn

import flatops
from flatops import ops, reference
from flatops.restore import Pass

SGD = torch.optim.SGD
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = {
    "contiguous": lambda randn: randn(4, 3, 3, 3),
    "channels_last": lambda randn: randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
    "transposed": lambda randn: randn(5, 7).t(),
    "with gaps": lambda randn: randn(6, 8)[::2, ::2],
    "0-dim": lambda randn: randn(()),
    "no filters": lambda randn: randn(0, 4),
    "empty filters": lambda randn: randn(4, 0),
    "one element": lambda randn: randn(1),
    "one of four dimensions": lambda randn: randn(1, 1, 1, 1),
}


def rwp(params, **options):
    return flatops.RWP(params, SGD, lr=0.1, **{"sigma": 0.1, **options})


def arwp(params, **options):
    optimizer = rwp(params, eta=1.0, **options)
    for p in params:
        optimizer._fisher(p).fill_(0.5)
    return optimizer


def mixed_arwp(params, **options):
    fill_gradients(params)
    return arwp(params, lam=0.5, **options)


def fill_gradients(params):
    for p in params:
        p.grad = torch.randn_like(p)


def sam(params, **options):
    fill_gradients(params)
    return flatops.SAM(params, SGD, lr=0.1, **{"rho": 0.5, **options})


def asam(params, **options):
    return sam(params, adaptive=True, rho=5.0)


def regenerating(params, **options):
    return rwp(params, restore="regenerate", **options)


OPTIMIZERS = {"rwp": rwp, "arwp": arwp, "m-arwp": mixed_arwp, "sam": sam, "asam": asam}


def some_params(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(4, 3), (5,), (2, 3, 2, 2)]]


# --- dtypes and layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_are_restored_to_the_bit(kind, dtype, layout):
    """For every dtype and layout; and address, strides and version tell autograd what happened."""
    torch.manual_seed(0)
    p = nn.Parameter(LAYOUTS[layout](functools.partial(torch.randn, dtype=dtype)))
    optimizer = OPTIMIZERS[kind]([p])
    before, address, strides, version = bits(p), p.data_ptr(), p.stride(), p._version
    for _ in range(2):
        with optimizer.perturbed():
            assert p.numel() < 10 or not torch.equal(bits(p), before)
            assert p.data_ptr() == address and p.stride() == strides and p._version > version
            p.grad = torch.randn_like(p)
        assert torch.equal(bits(p), before)


def test_memory_between_the_elements_does_not_change():
    """A parameter of every other element of a buffer does not change the elements in between."""
    torch.manual_seed(0)
    buffer = torch.randn(6, 8)
    p = nn.Parameter(buffer[::2, ::2])
    before = bits(buffer)
    with rwp([p]).perturbed():
        changed = bits(buffer) != before
        assert changed[::2, ::2].all() and changed.sum() == p.numel()
    assert torch.equal(bits(buffer), before)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_dtypes_mix_in_one_optimizer(kind):
    """One group of all dtypes together equals one optimizer per dtype, perturbed and restored."""
    params = [p for dtype in DTYPES for p in some_params(dtype)]
    optimizer = OPTIMIZERS[kind](params)
    before = all_bits(params)
    with optimizer.perturbed():
        assert all(not torch.equal(bits(p), b) for p, b in zip(params, before))
        fill_gradients(params)
    assert_same_bits(all_bits(params), before)


values = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
arrays = st_numpy.arrays(
    "float32", st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5), elements=values
)


@settings(max_examples=60, deadline=None)
@given(arrays=st.lists(arrays, min_size=1, max_size=3), dtype=st.sampled_from(DTYPES),
       kind=st.sampled_from(sorted(OPTIMIZERS)), permute=st.randoms(use_true_random=False))  # fmt: skip
def test_any_values_of_any_shape_are_restored(arrays, dtype, kind, permute):
    """NaN, infinities, subnormals and -0 too, in any order of dimensions."""
    params = []
    for array in arrays:
        weight = torch.from_numpy(array).to(dtype)
        params.append(nn.Parameter(weight.permute(permute.sample(range(weight.dim()), weight.dim()))))
    optimizer = OPTIMIZERS[kind](params)
    before = all_bits(params)
    with optimizer.perturbed():
        fill_gradients(params)
    assert_same_bits(all_bits(params), before)


# --- ways out ------------------------------------------------------------------------------------------


def leave_by_value_error():
    raise ValueError("from the body")


def leave_by_interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "leave, error",
    [(leave_by_value_error, ValueError), (leave_by_interrupt, KeyboardInterrupt), (sys.exit, SystemExit)],
    ids=["error", "interrupt", "exit"],
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_exception_in_the_body_propagates_and_restores_the_weights(kind, leave, error):
    """Weights are restored before any handler runs, and the optimizer can be used and saved."""
    params = some_params()
    optimizer = OPTIMIZERS[kind](params)
    before = all_bits(params)
    try:
        with optimizer.perturbed():
            leave()
    except error:
        assert_same_bits(all_bits(params), before)
        assert not optimizer.is_perturbed
        optimizer.state_dict()
    else:
        pytest.fail("the exception was swallowed")
    fill_gradients(params)
    with optimizer.perturbed():
        assert not torch.equal(bits(params[0]), before[0])
    assert_same_bits(all_bits(params), before)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operator, kind", [("perturb_", rwp), ("ascend_", sam)])
@pytest.mark.parametrize("enter", ["perturbed", "first_step"])
def test_a_failure_halfway_undoes_the_first_half(monkeypatch, operator, kind, enter, when):
    """The second of two operator calls fails, before or after its kernel: no weight stays perturbed."""
    params = some_params()
    key = "rho" if kind is sam else "sigma"
    optimizer = kind([p for p in params])
    optimizer.param_groups[0]["params"] = params[:1]
    optimizer.add_param_group({"params": params[1:], key: 0.2})
    before, original, calls = all_bits(params), getattr(ops, operator), []

    def failing(*args, **kwargs):
        calls.append(operator)
        if len(calls) == 2 and when == "before":
            raise MemoryError("half way")
        original(*args, **kwargs)
        if len(calls) == 2:
            raise MemoryError("half way")

    monkeypatch.setattr(ops, operator, failing)
    with pytest.raises(MemoryError, match="half way"):
        if enter == "perturbed":
            with optimizer.perturbed():
                pytest.fail("the body ran")
        else:
            optimizer.first_step()
    assert len(calls) == 2
    assert_same_bits(all_bits(params), before)
    assert not optimizer.is_perturbed


def test_an_invalid_second_group_raises_and_undoes_the_first():
    """An invalid hyperparameter written directly to param_groups raises, and changes nothing."""
    params = some_params()
    optimizer = rwp([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.param_groups[1]["sigma"] = float("nan")
    before = all_bits(params)
    with pytest.raises(ValueError, match="sigma"), optimizer.perturbed():
        pytest.fail("the body ran")
    assert_same_bits(all_bits(params), before)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_nested_perturbed_is_refused_and_the_outer_pass_continues(kind):
    """The inner perturbed() raises before anything changes; the outer pass continues, and still restores."""
    params = some_params()
    optimizer = OPTIMIZERS[kind](params)
    before = all_bits(params)
    with optimizer.perturbed():
        inside, gradients = all_bits(params), [p.grad for p in params]
        for enter in (lambda: optimizer.perturbed().__enter__(), optimizer.first_step):
            with pytest.raises(RuntimeError, match="perturbed"):
                enter()
            assert_same_bits(all_bits(params), inside)
            assert optimizer.is_perturbed and all(p.grad is g for p, g in zip(params, gradients))
    assert_same_bits(all_bits(params), before)


def test_restore_may_be_called_early():
    """restore() in the body removes the perturbation; leaving does not remove it again."""
    params = some_params()
    optimizer = regenerating(params)
    with optimizer.perturbed():
        optimizer.restore()
        early = all_bits(params)
        optimizer.restore()
    assert_same_bits(all_bits(params), early)


@pytest.mark.parametrize("kind", [rwp, regenerating, arwp])
def test_a_pass_without_gradients(kind):
    """Evaluating under noise works in no_grad and in inference mode."""
    for mode in (torch.no_grad, torch.inference_mode):
        params = some_params()
        optimizer, before = kind(params), [p.detach().clone() for p in params]
        with mode(), optimizer.perturbed():
            assert not torch.equal(params[0], before[0])
        for p, b in zip(params, before):
            torch.testing.assert_close(p.detach(), b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_a_graph_across_the_edge_of_a_pass_is_an_error(inside):
    """Forward at one set of weights and backward at the other raises, as for any weight changed in place."""
    model, batch = make_net(), make_batch(0)
    optimizer = rwp(list(model.parameters()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        if inside == "backward":
            loss = loss_of(model, batch)
            with optimizer.perturbed():
                loss.backward()
        else:
            with optimizer.perturbed():
                loss = loss_of(model, batch)
            loss.backward()


@pytest.mark.parametrize("kind", [rwp, sam])
def test_a_pass_that_is_never_left_ends_when_it_is_dropped(kind):
    params = some_params()
    optimizer = kind(params)
    before = all_bits(params)
    entered = optimizer.perturbed()
    entered.__enter__()
    assert not torch.equal(bits(params[0]), before[0])
    del entered
    assert_same_bits(all_bits(params), before)
    assert not optimizer.is_perturbed


def test_a_pass_that_failed_on_entry_does_not_end_a_later_one():
    class Failing:
        def __enter__(self):
            raise MemoryError("on entry")

        def __exit__(self, *exception): ...

    params = some_params()
    optimizer = rwp(params)
    before = all_bits(params)
    failed = Pass(optimizer, Failing())
    with pytest.raises(MemoryError, match="on entry"):
        failed.__enter__()
    assert_same_bits(all_bits(params), before)
    with optimizer.perturbed():
        del failed
        assert optimizer.is_perturbed and not torch.equal(bits(params[0]), before[0])
    assert_same_bits(all_bits(params), before)


# --- an interrupt at every moment ----------------------------------------------------------------------


class Interrupt:
    """Raises `error` at the k-th place where CPython handles signals, in flatops and in its context managers.

    Those places are the start of a function or generator, the return from a call and the backward jump of a loop.
    """

    def __init__(self, k: int, error: type[BaseException], modules: tuple[str, ...], starts_only: bool) -> None:
        self.k, self.error, self.modules, self.starts_only = k, error, modules, starts_only
        self.seen, self.where = 0, ""

    @staticmethod
    @functools.cache
    def answers(code):
        names = {i.offset: i.opname for i in dis.get_instructions(code)}
        return {offset for offset, name in names.items() if name.startswith(("CALL", "JUMP_BACKWARD", "RESUME"))}

    def trace(self, frame, event, arg):
        if not frame.f_globals.get("__name__", "").startswith(self.modules):
            return None
        self.reached(frame)
        if self.starts_only:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        previous = -1

        def local(frame, event, arg):
            nonlocal previous
            if event == "opcode":
                if previous in self.answers(frame.f_code):
                    self.reached(frame)
                previous = frame.f_lasti
            return local

        return local

    def reached(self, frame):
        self.seen += 1
        if self.seen == self.k:
            self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
            sys.settrace(None)
            raise self.error

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exception):
        sys.settrace(self.before)


def moments_that_go_wrong(kind, error, modules=("flatops", "contextlib"), starts_only=False, exact=True):
    """One perturbed pass for every moment; returns those after which a handler finds something wrong."""
    wrong, k = [], 0
    while True:
        k += 1
        params = some_params()
        optimizer = kind(params)
        before = [p.detach().clone() for p in params]
        try:
            with Interrupt(k, error, modules, starts_only) as interrupt, optimizer.perturbed():
                pass
        except error:
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
            back = all(torch.allclose(p, b, **tolerance) for p, b in zip(params, before))
            if optimizer.in_pass or not back:
                wrong.append(f"{interrupt.where} ({'still marked' if back else 'NOT RESTORED'})")
        if not interrupt.where:
            assert k > 50  # or nothing was interrupted
            return list(dict.fromkeys(wrong))


knows_the_opcodes = pytest.mark.skipif(sys.version_info < (3, 11), reason="opcodes of Python 3.11 and later")


@knows_the_opcodes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a generator that is being closed
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("kind", [rwp, mixed_arwp, sam, regenerating])
def test_an_interrupt_at_any_moment_restores_the_weights(kind, error):
    """Ctrl-C, or a handler of SIGTERM that exits: the weights are restored before any handler runs."""
    wrong = moments_that_go_wrong(kind, error, exact=kind is not regenerating)
    assert not wrong, f"{len(wrong)} places: " + ", ".join(wrong)


@knows_the_opcodes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a generator that is being closed
@pytest.mark.parametrize("kind", [rwp, sam])
def test_an_interrupt_inside_the_reference_backend_restores_the_weights(kind):
    """The reference changes one tensor after another in Python: those already changed are restored too."""
    with flatops.backend("reference"):
        wrong = moments_that_go_wrong(kind, KeyboardInterrupt, modules=(reference.__name__,), starts_only=True)
    assert not wrong, f"{len(wrong)} places: " + ", ".join(wrong)


@pytest.mark.parametrize("kind", [rwp, sam])
def test_interrupts_at_random_times_restore_the_weights(kind):
    """Real signals at random moments of a loop of passes: after each the weights have their bits."""
    params = some_params()
    optimizer = kind(params)
    gradients, before = [p.grad for p in params], all_bits(params)
    delay = random.Random(0)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    wrong, caught = 0, 0
    try:
        while caught < 400:
            try:
                signal.setitimer(signal.ITIMER_REAL, delay.uniform(1e-4, 1e-3))
                for _ in range(1000):  # Python swallows an interrupt while it frees an object
                    for p, g in zip(params, gradients):
                        p.grad = g
                    with optimizer.perturbed():
                        pass
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                caught += 1
                wrong += optimizer.is_perturbed or any(not torch.equal(bits(p), b) for p, b in zip(params, before))
            torch.set_grad_enabled(True)  # the exit of torch.no_grad may have been interrupted
            if optimizer.is_perturbed:
                optimizer.restore()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert wrong == 0, f"{wrong} of {caught} interrupts left the weights perturbed, or the optimizer marked so"
