"""BatchNorm in the perturbed pass: freeze_batchnorm_stats updates running statistics in clean passes only."""

from __future__ import annotations

import pytest
import torch
from models import all_bits, assert_same_bits, loss_of, make_batch, make_net
from torch import nn

import flatops


def make(kind, model):
    if kind == "sam":
        return flatops.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05)
    return flatops.RWP(model.parameters(), torch.optim.SGD, sigma=0.05, lam=0.5, lr=0.05)


def batch_norm_act(features):
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(features)


def tracking_instance_norm(features):
    return nn.InstanceNorm2d(features, track_running_stats=True)


def cumulative_batch_norm(features):
    return nn.BatchNorm2d(features, momentum=None)


NORMS = [nn.BatchNorm2d, batch_norm_act, tracking_instance_norm, cumulative_batch_norm]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("perturbed_input", ["finite", "nan"])
@pytest.mark.parametrize("kind", ["sam", "mrwp"])
def test_statistics_equal_those_of_clean_passes_alone(kind, norm, perturbed_input):
    """Running mean, variance and count have the bits of a network that ran the clean passes only."""
    model, twin = make_net(norm=norm), make_net(norm=norm)
    optimizer = make(kind, model)
    for i in range(3):
        twin.load_state_dict({**twin.state_dict(), **dict(model.named_parameters())})
        loss_of(twin, make_batch(i))
        loss_of(model, make_batch(i)).backward()
        x, y = make_batch(i + 10)
        with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
            loss = loss_of(model, (x * float("nan") if perturbed_input == "nan" else x, y))
            if perturbed_input == "finite":
                loss.backward()
        assert_same_bits(model.buffers(), twin.buffers())
        if perturbed_input == "finite":
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_freezing_changes_no_output(norm, training):
    """Normalised by the batch in training, by running statistics in eval; these stay unchanged."""
    model, x = make_net(norm=norm), make_batch(0)[0]
    model(x)
    model.train(training)
    before = all_bits(model.buffers())
    with flatops.freeze_batchnorm_stats(model):
        frozen = model(x)
    assert_same_bits(all_bits(model.buffers()), before)
    assert torch.equal(frozen, model(x))


def test_freezing_restores_layers():
    """After an error, nested, disabled, and for a layer that tracked nothing before."""
    model, x = make_net(), make_batch(0)[0]
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    layers[1].track_running_stats = False
    with pytest.raises(ValueError, match="body"), flatops.freeze_batchnorm_stats(model):
        with flatops.freeze_batchnorm_stats(model):
            pass
        model(x)
        raise ValueError("body")
    assert [layer.num_batches_tracked.item() for layer in layers] == [0, 0]
    with flatops.freeze_batchnorm_stats(model, enabled=False):
        model(x)
    assert [layer.num_batches_tracked.item() for layer in layers] == [1, 0]
