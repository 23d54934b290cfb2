"""flatops.perturb: noise without an optimizer; weights are restored to the bit on every path."""

from __future__ import annotations

import pytest
import torch
from documentation import run_snippets
from models import all_bits, assert_same_bits, bits, loss_of, make_batch, make_net
from test_distributed import groupnorm
from test_fsdp import shard, wholes
from test_optim_restore import LAYOUTS, knows_the_opcodes, moments_that_go_wrong, some_params
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard
from torch.testing._internal.two_tensor import TwoTensor
from workers import run

import flatops
from flatops.perturb import RESTORE

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = ("exact", "offload")
SGD = torch.optim.SGD


# --- the noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", RESTORE)
def test_the_noise_equals_that_of_rwp(restore):
    """For the same list, sigma, seed, draw and stream, to the bit; frozen parameters get noise too."""
    model, twin = make_net(), make_net()
    optimizer = flatops.RWP(twin.parameters(), SGD, sigma=0.05, seed=7, stream=2, lr=0.1)
    model.requires_grad_(False)
    for draw in range(3):
        with flatops.perturb(model, 0.05, seed=7, draw=draw, stream=2, restore=restore), optimizer.perturbed():
            if restore != "regenerate" or draw == 0:
                assert_same_bits(model.parameters(), twin.parameters())
            else:
                torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


def test_draws_seeds_and_streams_differ():
    model = make_net()
    seen = []
    for noise in ({}, {"draw": 1}, {"seed": 1}, {"stream": 1}, {"draw": torch.tensor(1)}):
        with flatops.perturb(model, 0.1, **noise):
            seen.append(bits(model.head.weight))
    assert torch.equal(seen[1], seen[4])
    assert len({tuple(t.flatten().tolist()) for t in seen}) == 4


def test_a_choice_of_weights():
    """Weights that are not named stay unchanged; buffers always do. One tensor counts as a list of one."""
    model = make_net()
    before, buffers = (all_bits(model.parameters()), all_bits(b for b in model.buffers() if b.is_floating_point()))
    chosen = [p for name, p in model.named_parameters() if name.startswith("head")]
    with flatops.perturb((p for p in chosen), 0.1):
        now = all_bits(model.parameters())
        assert_same_bits(now[:-2], before[:-2])
        assert not any(torch.equal(a, b) for a, b in zip(now[-2:], before[-2:]))
    with flatops.perturb(model.head.weight, 0.1):
        assert_same_bits([model.head.weight], [now[-2].view(torch.float32).view_as(model.head.weight)])
    with flatops.perturb(model):
        assert_same_bits(all_bits(b for b in model.buffers() if b.is_floating_point()), buffers)
    assert_same_bits(all_bits(model.parameters()), before)


def test_no_noise():
    model = make_net()
    with flatops.perturb(model, 0.0):
        assert_same_bits(model.parameters(), make_net().parameters())


# --- the way back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("restore", EXACT)
def test_weights_are_restored_to_the_bit(restore, dtype, layout):
    torch.manual_seed(0)
    w = LAYOUTS[layout](torch.randn).to(dtype)
    before = bits(w)
    with flatops.perturb([w], 0.5, restore=restore):
        assert w.numel() == 0 or not torch.equal(bits(w), before)
    assert torch.equal(bits(w), before)


def test_regenerating_drifts_by_rounding():
    params = some_params()
    before = [p.detach().clone() for p in params]
    for draw in range(100):
        with flatops.perturb(params, 0.1, draw=draw, restore="regenerate"):
            pass
    for p, b in zip(params, before):
        assert (p - b).norm() < 1e-6 * b.norm()


@pytest.mark.parametrize("restore", EXACT)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("inside", [False, True])
def test_under_every_grad_mode(mode, inside, restore):
    model = make_net()
    before = all_bits(model.parameters())
    noise = flatops.perturb(model, 0.1, restore=restore)
    first, second = (noise, mode()) if inside else (mode(), noise)
    with first, second:
        assert not torch.equal(bits(model.head.weight), before[-2])
    assert_same_bits(all_bits(model.parameters()), before)


@pytest.mark.parametrize("restore", EXACT)
def test_nested_and_together_with_an_optimizer(restore):
    model = make_net()
    optimizer = flatops.RWP(model.parameters(), SGD, sigma=0.1, lr=0.1)
    before = all_bits(model.parameters())
    with flatops.perturb(model, 0.1, restore=restore), optimizer.perturbed():
        with flatops.perturb(model, 0.1, draw=1, restore=restore):
            pass
        inside = all_bits(model.parameters())
        with flatops.perturb(model, 0.1, draw=2, restore=restore):
            assert not torch.equal(bits(model.head.weight), inside[-2])
        assert_same_bits(all_bits(model.parameters()), inside)
    assert_same_bits(all_bits(model.parameters()), before)


@pytest.mark.parametrize("restore", EXACT)
def test_shared_memory_is_refused(restore):
    """A weight perturbed twice could be lost. A tied parameter of a module counts once."""
    base = torch.randn(4, 6)
    before = bits(base)
    with pytest.raises(ValueError, match="share memory"), flatops.perturb([base, base[1]], 0.3, restore=restore):
        pytest.fail("it was entered")
    assert torch.equal(bits(base), before)
    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    tied[1].weight = tied[0].weight
    before = all_bits(tied.parameters())
    with flatops.perturb(tied, 0.3, restore=restore):
        pass
    assert_same_bits(all_bits(tied.parameters()), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_propagates(error):
    model = make_net()
    before = all_bits(model.parameters())
    with pytest.raises(error), flatops.perturb(model, 0.1):
        raise error
    assert_same_bits(all_bits(model.parameters()), before)


@knows_the_opcodes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("restore", RESTORE)
def test_an_interrupt_at_any_moment_restores_the_weights(restore):
    """Ctrl-C wherever CPython handles it: weights are restored before any handler runs."""

    class Noisy:
        def __init__(self, params):
            self.noise = flatops.perturb(params, 0.1, restore=restore)

        def perturbed(self):
            return self.noise

        @property
        def in_pass(self):
            return self.noise.owner.in_pass

    wrong = moments_that_go_wrong(Noisy, KeyboardInterrupt, exact=restore != "regenerate")
    assert not wrong, f"{len(wrong)} places: " + ", ".join(wrong)


def test_a_backward_across_the_edge_of_a_pass_is_an_error():
    model = make_net()
    with flatops.perturb(model, 0.1):
        loss = loss_of(model, make_batch(0))
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_autocast_sees_the_noise():
    """Its cache of cast weights does not outlive the perturbation, at entry and exit."""
    torch.manual_seed(0)
    model, x = nn.Linear(16, 1), torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        clean = model(x)
        with flatops.perturb(model, 0.5):
            noisy = model(x)
        after = model(x)
    assert torch.equal(clean, after) and not torch.equal(clean, noisy)


# --- use ---------------------------------------------------------------------------------------------


def adapted(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen layer with a low-rank adapter."""
    torch.manual_seed(seed)

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(16, 8, dtype=dtype).requires_grad_(False)
            self.down, self.up = (nn.Linear(16, 2, bias=False, dtype=dtype), nn.Linear(2, 8, bias=False, dtype=dtype))

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    return Adapted()


@pytest.mark.parametrize("restore", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_train_on_a_noisy_frozen_base(restore, dtype):
    """As in Flat-LoRA: the adapters' gradients are those at the perturbed base, which no optimizer has."""
    model, twin = adapted(dtype=dtype), adapted(dtype=dtype)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    clean = all_bits(frozen)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (model, twin)]
    for step in range(4):
        x = torch.randn(4, 16, dtype=dtype)
        with flatops.perturb(frozen, 0.1, draw=step, restore=restore):
            model(x).square().mean().backward()
        assert_same_bits(all_bits(frozen), clean)
        weights = [p.clone() for p in twin.base.parameters()]
        flatops.ops.perturb_(list(twin.base.parameters()), 0.1, seed=0, draw=step)
        twin(x).square().mean().backward()
        for p, w in zip(twin.base.parameters(), weights):
            p.data = w
        for o in optimizers:
            assert len(o.state) in (0, 2)  # of the adapters only
            o.step()
            o.zero_grad()
    assert_same_bits(model.parameters(), twin.parameters())


# --- shards --------------------------------------------------------------------------------------------


def on_shards(restore: str) -> None:
    model, alone = shard(make_net(norm=groupnorm)), make_net(norm=groupnorm)
    params = list(model.parameters())
    before = all_bits(p._local_tensor for p in params)
    batch = make_batch(0)
    for draw in range(2):
        with flatops.perturb(model, 0.1, draw=draw, restore=restore), flatops.perturb(alone, 0.1, draw=draw):
            assert_same_bits(wholes(model), alone.parameters())
            with torch.no_grad():
                assert torch.equal(loss_of(model, batch), loss_of(alone, batch))
        assert_same_bits(all_bits(p._local_tensor for p in params), before)
        with torch.no_grad():  # leaves gathered weights behind
            assert torch.equal(loss_of(model, batch), loss_of(alone, batch))
    columns = DTensor.from_local(torch.ones(4, 4), params[0].device_mesh, [Shard(1)], run_check=False)
    with pytest.raises(ValueError, match="placements"):
        flatops.perturb(columns)


@pytest.mark.parametrize("restore", EXACT)
def test_shards_have_the_noise_of_the_whole(restore):
    run(on_shards, 2, restore)


# --- errors and documentation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, name",
    [
        (([],), ValueError, "weights"),
        (([1.0],), TypeError, r"weights\[0\]"),
        (([torch.ones(3, dtype=torch.int8)],), TypeError, r"weights\[0\]"),
        (([torch.ones(3)], -1.0), ValueError, "sigma"),
        (([torch.ones(3)], float("nan")), ValueError, "sigma"),
        (([torch.ones(3)], 0.1, {"restore": "none"}), ValueError, "restore"),
        (([torch.ones(3, dtype=torch.bfloat16)], 0.1, {"restore": "regenerate"}), TypeError, "regenerate"),
        (([torch.ones(3)], 0.1, {"seed": -1}), ValueError, "seed"),
        (([torch.ones(3)], 0.1, {"draw": 0.5}), TypeError, "draw"),
        (([torch.ones(3)], 0.1, {"stream": -1}), ValueError, "stream"),
    ],
)
def test_errors_name_the_argument_and_change_nothing(arguments, error, name):
    *arguments, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=name), flatops.perturb(*arguments, **options):
        pytest.fail("it was entered")
    assert all(torch.equal(w, torch.ones_like(w)) for w in arguments[0] if torch.is_tensor(w))


class Packed(nn.Parameter):
    """As in bitsandbytes: codes of four bits, with any dtype."""

    quant_state = "nf4"


def test_unsupported_weights_are_refused():
    """Quantised codes, their wrappers, and weights offloaded by accelerate, which a hook would load without noise."""
    packed = torch.randn(4, 4).bfloat16()
    before = packed.clone()
    with pytest.raises(TypeError, match=r"weights\[0\] is quantised or wrapped \(Packed\)"):
        flatops.perturb([Packed(packed)])
    assert torch.equal(packed, before)
    with pytest.raises(TypeError, match="TwoTensor"):
        flatops.perturb([TwoTensor(torch.ones(2), torch.ones(2))])
    with pytest.raises(ValueError, match="weight is on the meta device"):
        flatops.perturb(nn.Linear(3, 3, device="meta"))


def test_a_pass_is_entered_once():
    w = torch.ones(3)
    noise = flatops.perturb([w])
    with noise:
        assert not torch.equal(w, torch.ones(3))
    with pytest.raises(RuntimeError, match="entered once"), noise:
        pass
    assert torch.equal(w, torch.ones(3))


def test_inference_tensors_are_refused():
    with torch.inference_mode():
        model = make_net()
    with pytest.raises(ValueError, match="inference_mode"):
        flatops.perturb(model, 0.1)


def test_modules_are_named_in_errors():
    model = make_net()
    model.head.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="head.weight is torch.uint8"):
        flatops.perturb(model, 0.1)


def test_the_snippets_of_the_documentation_run():
    run_snippets("perturb.md", 3)


# --- positions, caches ---------------------------------------------------------------------------------


def test_a_position_distinguishes_layers():
    """With numbered layers, one call per layer draws the noise of one call over all."""
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    together, apart = [a.clone(), b.clone()], [a.clone(), b.clone()]
    with (
        flatops.perturb(together, 0.1, seed=1),
        flatops.perturb(apart[:1], 0.1, seed=1),
        flatops.perturb(apart[1:], 0.1, seed=1, position=1),
    ):
        assert_same_bits(together, apart)
    for bad in (-1, 2**31, 0.5, "1", None):
        with pytest.raises(ValueError, match="position must be an integer"):
            flatops.perturb([a], position=bad)


def test_noise_is_seen_through_cached_parametrizations():
    """parametrize.cached() keeps computed weights: old ones are dropped on entry and exit."""
    from torch.nn.utils import parametrize

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Double())
    with torch.no_grad(), parametrize.cached():
        clean = layer.weight.clone()
        with flatops.perturb(layer, 0.1):
            assert not torch.equal(layer.weight, clean)
        assert torch.equal(layer.weight, clean)
