"""Every operator on every backend against the reference, bit for bit, over the table of cases."""

import sys

import pytest
import torch
import torch._dynamo.testing
from cases import (
    BACKENDS,
    CONFORMING,
    DTYPES,
    LAYOUTS,
    OPERATORS,
    ORACLE,
    WHY_NOT,
    Backend,
    Case,
    arguments,
    assert_same_bits,
    expected,
    fisher_of,
    make,
    outcome,
    same_bits,
    special,
    table,
    twin,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import flatops
from flatops import checks, ops
from flatops.backend import choose
from flatops.schemas import SCHEMAS, filters

# Triton's interpreter computes with NumPy, which warns of special values.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton.runtime.interpreter")

# --- equal bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator, case, on", table(), ids=str)
def test_equal_bits(operator, case, on):
    assert_same_bits(outcome(operator, case, on), expected(operator, case))


# Triton's tables are unlimited, and its interpreter takes 10 ms per tensor.
@pytest.mark.parametrize("operator", SCHEMAS)
@pytest.mark.parametrize("on", [b for b in BACKENDS if b != ORACLE and str(b) != "triton-cpu"], ids=str)
def test_more_tensors_than_one_launch_holds(operator, on):
    assert_same_bits(outcome(operator, Case("many"), on), expected(operator, Case("many")))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_threads(operator, dtype, threads):
    case = Case("long", dtype)
    assert_same_bits(outcome(operator, case, Backend("cpp", "cpu")), expected(operator, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_over_special_values(dtype, backend):
    """In one list a single NaN would hide everything else: each value separately, in the gradient and in the weight."""
    for value in special(dtype):
        for grads, params in (([value, 0.5], [0.5, 0.5]), ([0.5, 0.5], [value, 0.5]), ([value], [value])):
            grads, params = torch.tensor(grads, dtype=dtype), torch.tensor(params, dtype=dtype)
            for lists in ([[grads]], [[grads], [params]]):
                theirs = ops.grad_norm(*lists, backend="reference")
                assert_same_bits(ops.grad_norm(*([t.to(backend.device) for t in l] for l in lists)), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_regenerating_restores_within_rounding(dtype, eta, backend):
    params = [twin(t, backend.device) for t in Case("few", dtype).tensors(9)]
    before = [p.clone() for p in params]
    fisher = [f.to(backend.device) for f in fisher_of(params)] if eta else None
    how = {"seed": 2**40 + 17, "draw": 5, "stream": 3, "eta": eta, "fisher": fisher}
    scales = ops.perturb_(params, 0.1, **how)
    assert not torch.equal(params[0], before[0])
    ops.restore_(params, scales=scales, **how)
    for a, b, n in zip(params, before, ops.filter_norms(before).split([filters(p) for p in before])):
        bound = 2 * torch.finfo(dtype).eps * (b.abs().max() + n.max()) if b.numel() else 0
        assert ((a - b).abs() <= bound).all()


@pytest.mark.parametrize("on", BACKENDS, ids=str)
def test_restore_is_exact_for_any_bits(on):
    """A backup restores any bit pattern."""

    @settings(max_examples=6 if on.slow else 60, deadline=None)
    @given(
        seed=st.integers(0, 2**31),
        shape=st.lists(st.integers(0, 70), min_size=0, max_size=4)
        .map(tuple)
        .filter(lambda s: torch.Size(s).numel() < (2000 if on.slow else 20000)),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        sigma=st.floats(0, 10),
    )
    def check(seed, shape, dtype, layout, sigma):
        generator = torch.Generator().manual_seed(seed)
        ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        limit = torch.iinfo(ints)
        bits = torch.randint(limit.min, limit.max, shape, generator=generator, dtype=ints)
        w = twin(make(shape, dtype, layout, generator).copy_(bits.view(dtype)), on.device)
        backup = ops.new_backup([w])
        ops.perturb_([w], sigma, seed=seed, draw=1, backup=backup, backend=on.name)
        ops.restore_([w], backup=backup, backend=on.name)
        assert torch.equal(w.cpu().contiguous().view(ints), bits)

    check()


@pytest.mark.parametrize("on", WHY_NOT, ids=str)
def test_every_backend_of_this_machine_is_tested(on):
    """Backends that cannot run here are skipped with their reason."""
    if WHY_NOT[on]:
        pytest.skip(WHY_NOT[on])
    assert choose(torch.device(on.device), on.name) == on.name
    assert any((b.name, b.device) == (on.name, on.device) for b in CONFORMING) or on == ORACLE


# --- definitions ------------------------------------------------------------------------------------------------------


def test_perturb_is_the_papers_formula():
    """w_f + sigma ||w_f|| z_f / sqrt(1 + eta F_f), in PyTorch's own operations in float64."""
    w = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    fisher = torch.rand(8)
    z = ops.normal((8, 27), seed=1, draw=2, tensor=5).double().view(w.shape)
    scale = 0.02 * w.flatten(1).norm(dim=1) / (1 + 0.3 * fisher.double()).sqrt()
    expected = w + scale.view(-1, 1, 1, 1) * z
    ops.perturb_([w], 0.02, seed=1, draw=2, index=[5], eta=0.3, fisher=[fisher])
    torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-7)


def test_noise_follows_storage_order():
    """In a channels_last weight the noise of offset j belongs to the j-th element of its filter in memory."""
    w = torch.zeros(4, 6, 3, 3).contiguous(memory_format=torch.channels_last).fill_(1.0)
    before = w.clone()
    ops.perturb_([w], 0.5, seed=0, draw=0)
    z = ops.normal((4, 54), seed=0, draw=0)
    noise = (w - before).permute(0, 2, 3, 1).reshape(4, 54)
    torch.testing.assert_close(noise, 0.5 * 54**0.5 * z, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 0.0])
def test_a_zero_or_non_finite_norm_gives_no_ascent(bad, adaptive, backend):
    ones = torch.ones(5, 5, device=backend.device)
    w, g = [ones.clone()], [torch.full_like(ones, bad)]
    backup = ops.new_backup(w)
    norm = ops.grad_norm(g, w if adaptive else None)
    assert not norm > 0 or not norm.isfinite()
    ops.ascend_(w, g, 0.1, norm=norm, adaptive=adaptive, backup=backup)
    assert torch.equal(w[0], ones) and torch.equal(backup[0], ones)


def test_a_sum_that_is_not_finite_does_not_change_the_fisher(backend):
    g = torch.ones(3, 4, device=backend.device)
    g[1, 2] = float("nan")
    fisher = [torch.full((3,), 2.0, device=backend.device)]
    ops.filter_fisher_(fisher, [g], 0.5)
    assert fisher[0].tolist() == [5.0, 2.0, 5.0]


def test_sums_are_accurate():
    """float32 sums over a million elements are within a few roundings of float64's."""
    g = [torch.randn(1000, 1000)]
    exact = g[0].double().norm()
    assert abs(ops.grad_norm(g) - exact) / exact < 1e-7


# --- numbers ----------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def test_a_number_is_converted_to_a_tensor_once():
    """For each dtype, and only as many as the cache holds; -0.0 becomes 0.0."""
    checks._constant.cache_clear()
    made = checks.scalar("sigma", 0.25, CPU)
    assert checks.scalar("rho", 0.25, CPU) is made and made.dtype == torch.float64 and made.item() == 0.25
    one, also = checks.scalar("draw", 1, CPU, torch.int64), checks.scalar("sigma", 1, CPU)
    assert (one.dtype, also.dtype) == (torch.int64, torch.float64) and one.item() == also.item() == 1
    for zero in (-0.0, 0.0):
        assert not checks.scalar("sigma", zero, CPU).signbit()
    for i in range(1000):
        assert checks.scalar("draw", i, CPU, torch.int64).item() == i
    assert checks._constant.cache_info().currsize < 1000


@pytest.mark.parametrize("first", ["real", "unreal"])
@pytest.mark.parametrize("unreal", ["fake", "compiled", "inference"])
def test_cached_numbers_are_not_shared_between_modes(unreal, first):
    """The cache must return no fake tensor outside fake mode, and no real one inside."""
    checks._constant.cache_clear()
    start = torch.randn(5, 9)
    expected = start.clone()
    ops.perturb_([expected], torch.tensor(0.25, dtype=torch.float64), seed=1, draw=torch.tensor(2))

    def perturbed(w):
        w = w.clone()
        ops.perturb_([w], 0.25, seed=1, draw=2)
        return w

    def in_mode():
        if unreal == "fake":
            with FakeTensorMode() as mode:
                perturbed(mode.from_tensor(start))
        elif unreal == "compiled":
            torch._dynamo.reset()
            compiled = torch.compile(perturbed, backend="aot_eager", fullgraph=True)
            assert_same_bits(compiled(start), expected)
        else:
            with torch.inference_mode():
                perturbed(start)

    for run in (in_mode, lambda: perturbed(start)) if first == "unreal" else (lambda: perturbed(start), in_mode):
        run()
    assert_same_bits(perturbed(start), expected)
    number = checks.scalar("sigma", 0.25, CPU)
    assert type(number) is torch.Tensor and not number.is_inference()


# --- torch.library ----------------------------------------------------------------------------------------------------


def test_the_table_has_every_operator():
    assert {operator.split(",")[0] for operator in OPERATORS} == set(SCHEMAS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator, backend):
    args = arguments(operator, Case("tiny"), backend.device)
    torch.library.opcheck(backend.operator(operator.split(",")[0]), args)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compile_over_a_perturb_restore_pair(compiler, backend):
    """One graph for any sigma and draw, and the loss at the perturbed weights."""
    w, x = (torch.randn(shape, device=backend.device) for shape in ((6, 5), (3, 5)))
    saved = w.clone()
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend(compiler)

    def step(w, x, sigma, draw):
        backup = ops.new_backup([w])
        ops.perturb_([w], sigma, seed=1, draw=draw, first_row=[3], backup=backup)
        loss = (x @ w.T).sin().sum()
        ops.restore_([w], backup=backup)
        return loss

    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    for i in range(4):
        sigma = torch.tensor(0.1 * i, dtype=torch.float64, device=backend.device)
        draw = torch.tensor(i, device=backend.device)
        expected = step(w, x, sigma, draw)
        torch.testing.assert_close(compiled(w, x, sigma, draw), expected)
        assert torch.equal(w, saved)
        if i == 0:
            once = graphs.frame_count
        assert graphs.frame_count == once


def test_compile_notices_another_backend(backend):
    w = torch.randn(6, 5, device=backend.device)
    compiled = torch.compile(lambda: ops.filter_norms([w]), backend="eager", fullgraph=True)
    assert_same_bits(compiled(), ops.filter_norms([w]))
    with flatops.backend("reference"):
        assert_same_bits(compiled(), ops.filter_norms([w]))


def test_a_stale_backward_is_an_error(backend):
    """In-place changes through pointers still bump the version that autograd checks."""
    w = torch.randn(4, 4, device=backend.device, requires_grad=True)
    ones = torch.ones(4, 4, device=backend.device)
    for change in (
        lambda p: ops.perturb_([p], 0.1, seed=0, draw=0),
        lambda p: ops.ascend_([p], [ones], 0.1, norm=ones[0, 0]),
        lambda p: ops.restore_([p], backup=[ones]),
    ):
        loss = (w * w).sum()
        with torch.no_grad():
            change(w)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_nothing_is_allocated_beyond_scalars():
    """perturb_, ascend_ and restore_ with preallocated buffers create no tensor of more than one element."""
    params = [torch.randn(64, 64) for _ in range(5)]
    grads = [torch.randn(64, 64) for _ in range(5)]
    backup, scales = ops.new_backup(params), ops.new_scales(params)
    norm = ops.grad_norm(grads)

    def step():
        ops.perturb_(params, 0.1, seed=0, draw=1, backup=backup, scales=scales)
        ops.restore_(params, backup=backup)
        ops.ascend_(params, grads, 0.1, norm=norm, backup=backup)
        ops.restore_(params, backup=backup)

    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    assert max(event.cpu_memory_usage for event in profile.events()) <= 64


# --- bad input --------------------------------------------------------------------------------------------------------

W = torch.ones(3, 4)
ELSEWHERE = torch.ones(3, 4, device="meta")
BAD = [
    (lambda: ops.perturb_([], 0.1, seed=0, draw=0), ValueError, "params"),
    (lambda: ops.perturb_(W, 0.1, seed=0, draw=0), ValueError, "params"),
    (lambda: ops.perturb_([W], -0.1, seed=0, draw=0), ValueError, "sigma"),
    (lambda: ops.perturb_([W], float("nan"), seed=0, draw=0), ValueError, "sigma"),
    (lambda: ops.perturb_([W], 0.1, seed=-1, draw=0), ValueError, "seed"),
    (lambda: ops.perturb_([W], 0.1, seed=2**64, draw=0), ValueError, "seed"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, stream=-1), ValueError, "stream"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, eta=-1.0), ValueError, "eta"),
    (lambda: ops.perturb_([W.int()], 0.1, seed=0, draw=0), TypeError, r"params\[0\]"),
    (lambda: ops.perturb_([W.to_sparse()], 0.1, seed=0, draw=0), TypeError, r"params\[0\]"),
    (lambda: ops.perturb_([W, W], 0.1, seed=0, draw=0), ValueError, "twice"),
    (lambda: ops.perturb_([torch.ones(1).expand(3, 3)], 0.1, seed=0, draw=0), ValueError, "expanded"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, backup=[torch.ones(3, 5)]), ValueError, "backup"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, backup=[W.double()]), ValueError, "backup"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, fisher=[torch.ones(4)]), ValueError, "fisher"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, fisher=[]), ValueError, "fisher"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, scales=torch.ones(4)), ValueError, "scales"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, index=[1, 2]), ValueError, "index"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, first_row=[1, 2]), ValueError, "first_row"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, first_row=[-1]), ValueError, r"first_row\[0\]"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, first_row=[2**31]), ValueError, r"first_row\[0\]"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, first_row=[0.5]), ValueError, r"first_row\[0\]"),
    (
        lambda: ops.perturb_([W, W[0]], 0.1, seed=0, draw=0, first_row=[1, 1]),
        ValueError,
        r"first_row\[1\] must be 0, not 1: params\[1\] has 1 dimension",
    ),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, backend="metal"), ValueError, "unknown backend 'metal'"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, backend="cuda"), ValueError, "does not support cpu"),
    (lambda: ops.restore_([W]), ValueError, "backup, or scales"),
    (lambda: ops.restore_([W], scales=torch.ones(3)), ValueError, "seed"),
    (lambda: ops.restore_([W], scales=torch.ones(3), seed=0, draw=0, first_row=[]), ValueError, "first_row"),
    (lambda: ops.restore_([W[0]], scales=torch.ones(1), seed=0, draw=0, first_row=[1]), ValueError, r"first_row\[0\]"),
    (lambda: ops.restore_([W], scales=torch.ones(3), seed=0, draw=0, index=[1, 2]), ValueError, "index"),
    (lambda: ops.restore_([W], backup=[W, W]), ValueError, "backup"),
    (lambda: ops.restore_([W.bfloat16()], scales=torch.ones(3), seed=0, draw=0), TypeError, "bfloat16"),
    (lambda: ops.grad_norm([W], [torch.ones(4, 3)]), ValueError, r"grads\[0\]"),
    (lambda: ops.grad_norm([W, W], [W, ELSEWHERE]), ValueError, r"params\[1\] is on meta"),
    (lambda: ops.grad_norm([W.int()], [W.int()]), TypeError, r"params\[0\]"),
    (lambda: ops.grad_norm([W, W.clone()], [W]), ValueError, "grads"),
    (lambda: ops.ascend_([W], [W.double()], 0.1, norm=torch.ones(())), ValueError, r"grads\[0\]"),
    (lambda: ops.ascend_([W], [W], float("inf"), norm=torch.ones(())), ValueError, "rho"),
    (lambda: ops.filter_fisher_([torch.ones(3)], [W], 1.5), ValueError, "beta"),
    (lambda: ops.filter_norms([W, torch.ones(2, device="meta")]), ValueError, r"params\[1\] is on meta"),
    (lambda: ops.grad_norm([ELSEWHERE], [W]), ValueError, r"grads\[0\] is on meta"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, backup=[ELSEWHERE]), ValueError, r"backup\[0\] is on meta"),
    (lambda: ops.restore_([W], backup=[ELSEWHERE]), ValueError, r"backup\[0\] is on meta"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, fisher=[ELSEWHERE[:, 0].clone()]), ValueError, r"fisher\[0\]"),
    (lambda: ops.filter_fisher_([ELSEWHERE[:, 0].clone()], [W], 0.5), ValueError, r"fisher\[0\]"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, scales=ELSEWHERE[:, 0]), ValueError, "scales"),
    (lambda: ops.perturb_([W], ELSEWHERE[0, 0], seed=0, draw=0), ValueError, "sigma is on meta"),
    (lambda: ops.perturb_([W], torch.ones(2), seed=0, draw=0), ValueError, "sigma"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=ELSEWHERE[0, 0].long()), ValueError, "draw is on meta"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=torch.ones(())), TypeError, "draw"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0.5), TypeError, "draw"),
    (lambda: ops.perturb_([W], 0.1, seed=ELSEWHERE[0, 0].long(), draw=0), ValueError, "seed is on meta"),
    (lambda: ops.perturb_([W], 0.1, seed=torch.ones(()), draw=0), TypeError, "seed"),
    (lambda: ops.perturb_([W], 0.1, seed=0.5, draw=0), TypeError, "seed"),
    (lambda: ops.perturb_([W], 0.1, seed=torch.tensor(0), draw=0, stream=-1), ValueError, "stream"),
    (lambda: ops.ascend_([W], [W], ELSEWHERE[0, 0], norm=torch.ones(())), ValueError, "rho is on meta"),
    (lambda: ops.ascend_([W], [W], 0.1, norm=ELSEWHERE[0, 0]), ValueError, "norm is on meta"),
    (lambda: ops.ascend_([W], [W], 0.1, norm=torch.ones(2)), ValueError, "norm"),
    (lambda: ops.filter_fisher_([torch.ones(3)], [W], 0.5, scale=ELSEWHERE[0, 0]), ValueError, "scale is on meta"),
    (lambda: flatops.backend("metal"), ValueError, "unknown backend 'metal'"),
]


@pytest.mark.parametrize("call, error, match", BAD, ids=range(len(BAD)))
def test_bad_input(call, error, match):
    """One clear error that names the argument, before anything changes."""
    with pytest.raises(error, match=match):
        call()
    assert torch.equal(W, torch.ones(3, 4))


def test_backend_precedence(monkeypatch):
    """Argument before context manager before environment variable before the best available."""
    cpu = torch.device("cpu")
    assert choose(cpu) == "cpp"
    monkeypatch.setattr(sys.modules["flatops.backend"], "_forced", "reference")  # as FLATOPS_BACKEND does at import
    assert choose(cpu) == "reference"
    with flatops.backend("cpp"):
        assert choose(cpu) == "cpp"
        assert choose(cpu, "reference") == "reference"
    assert choose(cpu) == "reference"


def test_same_bits_can_fail():
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([-float("nan")]))
