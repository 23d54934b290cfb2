"""Replicas under DistributedDataParallel: parallel m-RWP, synced and local ascent, what processes must agree on."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import Net, all_bits, assert_same_bits, bits, loss_of, make_batch, make_net
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from workers import run

import flatops

SGD = torch.optim.SGD
METHODS = {
    "rwp": (flatops.RWP, {"seed": 0, "sigma": 0.1}),
    "arwp": (flatops.RWP, {"seed": 0, "sigma": 0.1, "eta": 1.0}),
    "mrwp": (flatops.RWP, {"seed": 0, "sigma": 0.1, "lam": 0.5}),
    "mrwp parallel": (flatops.RWP, {"seed": 0, "sigma": 0.1, "lam": 0.4, "parallel": True}),
    "marwp parallel": (flatops.RWP, {"seed": 0, "sigma": 0.1, "lam": 0.5, "eta": 1.0, "parallel": True}),
    "sam": (flatops.SAM, {"rho": 0.1}),
    "sam local": (flatops.SAM, {"rho": 0.1}),
    "asam": (flatops.SAM, {"rho": 1.0, "adaptive": True}),
    "ssam": (flatops.SSAM, {"seed": 0, "rho": 0.1, "fisher": "minibatch", "update_every": 3}),
    "ssam dynamic local": (flatops.SSAM, {"seed": 0, "rho": 0.1, "mask": "dynamic", "update_every": 3}),
    "ssam dynamic": (flatops.SSAM, {"seed": 0, "rho": 0.1, "mask": "dynamic", "update_every": 2}),
    "ssam dynamic by weight": (
        flatops.SSAM,
        {
            "seed": 0,
            "rho": 0.1,
            "mask": "dynamic",
            "update_every": 2,
            "drop": "weight",
            "grow": "gradient",
            "pattern": "layer",
        },
    ),
    "rwp regenerating": (flatops.RWP, {"seed": 0, "sigma": 0.1, "restore": "regenerate", "stream": 0}),
    "ssam skipping": (flatops.SSAM, {"seed": 0, "rho": 0.1, "pattern": "filter", "sparsity": 0.7, "skip_masked": True}),
}


def groupnorm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def make_optimizer(method: str, model: nn.Module, **more) -> flatops.SAM | flatops.RWP:
    flat, options = METHODS[method]
    return flat(model.parameters(), SGD, **{**options, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **more})


def part_of(batch: tuple[Tensor, Tensor], rank: int, world: int) -> tuple[Tensor, Tensor]:
    return tuple(t.chunk(world)[rank] for t in batch)


def passes(method: str, model: nn.Module, optimizer, batch, other=None) -> None:
    """The passes of one step, as a user writes them."""
    if isinstance(optimizer, flatops.SAM):
        with optimizer.ascent_pass(model if "local" in method or "skipping" in method else None):
            loss_of(model, batch).backward()
        with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
            loss_of(model, batch).backward()
        return
    if optimizer.clean_weight:
        (optimizer.clean_weight * loss_of(model, other or batch)).backward()
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model, optimizer.is_perturbed):
        (optimizer.perturbed_weight * loss_of(model, batch)).backward()


def gathered(t: Tensor) -> list[Tensor]:
    each = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(each, t.detach().contiguous())
    return each


def assert_same_everywhere(tensors) -> None:
    for i, t in enumerate(tensors):
        for rank, other in enumerate(gathered(t)):
            assert torch.equal(bits(other), bits(t)), f"tensor {i} differs from process {rank}'s"


def assert_close(left, right, tolerance: float = 2e-6) -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m: f"tensor {i}: {m}")


# --- parallel m-RWP ---------------------------------------------------------------------------------------------------


def parallel_against_one_process(lam: float, closure: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    net = make_net(1, norm=groupnorm)
    alone = copy.deepcopy(net)
    model = DDP(net)
    optimizer = flatops.RWP(model.parameters(), SGD, sigma=0.3, lam=lam, seed=7, parallel=True, lr=0.1)
    assert optimizer.perturbs == (rank >= world - world // 2)
    batch = make_batch(0, size=12)
    mine = part_of(batch, rank, world)
    before = all_bits(net.parameters())
    if closure:

        def evaluate():
            optimizer.zero_grad()
            assert optimizer.is_perturbed == optimizer.perturbs
            if closure == "that knows its weight":
                with optimizer.perturbed():
                    (optimizer.perturbed_weight * loss_of(model, mine)).backward()
            else:
                loss_of(model, mine).backward()

        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step(evaluate)
    else:
        with optimizer.perturbed():
            changed = any(not torch.equal(a, bits(p)) for a, p in zip(before, net.parameters()))
            assert changed == optimizer.is_perturbed == optimizer.perturbs
            (optimizer.perturbed_weight * loss_of(model, mine)).backward()
    assert_same_bits(before, all_bits(net.parameters()))
    assert optimizer.param_groups[0]["draw"] == 1

    expected = [torch.zeros_like(p) for p in alone.parameters()]
    half = world // 2
    for r in range(world):
        noisy = r >= world - half
        weight = lam / half if noisy else (1 - lam) / (world - half)
        one = flatops.RWP(alone.parameters(), SGD, sigma=0.3 if noisy else 0.0, seed=7, stream=r, lr=0.1)
        alone.zero_grad()
        with one.perturbed():
            loss_of(alone, part_of(batch, r, world)).backward()
        for e, p in zip(expected, alone.parameters()):
            e += weight * p.grad
    assert_close([p.grad for p in net.parameters()], expected)


@pytest.mark.parametrize(
    "closure", ["", "plain", "that knows its weight"], ids=lambda c: f"closure {c}" if c else "explicit"
)
@pytest.mark.parametrize("world, lam", [(2, 0.5), (2, 0.3), (3, 0.5), (4, 0.7)])
def test_parallel_mrwp_is_the_mixed_gradient_of_one_process(world, lam, closure):
    run(parallel_against_one_process, world, lam, closure)


def roles() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizer = make_optimizer("mrwp parallel", make_net())
    group = optimizer.role_group()
    members = dist.get_process_group_ranks(group)
    assert rank in members and set(members) == set(
        range(world // 2, world) if optimizer.perturbs else range(world // 2)
    )
    lone = make_optimizer("mrwp parallel", make_net(), lam=1.0)  # nothing to mix: all perturb
    assert lone.perturbs and lone.perturbed_weight == 1.0


def test_each_role_has_a_process_group():
    run(roles, 4)


def regenerating() -> None:
    model = make_net()
    before = all_bits(model.parameters())
    optimizer = flatops.RWP(model.parameters(), SGD, sigma=0.1, restore="regenerate", lr=0.1)
    with pytest.raises(ValueError, match="restore='regenerate'"), optimizer.perturbed():
        pass
    assert_same_bits(before, all_bits(model.parameters()))
    optimizer = flatops.RWP(
        model.parameters(), SGD, sigma=0.1, lam=0.5, eta=1.0, restore="regenerate", stream=0, lr=0.1
    )
    with pytest.raises(ValueError, match="no mixed ARWP"), optimizer.perturbed():
        pass


def mixed_arwp_accumulates() -> None:
    """Each replica's first micro-batch is local, and so is its contribution to F."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DDP(make_net())
    optimizer = flatops.RWP(model.parameters(), SGD, sigma=0.1, lam=0.5, eta=1.0, stream=0, lr=0.1)
    for i in range(3):
        for j in range(2):
            with model.no_sync() if j == 0 else contextlib.nullcontext():
                for one_pass in flatops.passes(optimizer, model):
                    with one_pass:
                        loss_of(model, part_of(make_batch(2 * i + j, size=16), rank, world)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_same_everywhere(optimizer.fisher.values())
        assert all(f.min() > 0 for f in optimizer.fisher.values() if f.numel() > 1)
    assert_same_everywhere(model.parameters())


def test_replicas_agree_on_f_under_accumulation():
    run(mixed_arwp_accumulates, 2)


def test_replicas_that_would_drift_apart_are_refused():
    run(regenerating, 2)


def parallel_mrwp_on_one_process() -> None:
    model = make_net()
    optimizer = make_optimizer("mrwp parallel", model)
    with pytest.raises(ValueError, match="needs two replicas"), optimizer.perturbed():
        pass
    assert not optimizer.is_perturbed and optimizer.param_groups[0]["draw"] <= 1


def test_parallel_mrwp_on_one_process_is_an_error_with_a_remedy():
    parallel_mrwp_on_one_process()
    run(parallel_mrwp_on_one_process, 1)


# --- replicas stay the same -------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """The net with dropout, which every process draws for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net.head(F.dropout(self.net.features(x).mean((2, 3)), 0.3, self.training))


def fifty_steps(method: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    net = Dropping()
    model = DDP(net)
    optimizer = make_optimizer(method, model)
    if method == "ssam skipping":
        batches = [make_batch(100 + rank)]
        optimizer.update_mask(model, F.cross_entropy, batches, samples=4)
    torch.manual_seed(rank)
    for i in range(50):
        optimizer.zero_grad()
        passes(method, model, optimizer, make_batch(i * world + rank), make_batch(1000 + i * world + rank))
        optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())
    assert_same_everywhere(net.parameters())
    if isinstance(optimizer, flatops.SSAM):
        assert_same_everywhere(mask.bits for mask in optimizer.masks.values())
    states = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert_same_everywhere(states)


@pytest.mark.parametrize("method", METHODS)
def test_processes_stay_the_same_to_the_bit_over_fifty_steps(method):
    run(fifty_steps, 2, method)


@pytest.mark.parametrize("method", ["mrwp parallel", "sam local", "ssam"])
def test_four_processes_stay_the_same_to_the_bit_over_fifty_steps(method):
    run(fifty_steps, 4, method)


# --- the SAM family ---------------------------------------------------------------------------------------------------


def sam_against_one_process(method: str, flags: dict, pieces: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    net = make_net(2, norm=groupnorm)
    alone = copy.deepcopy(net)
    model = DDP(net, **flags)
    optimizer, expected = make_optimizer(method, model), make_optimizer(method, alone)
    for i in range(5):
        batch = make_batch(i, size=16)
        mine = part_of(batch, rank, world)

        def accumulate(model, batch, distributed):
            for k in range(pieces):
                last = k == pieces - 1
                with model.no_sync() if distributed and not last else torch.enable_grad():
                    (loss_of(model, part_of(batch, k, pieces)) / pieces).backward()

        for m, o, b in ((model, optimizer, mine), (alone, expected, batch)):
            o.zero_grad()
            accumulate(m, b, m is model)
            with o.perturbed():
                accumulate(m, b, m is model)
            o.step()
    assert_close(net.parameters(), alone.parameters(), 1e-5)
    assert_same_everywhere(net.parameters())


FLAGS = {
    "plain": {},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "compile": {"compile": True},
}


class Branching(nn.Module):
    """Uses different heads in different steps and, for local ascent, in different processes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.heads, self.turn = Net(groupnorm), nn.ModuleList(nn.Linear(8, 4) for _ in range(2)), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.turn](self.net.features(x).mean((2, 3)))


def unused_parameters(method: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(5)
    net = Branching()
    alone = copy.deepcopy(net)
    model = DDP(net, find_unused_parameters=True)
    optimizer, expected = (make_optimizer(method, m, momentum=0.0) for m in (model, alone))
    for i in range(4):
        batch = make_batch(i, size=16)
        net.turn = alone.turn = i % 2
        for m, o, b in ((model, optimizer, part_of(batch, rank, world)), (alone, expected, batch)):
            o.zero_grad()
            o.run.agreed = o is expected  # it runs its passes alone
            passes(method, m, o, b)
            o.step()
        if "local" not in method:
            assert_close(net.parameters(), alone.parameters(), 1e-5)
        assert_same_everywhere(net.parameters())


@pytest.mark.parametrize("method", ["sam", "sam local", "ssam", "rwp regenerating"])
def test_parameters_that_are_not_used(method):
    run(unused_parameters, 2, method)


@pytest.mark.parametrize("flags", sorted(FLAGS.keys() - {"compile"}))
@pytest.mark.parametrize("method", ["sam", "asam", "ssam"])
def test_synced_ascent_equals_one_process(method, flags):
    run(sam_against_one_process, 2, method, FLAGS[flags], 1)


def test_synced_ascent_equals_one_process_on_four_and_by_accumulation():
    run(sam_against_one_process, 4, "sam", {}, 1)
    run(sam_against_one_process, 2, "sam", {}, 2)
    run(sam_against_one_process, 2, "sam", {"gradient_as_bucket_view": True}, 2)


def local_against_by_hand(flags: dict) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    net = make_net(2, norm=groupnorm)
    alone = copy.deepcopy(net)
    model = DDP(net, **{name: value for name, value in flags.items() if name != "compile"})
    optimizer = make_optimizer("sam", model, momentum=0.0, weight_decay=0.0)
    reduced = []
    model.register_comm_hook(None, lambda _, bucket: count_all_reduce(reduced, bucket))
    wrapped = torch.compile(model, backend="eager") if "compile" in flags else model
    for i in range(3):
        optimizer.zero_grad()
        batch = make_batch(i)
        passes("sam local", wrapped, optimizer, part_of(batch, rank, world))
        optimizer.step()
        each = []
        for r in range(world):  # m-sharpness, written out
            twin = copy.deepcopy(alone)
            grads = torch.autograd.grad(loss_of(twin, part_of(batch, r, world)), list(twin.parameters()))
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            with torch.no_grad():
                for p, g in zip(twin.parameters(), grads):
                    p += 0.1 * g / norm
            each.append(torch.autograd.grad(loss_of(twin, part_of(batch, r, world)), list(twin.parameters())))
        with torch.no_grad():
            for p, *gs in zip(alone.parameters(), *each):
                p -= 0.05 * sum(gs) / world
    assert_close(net.parameters(), alone.parameters(), 1e-5)
    assert len(reduced) == 3, "the first pass must not communicate"


def count_all_reduce(seen: list, bucket) -> torch.futures.Future:
    seen.append(bucket.index())
    world = dist.get_world_size()
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0].div_(world))


@pytest.mark.parametrize("flags", ["plain", "gradient_as_bucket_view", "find_unused_parameters", "compile"])
def test_local_ascent_is_m_sharpness_and_halves_the_communication(flags):
    run(local_against_by_hand, 2, FLAGS[flags])


def local_with_static_graph() -> None:
    model = DDP(make_net(), static_graph=True)
    optimizer = make_optimizer("sam", model)
    with pytest.raises(ValueError, match="static_graph=True"), optimizer.ascent_pass(model):
        pass


def test_local_ascent_refuses_a_static_graph():
    run(local_with_static_graph, 2)


def overflow_on_one(method: str) -> None:
    rank = dist.get_rank()
    net = make_net(norm=groupnorm)
    model = DDP(net)
    optimizer, scaler = make_optimizer(method, model), torch.amp.GradScaler("cpu", init_scale=8.0)
    before = all_bits(net.parameters())
    for i in range(3):
        optimizer.zero_grad()
        x, y = make_batch(i * 2 + rank)
        bad = torch.where(torch.tensor(i == 1 and rank == 1), torch.inf, 1.0)
        with optimizer.ascent_pass(model if "local" in method else None):
            scaler.scale(loss_of(model, (x, y)) * bad).backward()
        with optimizer.perturbed():
            scaler.scale(loss_of(model, (x, y))).backward()
        scaler.step(optimizer)
        scaler.update()
        after = all_bits(net.parameters())
        assert (i == 1) == all(map(torch.equal, before, after))
        assert scaler.get_scale() == (8.0 if i == 0 else 4.0)
        before = after
        assert_same_everywhere(net.parameters())


@pytest.mark.parametrize("method", ["sam", "sam local", "ssam", "ssam dynamic local"])
def test_an_overflow_on_one_process_skips_the_step_on_all(method):
    run(overflow_on_one, 2, method)


def errors_of_one() -> None:
    """An error of one process is raised on both, and neither waits."""
    rank = dist.get_rank()
    model = make_net(norm=groupnorm)
    optimizer = flatops.SSAM(model.parameters(), SGD, lr=0.1)
    with pytest.raises((ValueError, RuntimeError), match="4 samples and 8 are asked for|process 1 raised ValueError"):
        optimizer.update_mask(model, F.cross_entropy, [make_batch(0, size=8 - 4 * rank)], samples=8)
    dynamic = flatops.SSAM(model.parameters(), SGD, mask="dynamic", lr=0.1)
    loss_of(model, make_batch(0)).backward()
    with dynamic.perturbed():
        loss_of(model, make_batch(0)).backward()
    if rank:
        model.head.bias.grad.fill_(torch.nan)
    before = [mask.bits.clone() for mask in dynamic.masks.values()]
    with pytest.raises((ValueError, RuntimeError), match="holds a NaN"):
        dynamic.update_mask()
    assert_same_bits(before, [mask.bits for mask in dynamic.masks.values()])
    skipping = make_optimizer("ssam skipping", model)
    with pytest.raises(RuntimeError, match=r"ascent_pass\(model\)"):
        skipping.step(lambda: loss_of(model, make_batch(0)))


def test_an_error_of_one_process_is_raised_on_all():
    run(errors_of_one, 2)


def resume_mid_epoch(method: str) -> None:
    def new():
        torch.manual_seed(3)
        model = DDP(make_net(norm=groupnorm))
        return model, make_optimizer(method, model)

    def steps(model, optimizer, which):
        for i in which:
            optimizer.zero_grad()
            passes(
                method, model, optimizer, make_batch(2 * i + dist.get_rank()), make_batch(50 + 2 * i + dist.get_rank())
            )
            optimizer.step()

    model, optimizer = new()
    steps(model, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, range(4, 8))
    again, resumed = new()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    steps(again, resumed, range(4, 8))
    assert_same_bits(again.parameters(), model.parameters())


@pytest.mark.parametrize("method", ["marwp parallel", "sam local", "ssam dynamic local"])
def test_resume_equals_no_interruption_to_the_bit(method):
    run(resume_mid_epoch, 2, method)


def masks_against_one_process(pattern: str, vectorize: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_net()
    batch = make_batch(5, size=8)
    mine = [part_of(batch, rank, world)]
    made = []
    # Two processes evaluate the whole batch here, and their F is summed: twice the value, in the same order.
    for wrapped, batches, samples in ((DDP(model), mine, 8 // world), (model, [batch], 8)):
        sparsity = {} if ":" in pattern else {"sparsity": 0.6}
        optimizer = flatops.SSAM(wrapped.parameters(), SGD, pattern=pattern, lr=0.1, **sparsity)
        optimizer.update_mask(wrapped, F.cross_entropy, batches, samples=samples, vectorize=vectorize)
        made.append([mask.bits for mask in optimizer.masks.values()])
    assert_same_bits(*made)
    assert_same_everywhere(made[0])


@pytest.mark.parametrize("pattern", ["global", "filter", "2:4"])
def test_masks_of_two_processes_equal_those_of_one(pattern):
    run(masks_against_one_process, 2, pattern, pattern == "global")


# --- streams and agreement --------------------------------------------------------------------------------------------


def streams() -> None:
    model = make_net()
    optimizer = make_optimizer("rwp", model)
    with optimizer.perturbed():
        noisy = gathered(model.features[0].weight)
    assert not any(torch.equal(noisy[0], other) for other in noisy[1:])
    fixed = make_optimizer("rwp", model, stream=5)
    with fixed.perturbed():
        noisy = gathered(model.features[0].weight)
    assert all(torch.equal(noisy[0], other) for other in noisy[1:])


def test_replicas_draw_different_noise_by_default():
    run(streams, 3)


def disagree(what: str) -> None:
    rank = dist.get_rank()
    model = make_net(norm=groupnorm)
    params, more, wrong = model.parameters(), {}, what
    if what == "seed":
        more["seed"] = rank
    elif what == "sigma":
        more["sigma"] = torch.tensor(0.1 + rank)
    elif what == "params":
        params = list(params)[: 5 - rank]
    elif what == "parallel":
        more |= {"parallel": rank == 0, "lam": 0.5}
    optimizer = flatops.RWP(params, SGD, **{"sigma": 0.1, "lr": 0.1, **more})
    if what == "draw":
        with torch.no_grad():  # one process evaluates the loss once more than the other
            for _ in range(rank):
                with optimizer.perturbed():
                    pass
    if what == "the optimizer" and rank == 1:
        optimizer = make_optimizer("sam", model)
        loss_of(model, make_batch(0)).backward()
    if what == "restore" and rank == 1:
        optimizer.param_groups[0]["restore"] = "regenerate"
    before = all_bits(model.parameters())
    with pytest.raises(RuntimeError, match=f"processes disagree on {wrong}: .* on process 0, .* on process 1"):
        with optimizer.perturbed():
            pass
    assert_same_bits(before, all_bits(model.parameters()))


@pytest.mark.parametrize("what", ["seed", "sigma", "params", "draw", "parallel", "restore", "the optimizer"])
def test_processes_that_disagree_are_told_about_what(what):
    run(disagree, 2, what)


def agreement_is_checked_once() -> None:
    model = make_net(norm=groupnorm)
    optimizer = make_optimizer("rwp", model)
    calls = []
    real = dist.all_gather_object
    dist.all_gather_object = lambda *a, **k: calls.append(1) or real(*a, **k)
    try:
        for i in range(3):
            optimizer.zero_grad()
            passes("rwp", model, optimizer, make_batch(i))
            optimizer.step()
        assert len(calls) == 1
        optimizer.load_state_dict(optimizer.state_dict())  # another checkpoint may come from another optimizer
        passes("rwp", model, optimizer, make_batch(9))
        assert len(calls) == 2
    finally:
        dist.all_gather_object = real


def test_agreement_is_checked_once():
    run(agreement_is_checked_once, 2)


# --- engines that replace the parameters ------------------------------------------------------------------------------


def flattened(params: list[Tensor]) -> list[Tensor]:
    """As in ZeRO-1 and 2 and Megatron's distributed optimizer: one float32 copy, which no forward reads."""
    return [torch.cat([p.detach().flatten().float() for p in params]).requires_grad_()]


def copied(params: list[Tensor]) -> list[Tensor]:
    """As in the mixed precision of apex and Megatron: a float32 copy of each parameter."""
    return [p.detach().float().clone().requires_grad_() for p in params]


def nothing(params: list[Tensor]) -> list[Tensor]:
    """As in ZeRO-3 between two steps."""
    return []


@pytest.mark.parametrize("put", [flattened, copied, nothing])
@pytest.mark.parametrize("method", ["rwp", "sam"])
def test_copies_that_replace_parameters_are_refused(method, put):
    model = make_net()
    optimizer = make_optimizer(method, model)
    (group,) = optimizer.param_groups
    group["params"] = put(group["params"])
    for p in group["params"]:
        p.grad = torch.ones_like(p)
    before = all_bits(group["params"])
    with pytest.raises(ValueError, match="no longer in it.*fully_shard"), optimizer.perturbed():
        pass
    assert not optimizer.is_perturbed
    assert_same_bits(all_bits(group["params"]), before)


def test_parameters_outside_modules_are_not_mistaken_for_copies():
    """Plain tensors from the start; later other parameters, as when a scene gets new points."""
    w = torch.ones(3, 2, requires_grad=True)
    optimizer = flatops.RWP([w], SGD, sigma=0.1, lr=0.1)
    with optimizer.perturbed():
        w.sum().backward()
    optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    p = nn.Parameter(torch.ones(3, 2))
    grown = flatops.RWP([p], SGD, sigma=0.1, lr=0.1)
    grown.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    grown.param_groups[0]["params"] = [nn.Parameter(torch.ones(4, 2))]
    for one in (optimizer, grown, copy.deepcopy(optimizer)):
        with one.perturbed():
            pass


class FlatParameter(nn.Parameter):
    """The name of the parameter into which fairscale, XLA and their copies flatten others."""


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened", "ds_id", "its class"])
def test_flattened_parameters_are_recognised(mark):
    """Before or after the optimizer is built; for flatops.perturb too."""
    p = FlatParameter(torch.ones(6)) if mark == "its class" else nn.Parameter(torch.ones(6))
    later = flatops.RWP([p], SGD, lr=0.1) if mark != "its class" else None
    if mark != "its class":
        setattr(p, mark, True)
        with pytest.raises(ValueError, match=r"params\[0\] is flattened"), later.perturbed():
            pass
    with pytest.raises(ValueError, match=r"params\[0\] is flattened by .*use fully_shard"):
        flatops.SAM([p], SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"weights\[0\] is flattened"), flatops.perturb([p]):
        pass
    assert torch.equal(p, torch.ones(6))


# --- the documentation ------------------------------------------------------------------------------------------------


def snippets(blocks: list[str]) -> None:
    for block in blocks:
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        names = {
            "net": net, "x": torch.randn(4, 6), "y": torch.randint(3, (4,)), "loss_fn": F.cross_entropy,
            "torch": torch, "flatops": flatops, "DistributedDataParallel": DDP, "fully_shard": fully_shard,
        }  # fmt: skip
        before = copy.deepcopy(net.state_dict())
        exec(block, names)
        after = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in net.state_dict().items()}
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_snippets_of_the_documentation_run():
    text = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    run(snippets, 2, blocks)


def _default_seeds() -> None:
    torch.manual_seed(dist.get_rank())
    params = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))]
    groups = [{"params": params[:1]}, {"params": params[1:], "seed": 5}]
    optimizer = flatops.RWP(groups, SGD, lr=0.1)
    own = optimizer.param_groups[0]["seed"]
    with optimizer.perturbed():
        pass
    seeds = flatops.distributed.gather_objects((own, [group["seed"] for group in optimizer.param_groups]))
    assert seeds[0][0] != seeds[1][0]
    assert [after for _, after in seeds] == [[seeds[0][0], 5]] * 2


def test_processes_share_the_default_seed_of_the_first():
    """Even if they seeded torch differently; a given seed is kept."""
    run(_default_seeds, 2)
