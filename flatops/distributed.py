"""Parameters that several processes hold: replicas (DistributedDataParallel) and shards (FSDP2). torch.distributed does the rest.

A **replica** is a whole model: one process, or all the processes that hold its shards. A **shard** is a run of rows along dim 0.
Everything here is a collective call only where it says so, and nothing at all without torch.distributed.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# --- processes -----------------------------------------------------------------------------------------------------------


def world() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Sums tensors over all processes in place, where there are any."""
    for t in tensors if world()[1] > 1 else ():
        dist.all_reduce(t)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """The first process's tensors, in place, where there are others."""
    for t in tensors if world()[1] > 1 else ():
        dist.broadcast(t, src=0)


def from_first(make: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    """What `make` gives on the first process, on all of them; and what it raises there, everywhere. Collective."""
    rank, size = world()
    made, error = None, [None]
    if rank == 0:
        try:
            made = make().to(device)
        except Exception as e:  # the others would wait for ever
            error = [e]
    if size > 1:
        dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]
    if made is None:
        made = torch.empty(shape, dtype=dtype, device=device)
    broadcast([made])
    return made


def check_agreement(values: dict[str, Any], device: torch.device) -> None:
    """Raises on every process, naming the value, where two have different ones. Collective; a few bytes a value.

    Args:
        values: what all should agree on, with a meaningful repr.
        device: where the process group can send from.

    Raises:
        RuntimeError: naming what differs, and between whom.
    """
    size = world()[1]
    if size == 1:
        return
    mine = torch.tensor([zlib.crc32(repr(v).encode()) for v in values.values()], device=device)
    each = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(each, mine)
    if all(torch.equal(other, each[0]) for other in each):
        return
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, {name: repr(v) for name, v in values.items()})
    for name in values:
        for other, theirs in enumerate(everyone):
            if theirs[name] != everyone[0][name]:
                shown = [text if len(text) < 100 else text[:100] + "..." for text in (everyone[0][name], theirs[name])]
                raise RuntimeError(
                    f"processes disagree on {name}: {shown[0]} on process 0, {shown[1]} on process {other}. They must build the "
                    "same optimizer, and load the same checkpoint"
                )


# --- shards --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a parameter lies over the processes."""

    group: Any = None  # the process group whose members hold its shards, or None: each process has all of it
    members: int = 1  # of that group
    chunk: int = 0  # rows in a shard; the last ones may be smaller, or empty
    first_row: int = 0  # of this process's shard
    replica: int = 0  # which of ...
    replicas: int = 1  # ... how many whole parameters this process's is a part of


def is_distributed(t: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2's parameters are."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes long, and without it there are none
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """This process's part of a tensor, without autograd; itself where it has all of it. Always the same object."""
    return t._local_tensor if is_distributed(t) else t


def all_local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return list(tensors)
    return [t._local_tensor if isinstance(t, module.DTensor) else t for t in tensors]


def any_distributed(tensors: Iterable[Tensor]) -> bool:
    """Whether there is a DTensor among them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def by_group(params: list[Tensor]) -> dict[Any, list[int]]:
    """The positions of the parameters that are sharded over a process group, for each; those of the others under None."""
    if not any_distributed(params):
        return {None: list(range(len(params)))}
    groups: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        groups.setdefault(layout(p).group, []).append(i)
    return groups


@functools.lru_cache(maxsize=None)
def _layout(mesh: Any, placements: tuple, rows: int) -> Layout:
    rank = mesh.get_coordinate()
    dims = [d for d, placement in enumerate(placements) if placement.is_shard()]
    replica, replicas = 0, 1
    for d in range(mesh.ndim):
        if d not in dims:
            replica, replicas = replica * mesh.size(d) + rank[d], replicas * mesh.size(d)
    if not dims:
        return Layout(replica=replica, replicas=replicas)
    (d,) = dims
    chunk = -(-rows // mesh.size(d))  # as torch.chunk cuts
    return Layout(mesh.get_group(d), mesh.size(d), chunk, min(rank[d] * chunk, rows), replica, replicas)


def layout(p: Tensor) -> Layout:
    """Where a parameter's rows are."""
    if is_distributed(p):
        return _layout(p.device_mesh, tuple(p.placements), p.shape[0] if p.dim() else 1)
    replica, replicas = world()
    return Layout(replica=replica, replicas=replicas)


def check_layout(p: Tensor, name: str) -> None:
    """Raises for a DTensor of any other placements than FSDP2's.

    Raises:
        ValueError: naming the parameter and its placements.
    """
    if not is_distributed(p):
        return
    shards = [placement for placement in p.placements if not placement.is_replicate()]
    # _StridedShard, which FSDP makes of what tensor parallelism has cut before, inherits from Shard.
    right = all(type(s).__name__ == "Shard" and s.dim == 0 for s in shards) and len(shards) <= 1
    if not right:
        raise ValueError(
            f"{name} has placements {tuple(p.placements)}: only one Shard(0), as fully_shard makes it, and Replicate() are "
            "supported, no tensor parallelism"
        )


def shard_of(p: Tensor, whole: Tensor) -> Tensor:
    """The rows of a whole tensor that this process holds of `p`: a view. What is distributed as `p` is has them."""
    at = layout(p)
    if at.group is None or is_distributed(whole):
        return local(whole)
    return whole.narrow(0, at.first_row, len(local(p)))


def like_shard(p: Tensor, mine: Tensor, *shape: int) -> Tensor:
    """A tensor of this global shape, laid out as `p` is along dim 0, of which this process holds `mine`."""
    if not is_distributed(p):
        return mine
    from torch.distributed.tensor import DTensor

    size, stride = torch.Size(shape), torch.empty(shape, device="meta").stride()
    return DTensor.from_local(mine, p.device_mesh, p.placements, run_check=False, shape=size, stride=stride)


def whole(p: Tensor, mine: Tensor) -> Tensor:
    """All rows of what each process has as `mine`, laid out as `p` is. Collective where it is sharded."""
    if layout(p).group is None:
        return mine
    boolean = mine.dtype == torch.bool
    full = like_shard(p, mine.to(torch.uint8) if boolean else mine, *p.shape[: mine.dim()]).full_tensor()
    return full.bool() if boolean else full


def gather(params: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """The whole of what each process has a shard of: one all-gather for the list. Meant for what is small.

    Args:
        params: sharded parameters, all over one group.
        values: this process's part of a tensor along each one's dim 0, of one dtype.
    """
    at = [layout(p) for p in params]
    mine = values[0].new_zeros(sum(a.chunk for a in at))
    for room, v in zip(mine.split([a.chunk for a in at]), values):
        room[: len(v)] = v
    all_of_it = mine.new_empty(at[0].members * len(mine))
    dist.all_gather_into_tensor(all_of_it, mine, group=at[0].group)
    shards = all_of_it.view(at[0].members, -1).split([a.chunk for a in at], dim=1)
    return [s.contiguous().view(-1)[: p.shape[0]] for p, s in zip(params, shards)]


# --- modules -------------------------------------------------------------------------------------------------------------


def sharded_modules() -> list[weakref.ref]:
    """Every module under fully_shard in this process. A parameter does not know its module, so all objects are looked through."""
    from torch.distributed.fsdp import FSDPModule

    return [weakref.ref(m) for m in gc.get_objects() if issubclass(type(m), FSDPModule)]


def reshard(modules: list[weakref.ref]) -> None:
    """Drops gathered copies of the weights, which a forward without a backward leaves behind: the next forward gathers anew."""
    for reference in modules:
        module = reference()
        if module is not None:
            module.reshard()


def is_sharded_module(model: nn.Module) -> bool:
    """Whether fully_shard has been applied to a module or something in it."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(isinstance(m, module.FSDPModule) for m in model.modules())
