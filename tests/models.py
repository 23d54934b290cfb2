"""Shared by the optimizer tests: a small network, data for it, and comparison by bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Two convolutions with BatchNorm and a linear layer; smooth, so that rounding errors stay small."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), norm(6), nn.SiLU(),
            nn.Conv2d(6, 8, 3, padding=1, bias=False), norm(8), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def make_net(seed: int = 0, dtype: torch.dtype = torch.float32, norm: type[nn.Module] = nn.BatchNorm2d) -> Net:
    torch.manual_seed(seed)
    return Net(norm).to(dtype)


def make_batch(seed: int, dtype: torch.dtype = torch.float32, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(4, (size,), generator=generator)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def bits(t: Tensor) -> Tensor:
    """A copy as integers: NaN equals itself and 0 differs from -0."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().clone(memory_format=torch.contiguous_format).view(integer)


def all_bits(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [bits(t) for t in tensors]


def assert_same_bits(left: Iterable[Tensor], right: Iterable[Tensor]) -> None:
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for i, (a, b) in enumerate(zip(left, right)):
        a, b = (t if not t.is_floating_point() else bits(t) for t in (a, b))
        assert torch.equal(a, b), f"tensor {i} differs"


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The base optimizer's state, such as momentum, in the order of the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries = [item for p in params for item in sorted(optimizer.state.get(p, {}).items())]
    return [value for name, value in entries if torch.is_tensor(value) and name != "fisher"]
