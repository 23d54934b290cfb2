"""The noise contract: known answers, equal bits, and the statistics of a standard normal."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from cases import CONFORMING, DTYPES, LAYOUTS, Case, assert_same_bits, fisher_of, twin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flatops
from flatops import ops, reference

# From Random123: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    low, high = words(key)
    out = reference.philox(tuple(torch.tensor([c]) for c in words(counter)), torch.tensor(signed(high << 32 | low)))
    assert [int(x) for x in out] == words(expected)


def test_normals_come_from_the_known_words(backend):
    """The first four normals of counter 0, key 0 are Box-Muller of the known words."""
    z = flatops.ops.normal((4,), seed=0, draw=0, device=backend.device)
    x = [torch.tensor([w]) for w in words(KNOWN_ANSWERS[0][2])]
    assert_same_bits(z, torch.cat([*reference.box_muller(x[0], x[1]), *reference.box_muller(x[2], x[3])]))


@pytest.mark.parametrize("on", CONFORMING, ids=str)
def test_bits_equal_the_reference(on):
    """For any shape and any position in the noise."""

    @settings(max_examples=8 if on.slow else 40, deadline=None)
    @given(
        shape=st.lists(st.integers(0, 12 if on.slow else 40), min_size=0, max_size=3).map(tuple)
        | st.tuples(st.integers(1, 3), st.integers(1, 5000)),
        seed=st.integers(0, 2**64 - 1),
        draw=st.integers(0, 2**32 - 1),
        tensor=st.integers(0, 2**31 - 1),
        stream=st.integers(0, 2**31 - 1),
    )
    def check(shape, **where):
        ours = flatops.ops.normal(shape, **where, device=on.device)
        assert_same_bits(ours, flatops.ops.normal(shape, **where, backend="reference"))

    with on.forced():
        check()


@pytest.mark.parametrize("on", [b for b in CONFORMING if b.name == "cpp"], ids=str)
def test_bits_do_not_depend_on_level_or_threads(on, threads):
    shape = (301, 1031)
    expected = flatops.ops.normal(shape, seed=3, draw=9, tensor=4, backend="reference")
    with on.forced():
        assert_same_bits(flatops.ops.normal(shape, seed=3, draw=9, tensor=4), expected)


def cut(params: list[Tensor], generator: torch.Generator) -> list[tuple[int, int, int]]:
    """Shards of consecutive rows, some of them empty: the parameter, its first row and the row after its last."""
    shards = []
    for i, p in enumerate(params):
        rows = p.shape[0] if p.dim() > 1 else 0
        ends = torch.randint(0, rows + 1, (3 if rows else 0,), generator=generator).sort().values.tolist()
        shards += [(i, a, b) for a, b in itertools.pairwise([0, *ends, rows])]
    return shards


def test_a_shard_of_rows_draws_the_noise_of_the_whole(backend):
    """However parameters are cut into rows, even if cut differently before the noise is drawn again."""

    @settings(max_examples=2 if backend.slow else 6, deadline=None)
    @given(st.integers(0, 2**31), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.sampled_from([0.0, 0.7]))
    def check(seed, dtype, layout, eta):
        generator = torch.Generator().manual_seed(seed)
        case = Case("shards", dtype, layout)
        params = [twin(t, backend.device) for t in case.tensors(seed)]
        expected = [twin(p) for p in params]
        fisher = [f.to(backend.device) for f in fisher_of(params)] if eta else None
        how = {"seed": seed, "draw": 5, "stream": 3, "eta": eta}

        def of_shards(shards, tensors):
            return [tensors[i][a:b] if params[i].dim() > 1 else tensors[i] for i, a, b in shards]

        def where(shards):
            index, first_row, _ = zip(*shards)
            return {**how, "fisher": fisher and of_shards(shards, fisher), "index": index, "first_row": first_row}

        shards = cut(params, generator)
        scales = ops.perturb_(expected, 0.03, **how, fisher=fisher)
        theirs = ops.perturb_(of_shards(shards, params), 0.03, **where(shards))
        assert_same_bits([theirs, *params], [scales, *expected])
        if dtype in (torch.float32, torch.float64):
            shards = cut(params, generator)
            ops.restore_(expected, scales=scales, **how, fisher=fisher)
            ops.restore_(of_shards(shards, params), scales=scales, **where(shards))
            assert_same_bits(params, expected)

    check()


def test_the_angle_and_radius_of_box_muller_are_accurate():
    """Against float64 starting from the float32 u, over a million random words and the ends of their range."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, 1, 2, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1])
    x0 = torch.cat([torch.randint(0, 2**32, (1_000_000,), generator=generator), ends.repeat(8)])
    x1 = torch.cat([torch.randint(0, 2**32, (1_000_000,), generator=generator), ends.repeat_interleave(8)])
    z0, z1 = reference.box_muller(x0, x1)
    u = ((x0 >> 1) | 1).float().double() * 2.0**-31
    r = torch.sqrt(-2 * torch.log(u))
    phi = x1.to(torch.int32).double() * (math.pi / 4) * 2.0**-31
    a, b = torch.cos(phi), torch.sin(phi)
    odd = x1 & 1 == 1
    r = torch.where(x1 & 2 == 2, -r, r)
    e0, e1 = torch.where(odd, b, a) * r, torch.where(odd, a, b) * r
    error = torch.maximum((z0.double() - e0).abs(), (z1.double() - e1).abs())
    assert error.max() < 1.5e-6
    assert max(z0.abs().max(), z1.abs().max()) <= 6.5601


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return flatops.ops.normal((512, 8192), seed=20261121, draw=5).double().numpy()


def test_moments(sample):
    """Mean, variance, skewness and excess kurtosis within five standard errors."""
    z, n = sample.ravel(), sample.size
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_kolmogorov_smirnov(sample):
    assert scipy.stats.kstest(sample.ravel(), "norm").pvalue > 1e-4


def test_tails_to_five_sigma(sample):
    """Counts beyond 1 to 5 sigma, each side, against the binomial."""
    z, n = sample.ravel(), sample.size
    for sigma in (1, 2, 3, 4, 4.5, 5):
        p = scipy.stats.norm.sf(sigma)
        for count in ((z > sigma).sum(), (z < -sigma).sum()):
            assert scipy.stats.binomtest(int(count), n, p).pvalue > 1e-5, sigma


def test_nothing_is_correlated(sample):
    """Neighbours at several distances, filters, tensors, draws, seeds, streams; also of squares (the shared radius)."""
    here = {"seed": 20261121, "draw": 5}
    base = sample.ravel()
    others = {
        **{f"offset + {d}": (base[:-d], base[d:]) for d in (1, 2, 3, 4, 5, 8, 64, 1024)},
        "filter": (sample[:-1].ravel(), sample[1:].ravel()),
        "tensor": (base, flatops.ops.normal(sample.shape, **here, tensor=1).numpy().ravel()),
        "draw": (base, flatops.ops.normal(sample.shape, seed=here["seed"], draw=6).numpy().ravel()),
        "seed": (base, flatops.ops.normal(sample.shape, seed=here["seed"] + 1, draw=5).numpy().ravel()),
        "seed, high": (base, flatops.ops.normal(sample.shape, seed=here["seed"] + 2**33, draw=5).numpy().ravel()),
        "stream": (base, flatops.ops.normal(sample.shape, **here, stream=1).numpy().ravel()),
    }
    for name, (x, y) in others.items():
        bound = 5 / math.sqrt(len(x))
        assert abs(np.mean(x * y)) < bound, name
        assert abs(np.mean((x**2 - 1) * (y**2 - 1)) / 2) < bound, name


def test_both_normals_of_a_pair_fill_the_circle():
    """The angle of (z0, z1) is uniform: every sixteenth of the circle gets its share."""
    z = flatops.ops.normal((1_000_000,), seed=7, draw=0).view(-1, 2).double()
    angle = torch.atan2(z[:, 1], z[:, 0])
    counts = torch.histc(angle, bins=16, min=-math.pi, max=math.pi)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-4
