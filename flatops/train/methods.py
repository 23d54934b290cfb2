"""The methods: what each one adds to SGD, written out with the optimizers' explicit calls.

Every step leaves its gradient in `p.grad`; the engine then calls `optimizer.step()`, the same for all. A `Gradient` adds a batch's:
it knows about mixed precision, accumulation and processes, so that what stands here is the methods' formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

import flatops

from .config import METHOD_OPTIONS, TrainConfig
from .gradient import Gradient, Output
from .order import Batch

Options = dict[str, float | str]


def sgd(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: Gradient, batch: Batch) -> Output:
    """g = ∇L(w)"""
    return gradient(batch)


def rwp(model: nn.Module, optimizer: flatops.RWP, gradient: Gradient, batch: Batch) -> Output:
    """g = ∇L(w + ε), ε ~ N(0, σ²‖w_f‖²) in every filter f; ARWP: σ²/(1 + η·F_f)"""
    with optimizer.perturbed():
        return gradient(batch)


def mrwp(model: nn.Module, optimizer: flatops.RWP, gradient: Gradient, batch: Batch, other: Batch) -> Output:
    """g = (1 − λ)·∇L(w; batch) + λ·∇L(w + ε; other)"""
    return mixed(model, optimizer, gradient, batch, other)[0]


def mixed(
    model: nn.Module, optimizer: flatops.RWP, gradient: Gradient, batch: Batch, other: Batch
) -> tuple[Output, Output]:
    """m-RWP's clean and perturbed pass, one after the other."""
    clean = gradient(batch, optimizer.clean_weight)
    weight = optimizer.perturbed_weight
    with optimizer.perturbed(gradient.loss_scale(weight)), flatops.freeze_batchnorm_stats(model):
        return clean, gradient(other, weight)


def mrwp_in_halves(model: nn.Module, optimizer: flatops.RWP, gradient: Gradient, batch: Batch) -> Output:
    """m-RWP on the halves of one batch, the first clean: parallel m-RWP on one process"""
    halves = zip(*(tensor.chunk(2) for tensor in batch))
    clean, perturbed = mixed(model, optimizer, gradient, *halves)
    return Output((clean.loss + perturbed.loss) / 2, torch.cat([clean.logits, perturbed.logits]))


def mrwp_side_by_side(model: nn.Module, optimizer: flatops.RWP, gradient: Gradient, batch: Batch) -> Output:
    """m-RWP with a clean or a perturbed pass on each process, mixed by the all-reduce: parallel m-RWP"""
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model, optimizer.is_perturbed):
        return gradient(batch, optimizer.perturbed_weight)


def sam(
    model: nn.Module,
    optimizer: flatops.SAM,
    gradient: Gradient,
    batch: Batch,
    first_pass: Callable[[], AbstractContextManager] = nullcontext,
) -> Output:
    """g = ∇L(w + e), e = ρ·∇L(w)/‖∇L(w)‖; ASAM: e = ρ·w²·∇L(w)/‖|w|·∇L(w)‖; SSAM: e times a mask"""
    with first_pass():
        output = gradient(batch)
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
        gradient(batch)
    return output


def sam_local(model: nn.Module, optimizer: flatops.SAM, gradient: Gradient, batch: Batch) -> Output:
    """SAM's family with e from each process's own ∇L(w)"""
    return sam(model, optimizer, gradient, batch, lambda: optimizer.ascent_pass(model))


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    Args:
        label: its name in tables and plots.
        step: a training step up to the gradient, called as step(model, optimizer, gradient, *batches).
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
    share = config.batch_size // parts
    if share % config.accumulate:
        raise ValueError(f"a process's {share} images of a batch cannot be taken in accumulate {config.accumulate} equal pieces")
    if (config.mixup or config.cutmix) and config.batch_size // processes % 2:
        raise ValueError(f"mixup and cutmix pair images: batch_size {config.batch_size} gives a process an odd number")
    return method


def known_options(method: str) -> set[str]:
    """The options that mean something to a method."""
    known = set(find(method).options)
    return known | {f"{name}_end" for name in ("sigma", "rho") if name in known}


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


def with_method(config: TrainConfig, method: str) -> TrainConfig:
    """A run with another method: the options of its own go as far as they mean something to that one."""
    foreign = set(METHOD_OPTIONS) - known_options(method)
    forms = {
        "rwp_parallel": config.rwp_parallel and "lam" in METHODS[method].options,
        "ascent": config.ascent if "rho" in METHODS[method].options else "synced",
    }
    return replace(config, method=method, **dict.fromkeys(foreign), **forms)


def create_optimizer(
    params: Iterable[nn.Parameter], config: TrainConfig, steps_per_epoch: int = 1, processes: int = 1
) -> torch.optim.Optimizer:
    """The base optimizer, or the method's on top of it; a dynamic mask moves every `steps_per_epoch` steps.

    With `rwp_parallel` on several processes, each takes its role in m-RWP.

    Raises:
        ValueError: see used_options; also a value out of range (σ or ρ negative, λ outside [0, 1] …).
    """
    options = used_options(config)
    for name in ("sigma_end", "rho_end"):
        options.pop(name, None)
    base, own = torch.optim.AdamW, {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.base == "sgd":
        base = torch.optim.SGD
        own |= {"momentum": config.momentum, "nesterov": config.nesterov}
    if "mask" in options:
        options.pop("fisher_samples", None)
        if options["mask"] == "dynamic":
            options |= {"update_every": steps_per_epoch, "total_updates": config.epochs}
        return flatops.SSAM(params, base, seed=config.seed, **options, **own)
    if "sigma" in options:
        if config.rwp_parallel and processes > 1:
            options |= {"parallel": True}
        return flatops.RWP(params, base, seed=config.seed, **options, **own)
    if "rho" in options:
        return flatops.SAM(params, base, adaptive=config.method == "asam", **options, **own)
    return base(params, **own)
