"""The methods: what each one adds to SGD, written out with the optimizers' explicit calls.

Every step leaves its gradient in `p.grad`; the engine then calls `optimizer.step()`, the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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
    return mixed(model, optimizer, forward, batch, other)[0]


def mixed(
    model: nn.Module, optimizer: flatops.RWP, forward: Forward, batch: Batch, other: Batch
) -> tuple[Output, Output]:
    """m-RWP's clean and perturbed pass, one after the other."""
    clean = forward(batch)
    (clean.loss * optimizer.clean_weight).backward()
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
        perturbed = forward(other)
        (perturbed.loss * optimizer.perturbed_weight).backward()
    return clean, perturbed


def mrwp_in_halves(model: nn.Module, optimizer: flatops.RWP, forward: Forward, batch: Batch) -> Output:
    """m-RWP on the halves of one batch, the first clean: parallel m-RWP on one process"""
    halves = zip(*(tensor.chunk(2) for tensor in batch))
    clean, perturbed = mixed(model, optimizer, forward, *halves)
    return Output((clean.loss + perturbed.loss) / 2, torch.cat([clean.logits, perturbed.logits]))


def mrwp_side_by_side(model: nn.Module, optimizer: flatops.RWP, forward: Forward, batch: Batch) -> Output:
    """m-RWP with a clean or a perturbed pass on each process, mixed by the all-reduce: parallel m-RWP"""
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model, optimizer.is_perturbed):
        output = forward(batch)
        (output.loss * optimizer.perturbed_weight).backward()
    return output


def sam(
    model: nn.Module,
    optimizer: flatops.SAM,
    forward: Forward,
    batch: Batch,
    first_pass: Callable[[], AbstractContextManager] = nullcontext,
) -> Output:
    """g = ∇L(w + e), e = ρ·∇L(w)/‖∇L(w)‖; ASAM: e = ρ·w²·∇L(w)/‖|w|·∇L(w)‖; SSAM: e times a mask"""
    with first_pass():
        output = forward(batch)
        output.loss.backward()
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
        forward(batch).loss.backward()
    return output


def sam_local(model: nn.Module, optimizer: flatops.SAM, forward: Forward, batch: Batch) -> Output:
    """SAM's family with e from each process's own ∇L(w)"""
    return sam(model, optimizer, forward, batch, lambda: optimizer.ascent_pass(model))


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


def choose(config: TrainConfig, processes: int = 1) -> Method:
    """The method in the form in which a run takes its steps on so many processes.

    Raises:
        ValueError: unknown method, a form that it does not have, or a batch that cannot be shared out.
    """
    method = find(config.method)
    parts = processes
    if config.ascent == "local":
        if "rho" not in method.options:
            raise ValueError(f"{config.method} has no option ascent")
        if processes > 1:  # one alone has but one gradient to climb along
            method = replace(method, step=sam_local)
    if config.rwp_parallel:
        if "lam" not in method.options:
            raise ValueError(f"{config.method} has no option rwp_parallel")
        parts = max(2, processes)
        step = mrwp_side_by_side if processes > 1 else mrwp_in_halves
        method = replace(method, step=step, batches=1)
    if config.batch_size % parts:
        what = "processes" if processes > 1 else "halves"
        raise ValueError(f"batch_size {config.batch_size} cannot be shared out evenly over {parts} {what}")
    return method


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
    params: Iterable[nn.Parameter], config: TrainConfig, steps_per_epoch: int = 1, processes: int = 1
) -> torch.optim.Optimizer:
    """SGD, or the method's optimizer on top of it; a dynamic mask moves every `steps_per_epoch` steps.

    With `rwp_parallel` on several processes, each takes its role in m-RWP.

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
        if config.rwp_parallel and processes > 1:
            options |= {"parallel": True}
        return flatops.RWP(params, torch.optim.SGD, seed=config.seed, **options, **base)
    if "rho" in options:
        return flatops.SAM(params, torch.optim.SGD, adaptive=config.method == "asam", **options, **base)
    return torch.optim.SGD(params, **base)
