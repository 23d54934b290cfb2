"""Every operator on every backend against the reference, bit for bit, over the table of cases."""

import sys

import pytest
import torch
import torch._dynamo.testing
from cases import DTYPES, LAYOUTS, SHAPES, assert_same_bits, make, make_list, same_bits, twin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flatops
from flatops import ops
from flatops.backend import choose
from flatops.schemas import SCHEMAS, filters

INDEX = [3 * i + 1 for i in range(len(SHAPES))]
NOISE = {"seed": 2**40 + 17, "draw": 5, "stream": 3, "index": INDEX}

cases = pytest.mark.parametrize("dtype, layout", [(d, l) for d in DTYPES for l in LAYOUTS], ids=str)


def fisher_of(params: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.rand(p.shape[:1] if p.dim() else (1,), generator=generator) * 10 for p in params]


# --- equal bits ----------------------------------------------------------------------------------------------------------


@cases
def test_filter_norms(dtype, layout, level):
    params = make_list(dtype, layout, seed=1)
    assert_same_bits(ops.filter_norms(params), ops.filter_norms(params, backend="reference"))


@cases
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_perturb(dtype, layout, eta, level):
    ours, theirs = make_list(dtype, layout, seed=2), make_list(dtype, layout, seed=2)
    how = {**NOISE, "eta": eta, "fisher": fisher_of(ours) if eta else None}
    backup = ops.new_backup(ours)
    before = twin(ours)
    scales = ops.perturb_(ours, 0.03, **how, backup=backup)
    expected = ops.perturb_(theirs, 0.03, **how, backend="reference")
    assert_same_bits(scales, expected)
    assert_same_bits(ours, theirs)
    assert_same_bits(backup, before)
    ops.restore_(ours, backup=backup)
    assert_same_bits(ours, before)


@cases
@pytest.mark.parametrize("adaptive", [False, True])
def test_grad_norm_and_ascend(dtype, layout, adaptive, level):
    ours, theirs = make_list(dtype, layout, seed=3), make_list(dtype, layout, seed=3)
    grads = make_list(dtype, layout, seed=4, scale=0.01)
    norm = ops.grad_norm(grads, ours if adaptive else None)
    assert_same_bits(norm, ops.grad_norm(grads, theirs if adaptive else None, backend="reference"))
    backup, before = ops.new_backup(ours), twin(ours)
    ops.ascend_(ours, grads, 0.05, norm=norm, adaptive=adaptive, backup=backup)
    ops.ascend_(theirs, grads, 0.05, norm=norm, adaptive=adaptive, backend="reference")
    assert_same_bits(ours, theirs)
    ops.restore_(ours, backup=backup)
    assert_same_bits(ours, before)


@cases
def test_gradients_may_lie_otherwise_than_their_parameters(dtype, layout):
    """A contiguous gradient of a channels_last weight, and the other way round."""
    ours, theirs = make_list(dtype, layout, seed=5), make_list(dtype, layout, seed=5)
    grads = make_list(dtype, "contiguous", seed=6)
    for params, backend in ((ours, "cpp"), (theirs, "reference")):
        norm = ops.grad_norm(grads, params, backend=backend)
        ops.ascend_(params, grads, 0.1, norm=norm, adaptive=True, backend=backend)
    assert_same_bits(ours, theirs)
    ops.ascend_(ours, make_list(dtype, layout, seed=7), 0.1, norm=norm)
    ops.ascend_(theirs, make_list(dtype, "contiguous", seed=7), 0.1, norm=norm)
    assert_same_bits(ours, theirs)


@cases
def test_filter_fisher(dtype, layout, level):
    grads = make_list(dtype, layout, seed=8)
    ours, theirs = fisher_of(grads), fisher_of(grads)
    ops.filter_fisher_(ours, grads, 0.99, scale=0.5)
    ops.filter_fisher_(theirs, grads, 0.99, scale=0.5, backend="reference")
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_regenerating(dtype, eta, level):
    """Equal to the reference to the bit, and to the weights within rounding."""
    ours, theirs = make_list(dtype, "contiguous", seed=9), make_list(dtype, "contiguous", seed=9)
    before = twin(ours)
    how = {**NOISE, "eta": eta, "fisher": fisher_of(ours) if eta else None}
    scales = ops.perturb_(ours, 0.1, **how)
    ops.restore_(ours, scales=scales, **how)
    ops.perturb_(theirs, 0.1, **how, backend="reference")
    ops.restore_(theirs, scales=scales, **how, backend="reference")
    assert_same_bits(ours, theirs)
    for a, b, n in zip(ours, before, ops.filter_norms(before).split([filters(p) for p in before])):
        bound = 2 * torch.finfo(dtype).eps * (b.abs().max() + n.max()) if b.numel() else 0
        assert ((a - b).abs() <= bound).all()


def test_threads_change_nothing(threads):
    ours, theirs = (
        make_list(torch.float32, "contiguous", seed=10),
        make_list(torch.float32, "contiguous", seed=10),
    )
    grads = make_list(torch.float32, "contiguous", seed=11)
    assert_same_bits(ops.grad_norm(grads), ops.grad_norm(grads, backend="reference"))
    ops.perturb_(ours, 0.1, **NOISE)
    ops.perturb_(theirs, 0.1, **NOISE, backend="reference")
    assert_same_bits(ours, theirs)


def test_mixed_dtypes_in_one_call(level):
    def params():
        return [make_list(d, "contiguous", seed=12)[i] for i, d in zip((10, 11, 12, 4), DTYPES)]

    ours, theirs = params(), params()
    assert_same_bits(ops.grad_norm(ours), ops.grad_norm(theirs, backend="reference"))
    ops.perturb_(ours, 0.1, seed=1, draw=2)
    ops.perturb_(theirs, 0.1, seed=1, draw=2, backend="reference")
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, level):
    """Infinities, NaN, subnormals and the largest numbers: equal to the reference, and restored to the bit."""
    info = torch.finfo(dtype)
    values = [
        float("inf"),
        -float("inf"),
        float("nan"),
        info.max,
        -info.max,
        info.tiny,
        info.tiny / 4,
        0.0,
        -0.0,
        1.0,
    ]
    for value in values:
        w = torch.full((3, 37), 0.5, dtype=dtype)
        w[1, 5] = value
        ours, theirs, g = [w.clone()], [w.clone()], [w.flip(0)]
        backup = ops.new_backup(ours)
        assert_same_bits(ops.filter_norms(ours), ops.filter_norms(theirs, backend="reference"))
        assert_same_bits(ops.grad_norm(g, ours), ops.grad_norm(g, theirs, backend="reference"))
        ops.perturb_(ours, 0.1, seed=0, draw=0, backup=backup)
        ops.perturb_(theirs, 0.1, seed=0, draw=0, backend="reference")
        assert_same_bits(ours, theirs)
        ops.restore_(ours, backup=backup)
        assert_same_bits(ours[0], w)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shape=st.lists(st.integers(0, 70), min_size=0, max_size=4)
    .map(tuple)
    .filter(lambda s: torch.Size(s).numel() < 20000),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    sigma=st.floats(0, 10),
)
def test_restore_is_exact_for_any_bits(data, shape, dtype, layout, sigma):
    """Whatever the weights' bits are, a backup brings them back."""
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[torch.empty((), dtype=dtype).element_size()]
    limit = torch.iinfo(ints)
    bits = torch.randint(limit.min, limit.max, shape, generator=generator, dtype=ints)
    w = make(shape, dtype, layout, generator)
    w.copy_(bits.view(dtype))
    before = twin([w])
    backup = ops.new_backup([w])
    ops.perturb_([w], sigma, seed=seed, draw=1, backup=backup)
    ops.restore_([w], backup=backup)
    assert torch.equal(w.contiguous().view(ints), before[0].contiguous().view(ints))


# --- definitions ---------------------------------------------------------------------------------------------------------


def test_perturb_is_the_papers_formula():
    """w_f + sigma ||w_f|| z_f / sqrt(1 + eta F_f), written with PyTorch's own operations in float64."""
    w = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    fisher = torch.rand(8)
    z = ops.normal((8, 27), seed=1, draw=2, tensor=5).double().view(w.shape)
    scale = 0.02 * w.flatten(1).norm(dim=1) / (1 + 0.3 * fisher.double()).sqrt()
    expected = w + scale.view(-1, 1, 1, 1) * z
    ops.perturb_([w], 0.02, seed=1, draw=2, index=[5], eta=0.3, fisher=[fisher])
    torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-7)


def test_storage_order_decides_where_noise_goes():
    """A channels_last weight gets the noise of offset j at the j-th place of its filter in memory."""
    w = torch.zeros(4, 6, 3, 3).contiguous(memory_format=torch.channels_last).fill_(1.0)
    before = w.clone()
    ops.perturb_([w], 0.5, seed=0, draw=0)
    z = ops.normal((4, 54), seed=0, draw=0)
    noise = (w - before).permute(0, 2, 3, 1).reshape(4, 54)
    torch.testing.assert_close(noise, 0.5 * 54**0.5 * z, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 0.0])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_norm_without_a_direction_ascends_nowhere(bad, backend):
    w, g = [torch.ones(5, 5)], [torch.full((5, 5), bad)]
    backup = ops.new_backup(w)
    norm = ops.grad_norm(g, backend=backend)
    assert not norm > 0 or not norm.isfinite()
    ops.ascend_(w, g, 0.1, norm=norm, backup=backup, backend=backend)
    assert torch.equal(w[0], torch.ones(5, 5)) and torch.equal(backup[0], torch.ones(5, 5))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_sum_that_is_not_finite_leaves_the_fisher(backend):
    g = torch.ones(3, 4)
    g[1, 2] = float("nan")
    fisher = [torch.full((3,), 2.0)]
    ops.filter_fisher_(fisher, [g], 0.5, backend=backend)
    assert torch.equal(fisher[0], torch.tensor([5.0, 2.0, 5.0]))


def test_sums_are_accurate():
    """float32 sums over a million elements stay within a few roundings of float64's."""
    g = [torch.randn(1000, 1000)]
    exact = g[0].double().norm()
    assert abs(ops.grad_norm(g) - exact) / exact < 1e-7


# --- torch.library ---------------------------------------------------------------------------------------------------------


def arguments(name: str) -> tuple:
    params = [torch.randn(4, 9), torch.randn(7), torch.randn(2, 3, 3, 3)]
    grads = [torch.randn_like(p) for p in params]
    number, integer = torch.tensor(0.1, dtype=torch.float64), torch.tensor(3)
    backup, scales = ops.new_backup(params), ops.new_scales(params)
    fisher = fisher_of(params)
    return {
        "filter_norms": (params,),
        "perturb_": (params, scales, backup, number, integer, integer + 1, [0, 1, 2], fisher, 0.5),
        "restore_": (params, backup, None, None, None, [], [], 0.0),
        "normal_": (params[0], integer, integer + 1, 2),
        "filter_fisher_": (fisher, grads, 0.9, number),
        "grad_norm": (grads, params),
        "ascend_": (params, grads, backup, number, number + 1, True),
    }[name]


@pytest.mark.parametrize("namespace", ["flatops", "flatops_ref"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name, namespace):
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), name).default, arguments(name))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_over_a_perturb_restore_pair(backend):
    """One graph, whatever sigma and draw are, and the loss at the perturbed weights."""
    w = torch.randn(6, 5)
    x = torch.randn(3, 5)
    saved = w.clone()
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def step(w, x, sigma, draw):
        backup = ops.new_backup([w])
        ops.perturb_([w], sigma, seed=1, draw=draw, backup=backup)
        loss = (x @ w.T).sin().sum()
        ops.restore_([w], backup=backup)
        return loss

    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    for i in range(4):
        sigma, draw = torch.tensor(0.1 * i, dtype=torch.float64), torch.tensor(i)
        expected = step(w, x, sigma, draw)
        torch.testing.assert_close(compiled(w, x, sigma, draw), expected)
        assert torch.equal(w, saved)
        if i == 0:
            once = graphs.frame_count
        assert graphs.frame_count == once


def test_compile_notices_another_backend():
    w = torch.randn(6, 5)
    compiled = torch.compile(lambda: ops.filter_norms([w]), backend="eager", fullgraph=True)
    assert_same_bits(compiled(), ops.filter_norms([w]))
    with flatops.backend("reference"):
        assert_same_bits(compiled(), ops.filter_norms([w]))


def test_a_stale_backward_is_an_error():
    """In-place changes through pointers still move the version that autograd checks."""
    w = torch.randn(4, 4, requires_grad=True)
    for change in (
        lambda p: ops.perturb_([p], 0.1, seed=0, draw=0),
        lambda p: ops.ascend_([p], [torch.ones(4, 4)], 0.1, norm=torch.tensor(4.0)),
        lambda p: ops.restore_([p], backup=[torch.zeros(4, 4)]),
    ):
        loss = (w * w).sum()
        with torch.no_grad():
            change(w)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_nothing_is_allocated_beyond_scalars():
    """perturb_, ascend_ and restore_ with room given make no tensor of more than one element."""
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


# --- bad input -------------------------------------------------------------------------------------------------------------

W = torch.ones(3, 4)
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
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, backend="metal"), ValueError, "unknown backend 'metal'"),
    (lambda: ops.perturb_([W], 0.1, seed=0, draw=0, backend="cuda"), ValueError, "does not serve cpu"),
    (lambda: ops.restore_([W]), ValueError, "backup or scales"),
    (lambda: ops.restore_([W], scales=torch.ones(3)), ValueError, "seed"),
    (lambda: ops.restore_([W], backup=[W, W]), ValueError, "backup"),
    (lambda: ops.restore_([W.bfloat16()], scales=torch.ones(3), seed=0, draw=0), TypeError, "bfloat16"),
    (lambda: ops.grad_norm([W], [torch.ones(4, 3)]), ValueError, r"grads\[0\]"),
    (lambda: ops.grad_norm([W, W.clone()], [W]), ValueError, "grads"),
    (lambda: ops.ascend_([W], [W.double()], 0.1, norm=torch.ones(())), ValueError, r"grads\[0\]"),
    (lambda: ops.ascend_([W], [W], -1.0, norm=torch.ones(())), ValueError, "rho"),
    (lambda: ops.filter_fisher_([torch.ones(3)], [W], 1.5), ValueError, "beta"),
    (lambda: ops.filter_norms([W, torch.ones(2, device="meta")]), ValueError, "on meta"),
    (lambda: flatops.backend("metal"), ValueError, "unknown backend 'metal'"),
]


@pytest.mark.parametrize("call, error, match", BAD, ids=range(len(BAD)))
def test_bad_input(call, error, match):
    """One clear error that names the argument, and nothing changed."""
    with pytest.raises(error, match=match):
        call()
    assert torch.equal(W, torch.ones(3, 4))


def test_backend_precedence(monkeypatch):
    """Argument over context manager over environment over what is best."""
    cpu = torch.device("cpu")
    assert choose(cpu) == "cpp"
    monkeypatch.setattr(
        sys.modules["flatops.backend"], "_forced", "reference"
    )  # as FLATOPS_BACKEND does at import
    assert choose(cpu) == "reference"
    with flatops.backend("cpp"):
        assert choose(cpu) == "cpp"
        assert choose(cpu, "reference") == "reference"
    assert choose(cpu) == "reference"


def test_same_bits_can_fail():
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([-float("nan")]))
