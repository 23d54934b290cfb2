"""The methods: what each one adds to SGD, written out with the optimizers' explicit calls.

Every step leaves its gradient in `p.grad`; the engine then calls `optimizer.step()`, the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import flatops

from .config import METHOD_OPTIONS, TrainConfig
from .data import Batch


class Output(NamedTuple):
    """What a forward pass gives: the loss (scalar) and the logits (B, classes)."""

    loss: Tensor
    logits: Tensor


Forward = Callable[[Batch], Output]
Options = dict[str, float | str]


def sgd(model: nn.Module, optimizer: torch.optim.Optimizer, forward: Forward, batch: Batch) -> Output:
    """g = ∇L(w)"""
    output = forward(batch)
    output.loss.backward()
    return output


def rwp(model: nn.Module, optimizer: flatops.RWP, forward: Forward, batch: Batch) -> Output:
    """g = ∇L(w + ε), ε ~ N(0, σ²‖w_f‖²) in every filter f; ARWP: σ²/(1 + η·F_f)"""
    with optimizer.perturbed():
        output = forward(batch)
        output.loss.backward()
    return output


def mrwp(model: nn.Module, optimizer: flatops.RWP, forward: Forward, batch: Batch, other: Batch) -> Output:
    """g = (1 − λ)·∇L(w; batch) + λ·∇L(w + ε; other)"""
    output = forward(batch)
    (output.loss * optimizer.clean_weight).backward()
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
        (forward(other).loss * optimizer.perturbed_weight).backward()
    return output


def sam(model: nn.Module, optimizer: flatops.SAM, forward: Forward, batch: Batch) -> Output:
    """g = ∇L(w + e), e = ρ·∇L(w)/‖∇L(w)‖; ASAM: e = ρ·w²·∇L(w)/‖|w|·∇L(w)‖; SSAM: e times a mask"""
    output = forward(batch)
    output.loss.backward()
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
        forward(batch).loss.backward()
    return output


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    Args:
        label: its name in tables and plots.
        step: a training step up to the gradient, called as step(model, optimizer, forward, *batches).
        options: the method's options with the values they take where the user gives none, chosen on digits.
        batches: batches that a step takes, each from its own shuffle of the data.
    """

    label: str
    step: Callable[..., Output]
    options: Options
    batches: int = 1


METHODS = {
    "sgd": Method("SGD", sgd, {}),
    "rwp": Method("RWP", rwp, {"sigma": 0.03}),
    "mrwp": Method("m-RWP", mrwp, {"sigma": 0.05, "lam": 0.5}, batches=2),
    "arwp": Method("ARWP", rwp, {"sigma": 0.05, "eta": 0.1, "beta": 0.99}),
    "marwp": Method("m-ARWP", mrwp, {"sigma": 0.07, "lam": 0.5, "eta": 0.1, "beta": 0.99}, batches=2),
    "sam": Method("SAM", sam, {"rho": 0.15}),
    "asam": Method("ASAM", sam, {"rho": 1.0}),
    "ssam": Method(
        "SSAM",
        sam,
        {"rho": 0.2, "sparsity": 0.5, "mask": "fisher", "pattern": "global", "fisher_samples": 128},
    ),
}


def find(method: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    return METHODS[method]


def known_options(method: str) -> set[str]:
    """The options that mean something to a method."""
    known = set(find(method).options)
    return known | {"sigma_end"} if "sigma" in known else known


def used_options(config: TrainConfig) -> Options:
    """The method's options with the values of this run.

    Raises:
        ValueError: unknown method, or an option that means nothing to it.
    """
    given = {name: getattr(config, name) for name in METHOD_OPTIONS if getattr(config, name) is not None}
    foreign = sorted(set(given) - known_options(config.method))
    if foreign:
        raise ValueError(f"{config.method} has no option {', '.join(foreign)}")
    options = find(config.method).options | given
    for name, useless in (
        ("sparsity", ":" in options.get("pattern", "")),
        ("fisher_samples", options.get("mask") == "dynamic"),
    ):
        if useless and name not in given:
            del options[name]
        elif useless:
            raise ValueError(f"mask {options['mask']} with pattern {options['pattern']} has no option {name}")
    return options


def create_optimizer(
    params: Iterable[nn.Parameter], config: TrainConfig, steps_per_epoch: int = 1
) -> torch.optim.Optimizer:
    """SGD, or the method's optimizer on top of it; a dynamic mask moves every `steps_per_epoch` steps.

    Raises:
        ValueError: see used_options; also a value out of range (σ or ρ negative, λ outside [0, 1] …).
    """
    options = used_options(config)
    options.pop("sigma_end", None)
    base = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    if "mask" in options:
        options.pop("fisher_samples", None)
        if options["mask"] == "dynamic":
            options |= {"update_every": steps_per_epoch, "total_updates": config.epochs}
        return flatops.SSAM(params, torch.optim.SGD, seed=config.seed, **options, **base)
    if "sigma" in options:
        return flatops.RWP(params, torch.optim.SGD, seed=config.seed, **options, **base)
    if "rho" in options:
        return flatops.SAM(params, torch.optim.SGD, adaptive=config.method == "asam", **options, **base)
    return torch.optim.SGD(params, **base)
