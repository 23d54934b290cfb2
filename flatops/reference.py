"""The definition of every operator in plain PyTorch, short and slow; tests hold the other backends to the same bits.

Float32 square roots (not correctly rounded by PyTorch on a CPU) and fused multiply-adds (absent) go through float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flatops.schemas import filters, mask_size, mask_words, operator

REDUCE, LANES = 1024, 128  # csrc/tensor_list.h


# --- filters ----------------------------------------------------------------------------------------------------------


def _by_filter(t: Tensor, like: Tensor | None = None) -> Tensor:
    """A view of `t` with dim 0 first and the others in `like`'s storage order."""
    like = t if like is None else like
    return t.permute(sorted(range(t.dim()), key=lambda d: (d > 0, -like.stride(d) if d else 0)))


def rows(t: Tensor, like: Tensor | None = None) -> Tensor:
    """The filters of `t` in storage order, [filters, length]. A tensor with at most one dimension is one filter."""
    if t.numel() == 0:
        return t.new_empty(0, 0)
    return _by_filter(t, like).reshape(filters(t), -1)


def _write(t: Tensor, new_rows: Tensor) -> None:
    view = _by_filter(t)
    view.copy_(new_rows.reshape(view.shape))


# --- arithmetic that rounds once --------------------------------------------------------------------------------------


def fma(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a b + c for float32 values, rounded once.

    The float64 product is exact. The float64 sum is rounded to odd, which keeps what the second rounding, to float32,
    needs (Boldo and Melquiond, 2008).
    """
    p = torch.as_tensor(a, dtype=torch.float32).double() * torch.as_tensor(b, dtype=torch.float32).double()
    d = torch.as_tensor(c, dtype=torch.float32).double()
    s = p + d
    dp = s - d
    error = (p - dp) + (d - (s - dp))
    bits = s.view(torch.int64)
    inexact = (error != 0) & (bits & 1 == 0) & s.isfinite()
    step = torch.where((error > 0) == (s > 0), 1, -1)
    return (bits + torch.where(inexact, step, 0)).view(torch.float64).float()


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded float32 square root."""
    return x.double().sqrt().float()


def _fold(lanes: Tensor) -> Tensor:
    half = lanes.shape[-1] // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]


def _by_lanes(x: Tensor) -> Tensor:
    """[..., n] as [..., sums, steps, LANES], with REDUCE elements per sum, padded with zeros."""
    x = F.pad(x, (0, -x.shape[-1] % (REDUCE if x.shape[-1] > REDUCE else LANES)))
    return x.unflatten(-1, (-1, min(x.shape[-1], REDUCE) // LANES, LANES))


def total(x: Tensor) -> Tensor:
    """The float64 sum over the last dimension, in the order that every backend follows.

    REDUCE elements at a time: element i is added to lane i mod LANES, in order, and the lanes are folded by halves.
    This is repeated over the sums until one is left.
    """
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    while x.shape[-1] > 1:
        steps = _by_lanes(x).unbind(-2)
        x = _fold(sum(steps[1:], steps[0]))
    return x[..., 0]


def sum_squares(x: Tensor) -> Tensor:
    """The float64 sum of squares over the last dimension of float32 or float64, in the order of `total`.

    REDUCE squares at a time are summed in the dtype of `x`, by fma in float32.
    """
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1], dtype=torch.float64)
    steps = _by_lanes(x)
    lanes = torch.zeros_like(steps[..., 0, :])
    for step in steps.unbind(-2):
        lanes = fma(step, step, lanes) if x.dtype == torch.float32 else lanes + step * step
    return total(_fold(lanes).double())


# --- noise ------------------------------------------------------------------------------------------------------------

_M0, _M1, _W0, _W1, _WORD = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four int64 tensors of 32-bit words in, four out. `key` is an int64 scalar, low word first.

    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2  # wraps like an unsigned product, so that all 64 bits are right
        c0, c1, c2, c3 = (p1 >> 32) & _WORD ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) & _WORD ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0, c1, c2, c3


def box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two words become two float32 normals, step by step as csrc/gaussian.h explains."""
    radius, angle = radius.to(torch.int32), angle.to(torch.int32)  # keeps the low 32 bits
    sqrt_half = 0x3F3504F3
    u = ((radius >> 1) & 0x7FFFFFFF | 1).float().view(torch.int32)
    t = u - (sqrt_half + (31 << 23))
    e = (t >> 23).float()
    f = ((t & 0x007FFFFF) + sqrt_half).view(torch.float32) - 1.0
    q = fma(f, 0.20116034, -0.32527755)
    for c in (0.34573421, -0.39793965, 0.49932399, -0.66670003, 1.0000091, -2.0):
        q = fma(q, f, c)
    r = sqrt(fma(e, -1.3862944, q * f))
    r = torch.where(angle & 2 != 0, -r, r)

    x = angle.float() * 2.0**-31
    y = x * x
    s = fma(y, -3.5877224e-05, 0.0024898719)
    s = fma(s, y, -0.080745367)
    s = fma(s, y, 0.78539815) * x
    c = fma(y, -0.00031888014, 0.015849915)
    c = fma(c, y, -0.30842425)
    c = fma(c, y, 0.99999997)
    odd = angle & 1 != 0
    return r * torch.where(odd, s, c), r * torch.where(odd, c, s)


def normals(filters: int, length: int, key: Tensor, draw: Tensor, index: int, first_row: int = 0) -> Tensor:
    """The noise of a tensor, or of a shard of it whose first filter is `first_row`, float32 [filters, length].

    Philox with counter (offset // 4, filter, index, draw); words (0, 1) and (2, 3) become the normals of offsets
    4 i + (0, 1) and 4 i + (2, 3).
    """
    block = torch.arange((length + 3) // 4, device=key.device)[None, :]
    filter = first_row + torch.arange(filters, device=key.device)[:, None]
    counter = torch.broadcast_tensors(block, filter, torch.full_like(block, index), (draw & _WORD).reshape(1, 1))
    x0, x1, x2, x3 = philox(counter, key)
    z = torch.stack([*box_muller(x0, x1), *box_muller(x2, x3)], dim=-1)
    return z.reshape(filters, 4 * block.numel())[:, :length]


# --- operators: their schemas, for every backend, and their definitions -----------------------------------------------


def _exact(t: Tensor) -> Tensor:
    """In the dtype that kernels compute in: float64 for float64, float32 for the others."""
    return t if t.dtype == torch.float64 else t.float()


def _add_noise(params, scales: Tensor, key, draw, index, first_row, fisher, eta) -> None:
    """w_f += scale_f z_f / sqrt(1 + eta F_f)"""
    for i, (p, scale) in enumerate(zip(params, scales.split(list(map(filters, params))))):
        if p.numel() == 0:
            continue
        w, scale = rows(p), scale[:, None]
        z = normals(*w.shape, key, draw, index[i], first_row[i] if first_row else 0)
        if fisher:
            scale = scale / sqrt(fma(eta, fisher[i], 1.0)).reshape((1, -1) if p.dim() <= 1 else (-1, 1))
        if p.dtype == torch.float64:
            _write(p, w + scale.double() * z.double())
        else:
            _write(p, fma(scale, z, w.float()))


@operator(
    "(Tensor[] params) -> Tensor", lambda params: params[0].new_empty(sum(map(filters, params)), dtype=torch.float32)
)
def filter_norms(params: list[Tensor]) -> Tensor:
    return torch.cat([sqrt(sum_squares(_exact(rows(p))).float()) for p in params])


@operator(
    "(Tensor(a!)[] params, Tensor(b!) scales, Tensor(c!)[] backup, Tensor sigma, Tensor key, Tensor draw, int[] index, "
    "int[] first_row, Tensor[] fisher, float eta) -> ()"
)
def perturb_(params, scales, backup, sigma, key, draw, index, first_row, fisher, eta) -> None:
    for b, p in zip(backup, params):  # before any weight changes
        b.copy_(p)
    scales.copy_(sigma.float() * filter_norms(params))
    _add_noise(params, scales, key, draw, index, first_row, fisher, eta)


@operator(
    "(Tensor(a!)[] params, Tensor scales, Tensor key, Tensor draw, int[] index, int[] first_row, Tensor[] fisher, "
    "float eta) -> ()"
)
def subtract_noise_(params, scales, key, draw, index, first_row, fisher, eta) -> None:
    _add_noise(params, -scales, key, draw, index, first_row, fisher, eta)


@operator("(Tensor(a!)[] params, Tensor[] backup, Tensor? mask) -> ()")
def restore_(params, backup, mask) -> None:
    if mask is None:
        for p, b in zip(params, backup):
            p.copy_(b)
        return
    for p, live, slots in zip(params, unpack(mask, params), _slots(params, mask, backup[0])):
        w = rows(p).clone()
        w[rows(live, like=p)] = slots
        _write(p, w)


@operator("(Tensor(a!) out, Tensor key, Tensor draw, int index) -> ()")
def normal_(out: Tensor, key: Tensor, draw: Tensor, index: int) -> None:
    if out.numel():
        _write(out, normals(*rows(out).shape, key, draw, index))


@operator("(Tensor(a!)[] fisher, Tensor[] grads, float beta, Tensor scale) -> ()")
def filter_fisher_(fisher, grads, beta: float, scale: Tensor) -> None:
    for f, g in zip(fisher, grads):
        if g.numel() == 0:
            continue
        x = rows(g)
        squares = x.double().square().reshape(f.shape) if g.dim() <= 1 else sum_squares(_exact(x))
        added = scale.square() * squares
        f.copy_(torch.where(added.isfinite(), (beta * f.double() + added).float(), f))


@operator(
    "(Tensor[] grads, Tensor[] params) -> Tensor", lambda grads, params: grads[0].new_empty((), dtype=torch.float64)
)
def grad_norm(grads: list[Tensor], params: list[Tensor]) -> Tensor:
    def terms(i: int) -> Tensor:
        if not params:
            return _exact(rows(grads[i]))
        return _exact(rows(params[i])) * _exact(rows(grads[i], like=params[i]))

    square = total(torch.stack([sum_squares(terms(i).reshape(-1)) for i in range(len(grads))]))
    # Python's square root is correctly rounded.
    return torch.full_like(square, math.sqrt(square.item()) if square >= 0 else math.nan)


@operator(
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] backup, Tensor? mask, Tensor rho, Tensor norm, bool adaptive)"
    " -> ()"
)
def ascend_(params, grads, backup, mask, rho, norm, adaptive: bool) -> None:
    step = torch.where((norm > 0) & norm.isfinite(), rho / norm, 0.0)
    live = [torch.ones_like(p, dtype=torch.bool) for p in params] if mask is None else unpack(mask, params)
    if mask is None:
        for b, p in zip(backup, params):
            b.copy_(p)
    elif backup:
        for slots, p, l in zip(_slots(params, mask, backup[0]), params, live):
            slots.copy_(rows(p)[rows(l, like=p)])
    for p, g, l in zip(params, grads, live):
        if p.numel() == 0:
            continue
        w, d = _exact(rows(p)), _exact(rows(g, like=p))
        d = w * w * d if adaptive else d
        ascended = w + step * d if p.dtype == torch.float64 else fma(step.float(), d, w)
        _write(p, torch.where((step == 0) | ~rows(l, like=p), rows(p), ascended.to(p.dtype)))


# --- masks ------------------------------------------------------------------------------------------------------------


def _flat(tensors: list[Tensor], like: list[Tensor] | None = None) -> list[Tensor]:
    """Each tensor as one row of elements, in the storage order of `like`."""
    return [rows(t, like=l).reshape(-1) for t, l in zip(tensors, like or tensors)]


def pack(flat: list[Tensor]) -> Tensor:
    """The mask of one row of booleans per tensor: bit j of a tensor's word i is element 32 i + j; the ranks follow."""
    weights = 2 ** torch.arange(32, device=flat[0].device)
    words = [(F.pad(f, (0, -len(f) % 32)).view(-1, 32) * weights).sum(1) for f in flat]
    counts = torch.cat([F.pad(f, (0, -len(f) % REDUCE)).view(-1, REDUCE).sum(1) for f in flat])
    return torch.cat([*words, counts.cumsum(0) - counts]).to(torch.int32)


def unpack(mask: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The mask as booleans of the shapes of `like`."""
    sizes = list(map(mask_words, like))
    shifts = torch.arange(32, device=mask.device)
    out = []
    for words, t in zip(mask[: sum(sizes)].split(sizes), like):
        flat = (words[:, None] >> shifts & 1).bool().view(-1)[: t.numel()]
        out.append(torch.empty_like(t, dtype=torch.bool))
        if t.numel():
            _write(out[-1], flat)
    return out


def count(mask: Tensor, like: Sequence[Tensor]) -> int:
    """How many elements the mask selects: its last rank plus the ones of the words after it."""
    last = next((t for t in reversed(like) if t.numel()), None)
    if last is None:
        return 0
    words = sum(map(mask_words, like))
    tail = (mask_words(last) - 1) % 32 + 1
    ones = sum((word & 0xFFFFFFFF).bit_count() for word in mask[words - tail : words].tolist())
    return (int(mask[-1]) & 0xFFFFFFFF) + ones


def _slots(params: list[Tensor], mask: Tensor, backup: Tensor) -> list[Tensor]:
    """Each tensor's part of a masked backup, in its dtype. The backup must have room for all."""
    counts = [int(live.sum()) for live in unpack(mask, params)]
    slots = backup.view(torch.uint8).view(-1, backup.element_size())[: sum(counts)].split(counts)
    return [s[:, : p.element_size()].view(p.dtype)[:, 0] for s, p in zip(slots, params)]


def _largest(scores: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """Which elements of a row, or of those in `among`, are the `count` largest, ties to the first."""
    places = torch.arange(len(scores), device=scores.device) if among is None else among.nonzero()[:, 0]
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[places[scores[places].sort(descending=True, stable=True).indices[:count]]] = True
    return chosen


def _first_bad(bad: list[Tensor]) -> Tensor:
    where = torch.stack([b.any() for b in bad]).nonzero()[:, 0]
    return where[0] if len(where) else torch.tensor(-1, device=bad[0].device)


@operator("(Tensor(a!)[] fisher, Tensor[] grads, Tensor scale) -> ()")
def fisher_(fisher: list[Tensor], grads: list[Tensor], scale: Tensor) -> None:
    for f, g in zip(fisher, grads):
        if f.numel():
            d = scale.float() * rows(g, like=f).float()
            _write(f, fma(d, d, rows(f)))


@operator(
    "(Tensor[] scores, int k) -> (Tensor, Tensor)",
    lambda scores, k: (
        scores[0].new_empty(mask_size(scores), dtype=torch.int32),
        scores[0].new_empty((), dtype=torch.int64),
    ),
)
def topk_mask(scores: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    flat = [f.double() for f in _flat(scores)]
    chosen = _largest(torch.cat(flat), k).split([len(f) for f in flat])
    return pack(list(chosen)), _first_bad([~(f >= 0) for f in flat])


def _random_scores(params: list[Tensor], key: Tensor, draw: Tensor, index: list[int], place: int) -> Tensor:
    """The upper 24 bits of Philox words, with `place` in the counter instead of a filter."""
    out = []
    for p, i in zip(params, index):
        block = torch.arange((p.numel() + 3) // 4, device=key.device)
        counter = (block, torch.full_like(block, place), torch.full_like(block, i), (draw & _WORD).expand_as(block))
        out.append(torch.stack(philox(counter, key), -1).reshape(-1)[: p.numel()] >> 8)
    return torch.cat(out).double()


@operator(
    "(Tensor(a!) mask, Tensor[] params, Tensor[] drop, Tensor[] grow, Tensor key, Tensor draw, int[] index, int count)"
    " -> Tensor",
    lambda mask, *_: mask.new_empty((), dtype=torch.int64),
)
def regrow_mask_(mask, params, drop, grow, key, draw, index, count: int) -> Tensor:
    live, sizes = torch.cat(_flat(unpack(mask, params), params)), [p.numel() for p in params]
    count = min(count, int(live.sum()), int((~live).sum()))
    scores, bad = [], []
    for given, among, place in ((drop, live, 0xFFFFFFFE), (grow, ~live, 0xFFFFFFFF)):
        if given:
            scores.append(torch.cat(_flat(given, params)).double().abs())
            bad += (among & scores[-1].isnan()).split(sizes)
        else:
            scores.append(_random_scores(params, key, draw, index, place))
    first = _first_bad(bad or [live[:0]])
    if first >= 0:
        return first % len(params)
    dropped = _largest(-scores[0] if drop else scores[0], count, among=live)
    grown = _largest(scores[1], count, among=~live)
    mask.copy_(pack(list((live & ~dropped | grown).split(sizes))))
    return first
