"""Loops written for davda54/sam and pytorch_optimizer: constructor, weights to rounding, checkpoints."""

from __future__ import annotations

import copy

import pytest
import pytorch_optimizer
import torch
from documentation import run_snippets
from models import assert_same_bits, loss_of, make_batch, make_net, state_tensors

import flatops

pytestmark = pytest.mark.usefixtures("one_thread")
BASES = {"sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}), "adamw": (torch.optim.AdamW, {"lr": 0.01})}


class DavdaSAM:
    """davda54/sam as in its README and its users' checkpoints: a wrapper with copies of the weights in its state."""

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **kwargs):
        self.base_optimizer = base_optimizer(params, **kwargs)
        self.rho, self.adaptive, self.state = rho, adaptive, {}
        self.zero_grad = self.base_optimizer.zero_grad

    def params(self):
        return [p for group in self.base_optimizer.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        weigh = torch.abs if self.adaptive else torch.ones_like
        norm = torch.cat([(weigh(p) * p.grad).flatten() for p in self.params()]).norm()
        for p in self.params():
            self.state[p] = {"old_p": p.clone()}
            p += self.rho / norm * weigh(p) ** 2 * p.grad
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p in self.params():
            p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure):
        self.first_step(zero_grad=True)
        closure()
        self.second_step()

    def state_dict(self):
        """Before its first second_step, as its users save it: the copies, and no state of the base optimizer."""
        packed = self.base_optimizer.state_dict()
        return {**packed, "state": {i: self.state[p] for i, p in enumerate(self.params()) if p in self.state}}


PEERS = {"davda54": DavdaSAM, "pytorch_optimizer": pytorch_optimizer.SAM}


def train(optimizer, model, form, steps, first=0):
    """The loops of both READMEs, whose closures do not zero gradients."""
    for i in range(first, first + steps):

        def closure():
            loss = loss_of(model, make_batch(i))
            loss.backward()
            return loss

        if form == "closure":
            loss_of(model, make_batch(i)).backward()
            optimizer.step(closure)
            optimizer.zero_grad()
        else:
            loss_of(model, make_batch(i)).backward()
            optimizer.first_step(zero_grad=True)
            loss_of(model, make_batch(i)).backward()
            optimizer.second_step(zero_grad=True)


def difference(a, b):
    a, b = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", ["two steps", "closure"])
@pytest.mark.parametrize("peer", PEERS)
def test_the_same_loop_gives_the_same_weights(peer, form, base, adaptive):
    """Over 20 steps, within 1e-6 of the weights' norm (seen: 1.5e-7); the weights move by a tenth of it or more."""
    base, options = BASES[base]
    models = make_net(), make_net()
    for kind, model in zip((PEERS[peer], flatops.SAM), models):
        optimizer = kind(model.parameters(), base, rho=1.0 if adaptive else 0.1, adaptive=adaptive, **options)
        train(optimizer, model, form, 20)
    assert difference(*models) < 1e-6
    assert difference(models[0], make_net()) > 0.1


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("peer", PEERS)
def test_their_checkpoints_load(peer, base):
    """With the base optimizer's state; training continues as it would have there."""
    base, options = BASES[base]
    model, twin = make_net(), make_net()
    old = PEERS[peer](model.parameters(), base, rho=0.1, **options)
    train(old, model, "two steps", 5)
    twin.load_state_dict(model.state_dict())
    optimizer = flatops.SAM(twin.parameters(), base, rho=0.1, **options)
    saved = (old.base_optimizer if peer == "davda54" else old).state_dict()
    optimizer.load_state_dict(copy.deepcopy(saved))  # as from a file: torch would share the tensors
    names = list(optimizer.state[twin.head.weight])
    assert names and "old_p" not in names
    assert_same_bits(state_tensors(optimizer), state_tensors(old.base_optimizer))
    train(old, model, "two steps", 5, first=5)
    train(optimizer, twin, "two steps", 5, first=5)
    assert difference(twin, model) < 1e-6


@pytest.mark.parametrize("base", BASES)
def test_their_own_state_loads_too(base):
    """davda54's state has copies of the weights but no state of the base optimizer, which starts anew in both."""
    base, options = BASES[base]
    model, twin = make_net(), make_net()
    old = DavdaSAM(model.parameters(), base, rho=0.1, **options)
    loss_of(model, make_batch(0)).backward()
    old.first_step()
    saved = copy.deepcopy(old.state_dict())
    assert any("old_p" in entry for entry in saved["state"].values())
    old.zero_grad()
    optimizer, fresh = (flatops.SAM(m.parameters(), base, rho=0.1, **options) for m in (twin, model))
    optimizer.load_state_dict(saved)
    assert not optimizer.state
    twin.load_state_dict(model.state_dict())
    train(optimizer, twin, "two steps", 3)
    train(fresh, model, "two steps", 3)
    assert_same_bits(twin.parameters(), model.parameters())


def test_the_snippets_of_the_documentation_run():
    run_snippets("migration.md", 3)
