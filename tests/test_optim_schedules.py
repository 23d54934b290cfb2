"""CosineRamp: sigma and rho follow half a cosine, in every group that takes part."""

from __future__ import annotations

import copy
import math

import pytest
from models import make_net
from torch.optim import SGD

import flatops
from flatops import CosineRamp


@pytest.mark.parametrize("start, end", [(0.0, 0.02), (0.02, 0.0), (0.01, 0.05)])
def test_cosine_ramp(start, end):
    """end + (start - end) (1 + cos(pi t / T)) / 2, then end; a group at 0 stays at 0; it can resume."""
    model = make_net()
    groups = [{"params": model.features.parameters()}, {"params": model.head.parameters(), "sigma": 0.0}]
    optimizer = flatops.RWP(groups, SGD, lr=0.1, sigma=0.3)
    ramp = CosineRamp(optimizer, "sigma", start, end, total_steps=8)
    for t in range(11):
        expected = end + (start - end) * (1 + math.cos(math.pi * min(t, 8) / 8)) / 2
        assert ramp.value == pytest.approx(expected, abs=1e-15)
        assert [group["sigma"] for group in optimizer.param_groups] == [ramp.value, 0.0]
        if t == 4:
            saved = copy.deepcopy((ramp.state_dict(), optimizer.state_dict()))
        ramp.step()
    optimizer.load_state_dict(saved[1])
    again = CosineRamp(optimizer, "sigma", start, end, total_steps=8)
    again.load_state_dict(saved[0])
    for _ in range(3):
        again.step()
    expected = end + (start - end) * (1 + math.cos(math.pi * 7 / 8)) / 2
    assert again.value == pytest.approx(expected) and optimizer.param_groups[0]["sigma"] == again.value


@pytest.mark.parametrize("kind, key", [("sam", "rho"), ("rwp", "sigma")])
def test_a_ramp_of_an_optimizer_that_starts_at_zero_ramps(kind, key):
    """If every group is at 0, none is excluded: the ramp moves them, or raises if it cannot."""
    flat = {"sam": flatops.SAM, "rwp": flatops.RWP}[kind]
    optimizer = flat(make_net().parameters(), SGD, lr=0.1, **{key: 0.0})
    try:
        ramp = CosineRamp(optimizer, key, 0.0, 0.05, total_steps=2)
    except ValueError as error:
        assert key in str(error)
    else:
        ramp.step()
        ramp.step()
        assert optimizer.param_groups[0][key] == 0.05


def test_a_ramp_takes_groups_added_later():
    """A group that is added after the ramp was made follows it from its next step."""
    model = make_net()
    optimizer = flatops.RWP(model.features.parameters(), SGD, lr=0.1, sigma=0.3)
    ramp = CosineRamp(optimizer, "sigma", 0.3, 0.1, total_steps=2)
    optimizer.add_param_group({"params": list(model.head.parameters())})
    ramp.step()
    ramp.step()
    assert [group["sigma"] for group in optimizer.param_groups] == [0.1, 0.1]
