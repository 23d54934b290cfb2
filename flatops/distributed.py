"""Replicas (DistributedDataParallel) and shards (FSDP2): what the algorithms need on top of torch.distributed.

A **replica** is a whole model: one process, or all processes that hold its shards. A **shard** is a range of rows along
dim 0. Functions are collective only if they say so; without torch.distributed, none communicates.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

M = TypeVar("M", bound="nn.Module | None")

# --- processes --------------------------------------------------------------------------------------------------------


def launched() -> tuple[int, int, int]:
    """This process's rank, the world size and the local rank, from torchrun's environment; (0, 1, 0) without it."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ.get("RANK", 0)), size, int(os.environ.get("LOCAL_RANK", 0))) if size > 1 else (0, 1, 0)


def world() -> tuple[int, int]:
    """This process's rank and the world size; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Sums tensors over all processes, in place. Collective."""
    for t in tensors if world()[1] > 1 else ():
        dist.all_reduce(t)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrites tensors with those of rank 0. Collective."""
    for t in tensors if world()[1] > 1 else ():
        dist.broadcast(t, src=0)


def gather_objects(mine: Any) -> list[Any]:
    """The objects of all processes, by rank. Collective."""
    everyone = [mine] * world()[1]
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises an exception of one process on all of them: the others would hang in their next collective. Collective."""
    error = None
    try:
        yield
    except Exception as e:
        error = e
    messages = gather_objects(f"{type(error).__name__}: {error}" if error else None)
    if error:
        raise error
    for rank, message in enumerate(messages):
        if message:
            raise RuntimeError(f"process {rank} raised {message}")


def from_first(make: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    """What `make` returns on rank 0, on all processes. Collective."""
    with together():
        first = world()[0] == 0
        made = make().to(device) if first else torch.empty(shape, dtype=dtype, device=device)
    broadcast([made])
    return made


def check_agreement(values: dict[str, Any], offer: Any = None) -> Any:
    """Raises on every process if they hold different values. Collective; about 100 bytes per value.

    Args:
        values: what must be equal on all processes, compared by repr.
        offer: an object that the others take from rank 0.

    Returns:
        The offer of rank 0.

    Raises:
        RuntimeError: naming the value, and two ranks that disagree on it.
    """

    def short(text: str) -> str:
        return text if len(text) < 100 else f"{text[:80]}... ({zlib.crc32(text.encode()):08x})"

    offers, everyone = zip(*gather_objects((offer, {name: short(repr(v)) for name, v in values.items()})))
    for name in {name: None for theirs in everyone for name in theirs}:
        for rank, theirs in enumerate(everyone):
            if theirs.get(name) != everyone[0].get(name):
                raise RuntimeError(
                    f"processes disagree on {name}: {everyone[0].get(name)} on process 0, {theirs.get(name)} on "
                    f"process {rank}. Build the same optimizer, load the same checkpoint and run every pass on all"
                )
    return offers[0]


# --- shards -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a parameter is distributed."""

    group: Any = None  # the process group over which it is sharded; None: each process has all of it
    members: int = 1  # of the group
    chunk: int = 0  # rows per shard; the last shards may be smaller, or empty
    first_row: int = 0  # of this process's shard
    replica: int = 0  # the replica that this process belongs to
    replicas: int = 1  # how many there are


def is_distributed(t: Tensor) -> bool:
    """Whether it is a DTensor, as parameters under FSDP2 are."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import; if nobody has, there are no DTensors
    return module is not None and isinstance(t, module.DTensor)


def local(t: Any) -> Tensor:
    """This process's shard of a DTensor, any other tensor itself; complex numbers as pairs of real ones."""
    return all_local([t])[0]


def all_local(tensors: Iterable[Any]) -> list[Tensor]:
    """`local` of each."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None:
        tensors = [t._local_tensor if isinstance(t, module.DTensor) else t for t in tensors]
    return [torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t for t in tensors]


def real_shape(p: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, complex numbers as pairs of real ones."""
    return (*p.shape, 2) if p.is_complex() else tuple(p.shape)


def own(grad: Tensor) -> Tensor:
    """The gradient, or a copy if it is a view into the buckets of DistributedDataParallel, which overwrites them."""
    return grad.clone() if grad._is_view() else grad


def any_distributed(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def by_group(params: list[Tensor]) -> dict[Any, list[int]]:
    """Process group -> positions of the parameters sharded over it; None -> those of the others."""
    if not any_distributed(params):
        return {None: list(range(len(params)))}
    groups: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        groups.setdefault(layout(p).group, []).append(i)
    return groups


def _layout(mesh: Any, placements: tuple[Any, ...], rows: int) -> Layout:
    rank = mesh.get_coordinate()
    dims = [d for d, placement in enumerate(placements) if placement.is_shard()]
    replica, replicas = 0, 1
    for d in range(mesh.ndim):
        if d not in dims:
            replica, replicas = replica * mesh.size(d) + rank[d], replicas * mesh.size(d)
    if not dims:
        return Layout(replica=replica, replicas=replicas)
    (d,) = dims
    chunk = -(-rows // mesh.size(d))  # as torch.chunk does
    return Layout(mesh.get_group(d), mesh.size(d), chunk, min(rank[d] * chunk, rows), replica, replicas)


_layouts: dict[int, tuple[weakref.ref[Any], dict[tuple[Any, ...], Layout]]] = {}


def _layouts_of(mesh: Any) -> dict[tuple[Any, ...], Layout]:
    """The cache of this mesh, by identity: it may equal a mesh whose process groups have been destroyed."""
    i = id(mesh)
    if i not in _layouts:
        _layouts[i] = weakref.ref(mesh, lambda _: _layouts.pop(i, None)), {}
    return _layouts[i][1]


def layout(p: Tensor) -> Layout:
    """How a parameter is distributed."""
    if is_distributed(p):
        known = _layouts_of(p.device_mesh)
        key = (tuple(p.placements), p.shape[0] if p.dim() else 1)
        if key not in known:
            known[key] = _layout(p.device_mesh, *key)
        return known[key]
    replica, replicas = world()
    return Layout(replica=replica, replicas=replicas)


_MARKS = {  # attributes that engines set on parameters that they flatten
    "_is_flat_param": "FullyShardedDataParallel",
    "_fsdp_flattened": "FullyShardedDataParallel",  # use_orig_params=True
    "ds_id": "DeepSpeed",  # ZeRO-3
}


def check_layout(p: Tensor, name: str) -> None:
    """Raises ValueError for a flattened parameter, which has no filters, and for placements other than FSDP2's."""
    engine = next((engine for mark, engine in _MARKS.items() if hasattr(p, mark)), None)
    if engine is None and type(p).__name__ == "FlatParameter":  # fairscale's and XLA's
        engine = type(p).__module__
    if engine is not None:
        raise ValueError(
            f"{name} is flattened by {engine} and its filters are lost: use fully_shard, which keeps parameters' rows"
        )
    if not is_distributed(p):
        return
    if p.is_complex():
        raise ValueError(f"{name} is complex and sharded: make its real and imaginary parts two parameters")
    shards = [placement for placement in p.placements if not placement.is_replicate()]
    # By the class's name: _StridedShard (FSDP over tensor parallelism) inherits from Shard.
    if len(shards) > 1 or any(type(s).__name__ != "Shard" or s.dim != 0 for s in shards):
        raise ValueError(
            f"{name} has placements {tuple(p.placements)}: only one Shard(0), as made by fully_shard, and Replicate() "
            "are supported; leave tensor parallelism out"
        )


def check_params(params: list[Any], given: bool) -> None:
    """Raises if an engine has replaced the optimizer's parameters since it was built.

    Args:
        params: what the optimizer holds now.
        given: whether it was built from `nn.Parameter`s only.

    Raises:
        ValueError: as `check_layout`; or if they are no longer parameters, or gone.
    """
    for i, p in enumerate(params):
        check_layout(p, f"params[{i}]")
    if given and not (params and all(isinstance(p, nn.Parameter) for p in params)):
        raise ValueError(
            "the parameters that the optimizer was given are no longer in it: an engine such as DeepSpeed, Megatron or "
            "apex has replaced them by copies that no forward reads. Use DistributedDataParallel or fully_shard"
        )


def shard_of(p: Tensor, whole: Tensor) -> Tensor:
    """A view of those rows of `whole` that this process holds of `p`; the shard itself if `whole` is a DTensor too."""
    at = layout(p)
    if at.group is None or is_distributed(whole):
        return local(whole)
    return whole.narrow(0, at.first_row, len(local(p)))


def like_shard(p: Tensor, mine: Tensor, *shape: int) -> Tensor:
    """A tensor of this global shape, sharded as `p` is, whose shard on this process is `mine`."""
    if not is_distributed(p):
        return mine
    from torch.distributed.tensor import DTensor

    size, stride = torch.Size(shape), torch.empty(shape, device="meta").stride()
    return DTensor.from_local(mine, p.device_mesh, p.placements, run_check=False, shape=size, stride=stride)


def whole(p: Tensor, mine: Tensor) -> Tensor:
    """The whole tensor, sharded as `p` is, whose shard on this process is `mine`. Collective if `p` is sharded."""
    if layout(p).group is None:
        return mine
    boolean = mine.dtype == torch.bool
    full = like_shard(p, mine.to(torch.uint8) if boolean else mine, *p.shape[: mine.dim()]).full_tensor()
    return full.bool() if boolean else full


def gather(params: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """The whole of small sharded tensors, by one all-gather for the list. Collective.

    Args:
        params: sharded parameters, all over one group.
        values: for each of them this process's shard of a one-dimensional tensor, all of one dtype.
    """
    at = [layout(p) for p in params]
    mine = values[0].new_zeros(sum(a.chunk for a in at))
    torch._foreach_copy_([room[: len(v)] for room, v in zip(mine.split([a.chunk for a in at]), values)], values)
    all_of_it = mine.new_empty(at[0].members * len(mine))
    dist.all_gather_into_tensor(all_of_it, mine, group=at[0].group)
    shards = all_of_it.view(at[0].members, -1).split([a.chunk for a in at], dim=1)
    return [s.contiguous().view(-1)[: p.shape[0]] for p, s in zip(params, shards)]


# --- modules ----------------------------------------------------------------------------------------------------------


def sharded_modules() -> list[weakref.ref[Any]]:
    """Every module under fully_shard in this process; a parameter does not know its module."""
    from torch.distributed.fsdp import FSDPModule

    try:
        from torch.distributed._composable_state import _module_state_mapping

        registered: list[Any] = list(_module_state_mapping)
    except ImportError:  # it is private; without it, look through all objects
        registered = gc.get_objects()
    return [weakref.ref(m) for m in registered if issubclass(type(m), FSDPModule)]


def reshard(modules: list[weakref.ref[Any]]) -> None:
    """Drops the gathered weights that a forward without a backward leaves behind; the next forward gathers them anew.

    Unlike Module.reshard(), also for a module whose forward raised an exception.
    """
    for group in _param_groups(modules):
        if group._all_gather_result is not None:  # prefetched
            group.wait_for_unshard()
        group._to_sharded()


def _param_groups(modules: list[weakref.ref[Any]]) -> Iterator[Any]:
    for module in filter(None, (reference() for reference in modules)):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        yield from (group for group in groups if group is not None)


def check_reduced(modules: list[weakref.ref[Any]], params: Iterable[Tensor], what: str) -> None:
    """Raises RuntimeError if fully_shard has not reduced all gradients of these parameters into p.grad.

    Args:
        modules: those under fully_shard.
        params: the parameters.
        what: needs their gradients; for the message.
    """
    needed = set(map(id, params))

    def held(one: Any) -> bool:
        unsharded = getattr(one, "_unsharded_param", None)  # made by the first forward
        return one.unsharded_accumulated_grad is not None or (unsharded is not None and unsharded.grad is not None)

    for group in _param_groups(modules):
        part = [one for one in group.fsdp_params if id(one.sharded_param) in needed]
        if part and (group._partial_reduce_output is not None or any(map(held, part))):
            raise RuntimeError(
                f"{what} needs gradients that fully_shard has not reduced yet: keep set_requires_gradient_sync(True) "
                "in every pass (accelerate and Trainer: gradient accumulation with sync_each_batch=True)"
            )


def is_offloaded(params: Iterable[Tensor]) -> bool:
    """Whether FSDP keeps shards in the host's memory and computes elsewhere, so that copies may be under way."""
    return any(is_distributed(p) and local(p).device.type == "cpu" != p.device_mesh.device_type for p in params)


def undecorated(model: M) -> M:
    """The module under torch.compile's wrapper, if there is one."""
    return getattr(model, "_orig_mod", model)


def is_sharded_module(model: nn.Module) -> bool:
    """Whether fully_shard has been applied to a module or one of its submodules."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(isinstance(m, module.FSDPModule) for m in model.modules())
