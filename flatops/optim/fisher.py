"""The empirical Fisher information, summed over single samples."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flatops import distributed, ops
from flatops.distributed import local
from flatops.scalars import on

Gradients = Iterator[dict[Tensor, Tensor]]  # per sample, parameter -> gradient; without those the loss does not use


def sample_fisher(
    parts: list[list[Tensor]],
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    samples: int,
    vectorize: bool,
    progress: bool,
) -> dict[Tensor, Tensor]:
    """The empirical Fisher of every parameter, the sum of g^2 over single samples; see `SSAM.update_mask`.

    `parts` holds one list of parameters per device. Of a sharded parameter each process gets the Fisher of its shard.
    """
    params = [p for part in parts for p in part]
    model = distributed.undecorated(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # its own forward would prepare an all-reduce
    devices = sorted({p.device.index for p in params if p.device.type == "cuda"})
    gradients = _vectorized if vectorize else _one_by_one
    if distributed.is_sharded_module(model):
        if vectorize:
            raise ValueError("vectorize=True does not work with fully_shard, whose shards torch.func cannot handle")
        gradients = _by_shards
    done = 0
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices),
        _evaluating(model),
        _bar(samples, progress) as show,
    ):
        fisher = {p: torch.zeros_like(local(p), dtype=torch.float32, requires_grad=False) for p in params}
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"batches must hold pairs (inputs, targets), not {type(batch).__name__}")
            x, y = pytree.tree_map(lambda value: on(params[0].device, value), tuple(batch))
            size = min(_length(x), samples - done)
            if gradients is _by_shards and not done:
                sums = [v.double().sum().item() for v in pytree.tree_leaves((x, y)) if isinstance(v, Tensor)]
                distributed.check_agreement({"batches, which fully_shard needs to be the same on all": (size, sums)})
            x, y = _rows((x, y), slice(size))
            for grads in gradients(params, model, loss_fn, x, y, size):
                for part in parts:
                    if reached := [p for p in part if p in grads]:
                        ops.fisher_([fisher[p] for p in reached], [local(grads[p]) for p in reached])
                done += 1
                show(done)
            if done == samples:
                return fisher
    raise ValueError(f"batches holds {done} samples and {samples} are asked for" if done else "batches is empty")


def _length(inputs: Any) -> int:
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise TypeError("inputs must hold a tensor whose first dimension counts the samples")


def _rows(values: Any, which: slice) -> Any:
    return pytree.tree_map(lambda value: value[which] if isinstance(value, Tensor) and value.dim() else value, values)


def _one_by_one(
    params: list[Tensor], model: nn.Module, loss_fn: Callable[..., Tensor], x: Any, y: Any, size: int
) -> Gradients:
    for i in range(size):
        one, target = _rows((x, y), slice(i, i + 1))
        grads = torch.autograd.grad(loss_fn(model(one), target), params, allow_unused=True)
        yield {p: g for p, g in zip(params, grads) if g is not None}


def _by_shards(
    params: list[Tensor], model: nn.Module, loss_fn: Callable[..., Tensor], x: Any, y: Any, size: int
) -> Gradients:
    # FSDP2's backward() averages gradients over processes, so every process must have the same samples.
    kept = [(p, p.grad) for p in {*params, *model.parameters()}]
    modules = distributed.sharded_modules()
    distributed.check_reduced(modules, params, "update_mask()")
    try:
        for i in range(size):
            for p, _ in kept:
                p.grad = None
            one, target = _rows((x, y), slice(i, i + 1))
            loss_fn(model(one), target).backward()
            distributed.check_reduced(modules, params, "update_mask()")
            yield {p: p.grad for p in params if p.grad is not None}
    finally:
        for p, grad in kept:
            p.grad = grad


def _vectorized(
    params: list[Tensor], model: nn.Module, loss_fn: Callable[..., Tensor], x: Any, y: Any, size: int
) -> Gradients:
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    wanted = {names[p]: p.detach() for p in params if p in names}
    shapes = pytree.tree_map(lambda value: 0 if isinstance(value, Tensor) and value.dim() else None, (x, y))

    def loss(weights: dict[str, Tensor], x: Any, y: Any) -> Tensor:
        one, target = (
            pytree.tree_map(lambda v, dim: v if dim is None else v[None], value, dims)
            for value, dims in zip((x, y), shapes)
        )
        return loss_fn(torch.func.functional_call(model, weights, (one,)), target)

    if size:
        grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *shapes))(wanted, x, y)
        for i in range(size):
            yield {p: grads[names[p]][i] for p in params if p in names}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode: a batch of one sample has no statistics, and dropout adds noise."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on rank 0 that appears after two seconds and disappears at the end."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
    task = bar.add_task("Fisher", total=total)
    start = time.monotonic()
    wanted = wanted and distributed.world()[0] == 0 and bar.console.is_terminal

    def show(done: int) -> None:
        bar.update(task, completed=done)
        if wanted and not bar.live.is_started and time.monotonic() - start > 2:
            bar.start()

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
