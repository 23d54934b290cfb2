"""One network on several processes, replicated or sharded by PyTorch, and its full state dict."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flatops.distributed import is_distributed, like_shard, shard_of, world

State = dict[str, Any]


def distribute(model: nn.Module, kind: Literal["ddp", "fsdp"], device: torch.device) -> nn.Module:
    """The network to run: a DistributedDataParallel around `model`, or `model` itself, sharded in place by fully_shard.

    Collective. Create the optimizer afterwards, from the new parameters.
    """
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    from torch.distributed.device_mesh import init_device_mesh  # slow to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world()[1],))
    for module in [*units(model), model]:
        # The root too: weights that are perturbed after an evaluation must be gathered again.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model


def units(model: nn.Module) -> Iterator[nn.Module]:
    """The layers to gather one at a time: children with a matrix, including those in containers."""
    for child in model.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from units(child)
        elif any(p.dim() > 1 for p in child.parameters()):
            yield child


def full_state(state: Any) -> Any:
    """A state dict with its shards gathered on the CPU; other values are unchanged. Collective."""
    if isinstance(state, dict):
        full = copy.copy(state)  # a module's has attributes
        full.update((key, full_state(value)) for key, value in state.items())
        return full
    return state.full_tensor().cpu() if isinstance(state, Tensor) and is_distributed(state) else state


def sharded(value: Any, like: Tensor) -> Any:
    """Shard a full tensor like `like`, if that is sharded and of the same shape; other values are unchanged."""
    if not (isinstance(value, Tensor) and is_distributed(like) and value.shape == like.shape):
        return value
    return like_shard(like, shard_of(like, value.to(like.device)).clone(), *value.shape)


def load_model(model: nn.Module, state: State) -> None:
    """Load a full state dict into a model, which may be sharded."""
    ours, shards = model.state_dict(), copy.copy(state)
    shards.update((name, sharded(value, ours[name])) for name, value in state.items() if name in ours)
    model.load_state_dict(shards)


def load_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Load a full state dict into an optimizer, whose parameters may be sharded."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    shards = {i: {name: sharded(v, params[i]) for name, v in entry.items()} for i, entry in state["state"].items()}
    optimizer.load_state_dict({**state, "state": shards})
