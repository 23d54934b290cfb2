"""Shards under FSDP2: noise, masks, steps and checkpoints do not depend on the number of shards."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import DEVICES
from models import all_bits, assert_same_bits, loss_of, make_batch, make_net
from test_distributed import METHODS, assert_close, assert_same_everywhere, groupnorm, make_optimizer, part_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Shard
from torch.nn import functional as F
from workers import run

import flatops

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
SHARDED = [name for name in METHODS if not any(word in name for word in ("parallel", "local", "skipping"))]


def shard(net: nn.Module, mesh=None, **policy) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    fully_shard(net.features, mesh=mesh, **policy)
    return fully_shard(net, mesh=mesh, **policy)


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()  # on one shard it is a view of the shard


def wholes(model: nn.Module) -> list[Tensor]:
    return [whole(p.detach()) for p in model.parameters()]


def run_passes(optimizer, model, batch, other, seen: list | None = None) -> None:
    """The passes of one step, on one process or on shards; `seen` collects the perturbed weights."""
    if isinstance(optimizer, flatops.SAM):
        loss_of(model, batch).backward()
    elif optimizer.clean_weight:
        (optimizer.clean_weight * loss_of(model, other)).backward()
    with optimizer.perturbed():
        if seen is not None:
            seen.append(wholes(model))
        (getattr(optimizer, "perturbed_weight", 1.0) * loss_of(model, batch)).backward()


def shards_against_one_process(method: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = make_net(4, norm=groupnorm)
    model = shard(copy.deepcopy(alone))
    stream = {"stream": 0} if issubclass(METHODS[method][0], flatops.RWP) else {}  # or each process would be a replica
    optimizer, expected = (make_optimizer(method, m, **stream) for m in (model, alone))
    for i in range(6):
        batch, other = make_batch(i, size=12), make_batch(i + 50, size=12)
        before = [p._local_tensor.clone() for p in model.parameters()]
        noisy, noisy_alone = [], []
        optimizer.zero_grad()
        expected.zero_grad()
        run_passes(optimizer, model, part_of(batch, rank, world), part_of(other, rank, world), noisy)
        run_passes(expected, alone, batch, other, noisy_alone)
        if "regenerating" in method:
            assert_close([p._local_tensor for p in model.parameters()], before, 1e-6)
        else:
            assert_same_bits([p._local_tensor for p in model.parameters()], before)
        if i == 0 and isinstance(optimizer, flatops.RWP):
            assert_same_bits(noisy[0], noisy_alone[0])
        else:
            assert_close(noisy[0], noisy_alone[0], 2e-5)
        optimizer.step()
        expected.step()
        if isinstance(optimizer, flatops.SSAM):
            assert (
                optimizer.state_dict()["param_groups"][0]["mask_bits"]
                == expected.state_dict()["param_groups"][0]["mask_bits"]
            )
        if world == 1:
            assert_same_bits(wholes(model), alone.parameters())
    assert_close(wholes(model), list(alone.parameters()), 2e-5)
    for p, q in zip(model.parameters(), alone.parameters()):
        if method == "arwp":
            assert_close([whole(optimizer.fisher[p])], [expected.fisher[q]], 1e-3)


@pytest.mark.parametrize("method", SHARDED)
def test_three_shards_equal_one_process(method):
    run(shards_against_one_process, 3, method)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("method", ["rwp", "arwp", "sam", "ssam", "ssam dynamic"])
def test_any_number_of_shards_equals_one_process(method, world):
    run(shards_against_one_process, world, method)


def masks_from_samples(pattern: str) -> None:
    alone = make_net(4, norm=groupnorm)
    model = shard(copy.deepcopy(alone))
    sparsity = {} if ":" in pattern else {"sparsity": 0.6}
    batches = [make_batch(1), make_batch(2)]
    texts = []
    for net in (model, alone):
        optimizer = flatops.SSAM(net.parameters(), SGD, pattern=pattern, lr=0.1, **sparsity)
        loss_of(net, make_batch(3)).backward()
        kept = [whole(p.grad).clone() for p in net.parameters()]
        if net is alone:  # its F is not to be summed over processes
            fisher = flatops.optim.fisher.sample_fisher(
                [list(net.parameters())], net, F.cross_entropy, batches, 12, False, False
            )
            optimizer._install(optimizer._masker().largest(fisher))
        else:
            optimizer.update_mask(net, F.cross_entropy, batches, samples=12)
        assert_same_bits(kept, [whole(p.grad) for p in net.parameters()])
        texts.append(optimizer.state_dict()["param_groups"][0]["mask_bits"])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("pattern", ["global", "layer", "filter", "2:4"])
def test_masks_from_samples_equal_those_of_one_process(pattern):
    run(masks_from_samples, 3, pattern)


def nan_scores() -> None:
    model = shard(make_net(norm=groupnorm))
    optimizer = make_optimizer("ssam", model)
    loss_of(model, make_batch(0)).backward()
    with optimizer.perturbed():
        loss_of(model, make_batch(0)).backward()
    for f in optimizer.fisher.values():
        f._local_tensor.fill_(torch.nan)
    with pytest.raises((ValueError, RuntimeError), match="holds a NaN"):
        optimizer.update_mask()
    assert not optimizer.masks


def test_scores_that_cannot_be_ordered_are_an_error_on_every_process():
    run(nan_scores, 3)


def one_shard(device: str, method: str) -> None:
    """Everything on one GPU, for lack of a second: tests devices and NCCL."""
    group = dist.new_group(backend="nccl" if device == "cuda" else "gloo")
    alone = make_net(4, norm=groupnorm).to(device)
    model = shard(copy.deepcopy(alone), DeviceMesh.from_group(group, device))
    optimizer, expected = (make_optimizer(method, m) for m in (model, alone))
    for i in range(4):
        batch, other = (tuple(t.to(device) for t in make_batch(j)) for j in (i, i + 50))
        for o, m in ((optimizer, model), (expected, alone)):
            o.zero_grad()
            run_passes(o, m, batch, other)
            o.step()
    assert_close(wholes(model), list(alone.parameters()), 1e-4 if device == "cuda" else 0)


@pytest.mark.parametrize("method", ["arwp", "mrwp", "asam", "ssam", "ssam dynamic"])
@pytest.mark.parametrize("device", DEVICES)
def test_one_shard_on_each_device(device, method):
    run(one_shard, 1, device, method)


# --- stale gathered weights -------------------------------------------------------------------------------------------


def stale(reshard_after_forward: bool | int | None, backward_too: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    policy = {} if reshard_after_forward is None else {"reshard_after_forward": reshard_after_forward}
    alone = make_net(4, norm=groupnorm)
    model = shard(copy.deepcopy(alone), **policy)
    if not backward_too:
        model.set_reshard_after_backward(False)
    optimizer, expected = (make_optimizer("mrwp", m, stream=0, sigma=0.5) for m in (model, alone))
    batch = make_batch(0, size=12)

    def evaluate(net):
        with torch.no_grad():
            return loss_of(net, batch)

    for i in range(3):
        clean = evaluate(model)  # leaves the root's weights gathered, and with False everyone's
        assert_close([clean], [evaluate(alone)], 1e-5)
        with optimizer.perturbed(), expected.perturbed():
            noisy = evaluate(model)
            assert_close([noisy], [evaluate(alone)], 1e-5)
        assert abs(noisy - clean) > 1e-3
        assert_close([evaluate(model)], [evaluate(alone)], 1e-5)
        optimizer.zero_grad()
        expected.zero_grad()
        run_passes(optimizer, model, part_of(batch, rank, world), part_of(batch, rank, world))
        run_passes(expected, alone, batch, batch)
        optimizer.step()
        expected.step()
    assert_close(wholes(model), list(alone.parameters()), 2e-5)


@pytest.mark.parametrize("setting", [None, True, False, 1], ids=str)
def test_evaluation_leaves_no_stale_weights(setting):
    run(stale, 2, setting, True)


def test_weights_left_gathered_after_backward_are_gathered_again():
    run(stale, 2, False, False)


def first_evaluations() -> None:
    """Evaluations before any pass with gradients, and one that fails in the middle of a forward."""
    alone = make_net(4, norm=groupnorm)
    model = shard(copy.deepcopy(alone))
    optimizer, expected = (make_optimizer("rwp", m, stream=0, sigma=0.5) for m in (model, alone))
    batch = make_batch(0, size=12)

    @torch.no_grad()
    def same_loss() -> bool:
        return torch.allclose(loss_of(model, batch), loss_of(alone, batch), atol=1e-5)

    with torch.no_grad():
        for _ in range(2):
            assert same_loss()
            with optimizer.perturbed(), expected.perturbed():
                assert same_loss()
            assert same_loss()

    def fail(*_):
        raise MemoryError

    for grad in (False, True):
        hook = model.head.register_forward_pre_hook(fail)
        with torch.set_grad_enabled(grad), pytest.raises(MemoryError), optimizer.perturbed(), expected.perturbed():
            loss_of(model, batch)
        hook.remove()
        assert same_loss()
    loss_of(model, batch).backward()
    loss_of(alone, batch).backward()
    assert_close([whole(p.grad) for p in model.parameters()], [p.grad for p in alone.parameters()], 1e-5)


def test_evaluations_and_failures_leave_no_stale_weights():
    run(first_evaluations, 2)


def low_precision(method: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(make_net(4, norm=groupnorm), mp_policy=policy)
    optimizer = make_optimizer(method, model)
    params = list(model.parameters())  # in evaluation, gathered parameters replace them
    first = None
    for i in range(20):
        optimizer.zero_grad()
        batch = part_of(make_batch(i % 2, size=16), rank, world)
        before = [p._local_tensor.clone() for p in params]
        run_passes(optimizer, model, batch, batch)
        assert_same_bits([p._local_tensor for p in params], before)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in params)
        optimizer.step()
        with torch.no_grad():
            loss = loss_of(model, make_batch(0, size=16))
        first = loss if first is None else first
    assert loss < first


@pytest.mark.parametrize("method", ["arwp", "sam"])
def test_mixed_precision_policy(method):
    run(low_precision, 2, method)


# --- HSDP -------------------------------------------------------------------------------------------------------------


def hybrid(method: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    replica = mesh.get_coordinate()[0]
    alone = make_net(4, norm=groupnorm)
    model = shard(copy.deepcopy(alone), mesh)
    optimizer = make_optimizer(method, model)
    if method == "mrwp parallel":
        assert optimizer.perturbs == (replica == 1)
    with optimizer.perturbed():
        noisy = wholes(model)
    one = flatops.RWP(alone.parameters(), SGD, sigma=0.1, seed=0, stream=replica, lr=0.1)
    if method == "rwp" or replica:
        with torch.no_grad(), one.perturbed():  # with gradients it would wait for the other processes
            assert_same_bits(noisy, alone.parameters())
    else:
        assert_same_bits(noisy, alone.parameters())
    for i in range(5):
        optimizer.zero_grad()
        with optimizer.perturbed():
            (optimizer.perturbed_weight * loss_of(model, make_batch(10 * i + dist.get_rank()))).backward()
        optimizer.step()
    assert_same_everywhere(wholes(model))


@pytest.mark.parametrize("method", ["rwp", "mrwp parallel"])
def test_replicas_of_hsdp_draw_different_noise_and_their_shards_the_same(method):
    run(hybrid, 4, method)


def hybrid_parallel() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    alone = make_net(4, norm=groupnorm)
    model = shard(copy.deepcopy(alone), mesh)
    optimizer = make_optimizer("mrwp parallel", model, lam=0.3)
    batch = make_batch(0, size=16)
    with optimizer.perturbed():
        (optimizer.perturbed_weight * loss_of(model, part_of(batch, dist.get_rank(), 4))).backward()
    for replica, weight in ((0, 0.7), (1, 0.3)):
        one = flatops.RWP(alone.parameters(), SGD, sigma=0.1 * replica, seed=0, stream=1, lr=0.1)
        one.run.agreed = True
        with one.perturbed():
            (weight * loss_of(alone, part_of(batch, replica, 2))).backward()
    assert_close([whole(p.grad) for p in model.parameters()], [p.grad for p in alone.parameters()], 1e-6)
    optimizer.step()
    with pytest.raises(RuntimeError, match="gradients of sharded parameters cannot be weighted"):
        optimizer.step(lambda: loss_of(model, batch))


def test_parallel_mrwp_under_hsdp_is_the_mixed_gradient():
    run(hybrid_parallel, 4)


def groups_and_accumulation() -> None:
    """Groups with their own sigma and eta; gradients accumulated before they are reduced."""
    alone = make_net(4, norm=groupnorm)
    model = shard(copy.deepcopy(alone))
    rank, world = dist.get_rank(), dist.get_world_size()
    nets = []
    for net in (model, alone):
        groups = [{"params": net.features.parameters(), "eta": 0.5}, {"params": net.head.parameters(), "sigma": 0.3}]
        nets.append((net, flatops.RWP(groups, SGD, sigma=0.1, seed=0, stream=0, lr=0.05)))
    for i in range(3):
        for net, optimizer in nets:
            optimizer.zero_grad()
            with optimizer.perturbed():
                for k in range(2):
                    batch = part_of(make_batch(i, size=16), k, 2)
                    if net is model:
                        model.set_requires_gradient_sync(k == 1)
                        batch = part_of(batch, rank, world)
                    (loss_of(net, batch) / 2).backward()
            optimizer.step()
    assert_close(wholes(model), list(alone.parameters()), 1e-5)


def test_parameter_groups_and_accumulation():
    run(groups_and_accumulation, 2)


def micro_batches(method: str, how: str) -> None:
    """Two micro-batches per step, whose gradients are reduced according to `how`; as on one process without shards."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = make_net(4, norm=groupnorm)
    model = shard(copy.deepcopy(alone))
    stream = {"stream": 0} if issubclass(METHODS[method][0], flatops.RWP) else {}
    pairs = [(net, make_optimizer(method, net, **stream)) for net in (model, alone)]

    def backward(net, weight, i, k, sync):
        batch = part_of(make_batch(i, size=16), k, 2)
        if net is model:
            model.set_requires_gradient_sync(sync)
            batch = part_of(batch, rank, world)
        (weight * loss_of(net, batch) / 2).backward()

    for i in range(3):
        for net, optimizer in pairs:
            optimizer.zero_grad()
            if how == "passes":  # an ascent per micro-batch needs its gradient; RWP needs none before the step
                for k in range(2):
                    for one_pass in flatops.passes(optimizer, net):
                        with one_pass:
                            backward(net, 1.0, i, k, sync=k == 1 or "sam" in method)
            else:  # each pass over the whole batch, reduced once
                weights = [getattr(optimizer, f"{which}_weight", 1.0) for which in ("clean", "perturbed")]
                for k in range(2):
                    backward(net, weights[0], i, k, sync=k == 1 and "sam" in method)
                with optimizer.perturbed():
                    for k in range(2):
                        backward(net, weights[1], i, k, sync=k == 1)
            optimizer.step()
    assert_close(wholes(model), list(alone.parameters()), 2e-5)


@pytest.mark.parametrize(
    "method, how",
    [
        ("rwp", "passes"),
        ("arwp", "passes"),
        ("sam", "passes"),
        ("ssam dynamic", "passes"),
        ("sam", "whole"),
        ("mrwp", "whole"),
    ],
)
def test_accumulation_reduces_gradients_where_they_are_needed(method, how):
    run(micro_batches, 2, method, how)


def not_reduced(pass_of: str, method: str, hold: str) -> None:
    """Gradients of all or of one module that were not reduced, in either pass: an error, and restored weights."""
    world = dist.get_world_size()
    mesh = (
        init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        if hold == "all-reduce"
        else None
    )
    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if hold == "low precision" else {}
    model = shard(make_net(4, norm=groupnorm), mesh, **policy)
    other = shard(make_net(4, norm=groupnorm))  # may accumulate
    other.set_requires_gradient_sync(False)
    loss_of(other, make_batch(0)).backward()
    optimizer = (
        flatops.RWP(model.parameters(), SGD, lam=0.5, eta=1.0, lr=0.1)
        if method == "marwp"
        else make_optimizer(method, model)
    )

    def backward(sync):
        if hold == "all-reduce":
            model.set_requires_all_reduce(sync)
        else:
            (model.features if hold == "a module" else model).set_requires_gradient_sync(sync)
        loss_of(model, make_batch(0)).backward()

    def two(first, second):
        backward(first)
        with optimizer.perturbed():
            backward(second)

    two(True, True)
    optimizer.step()
    before = all_bits(p._local_tensor for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"ARWP.* needs gradients|SAM needs gradients"):
        two(pass_of != "first", False)
    assert not optimizer.is_perturbed
    assert_same_bits(all_bits(p._local_tensor for p in model.parameters()), before)


@pytest.mark.parametrize("pass_of", ["first", "second"])
@pytest.mark.parametrize(
    "method, hold",
    [("sam", "all"), ("ssam", "a module"), ("sam", "low precision"), ("sam", "all-reduce"), ("marwp", "all")],
    ids=lambda value: value.replace(" ", "_"),
)
def test_gradients_that_are_not_reduced_are_an_error(method, hold, pass_of):
    run(not_reduced, 4 if hold == "all-reduce" else 2, pass_of, method, hold)


def masks_while_accumulating() -> None:
    model = shard(make_net(4, norm=groupnorm))
    ssam = flatops.SSAM(model.parameters(), SGD, lr=0.1)
    model.set_requires_gradient_sync(False)
    loss_of(model, make_batch(0)).backward()
    with pytest.raises(RuntimeError, match="update_mask.* needs gradients"):
        ssam.update_mask(model, F.cross_entropy, [make_batch(1)], samples=2)
    model.set_requires_gradient_sync(True)
    loss_of(model, make_batch(0)).backward()
    kept = [p.grad.full_tensor() for p in model.parameters()]
    alone = make_net(4, norm=groupnorm)
    loss_of(alone, make_batch(0)).backward()
    assert_close(kept, [2 * p.grad for p in alone.parameters()], 1e-5)  # no gradient was lost


def test_no_mask_is_made_before_gradients_are_reduced():
    run(masks_while_accumulating, 2)


def hybrid_sam() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    alone = make_net(4, norm=groupnorm)
    model = shard(copy.deepcopy(alone), mesh)
    optimizer, expected = make_optimizer("sam", model), make_optimizer("sam", alone)
    for i in range(3):
        batch = make_batch(i, size=16)
        for o, m, b in ((optimizer, model, part_of(batch, dist.get_rank(), 4)), (expected, alone, batch)):
            o.zero_grad()
            run_passes(o, m, b, b)
            o.step()
    assert_close(wholes(model), list(alone.parameters()), 1e-5)


def test_sam_under_hsdp_equals_one_process():
    run(hybrid_sam, 4)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusals() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for placement in (Shard(1),):
        p = nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [placement]))
        with pytest.raises(ValueError, match=r"params\[0\] has placements \(Shard\(dim=1\)"):
            flatops.SAM([p], SGD, lr=0.1)
    model = shard(make_net(norm=groupnorm))
    optimizer = make_optimizer("mrwp parallel", model)
    with pytest.raises(ValueError, match="needs two replicas"), optimizer.perturbed():
        pass
    sam = make_optimizer("sam", model)
    with pytest.raises(ValueError, match="fully_shard"), sam.ascent_pass(model):
        pass
    ssam = flatops.SSAM(model.parameters(), SGD, lr=0.1)
    with pytest.raises(ValueError, match="vectorize=True"):
        ssam.update_mask(model, F.cross_entropy, [make_batch(0)], samples=2, vectorize=True)
    skipping = make_optimizer("ssam skipping", model)
    loss_of(model, make_batch(0)).backward()
    with pytest.raises(ValueError, match="skip_masked"), skipping.perturbed():
        pass
    with pytest.raises(RuntimeError, match="processes disagree on batches"):
        ssam.update_mask(model, F.cross_entropy, [make_batch(dist.get_rank())], samples=2)


def test_unsupported_settings_are_refused_by_name():
    run(refusals, 2)


def fsdp1(use_orig_params: bool, after: bool, frozen: bool) -> None:
    """FSDP1 around a model whose weights it flattens, before or after the optimizer is built."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(2)])
    net[0].weight.requires_grad_(not frozen)
    wrap = lambda module: FullyShardedDataParallel(
        module, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    refused = pytest.raises(ValueError, match=r"params\[0\] is flattened by FullyShardedDataParallel.*use fully_shard")
    if not after:
        model = wrap(net)
        for flat in (flatops.RWP, flatops.SAM):
            with refused:
                flat(model.parameters(), SGD, lr=0.1)
        with pytest.raises(ValueError, match="weight is flattened|flat_param is flattened"), flatops.perturb(model):
            pass
        return
    optimizers = [flat(net.parameters(), SGD, lr=0.1) for flat in (flatops.RWP, flatops.SAM)]
    model = wrap(net)
    model(torch.randn(4, 8)).square().mean().backward()
    before = all_bits(model.parameters())
    for optimizer in optimizers:
        with refused, optimizer.perturbed():
            pass
        assert not optimizer.is_perturbed
    assert_same_bits(all_bits(model.parameters()), before)


@pytest.mark.parametrize(
    "use_orig_params, after, frozen",
    [(False, False, False), (True, False, False), (True, True, False), (True, True, True)],
    ids=["flat", "with its parameters", "wrapped later", "wrapped later, partly frozen"],
)
def test_fsdp1_is_refused(use_orig_params, after, frozen):
    run(fsdp1, 2, use_orig_params, after, frozen)


# --- overflow and checkpoints -----------------------------------------------------------------------------------------


def overflow(method: str) -> None:
    model = shard(make_net(norm=groupnorm))
    optimizer, scaler = make_optimizer(method, model), torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(3):
        optimizer.zero_grad()
        before = all_bits(wholes(model))
        bad = torch.inf if i == 1 and dist.get_rank() == 1 else 1.0
        scaler.scale(loss_of(model, make_batch(i)) * bad).backward()
        with optimizer.perturbed():
            scaler.scale(loss_of(model, make_batch(i))).backward()
        scaler.step(optimizer)
        scaler.update()
        after = all_bits(wholes(model))
        assert (i == 1) == all(map(torch.equal, before, after))
        assert scaler.get_scale() == (8.0 if i == 0 else 4.0)


@pytest.mark.parametrize("method", ["sam", "ssam"])
def test_an_overflow_skips_the_step_on_all_shards(method):
    run(overflow, 3, method)


def save_and_resume(method: str, base, folder: str, phase: str) -> None:
    """Trains 3 steps and saves, or loads and continues, or trains all 6 steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    flat, options = METHODS[method]

    def new(seed: int):
        model = shard(make_net(seed, norm=groupnorm))
        return model, flat(model.parameters(), base, lr=0.01, **options)

    def steps(model, optimizer, which):
        for i in which:
            optimizer.zero_grad()
            batch, other = make_batch(i, size=12), make_batch(i + 50, size=12)
            run_passes(optimizer, model, part_of(batch, rank, world), part_of(other, rank, world))
            optimizer.step()

    if phase == "save":
        model, optimizer = new(4)
        steps(model, optimizer, range(3))
        states = get_state_dict(model, optimizer)
        dcp.save(dict(zip(("model", "optimizer"), states)), checkpoint_id=folder)
        local = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, local)
        steps(model, optimizer, range(3, 6))
        if rank == 0:
            full = [t.cpu() for t in wholes(model)]
        else:
            full = wholes(model) and None
        if rank == 0:
            torch.save(full, f"{folder}/end.pt")
        again, resumed = new(9)  # torch.save, with the same shards
        local.seek(0)
        state = torch.load(local, weights_only=False)
        again.load_state_dict(state["model"])
        resumed.load_state_dict(state["optimizer"])
        steps(again, resumed, range(3, 6))
        assert_same_bits(wholes(again), wholes(model))
    else:
        model, optimizer = new(9)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        dcp.load(states, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        steps(model, optimizer, range(3, 6))
        end = torch.load(f"{folder}/end.pt")
        if phase == "same":
            assert_same_bits(wholes(model), end)
        else:
            assert_close(wholes(model), end, 1e-5)


@pytest.mark.parametrize(
    "method, base",
    [("rwp", SGD), ("arwp", ADAMW), ("mrwp", SGD), ("sam", ADAMW), ("ssam", SGD), ("ssam dynamic", ADAMW)],
)
def test_checkpoints_resume_on_any_number_of_shards(method, base, tmp_path):
    run(save_and_resume, 2, method, base, str(tmp_path), "save")
    run(save_and_resume, 2, method, base, str(tmp_path), "same")
    for world in (1, 3):
        run(save_and_resume, world, method, base, str(tmp_path), "other")
