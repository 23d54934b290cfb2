"""The types that a type checker infers in a user's code: `make lint` checks them, running the tests confirms them."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import flatops
from flatops.optim.base import Flat
from flatops.restore import Pass


def loss(model: torch.nn.Module) -> Tensor:
    return model(torch.ones(2, 4)).square().mean()


def test_optimizers_have_their_types() -> None:
    model = torch.nn.Linear(4, 2)
    sam = flatops.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    ssam = flatops.SSAM(model.parameters(), torch.optim.AdamW, rho=torch.tensor(0.1), sparsity=0.5, mask="dynamic")
    rwp = flatops.RWP(model.parameters(), torch.optim.SGD, lam=0.5, lr=0.1)
    assert_type(sam, flatops.SAM)
    assert_type(ssam, flatops.SSAM)
    assert_type(rwp, flatops.RWP)
    assert_type(rwp.clean_weight, float)
    assert_type(flatops.unwrap(sam), Flat)
    assert isinstance(sam, torch.optim.SGD)  # no checker can know this: the class is made at run time
    torch.optim.lr_scheduler.StepLR(rwp, 10)  # accepts it as an optimizer


def test_passes_are_contexts_that_suppress_no_errors() -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = flatops.RWP(model.parameters(), torch.optim.SGD, sigma=0.01, lr=0.1)
    assert_type(optimizer.perturbed(loss_scale=2.0), Pass)
    with optimizer.perturbed():
        value = loss(model)
        value.backward()
    assert_type(value, Tensor)  # and not "possibly unbound"
    for one_pass in flatops.passes(optimizer, model):
        with one_pass, flatops.freeze_batchnorm_stats(model):
            loss(model).backward()
    optimizer.step()
    with flatops.perturb(model, 0.01, restore="offload"), flatops.backend("cpp"):
        loss(model)


def test_operators_take_lists_and_give_tensors() -> None:
    params = [torch.ones(4, 4), torch.ones(4)]
    assert_type(flatops.ops.filter_norms(params), Tensor)
    mask = flatops.ops.topk_mask(params, 3)
    assert_type(mask, Tensor)
    assert_type(flatops.ops.unpack_mask(mask, params), list[Tensor])
    assert_type(flatops.ops.count_mask(mask, params), int)
    assert flatops.ops.count_mask(mask, params) == 3
