"""A run's optimizer, and the gradient of one step.

Functions that take a batch leave the step's gradient in `p.grad`; the engine then calls `optimizer.step()`. Each pass
is one call of a `Gradient`, which handles mixed precision, gradient accumulation and several processes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

import flatops
from flatops.methods import find

from .config import TrainConfig, used_options
from .gradient import Gradient, Output
from .order import Batch


def create_optimizer(
    params: Iterable[nn.Parameter], config: TrainConfig, steps_per_epoch: int = 1, processes: int = 1
) -> torch.optim.Optimizer:
    """The method's optimizer, or the base optimizer alone; a dynamic mask is updated every `steps_per_epoch` steps.

    With `rwp_parallel` on several processes, each takes its role in parallel m-RWP.

    Raises:
        ValueError: an option that does not apply, or is out of range (σ or ρ negative, λ outside [0, 1] …).
    """
    method, options = find(config.method), used_options(config)
    for name in ("sigma_end", "rho_end", "fisher_samples"):  # used by the engine
        options.pop(name, None)
    base, own = torch.optim.AdamW, {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.base == "sgd":
        base = torch.optim.SGD
        own |= {"momentum": config.momentum, "nesterov": config.nesterov}
    if method.optimizer is None:
        return base(params, **own)
    if options.get("mask") == "dynamic":
        options |= {"update_every": steps_per_epoch, "total_updates": config.epochs}
    if config.rwp_parallel and processes > 1:
        options["parallel"] = True
    if "seed" in inspect.signature(method.optimizer.__init__).parameters:  # SAM has no randomness
        options["seed"] = config.seed
    return method.optimizer(params, base, **method.fixed, **options, **own)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: Gradient, batch: Batch) -> Output:
    """SGD: g = ∇L(w)"""
    return gradient(batch)


def passes(model: nn.Module, optimizer: flatops.RWP | flatops.SAM, gradient: Gradient, batch: Batch) -> Output:
    """The optimizer's passes over one batch: perturbed for RWP; clean, then perturbed for SAM"""
    outputs = []
    for one_pass in flatops.passes(optimizer, model):
        with one_pass:
            outputs.append(gradient(batch))
    return outputs[0]


def local_ascent(model: nn.Module, optimizer: flatops.SAM, gradient: Gradient, batch: Batch) -> Output:
    """SAM: g = ∇L(w + e), where each process's e is along the gradient of its share of the batch"""
    with optimizer.ascent_pass(model):
        output = gradient(batch)
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model):
        gradient(batch)
    return output


def mixed(model: nn.Module, optimizer: flatops.RWP, gradient: Gradient, clean: Batch, perturbed: Batch) -> list[Output]:
    """m-RWP: g = (1 − λ)·∇L(w; clean) + λ·∇L(w + ε; perturbed), one pass after the other; returns both outputs"""
    first = gradient(clean, optimizer.clean_weight)
    weight = optimizer.perturbed_weight
    with optimizer.perturbed(gradient.loss_scale(weight)), flatops.freeze_batchnorm_stats(model):
        return [first, gradient(perturbed, weight)]


def mixed_batches(model: nn.Module, optimizer: flatops.RWP, gradient: Gradient, *batches: Batch) -> Output:
    """m-RWP on two batches"""
    return mixed(model, optimizer, gradient, *batches)[0]


def mixed_halves(model: nn.Module, optimizer: flatops.RWP, gradient: Gradient, batch: Batch) -> Output:
    """m-RWP on the halves of one batch: parallel m-RWP on one process"""
    losses, logits = zip(*mixed(model, optimizer, gradient, *zip(*(tensor.chunk(2) for tensor in batch))))
    return Output(sum(losses) / 2, torch.cat(logits))


def mixed_processes(model: nn.Module, optimizer: flatops.RWP, gradient: Gradient, batch: Batch) -> Output:
    """m-RWP with a clean or a perturbed pass on each process, mixed by the all-reduce: parallel m-RWP"""
    with optimizer.perturbed(), flatops.freeze_batchnorm_stats(model, optimizer.is_perturbed):
        return gradient(batch, optimizer.perturbed_weight)


class Form(NamedTuple):
    """How a run computes a step's gradient, `take(model, optimizer, gradient, *batches)`, from how many batches."""

    take: Callable[..., Output]
    batches: int = 1


def choose(config: TrainConfig, processes: int = 1) -> Form:
    """The form of a run's steps on this many processes.

    Raises:
        ValueError: unknown method, an option that does not apply to it, or a batch that cannot be divided evenly.
    """
    method, parts = find(config.method), processes
    if config.ascent == "local" and not method.ascends:
        raise ValueError(f"{config.method} has no option ascent")
    if config.rwp_parallel and method.batches != 2:
        raise ValueError(f"{config.method} has no option rwp_parallel")
    if config.rwp_parallel:
        parts, form = max(2, processes), Form(mixed_processes if processes > 1 else mixed_halves)
    elif method.batches == 2:
        form = Form(mixed_batches, 2)
    elif config.ascent == "local" and processes > 1:  # a single process's share is the whole batch
        form = Form(local_ascent)
    else:
        form = Form(passes if method.optimizer else plain)
    if config.batch_size % parts:
        what = "processes" if processes > 1 else "halves"
        raise ValueError(f"batch_size {config.batch_size} cannot be divided evenly among {parts} {what}")
    share = config.batch_size // parts
    if share % config.accumulate:
        raise ValueError(f"accumulate {config.accumulate} does not divide a process's {share} images of a batch")
    if (config.mixup or config.cutmix) and config.batch_size // processes % 2:
        raise ValueError(f"mixup and cutmix pair images: batch_size {config.batch_size} gives a process an odd number")
    return form
