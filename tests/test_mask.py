"""Masks: exactly k bits, as a stable sort would choose; packing and counting; the masked ascent, its backup."""

import math

import pytest
import torch
from cases import BACKENDS, CONFORMING, DTYPES, ORACLE, assert_same_bits, make, twin
from hypothesis import given, settings
from hypothesis import strategies as st

from flatops import ops


def sorted_mask(scores: list[torch.Tensor], k: int) -> list[torch.Tensor]:
    """The definition: a stable sort of all scores concatenated."""
    row = torch.cat([s.flatten().double() for s in scores])
    live = torch.zeros_like(row, dtype=torch.bool)
    live[row.argsort(descending=True, stable=True)[:k]] = True
    return [l.view(s.shape) for l, s in zip(live.split([s.numel() for s in scores]), scores)]


SCORES = {
    "any": lambda shape, g: torch.rand(shape, generator=g),
    "few values": lambda shape, g: torch.randint(0, 4, shape, generator=g).float(),
    "mostly zero": lambda shape, g: (torch.rand(shape, generator=g) - 0.8).relu(),
    "equal": lambda shape, g: torch.full(shape, 0.3),
    "subnormal": lambda shape, g: torch.rand(shape, generator=g) * 1e-40,
    "wide": lambda shape, g: torch.exp(20 * torch.randn(shape, generator=g)),
    "infinite": lambda shape, g: torch.where(torch.rand(shape, generator=g) < 0.3, math.inf, 1.0),
    "zeros of both signs": lambda shape, g: torch.where(torch.rand(shape, generator=g) < 0.5, 0.0, -0.0),
}


@pytest.mark.parametrize("on", BACKENDS, ids=str)
def test_a_mask_equals_a_stable_sort(on):
    """A thousand random lists: shapes, kinds of scores, dtypes, k."""

    @settings(max_examples=12 if on.slow else 1000, deadline=None)
    @given(
        shapes=st.lists(st.lists(st.integers(0, 60), max_size=2).map(tuple), min_size=1, max_size=5),
        kinds=st.lists(st.sampled_from(sorted(SCORES)), min_size=5, max_size=5),
        dtype=st.sampled_from(DTYPES),
        share=st.floats(0, 1),
        seed=st.integers(0, 2**31),
    )
    def check(shapes, kinds, dtype, share, seed):
        generator = torch.Generator().manual_seed(seed)
        scores = [SCORES[kind](shape, generator).to(dtype) for shape, kind in zip(shapes, kinds)]
        k = round(share * sum(s.numel() for s in scores))
        there = [s.to(on.device) for s in scores]
        mask = ops.topk_mask(there, k, backend=on.name)
        assert ops.count_mask(mask, there) == k
        assert_same_bits([l.cpu() for l in ops.unpack_mask(mask, there)], sorted_mask(scores, k))

    check()


LARGE = [b for b in CONFORMING if not b.slow]


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("on", LARGE, ids=str)
def test_a_large_mask_equals_a_stable_sort(on, kind):
    """Large enough for a sample to bracket the threshold, which falls among ties, next to them and between them."""
    generator = torch.Generator().manual_seed(1)
    scores = [SCORES[kind]((300, 701), generator), SCORES["any"]((5,), generator), SCORES[kind]((90001,), generator)]
    scores[0][:, :100] = torch.rand(300, 100, generator=generator)  # other scores, for the sample to hit or miss
    there = [s.to(on.device) for s in scores]
    row = torch.cat([s.flatten() for s in scores])
    elements = row.numel()
    edges = [int((row > v).sum()) + d for v in row[::60000].tolist() for d in (-1, 0, 1)]
    with on.forced():
        for k in {0, 1, elements // 20, elements // 2, elements - 1, elements, *edges}:
            if not 0 <= k <= elements:
                continue
            mask = ops.topk_mask(there, k)
            assert ops.count_mask(mask, there) == k
            assert_same_bits([l.cpu() for l in ops.unpack_mask(mask, there)], sorted_mask(scores, k))


def test_a_pattern_with_the_period_of_the_sample():
    """All sampled positions hold a one, and all others a value that the sample never saw."""
    scores = torch.rand(32768 * 16)
    scores.view(-1, 16)[:, 8] = 1.0
    for k in (1, 1000, 32768, 32769, 100_000, 32768 * 8):
        live = ops.unpack_mask(ops.topk_mask([scores], k, backend="cpp"), [scores])
        assert_same_bits(live, sorted_mask([scores], k))


def test_packing_undoes_unpacking(backend):
    like = [torch.empty(5, 7, device=backend.device), torch.empty(3, 4, 2, 2, device=backend.device)]
    like[1] = like[1].contiguous(memory_format=torch.channels_last)
    mask = ops.topk_mask([torch.rand_like(t) for t in like], 40)
    live = ops.unpack_mask(mask, like)
    assert [l.shape for l in live] == [t.shape for t in like] and sum(int(l.sum()) for l in live) == 40
    assert torch.equal(ops.pack_mask(live), mask)


def test_bits_lie_in_storage_order():
    """The j-th bit of a channels_last tensor is its j-th element in memory."""
    scores = torch.zeros(1, 2, 2, 2).contiguous(memory_format=torch.channels_last)
    scores[0, 1, 0, 0] = 1.0  # second in memory, fifth in the tensor
    assert int(ops.topk_mask([scores], 1)[0]) == 0b10
    assert torch.equal(ops.unpack_mask(ops.topk_mask([scores], 1), [scores])[0], scores.bool())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_selected_weights_change_and_all_are_restored(dtype, backend):
    """All others keep their bits, whatever they are; the backup has a slot for each selected weight."""
    generator = torch.Generator().manual_seed(5)
    params = [make(shape, dtype, "contiguous", generator).to(backend.device) for shape in ((9, 130), (1500,), (3,))]
    params[0].view(-1)[7] = math.nan
    before = [twin(p) for p in params]
    grads = [torch.ones_like(p) for p in params]
    mask = ops.topk_mask([torch.rand(p.shape, generator=generator).to(backend.device) for p in params], 700)
    backup = ops.new_backup(params, mask)
    assert [b.shape for b in backup] == [(700,)]
    norm = ops.grad_norm(grads)
    ops.ascend_(params, grads, 1.0, norm=norm, mask=mask, backup=backup)
    for p, b, live in zip(params, before, ops.unpack_mask(mask, params)):
        assert_same_bits(p[~live], b[~live])
        assert torch.isnan(b[live]).any() or not torch.equal(p[live], b[live]) or not live.any()
    ops.restore_(params, backup=backup, mask=mask)
    assert_same_bits(params, before)


def test_several_dtypes_share_a_backup(backend):
    """A slot has the size of the widest dtype."""
    params = [torch.randn(40, 50, device=backend.device).to(d) for d in DTYPES]
    before = [twin(p) for p in params]
    mask = ops.topk_mask([torch.rand(40, 50, device=backend.device) for _ in params], 5000)
    backup = ops.new_backup(params, mask)
    assert backup[0].dtype == torch.float64
    ops.ascend_(params, params, 0.5, norm=ops.grad_norm(params), mask=mask, backup=backup)
    assert not torch.equal(params[0], before[0])
    ops.restore_(params, backup=backup, mask=mask)
    assert_same_bits(params, before)


@pytest.mark.parametrize("drop, grow", [(True, True), (True, False), (False, True), (False, False)])
def test_regrowing_equals_sorting(drop, grow, backend):
    """The lowest selected weights are dropped, the highest others grow, and their number stays the same."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(30, 41, generator=generator), torch.randn(77, generator=generator)]
    grads = [torch.randn(p.shape, generator=generator) for p in params]
    there = [[t.to(backend.device) for t in ts] for ts in (params, grads)]
    mask = ops.topk_mask([p.abs() for p in there[0]], 600)
    before = torch.cat([l.flatten() for l in ops.unpack_mask(mask, there[0])]).cpu()
    how = {"drop": there[1] if drop else None, "grow": there[0] if grow else None, "seed": 4, "draw": 9}
    ops.regrow_mask_(mask, there[0], 50, **how)
    after = torch.cat([l.flatten() for l in ops.unpack_mask(mask, there[0])]).cpu()
    assert int(after.sum()) == 600 == ops.count_mask(mask, there[0])
    dropped, grown = before & ~after, after & ~before
    assert int(dropped.sum()) == int(grown.sum()) == 50
    if drop:
        g = torch.cat([g.flatten().abs() for g in grads])
        assert g[dropped].max() < g[before & after].min()
    if grow:
        w = torch.cat([p.flatten().abs() for p in params])
        assert w[grown].min() > w[~before & ~after].max()


def test_regrowing_is_limited_by_the_unselected_weights(backend):
    params = [torch.randn(100, device=backend.device)]
    mask = ops.topk_mask([p.abs() for p in params], 97)
    live = ops.unpack_mask(mask, params)[0]
    ops.regrow_mask_(mask, params, 50, drop=params, seed=0, draw=0)
    after = ops.unpack_mask(mask, params)[0]
    assert int(after.sum()) == 97 and bool(after[~live].all())  # all three unselected ones have grown


def test_infinite_scores_are_dropped_last(backend):
    """If fewer finite scores are selected than are to be dropped, infinite ones are dropped too, in order."""
    params = [torch.ones(64, device=backend.device)]
    drop = [torch.full((64,), math.inf, device=backend.device)]
    drop[0][40] = 1.0
    mask = ops.pack_mask([torch.arange(64, device=backend.device) >= 32])
    ops.regrow_mask_(mask, params, 3, drop=drop, grow=params, seed=0, draw=0)
    live = ops.unpack_mask(mask, params)[0].cpu()
    assert live.nonzero()[:, 0].tolist() == [0, 1, 2, *(i for i in range(34, 64) if i != 40)]


def test_random_growth_is_uniform_and_new_each_time():
    params = [torch.zeros(400, 500)]
    start = ops.pack_mask([torch.arange(200_000).view(400, 500) < 100_000])
    seen = []
    for draw in (0, 1):
        mask = start.clone()
        ops.regrow_mask_(mask, params, 20_000, seed=1, draw=draw)
        seen.append(ops.unpack_mask(mask, params)[0].flatten())
        for half, share in ((seen[-1][:100_000], 0.8), (seen[-1][100_000:], 0.2)):
            counts = half.view(10, -1).float().mean(1)
            assert (counts - share).abs().max() < 5 * math.sqrt(0.16 / 10_000)
    assert not torch.equal(*seen)


def test_weights_without_a_slot_do_not_change(backend):
    """A mask of more weights than the backup has slots: an error where that costs no host sync, else no change."""
    params = [torch.randn(4000, device=backend.device)]
    few, many = (ops.topk_mask([p.abs() for p in params], k) for k in (100, 3000))
    backup, before = ops.new_backup(params, few), [twin(p) for p in params]
    if backend.device == "cpu":
        with pytest.raises(ValueError, match="room for 100 weights and the mask selects 3000"):
            ops.ascend_(params, params, 0.1, norm=ops.grad_norm(params), mask=many, backup=backup)
    else:
        ops.ascend_(params, params, 0.1, norm=ops.grad_norm(params), mask=many, backup=backup)
        ops.restore_(params, backup=backup, mask=many)
    assert_same_bits(params, before)


S = [torch.rand(3, 4), torch.rand(5)]
P = [torch.randn(3, 4), torch.randn(5)]
M = ops.topk_mask(S, 8)
BAD = [
    (lambda: ops.topk_mask(S, -1), ValueError, r"k must be an integer in \[0, 17\]"),
    (lambda: ops.topk_mask(S, 18), ValueError, r"k must be an integer in \[0, 17\]"),
    (lambda: ops.topk_mask(S, 2.0), ValueError, "k must be"),
    (lambda: ops.topk_mask([], 0), ValueError, "scores"),
    (lambda: ops.topk_mask([S[0], S[1].double()], 3), TypeError, "float64"),
    (lambda: ops.topk_mask([S[0], torch.tensor([1.0, math.nan])], 3), ValueError, r"scores\[1\] holds a NaN"),
    (lambda: ops.topk_mask([S[0], torch.tensor([1.0, -1.0])], 3), ValueError, r"scores\[1\] holds"),
    (lambda: ops.topk_mask([s.int() for s in S], 3), TypeError, r"scores\[0\]"),
    (lambda: ops.unpack_mask(M, S[:1]), ValueError, "another|made for"),
    (lambda: ops.unpack_mask(M.long(), S), ValueError, "int32"),
    (lambda: ops.pack_mask(S), TypeError, "boolean"),
    (lambda: ops.ascend_(P, P, 0.1, norm=torch.ones(()), mask=M[:-1]), ValueError, "mask must be contiguous int32"),
    (lambda: ops.ascend_(P, P, 0.1, norm=torch.ones(()), mask=M, backup=ops.new_backup(P)), ValueError, "new_backup"),
    (lambda: ops.ascend_(P, P, 0.1, norm=torch.ones(()), backup=ops.new_backup(P, M)), ValueError, "backup"),
    (lambda: ops.restore_(P, mask=M, scales=torch.ones(4), seed=0, draw=0), ValueError, "never masked"),
    (lambda: ops.regrow_mask_(M, P, -1, seed=0, draw=0), ValueError, "count"),
    (lambda: ops.regrow_mask_(M, P, 1, drop=S[:1], seed=0, draw=0), ValueError, "drop"),
    (lambda: ops.regrow_mask_(M, P[:1], 1, seed=0, draw=0), ValueError, "mask"),
    (lambda: ops.regrow_mask_(M, P, 1, seed=0, draw=0, index=[1]), ValueError, "index"),
    (
        lambda: ops.regrow_mask_(M, P, 1, drop=[p * math.nan for p in P], seed=0, draw=0),
        ValueError,
        r"drop or grow\[0\]",
    ),
    (lambda: ops.fisher_([torch.zeros(3, 4)], P), ValueError, "fisher has 1"),
    (lambda: ops.fisher_([torch.zeros(3, 4), torch.zeros(5).double()], P), ValueError, r"fisher\[1\]"),
]


@pytest.mark.parametrize("call, error, match", BAD, ids=range(len(BAD)))
def test_bad_input(call, error, match):
    """One clear error that names the argument, before anything changes."""
    params, mask = [twin(p) for p in P], M.clone()
    with pytest.raises(error, match=match):
        call()
    assert_same_bits([*P, M], [*params, mask])


def test_the_oracle_is_among_the_backends():
    assert ORACLE in BACKENDS
