"""The cases that every operator is tested on: backends, shapes, dtypes, layouts, arguments; and comparison by bits."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import flatops
from flatops import ops
from flatops.backend import _C, operators, why_not
from flatops.backend import BACKENDS as REGISTERED

if importlib.util.find_spec("emulated"):
    import emulated

    emulated.register()


# --- backends ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """One backend on one device type."""

    name: str
    device: str
    level: str = ""  # for cpp: a SIMD level; empty for the best one

    def __str__(self) -> str:
        return "-".join(filter(None, (self.name, self.device, self.level)))

    @property
    def slow(self) -> bool:
        """Whether it runs GPU code on a CPU, at about a second per call."""
        return self.device == "cpu" and self.name in ("triton", "emulated")

    def operator(self, name: str) -> Callable[..., Any]:
        """The registered operator, without the checks of flatops.ops."""
        return getattr(operators(torch.device(self.device), self.name), name).default

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """flatops uses this backend in the body."""
        best = _C.simd()
        if self.level:
            _C.set_simd(self.level)
        try:
            with flatops.backend(self.name):
                yield
        finally:
            _C.set_simd(best)


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# Every backend and device of this machine, and why the pair cannot run; empty where it can.
WHY_NOT = {
    Backend(name, device): why_not(name, torch.device(device, 0))
    for name, (_, serves) in REGISTERED.items()
    for device in DEVICES
    if serves is None or device in serves
}
ORACLE = Backend("reference", "cpu")
BACKENDS = [backend for backend, why in WHY_NOT.items() if not why]
# The backends that are compared with the oracle: cpp at every SIMD level of this machine.
CONFORMING = [
    leveled
    for backend in BACKENDS
    if backend != ORACLE
    for leveled in (
        [replace(backend, level=level) for level in _C.simd_levels()] if backend.name == "cpp" else [backend]
    )
]


# --- tensors ----------------------------------------------------------------------------------------------------------

SHAPES = {
    # Odd lengths, lengths around the SIMD widths, the 128 lanes and 1024 elements of a sum; empty tensors and scalars.
    "table": [
        (),
        (0,),
        (1,),
        (7,),
        (1025,),
        (0, 3),
        (3, 0),
        (1, 1),
        (5, 9),
        *((6, n) for n in range(1, 9)),
        (5, 127),
        (4, 128),
        (3, 129),
        (33, 147),
        (3, 1023),
        (2, 1024),
        (70, 36),
        (4, 5, 3, 2, 2),
        (16, 3, 3, 3),
    ],
    # Filters too long for registers, for one block, for one thread's share; ViT-B's position embedding.
    "long": [(8191,), (8192,), (8193,), (2, 9216), (3, 8192), (2, 40000), (70001,), (5, 9), (1, 197, 768)],
    # More tensors than the table of one launch holds.
    "many": [(1 + i % 3, 1 + i % 5) for i in range(900)],
    "few": [(7,), (0, 3), (5, 9), (2, 1025), (4, 5, 3, 2, 2), (16, 3, 3, 3)],
    "tiny": [(7,), (2, 3, 3, 3), (4, 9)],
    # Cut into shards of rows; every backend splits the last one's filters over blocks.
    "shards": [(), (7,), (0, 3), (5, 9), (70, 36), (16, 3, 3, 3), (2, 70001)],
    "special": [(3, 37)] * 10,  # each tensor holds one of the values of `special`
}
LAYOUTS = ["contiguous", "channels_last", "transposed", "strided", "unaligned"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """A tensor of random values, among them zeros of both signs, in the given memory layout."""
    t = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    t = torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, t)
    t = torch.where(torch.rand(shape, generator=generator) < 0.05, -0.0, t).to(dtype)
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last" and t.dim() == 5:
        return t.contiguous(memory_format=torch.channels_last_3d)
    if layout == "transposed" and t.dim() >= 2:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and t.dim() >= 1:
        room = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), 7.0, dtype=dtype)
        return room[..., : 2 * t.shape[-1] : 2].copy_(t)
    if layout == "unaligned":  # starts one element into a buffer and ends one element before its end
        return torch.full((t.numel() + 2,), 7.0, dtype=dtype)[1:-1].view(shape).copy_(t)
    return t


def special(dtype: torch.dtype) -> list[float]:
    """Infinities, NaN, the largest numbers, subnormals, zeros."""
    info = torch.finfo(dtype)
    values = [float("inf"), float("nan"), info.max, info.tiny, info.tiny / 4, 0.0]
    return [*values, -float("inf"), -info.max, -0.0, 1.0]


@dataclass(frozen=True)
class Case:
    """One list of tensors."""

    shapes: str
    dtype: torch.dtype | None = torch.float32  # None: all dtypes in turn
    layout: str = "contiguous"

    def __str__(self) -> str:
        dtype = "mixed" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return f"{self.shapes}-{dtype}-{self.layout}"

    def tensors(self, seed: int, scale: float = 1.0) -> list[Tensor]:
        """One tensor of every shape, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for i, shape in enumerate(SHAPES[self.shapes]):
            dtype = self.dtype or DTYPES[i % len(DTYPES)]
            made.append(make(shape, dtype, self.layout, generator, scale))
            if self.shapes == "special":  # only in one filter; another list has it in the next
                made[-1][1, seed] = made[-1][2, 7] = special(dtype)[i]
        return made

    def otherwise(self) -> Case:
        """The same tensors in another memory format, as gradients may have it."""
        return replace(self, layout="channels_last" if self.layout == "contiguous" else "contiguous")


SPECIAL = [Case("special", dtype) for dtype in DTYPES]
CASES = [
    *(Case("table", dtype, layout) for dtype in [*DTYPES, None] for layout in LAYOUTS),
    *(Case("long", dtype) for dtype in DTYPES),
    Case("long", layout="unaligned"),
    *SPECIAL,
]
SLOW_CASES = [
    *(Case("table", dtype) for dtype in [*DTYPES, None]),
    *(Case("few", dtype, layout) for dtype in (torch.float32, torch.bfloat16) for layout in LAYOUTS[1:]),
    Case("long"),
    *SPECIAL,
]


# --- operators --------------------------------------------------------------------------------------------------------


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


KEY, DRAW = torch.tensor((2**40 + 17) ^ (3 << 32)), torch.tensor(5)


def _index(params: list[Tensor]) -> list[int]:
    return [3 * i + 1 for i in range(len(params))]


def _first_row(params: list[Tensor]) -> list[int]:
    """Rows that make the tensors shards of the largest possible parameters."""
    return [2**31 - 1 - 5 * i if p.dim() > 1 else 0 for i, p in enumerate(params)]


def fisher_of(params: list[Tensor]) -> list[Tensor]:
    """An F for every parameter, as ARWP may have accumulated it."""
    generator = torch.Generator().manual_seed(11)
    return [torch.rand(p.shape[:1] if p.dim() else (1,), generator=generator) * 10 for p in params]


def _perturb(case: Case, eta: float = 0.0, backup: bool = True) -> tuple:
    params = case.tensors(1)
    return (
        params,
        ops.new_scales(params),
        ops.new_backup(params) if backup else [],
        _number(0.03),
        KEY,
        DRAW,
        _index(params),
        _first_row(params) if backup else [],
        fisher_of(params) if eta else [],
        eta,
    )


def mask_of(tensors: list[Tensor]) -> Tensor:
    """A random mask, in which a filter of each tensor and all of some tensors are unselected."""
    generator = torch.Generator().manual_seed(13)
    masked = []
    for i, t in enumerate(tensors):
        live = torch.empty_like(t, dtype=torch.bool)
        masked.append(live.copy_(torch.rand(t.shape, generator=generator) < (0.0 if i % 5 == 3 else 0.5)))
        if t.dim() > 1:
            live[1:2] = False
    return ops.pack_mask(masked)


def _subtract_noise(case: Case, eta: float = 0.0) -> tuple:
    params = case.tensors(1)
    scales = torch.rand(ops.new_scales(params).shape, generator=torch.Generator().manual_seed(2))
    fisher = fisher_of(params) if eta else []
    return params, scales, KEY, DRAW, _index(params), _first_row(params), fisher, eta


def _restore_masked(case: Case) -> tuple:
    params = case.tensors(1)
    mask = mask_of(params)
    backup = ops.new_backup(params, mask)
    backup[0].view(torch.uint8).copy_(
        torch.randint(0, 256, (backup[0].nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    )
    return params, backup, mask


def _ascend(
    case: Case, adaptive: bool = False, backup: bool = True, otherwise: bool = False, masked: bool = False
) -> tuple:
    params = case.tensors(1)
    grads = (case.otherwise() if otherwise else case).tensors(2, scale=0.01)
    mask = mask_of(params) if masked else None
    return (
        params,
        grads,
        [b.zero_() for b in ops.new_backup(params, mask)] if backup else [],
        mask,
        _number(0.05),
        _number(0.37),
        adaptive,
    )


def _scores(case: Case, ties: bool = False) -> list[Tensor]:
    """Valid scores for topk_mask: not negative, no NaN; with `ties`, few distinct values, mostly zero."""
    dtype = torch.float32 if case.dtype is None else case.dtype
    scores = [twin(t).abs_().nan_to_num_(nan=0.5, posinf=torch.inf) for t in replace(case, dtype=dtype).tensors(3)]
    return [s.mul_(2).floor_() for s in scores] if ties else scores


def _topk(case: Case, share: float, ties: bool = False) -> tuple:
    scores = _scores(case, ties)
    return scores, int(share * sum(s.numel() for s in scores))


def _regrow(case: Case, drop: bool, grow: bool) -> tuple:
    dtype = torch.float32 if case.dtype is None else case.dtype
    params = replace(case, dtype=dtype).tensors(1)
    scores = [
        replace(case, dtype=dtype).tensors(seed, scale=0.1) if given else [] for seed, given in ((4, drop), (5, grow))
    ]
    count = sum(p.numel() for p in params) // 7
    return mask_of(params), params, *scores, KEY, DRAW, _index(params), count


# The operator, after a comma its variant: how to make its arguments for a case.
OPERATORS: dict[str, Callable[[Case], tuple]] = {
    "filter_norms": lambda case: (case.tensors(1),),
    "perturb_": _perturb,
    "perturb_,bare": lambda case: _perturb(case, backup=False),
    "perturb_,fisher": lambda case: _perturb(case, eta=0.7),
    "restore_": lambda case: (case.tensors(1), case.tensors(2), None),
    "restore_,masked": _restore_masked,
    "restore_,otherwise": lambda case: (case.tensors(1), case.otherwise().tensors(2), None),
    "subtract_noise_": _subtract_noise,
    "subtract_noise_,fisher": lambda case: _subtract_noise(case, eta=0.7),
    "normal_": lambda case: (replace(case, dtype=torch.float32).tensors(1)[-1], KEY, DRAW, 7),
    "filter_fisher_": lambda case: (fisher_of(case.tensors(1)), case.tensors(1), 0.99, _number(0.5)),
    "grad_norm": lambda case: (case.tensors(2, scale=0.01), []),
    "grad_norm,adaptive": lambda case: (case.tensors(2, scale=0.01), case.tensors(1)),
    "grad_norm,otherwise": lambda case: (case.otherwise().tensors(2), case.tensors(1)),
    "ascend_": _ascend,
    "ascend_,bare": lambda case: _ascend(case, backup=False),
    "ascend_,adaptive": lambda case: _ascend(case, adaptive=True),
    "ascend_,otherwise": lambda case: _ascend(case, otherwise=True),
    "ascend_,masked": lambda case: _ascend(case, masked=True),
    "ascend_,masked,bare": lambda case: _ascend(case, masked=True, backup=False, adaptive=True),
    "ascend_,masked,otherwise": lambda case: _ascend(case, masked=True, otherwise=True),
    "fisher_": lambda case: (replace(case, dtype=torch.float32).tensors(1), case.tensors(2), _number(0.5)),
    "topk_mask": lambda case: _topk(case, 0.5),
    "topk_mask,few": lambda case: _topk(case, 0.01),
    "topk_mask,ties": lambda case: _topk(case, 0.6, ties=True),
    "regrow_mask_": lambda case: _regrow(case, True, True),
    "regrow_mask_,random": lambda case: _regrow(case, False, False),
}


def arguments(operator: str, case: Case, device: str = "cpu") -> tuple:
    """The arguments of an operator for a case."""
    return tuple(
        [twin(t, device) for t in a] if isinstance(a, list) and a and isinstance(a[0], Tensor)
        else twin(a, device) if isinstance(a, Tensor) else a
        for a in OPERATORS[operator](case)
    )  # fmt: skip


def tensors_of(arguments: tuple) -> list[Tensor]:
    """The tensors among an operator's arguments, including those in lists."""
    nested = [a if isinstance(a, list) else [a] for a in arguments]
    return [t for a in nested for t in a if isinstance(t, Tensor)]


def outcome(operator: str, case: Case, backend: Backend) -> list[Tensor]:
    """All memory passed to a call, with what should not change and the gaps between elements, and its result."""
    args = arguments(operator, case, backend.device)
    with backend.forced():
        result = backend.operator(operator.split(",")[0])(*args)
    return [*map(whole, tensors_of(args)), *tensors_of((result,))]


@functools.cache
def expected(operator: str, case: Case) -> list[Tensor]:
    """The oracle's outcome. All outcomes are cached (0.4 GB), because tests run in any order."""
    return outcome(operator, case, ORACLE)


def table() -> list[tuple[str, Case, Backend]]:
    """Every operator on every case on every backend."""
    return [
        (operator, case, backend)
        for operator in OPERATORS
        for case in dict.fromkeys(CASES + SLOW_CASES)
        for backend in CONFORMING
        if case in (SLOW_CASES if backend.slow else CASES)
        # bfloat16 and float16 are refused: their low bits would be lost
        if not operator.startswith("subtract_noise_") or case.dtype in (torch.float32, torch.float64)
    ]


# --- equal bits -------------------------------------------------------------------------------------------------------


def whole(t: Tensor) -> Tensor:
    """All memory of a tensor's storage, as one row."""
    return t.detach().as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def twin(t: Tensor, device: str | torch.device | None = None) -> Tensor:
    """A copy with the same layout as `t`: strides, offset and the gaps between elements."""
    return whole(t).to(device or t.device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether every element has the same bits; all NaNs count as equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    equal = a.view(ints) == b.view(ints)
    if a.is_floating_point():
        equal |= a.isnan() & b.isnan()
    return bool(equal.all())


def assert_same_bits(actual: list[Tensor] | Tensor, expected: list[Tensor] | Tensor) -> None:
    """Fails, naming the tensor, unless all bits are equal."""
    if isinstance(actual, Tensor):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected)):
        assert same_bits(a, b), (
            f"tensor {i} of shape {tuple(a.shape)}: {(a.cpu() != b.cpu()).sum().item()} elements differ"
        )
