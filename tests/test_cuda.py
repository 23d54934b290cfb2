"""What only a GPU can test: no host syncs, few launches, CUDA graphs, streams, several devices, very large tensors."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import BACKENDS, OPERATORS, Case, arguments, assert_same_bits, tensors_of, whole
from torch import Tensor, nn
from torch.nn import functional as F

import flatops
from flatops import CosineRamp, checks, ops, reference

if not torch.cuda.is_available():
    pytest.skip("no GPU: torch.cuda.is_available() is False", allow_module_level=True)

ON_GPU = [b for b in BACKENDS if b.device == "cuda"]
on_kernels = pytest.mark.parametrize("backend", [b for b in ON_GPU if b.name != "reference"], ids=str, indirect=True)
on_operators = pytest.mark.parametrize("operator", OPERATORS)

KINDS = {
    "sam": (flatops.SAM, {"rho": 0.1}),
    "asam": (flatops.SAM, {"rho": 1.0, "adaptive": True}),
    "rwp": (flatops.RWP, {"sigma": 0.1, "seed": 2**63 + 5}),
    "mrwp": (flatops.RWP, {"sigma": 0.1, "lam": 0.5, "stream": 3}),
    "arwp": (flatops.RWP, {"sigma": 0.1, "eta": 1.0}),
    "marwp": (flatops.RWP, {"sigma": 0.1, "eta": 1.0, "lam": 0.5}),
    "regenerating": (flatops.RWP, {"sigma": 0.1, "restore": "regenerate"}),
}
on_kinds = pytest.mark.parametrize("kind", KINDS)


def key_of(kind: str) -> str:
    return "rho" if "sam" in kind else "sigma"


def make_net(device: str = "cuda") -> nn.Module:
    torch.manual_seed(0)  # on the CPU, so that it is the same everywhere
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(device)


def make_batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(8, 16, generator=generator).cuda(), torch.randn(8, 4, generator=generator).cuda()


def make(kind: str, model: nn.Module, as_tensors: bool = True, **changed: Any) -> Any:
    flat, options = KINDS[kind]
    options = {**options, "lr": 0.05, "momentum": 0.9, **changed}
    if as_tensors:
        options[key_of(kind)] = torch.tensor(options[key_of(kind)], dtype=torch.float64)
    return flat(model.parameters(), torch.optim.SGD, **options)


def step(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """A step's passes (one for RWP) and the base optimizer's step."""
    optimizer.zero_grad()
    clean, perturbed = getattr(optimizer, "clean_weight", 1.0), getattr(optimizer, "perturbed_weight", 1.0)
    if clean:
        (clean * F.mse_loss(model(x), y)).backward()
    with optimizer.perturbed():
        (perturbed * F.mse_loss(model(x), y)).backward()
    optimizer.step()


# --- host syncs -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Fails on a host sync: PyTorch reports it, or the host returns only after a sleep queued before its work."""
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 28)  # more than a tenth of a second
    awake = torch.cuda.Event()
    awake.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        assert not awake.query(), "the host waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.parametrize("wait", [torch.cuda.synchronize, lambda: torch.ones((), device="cuda").item()])
def test_host_syncs_are_detected(wait):
    with pytest.raises((AssertionError, RuntimeError), match="wait|synchroniz"), no_host_sync():
        wait()


@on_kernels
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@on_operators
def test_no_operator_syncs_with_the_host(operator, layout, backend):
    args = arguments(operator, Case("few", layout=layout), "cuda")
    call = backend.operator(operator.split(",")[0])
    call(*args)  # loads, compiles, fills tables
    with no_host_sync():
        call(*args)


@on_kernels
@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
@on_kinds
def test_no_step_syncs_with_the_host(kind, as_tensors, backend):
    """All passes, the base optimizer's step and a ramp; in a loop and with a closure."""
    model, (x, y) = make_net(), make_batch(0)
    optimizer = make(kind, model, as_tensors)
    ramp = CosineRamp(optimizer, key_of(kind), 0.1, 0.01, total_steps=9)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    def both():
        step(optimizer, model, x, y)
        optimizer.step(closure)
        ramp.step()

    for _ in range(2):
        both()
    with no_host_sync():
        both()


# --- launches ---------------------------------------------------------------------------------------------------------


def launches(call: Callable[[], Any]) -> list[str]:
    """What one call runs on the GPU: kernels, copies, fills. A first call, which compiles, is not counted."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    own = ("Sync", "Buffer", "Loading")  # events that the profiler adds
    return [name for name in on_gpu if not any(word in name for word in own)]


@pytest.fixture(scope="module")
def profiler_sees_kernels():
    if not launches(torch.ones(9, device="cuda").neg):
        pytest.skip("torch.profiler records no kernels here: CUPTI is missing or not permitted")


@on_kernels
@pytest.mark.parametrize("shapes", ["few", "long"])
@pytest.mark.parametrize("operator", [o for o in OPERATORS if "otherwise" not in o])
def test_three_launches_at_most(operator, shapes, backend, profiler_sees_kernels):
    args = arguments(operator, Case(shapes), "cuda")
    call = backend.operator(operator.split(",")[0])
    ran = launches(lambda: call(*args))
    assert 1 <= len(ran) <= 3, ran


@on_kernels
def test_numbers_cost_no_launches(backend, profiler_sees_kernels):
    """sigma, seed, draw and rho as Python numbers are converted to tensors once."""
    params, grads = Case("few").tensors(1), Case("few").tensors(2)
    params, grads = [p.cuda() for p in params], [g.cuda() for g in grads]
    backup, scales, norm = ops.new_backup(params), ops.new_scales(params), ops.grad_norm(grads)
    for call in (
        lambda: ops.perturb_(params, 0.1, seed=5, draw=7, backup=backup, scales=scales),
        lambda: ops.ascend_(params, grads, 0.1, norm=norm, backup=backup),
    ):
        ran = launches(call)
        assert 1 <= len(ran) <= 3, ran


@on_kernels
def test_a_pass_allocates_next_to_nothing(backend):
    """Partial sums and the like: less than a fiftieth of the weights, in every pass."""
    params = [torch.randn(512, 512, device="cuda") for _ in range(5)]
    grads = [torch.randn_like(p) for p in params]
    backup, scales = ops.new_backup(params), ops.new_scales(params)

    def both_passes():
        ops.perturb_(params, 0.1, seed=0, draw=1, backup=backup, scales=scales)
        ops.restore_(params, backup=backup)
        ops.ascend_(params, grads, 0.1, norm=ops.grad_norm(grads), backup=backup)
        ops.restore_(params, backup=backup)

    both_passes()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        both_passes()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < sum(p.nbytes for p in params) / 50


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def capture(call: Callable[[], Any], warm_up: int = 3) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call, and the call's result, which every replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@on_kernels
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("shapes", ["few", "long"])
@on_operators
def test_a_replayed_operator_equals_the_eager_one(operator, shapes, layout, backend):
    """To the bit, for any change of sigma, rho, norm, scale, key and draw between replays."""
    case, call = Case(shapes, layout=layout), backend.operator(operator.split(",")[0])
    args = arguments(operator, case, "cuda")
    start = [t.clone() for t in tensors_of(args)]
    graph, result = capture(lambda: call(*args))
    for i in range(3):
        eager_args = arguments(operator, case, "cuda")
        for t, at_start in zip(tensors_of(args), start):
            t.copy_(at_start)
        for t in tensors_of(args) + tensors_of(eager_args):
            if t.dim() == 0 and t.dtype in (torch.int64, torch.float64):
                t.add_(i)
        graph.replay()
        eager_result = call(*eager_args)
        replayed = [*map(whole, tensors_of(args)), *tensors_of((result,))]
        assert_same_bits(replayed, [*map(whole, tensors_of(eager_args)), *tensors_of((eager_result,))])


@on_kernels
def test_a_replayed_pass_draws_new_noise(backend):
    """Every replay draws the noise of the next draw at the current sigma; a checkpoint is loaded in place."""
    w = nn.Parameter(torch.randn(8, 100, device="cuda"))
    optimizer = flatops.RWP([w], torch.optim.SGD, lr=0.1, sigma=torch.tensor(0.1).double(), seed=5, stream=2)
    saved, before, seen = optimizer.state_dict(), w.detach().clone(), torch.empty_like(w)

    def copy_perturbed():
        with optimizer.perturbed(), torch.no_grad():
            seen.copy_(w)

    graph, _ = capture(copy_perturbed)
    group = optimizer.param_groups[0]
    for sigma, draw in ((0.1, 3), (0.2, 4), (0.3, 5), (0.1, 0), (0.1, 1)):
        if draw == 0:
            optimizer.load_state_dict(saved)
        group["sigma"].fill_(sigma)
        assert group["draw"].item() == draw
        graph.replay()
        expected = [before.clone()]
        ops.perturb_(expected, sigma, seed=5, draw=draw, stream=2)
        assert_same_bits(seen, expected[0])
        assert_same_bits(w, before)


@on_kernels
@on_kinds
def test_a_replayed_step_equals_the_eager_one(kind, backend):
    """Whole steps with new data, sigma or rho at every replay; cuBLAS may round differently in a graph."""
    model, twin, (x, y) = make_net(), make_net(), make_batch(0)
    optimizer, eager = make(kind, model), make(kind, twin)
    graph, _ = capture(lambda: step(optimizer, model, x, y))
    for _ in range(3):
        step(eager, twin, x, y)
    start = [p.detach().clone() for p in model.parameters()]
    for i in range(1, 5):
        for o in (optimizer, eager):
            o.param_groups[0][key_of(kind)].fill_(0.1 * i)
        for static, new in zip((x, y), make_batch(i)):
            static.copy_(new)
        graph.replay()
        step(eager, twin, x, y)
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-4, atol=1e-5)
    assert all((p - s).abs().max() > 1e-3 for p, s in zip(model.parameters(), start))
    if "draw" in optimizer.options:
        assert optimizer.state_dict()["param_groups"][0]["draw"] == 7


@on_kernels
def test_an_overflow_taints_in_a_graph_too(backend):
    """The first pass of one replay overflows: its second gradient is NaN, and that of the next replay is not."""
    p = nn.Parameter(torch.ones(3, device="cuda"))
    factor = torch.ones((), device="cuda")
    optimizer = flatops.SAM([p], torch.optim.SGD, lr=0.1, rho=0.5)

    def both_passes():
        p.grad = None
        (factor * p).sum().backward()
        with optimizer.perturbed():
            (p * p).sum().backward()

    graph, _ = capture(both_passes)
    for value, finite in ((1.0, True), (float("inf"), False), (1.0, True)):
        factor.fill_(value)
        graph.replay()
        assert p.grad.isfinite().all().item() == finite
        assert torch.equal(p, torch.ones_like(p))


@on_kernels
def test_numbers_in_a_graph_are_not_cached(backend):
    """A graph's memory does not enter the cache of numbers, which outlives the graph."""
    w, draw = torch.randn(6, 50, device="cuda"), torch.tensor(4, device="cuda")
    ops.perturb_([w], 0.5, seed=1, draw=draw)
    checks._constant.cache_clear()
    before = w.clone()
    graph, _ = capture(lambda: ops.perturb_([w], 0.125, seed=3, draw=draw), warm_up=0)
    assert checks._constant.cache_info().currsize == 0
    graph.replay()
    expected = [before]
    ops.perturb_(expected, 0.125, seed=3, draw=4)
    assert_same_bits(w, expected[0])


# --- streams ----------------------------------------------------------------------------------------------------------


@on_kernels
@on_operators
def test_the_current_stream_is_respected(operator, backend):
    """Between a slow producer and a reader on a side stream, an operator gives its usual result."""
    case, call = Case("few"), backend.operator(operator.split(",")[0])
    expected_args = arguments(operator, case, "cuda")
    expected_result = call(*expected_args)
    args = arguments(operator, case, "cuda")
    values = [t.clone() for t in tensors_of(args)]
    for t in tensors_of(args):
        t.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(1 << 27)
        for t, value in zip(tensors_of(args), values):
            t.copy_(value)
        result = call(*args)
        seen = [t.clone() for t in [*map(whole, tensors_of(args)), *tensors_of((result,))]]
    side.synchronize()
    assert_same_bits(seen, [*map(whole, tensors_of(expected_args)), *tensors_of((expected_result,))])


@on_kernels
def test_a_number_is_made_on_the_stream_that_reads_it(backend):
    """A tensor that another, sleeping stream has yet to fill would be read too early."""
    checks._constant.cache_clear()
    w, side = torch.randn(6, 50), torch.cuda.Stream()
    first, second = [w.cuda()], [w.cuda()]
    ops.perturb_([w.cuda()], 0.5, seed=1, draw=1)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(1 << 27)
        ops.perturb_(first, 0.25, seed=2**40, draw=77)
    ops.perturb_(second, 0.25, seed=2**40, draw=77)
    seen = second[0].cpu()
    side.synchronize()
    expected = [w]
    ops.perturb_(expected, 0.25, seed=2**40, draw=77, backend="reference")
    assert_same_bits(seen, expected[0])
    assert_same_bits(first, expected)


# --- several devices --------------------------------------------------------------------------------------------------

SECOND = pytest.param(
    "cuda:1", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one GPU")
)


@pytest.mark.parametrize("other", ["cpu", SECOND])
@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "a group a device"])
@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
@on_kinds
def test_one_optimizer_over_several_devices(kind, as_tensors, grouped, other):
    """The same noise, ascent and step as on the CPU alone; all weights are restored to the bit."""

    def parameters(devices):
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(5, 40, generator=generator).to(device)) for device in devices]

    def optimizer_of(params, groups):
        flat, options = KINDS[kind]
        options = {**options, "lr": 0.1}
        if as_tensors:
            options[key_of(kind)] = torch.tensor(options[key_of(kind)], dtype=torch.float64)
        return flat([{"params": group} for group in groups], torch.optim.SGD, **options)

    params, alone = parameters(["cuda:0", other] * 2), parameters(["cpu"] * 4)
    optimizer = optimizer_of(params, [params[::2], params[1::2]] if grouped else [params])
    on_cpu = optimizer_of(alone, [alone[::2], alone[1::2]] if grouped else [alone])
    for i in range(2):
        for p, q in zip(params, alone):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(i))
            p.grad = q.grad.to(p.device)
        before = [p.detach().clone() for p in params]
        with optimizer.perturbed(), on_cpu.perturbed():
            assert not torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])
            for p, q in zip(params, alone):
                torch.testing.assert_close(p.cpu(), q, rtol=1e-5, atol=1e-6)
                if i == 0 and key_of(kind) == "sigma":
                    assert_same_bits(p, q)
                q.grad = torch.ones_like(q)
                p.grad = torch.ones_like(p)
        if kind != "regenerating":
            assert_same_bits(params, before)
        optimizer.step()
        on_cpu.step()
        for p, q in zip(params, alone):
            torch.testing.assert_close(p.cpu(), q, rtol=1e-5, atol=1e-6)


W, ON_CPU = torch.ones(3, 4, device="cuda"), torch.ones(3, 4)
NUMBER = torch.ones((), dtype=torch.float64)
BAD = {
    r"params\[1\] is on cpu": lambda: ops.filter_norms([W, ON_CPU]),
    r"params\[1\] is on cuda": lambda: ops.perturb_([ON_CPU, W], 0.1, seed=0, draw=0),
    r"grads\[0\] is on cpu": lambda: ops.grad_norm([ON_CPU], [W]),
    r"grads\[1\] is on cpu": lambda: ops.ascend_([W, W + 1], [W, ON_CPU], 0.1, norm=NUMBER.cuda()),
    r"backup\[0\] is on cpu": lambda: ops.perturb_([W], 0.1, seed=0, draw=0, backup=[ON_CPU]),
    r"backup\[0\] is on cpu.*": lambda: ops.restore_([W], backup=[ON_CPU]),
    r"fisher\[0\]": lambda: ops.perturb_([W], 0.1, seed=0, draw=0, fisher=[ON_CPU[:, 0].clone()]),
    r"fisher\[0\].*": lambda: ops.filter_fisher_([ON_CPU[:, 0].clone()], [W], 0.5),
    "scales": lambda: ops.perturb_([W], 0.1, seed=0, draw=0, scales=torch.ones(3)),
    "sigma is on cpu": lambda: ops.perturb_([W], NUMBER, seed=0, draw=0),
    "seed is on cpu": lambda: ops.perturb_([W], 0.1, seed=NUMBER.long(), draw=0),
    "draw is on cpu": lambda: ops.perturb_([W], 0.1, seed=0, draw=NUMBER.long()),
    "draw is on cuda": lambda: ops.perturb_([ON_CPU], 0.1, seed=0, draw=NUMBER.long().cuda()),
    "rho is on cpu": lambda: ops.ascend_([W], [W + 1], NUMBER, norm=NUMBER.cuda()),
    "norm is on cpu": lambda: ops.ascend_([W], [W + 1], 0.1, norm=NUMBER),
    "scale is on cpu": lambda: ops.filter_fisher_([W[:, 0].clone()], [W], 0.5, scale=NUMBER),
    "'cpp' cannot be used: it does not support cuda": lambda: ops.filter_norms([W], backend="cpp"),
    "'cuda' cannot be used: it does not support cpu": lambda: ops.filter_norms([ON_CPU], backend="cuda"),
}


@pytest.mark.parametrize("match", BAD)
def test_tensors_on_other_devices_are_refused(match):
    """A ValueError that names the argument, before anything changes."""
    with pytest.raises(ValueError, match=match):
        BAD[match]()
    assert torch.equal(W.cpu(), torch.ones(3, 4)) and torch.equal(ON_CPU, torch.ones(3, 4))


# --- more than 2**31 elements -----------------------------------------------------------------------------------------


def noise_at(filter: Tensor, offset: Tensor, key: int, draw: int, index: int) -> Tensor:
    """The reference's normals at single positions."""
    words = reference.philox(
        (offset // 4, filter, torch.full_like(offset, index), torch.full_like(offset, draw)), torch.tensor(key)
    )
    z = torch.stack([*reference.box_muller(*words[:2]), *reference.box_muller(*words[2:])], -1)
    return z.gather(-1, (offset % 4)[:, None])[:, 0]


def norm_in_parts(row: Tensor) -> Tensor:
    return sum(part.double().square().sum() for part in row.split(2**26)).sqrt()


@on_kernels
@pytest.mark.parametrize("shape", [(2**31 + 8195,), (2**21 + 3, 1024), (3, 2**30)], ids=str)
def test_more_than_two_to_the_31_elements(shape, backend):
    """No index overflows: noise, ascent, sums at both ends and around 2**31 and 2**32 bytes; weights are restored."""
    n = torch.Size(shape).numel()
    needed = 5 * 2 * n  # five lists of bfloat16, a mask of bool, and temporary chunks
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 1.2 * needed:
        pytest.skip(f"{free / 1e9:.0f} GB of GPU memory are free, and {1.2 * needed / 1e9:.0f} are needed")
    w = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    g = torch.empty_like(w)
    for t in (w, g):
        for part in t.view(-1).split(2**28):
            part.normal_()
    before = w.clone()
    backup = ops.new_backup([w])
    length = n // shape[0] if len(shape) > 1 else n
    places = torch.cat([torch.arange(c - 2048, c + 2048) for c in (2048, 2**30, 2**31, n - 2048)])
    filter, offset = places // length, places % length
    on_gpu = places.cuda()

    scales = ops.perturb_([w], 0.1, seed=9, draw=8, index=[7], backup=backup)
    scale = scales.cpu()[filter]
    for f in (0, len(scales) - 1):
        exact = 0.1 * norm_in_parts(before.view(-1, length)[f])
        torch.testing.assert_close(scales[f].double(), exact, rtol=1e-6, atol=0)
    old = before.view(-1)[on_gpu].cpu()
    expected = reference.fma(scale, noise_at(filter, offset, 9, 8, 7), old.float()).bfloat16()
    assert_same_bits(w.view(-1)[on_gpu], expected)
    ops.restore_([w], backup=backup)
    assert torch.equal(w, before)

    norm = ops.grad_norm([g])
    torch.testing.assert_close(norm, norm_in_parts(g.view(-1)), rtol=1e-6, atol=0)
    ops.ascend_([w], [g], 1e4, norm=norm)
    step = (torch.tensor(1e4, dtype=torch.float64) / norm.cpu()).float()
    ascended = reference.fma(step, g.view(-1)[on_gpu].cpu().float(), old.float()).bfloat16()
    assert_same_bits(w.view(-1)[on_gpu], ascended)


# --- training ---------------------------------------------------------------------------------------------------------


@on_kernels
@on_kinds
def test_an_exception_restores_the_weights(kind, backend):
    model, (x, y) = make_net(), make_batch(0)
    optimizer = make(kind, model)
    F.mse_loss(model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="body"), optimizer.perturbed():
        assert not torch.equal(before[0], next(model.parameters()))
        raise ValueError("body")
    if kind == "regenerating":
        torch.testing.assert_close([p.detach() for p in model.parameters()], before, rtol=1e-5, atol=1e-6)
    else:
        assert_same_bits(list(model.parameters()), before)
    assert not optimizer.is_perturbed


@on_kinds
def test_every_backend_trains_the_same_weights(kind):
    """Twenty steps, bit for bit; the network's own operations are deterministic."""
    trained = []
    for backend in ON_GPU:
        with backend.forced():
            model = make_net()
            optimizer = make(kind, model, as_tensors=False)
            for i in range(20):
                step(optimizer, model, *make_batch(i))
        trained.append(list(model.parameters()))
        assert_same_bits(trained[-1], trained[0])
    assert not torch.equal(trained[0][0], next(make_net().parameters()))


@on_kernels
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "regenerating"])
def test_float16_under_a_grad_scaler(kind, fused, backend):
    """An overflow in the first pass skips the step and lowers the scale, and the next step is complete."""
    model, (x, y) = make_net(), make_batch(0)
    optimizer = make(kind, model, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=1000)

    def scaled_step(factor=1.0):
        clean = getattr(optimizer, "clean_weight", 1.0)
        weight = getattr(optimizer, "perturbed_weight", 1.0)
        if clean:
            with torch.autocast("cuda", dtype=torch.float16):
                loss = factor * clean * F.mse_loss(model(x), y)
            scaler.scale(loss).backward()
        options = {"loss_scale": scaler.get_scale() * weight} if kind == "marwp" else {}
        with optimizer.perturbed(**options):
            with torch.autocast("cuda", dtype=torch.float16):
                loss = (1.0 if clean else factor) * weight * F.mse_loss(model(x), y)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def weights():
        return copy.deepcopy([p.detach() for p in model.parameters()])

    losses = []
    for _ in range(5):
        losses.append(F.mse_loss(model(x), y).item())
        scaled_step()
    assert losses[-1] < losses[0] and scaler.get_scale() == 2.0**10
    before = weights()
    scaled_step(float("inf"))
    assert_same_bits(weights(), before)
    assert scaler.get_scale() == 2.0**9
    scaled_step()
    assert scaler.get_scale() == 2.0**9
    assert all(p.isfinite().all() for p in model.parameters()) and not torch.equal(weights()[0], before[0])
