"""One network on several processes, replicated or sharded by PyTorch; its state as one process would write it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flatops.distributed import is_distributed

State = dict[str, Any]


def distribute(model: nn.Module, kind: Literal["ddp", "fsdp"], device: torch.device) -> nn.Module:
    """The network to run: a DistributedDataParallel around `model`, or `model` itself, sharded in place by fully_shard.

    Collective. The optimizer is made afterwards, from the parameters that `model` then has.
    """
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    for module in [*units(model), model]:
        # The root too drops what it gathered: weights perturbed after an evaluation are to be gathered anew.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model


def units(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that are gathered one at a time: those with a matrix among the children, and in lists of them."""
    for child in model.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from units(child)
        elif any(p.dim() > 1 for p in child.parameters()):
            yield child


def whole(state: Any) -> Any:
    """A state with its shards gathered, on the CPU. Collective; without shards the very same values."""
    if isinstance(state, dict):
        gathered = copy.copy(state)  # a module's has attributes
        gathered.update((key, whole(value)) for key, value in state.items())
        return gathered
    return state.full_tensor().cpu() if isinstance(state, Tensor) and is_distributed(state) else state


def shard(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of `like`, as a DTensor; a plain one's is all of it."""
    if not is_distributed(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def load_model(model: nn.Module, state: State) -> None:
    """Load a model's whole state into the one that has its shards."""
    ours, sharded = model.state_dict(), copy.copy(state)
    sharded.update((name, shard(value, ours[name])) for name, value in state.items() if name in ours)
    model.load_state_dict(sharded)


def load_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Load an optimizer's whole state into the one that has its shards."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        i: {name: shard(v, params[i]) if isinstance(v, Tensor) else v for name, v in entry.items()}
        for i, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": sharded})
