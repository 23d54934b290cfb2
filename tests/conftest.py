"""Fixtures that several files share."""

from __future__ import annotations

import pytest
import torch

from flatops.backend import _C


@pytest.fixture(params=_C.simd_levels())
def level(request):
    """Every SIMD level that the machine runs, in turn."""
    best = _C.simd()
    _C.set_simd(request.param)
    yield request.param
    _C.set_simd(best)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """Several thread counts, in turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
