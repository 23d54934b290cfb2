"""A whole step inside torch.compile: weights are restored, and gradients equal those of the eager step."""

from __future__ import annotations

import pytest
import torch
from models import all_bits, assert_same_bits, loss_of, make_batch, make_net

import flatops

SGD = torch.optim.SGD
METHODS = {
    "sam": lambda params: flatops.SAM(params, SGD, rho=0.1, lr=0.1),
    "rwp": lambda params: flatops.RWP(params, SGD, sigma=0.1, seed=1, lr=0.1),
    "m-rwp": lambda params: flatops.RWP(params, SGD, sigma=0.1, lam=0.5, seed=1, lr=0.1),
    "regenerating": lambda params: flatops.RWP(params, SGD, sigma=0.1, seed=1, restore="regenerate", lr=0.1),
    "ssam": lambda params: flatops.SSAM(params, SGD, rho=0.1, mask="dynamic", update_every=2, seed=1, lr=0.1),
}


def explicit(model, optimizer, batch):
    loss = loss_of(model, batch)
    loss.backward()
    with optimizer.perturbed():
        loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def by_passes(model, optimizer, batch):
    for one_pass in flatops.passes(optimizer, model):
        with one_pass:
            loss = loss_of(model, batch)
            loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def two_steps(model, optimizer, batch):
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, batch).backward()
    optimizer.second_step(zero_grad=True)
    return loss


def by_closure(model, optimizer, batch):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return optimizer.step(closure)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CASES = [(method, explicit) for method in METHODS] + [("sam", two_steps), ("sam", by_closure), ("m-rwp", by_passes)]


@pytest.mark.parametrize("method, step", CASES)
def test_a_compiled_step_equals_the_eager_step(method, step):
    """Weights that were not restored would end up elsewhere than in eager mode."""
    models = make_net(), make_net()
    optimizers = [METHODS[method](model.parameters()) for model in models]
    compiled = torch.compile(step, backend="aot_eager")
    for i in range(2):
        step(models[0], optimizers[0], make_batch(i))
        compiled(models[1], optimizers[1], make_batch(i))
        assert not optimizers[1].is_perturbed
        for p, q in zip(models[0].parameters(), models[1].parameters()):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_compiled_noise_without_an_optimizer():
    """In every call the noise is present in the body, and gone afterwards."""
    model, (x, _) = make_net().eval(), make_batch(0)

    def noisy(x):
        with torch.no_grad(), flatops.perturb(model, sigma=0.1, seed=3):
            return model(x)

    expected, before = noisy(x), all_bits(model.parameters())
    compiled = torch.compile(noisy, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected)
        assert_same_bits(all_bits(model.parameters()), before)
    assert not torch.allclose(model(x), expected)


def test_fullgraph_is_refused():
    """fullgraph=True cannot hold what runs between graphs: torch's error says where, and nothing has changed."""
    model = make_net()
    optimizer = METHODS["rwp"](model.parameters())
    before = all_bits(model.parameters())

    @torch.compile(backend="eager", fullgraph=True)
    def noisy(x):
        with optimizer.perturbed():
            return model(x)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="perturbs and restores weights between graphs"):
        noisy(make_batch(0)[0])
    assert_same_bits(all_bits(model.parameters()), before)
    assert not optimizer.is_perturbed
