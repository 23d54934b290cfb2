"""The table that every operator is tested on: shapes, dtypes, memory layouts, backends; and what equal bits are."""

from __future__ import annotations

import torch
from torch import Tensor

# Odd lengths, lengths around the SIMD widths and the 1024 of a sum, filters too long for one block, empty and scalar ones.
SHAPES = [
    (),
    (0,),
    (1,),
    (7,),
    (1025,),
    (70001,),  # one filter longer than a block
    (0, 3),
    (3, 0),
    (1, 1),
    (5, 9),
    (33, 147),
    (2, 1024),
    (3, 1023),
    (2, 40000),  # long filters
    (16, 3, 3, 3),
    (4, 5, 3, 2, 2),
]
LAYOUTS = ["contiguous", "channels_last", "transposed", "strided"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """A tensor of random values, with zeros of both signs among them, that lies in memory as `layout` says."""
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
        room = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=dtype)
        room[..., : 2 * t.shape[-1] : 2] = t
        return room[..., : 2 * t.shape[-1] : 2]
    return t


def make_list(dtype: torch.dtype, layout: str, seed: int, scale: float = 1.0) -> list[Tensor]:
    """One tensor of every shape."""
    generator = torch.Generator().manual_seed(seed)
    return [make(shape, dtype, layout, generator, scale) for shape in SHAPES]


def twin(tensors: list[Tensor]) -> list[Tensor]:
    """Copies with the same strides, holes included."""
    out = []
    for t in tensors:
        copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        out.append(copy.copy_(t))
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether every element has the same bits; one NaN is as good as another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = a.detach().contiguous(), b.detach().contiguous()
    equal = a.view(ints) == b.view(ints)
    if a.is_floating_point():
        equal |= a.isnan() & b.isnan()
    return bool(equal.all())


def assert_same_bits(actual: list[Tensor] | Tensor, expected: list[Tensor] | Tensor) -> None:
    """Fails, naming the tensor, unless all bits agree."""
    if isinstance(actual, Tensor):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected)):
        assert same_bits(a, b), (
            f"tensor {i} of shape {tuple(a.shape)}: {(a != b).sum().item()} elements differ"
        )
