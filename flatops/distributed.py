"""Parameters that several processes hold: replicas (DistributedDataParallel) and shards (FSDP2). torch.distributed does the rest.

A **replica** is a whole model: one process, or all the processes that hold its shards. A **shard** is a run of rows along dim 0.
Everything here is a collective call only where it says so, and nothing at all without torch.distributed.
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

# --- processes -----------------------------------------------------------------------------------------------------------


def launched() -> tuple[int, int, int]:
    """This process's rank, the world size and its local rank, from torchrun's environment; (0, 1, 0) without it."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ.get("RANK", 0)), size, int(os.environ.get("LOCAL_RANK", 0))) if size > 1 else (0, 1, 0)


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


def gather_objects(mine: Any) -> list[Any]:
    """What every process has, by rank. Collective."""
    everyone = [mine] * world()[1]
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is raised within on one process is raised on all: the others would wait for it in the next exchange. Collective."""
    error = None
    try:
        yield
    except Exception as e:
        error = e
    said = gather_objects(f"{type(error).__name__}: {error}" if error else None)
    if error:
        raise error
    for rank, message in enumerate(said):
        if message:
            raise RuntimeError(f"process {rank} raised {message}")


def from_first(make: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    """What `make` gives on the first process, on all of them. Collective."""
    with together():
        first = world()[0] == 0
        made = make().to(device) if first else torch.empty(shape, dtype=dtype, device=device)
    broadcast([made])
    return made


def check_agreement(values: dict[str, Any], offer: Any = None) -> Any:
    """Raises on every process, naming the value, where two have different ones. Collective; some 100 bytes a value.

    Args:
        values: what all should agree on, with a meaningful repr.
        offer: what others take from this process, if it is the first.

    Returns:
        What the first process offers.

    Raises:
        RuntimeError: naming what differs, and between whom.
    """

    def short(text: str) -> str:
        return text if len(text) < 100 else f"{text[:80]}... ({zlib.crc32(text.encode()):08x})"

    offers, everyone = zip(*gather_objects((offer, {name: short(repr(v)) for name, v in values.items()})))
    for name in {name: None for theirs in everyone for name in theirs}:
        for rank, theirs in enumerate(everyone):
            if theirs.get(name) != everyone[0].get(name):
                raise RuntimeError(
                    f"processes disagree on {name}: {everyone[0].get(name)} on process 0, {theirs.get(name)} on process {rank}. "
                    "They must build the same optimizer, load the same checkpoint and take every perturbed pass together"
                )
    return offers[0]


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


def local(t: Any) -> Tensor:
    """This process's part of a tensor, without autograd, complex numbers as pairs of real ones; itself where it has all of it."""
    return all_local([t])[0]


def all_local(tensors: Iterable[Any]) -> list[Tensor]:
    """This process's part of each, as `local` has it."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None:
        tensors = [t._local_tensor if isinstance(t, module.DTensor) else t for t in tensors]
    return [torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t for t in tensors]


def real_shape(p: Tensor) -> tuple[int, ...]:
    """The shape of a whole parameter, complex numbers as pairs of real ones."""
    return (*p.shape, 2) if p.is_complex() else tuple(p.shape)


def own(grad: Tensor) -> Tensor:
    """A gradient that nobody else writes to: a view is DistributedDataParallel's, into its buckets."""
    return grad.clone() if grad._is_view() else grad


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
    chunk = -(-rows // mesh.size(d))  # as torch.chunk cuts
    return Layout(mesh.get_group(d), mesh.size(d), chunk, min(rank[d] * chunk, rows), replica, replicas)


_layouts: dict[int, tuple[weakref.ref[Any], dict[tuple[Any, ...], Layout]]] = {}


def _layouts_of(mesh: Any) -> dict[tuple[Any, ...], Layout]:
    """The layouts known on this very mesh: one equals another whose process groups are gone."""
    i = id(mesh)
    if i not in _layouts:
        _layouts[i] = weakref.ref(mesh, lambda _: _layouts.pop(i, None)), {}
    return _layouts[i][1]


def layout(p: Tensor) -> Layout:
    """Where a parameter's rows are."""
    if is_distributed(p):
        known = _layouts_of(p.device_mesh)
        key = (tuple(p.placements), p.shape[0] if p.dim() else 1)
        if key not in known:
            known[key] = _layout(p.device_mesh, *key)
        return known[key]
    replica, replicas = world()
    return Layout(replica=replica, replicas=replicas)


_MARKS = {  # that engines leave on the parameters that they flatten
    "_is_flat_param": "FullyShardedDataParallel",
    "_fsdp_flattened": "FullyShardedDataParallel",  # use_orig_params=True
    "ds_id": "DeepSpeed",  # ZeRO-3
}


def check_layout(p: Tensor, name: str) -> None:
    """Raises for a flattened parameter, whose filters are gone, and for a DTensor of any other placements than FSDP2's.

    Raises:
        ValueError: naming the parameter and its engine or placements.
    """
    engine = next((engine for mark, engine in _MARKS.items() if hasattr(p, mark)), None)
    if engine is None and type(p).__name__ == "FlatParameter":  # fairscale's and XLA's
        engine = type(p).__module__
    if engine is not None:
        raise ValueError(
            f"{name} is flattened by {engine}, and its filters are lost: use fully_shard, whose parameters keep their rows"
        )
    if not is_distributed(p):
        return
    if p.is_complex():
        raise ValueError(f"{name} is complex and sharded: split it into real and imaginary parts of their own")
    shards = [placement for placement in p.placements if not placement.is_replicate()]
    # _StridedShard, which FSDP makes of what tensor parallelism has cut before, inherits from Shard.
    right = all(type(s).__name__ == "Shard" and s.dim == 0 for s in shards) and len(shards) <= 1
    if not right:
        raise ValueError(
            f"{name} has placements {tuple(p.placements)}: only one Shard(0), as fully_shard makes it, and Replicate() are "
            "supported, no tensor parallelism"
        )


def check_params(params: list[Any], given: bool) -> None:
    """Raises where an engine has taken parameters over after the optimizer was built.

    Args:
        params: what the optimizer holds now.
        given: whether all that it was given were the model's own: `nn.Parameter`s.

    Raises:
        ValueError: as `check_layout`; or for tensors in the place of parameters, or none at all.
    """
    for i, p in enumerate(params):
        check_layout(p, f"params[{i}]")
    if given and not (params and all(isinstance(p, nn.Parameter) for p in params)):
        raise ValueError(
            "the parameters that the optimizer was given are no longer in it, but copies that no forward reads: DeepSpeed, Megatron "
            "and apex put such there, most of them flattened. Use DistributedDataParallel or fully_shard"
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
    torch._foreach_copy_([room[: len(v)] for room, v in zip(mine.split([a.chunk for a in at]), values)], values)
    all_of_it = mine.new_empty(at[0].members * len(mine))
    dist.all_gather_into_tensor(all_of_it, mine, group=at[0].group)
    shards = all_of_it.view(at[0].members, -1).split([a.chunk for a in at], dim=1)
    return [s.contiguous().view(-1)[: p.shape[0]] for p, s in zip(params, shards)]


# --- modules -------------------------------------------------------------------------------------------------------------


def sharded_modules() -> list[weakref.ref[Any]]:
    """Every module under fully_shard in this process: a parameter does not know its own."""
    from torch.distributed.fsdp import FSDPModule

    try:
        from torch.distributed._composable_state import _module_state_mapping

        registered: list[Any] = list(_module_state_mapping)
    except ImportError:  # it is private; without it, all objects are looked through
        registered = gc.get_objects()
    return [weakref.ref(m) for m in registered if issubclass(type(m), FSDPModule)]


def reshard(modules: list[weakref.ref[Any]]) -> None:
    """Drops gathered copies of the weights, which a forward without a backward leaves behind: the next forward gathers anew.

    Module.reshard() does so too, but for a module whose forward has not ended, and an exception in it leaves that so for good.
    """
    for group in _param_groups(modules):
        if group._all_gather_result is not None:  # gathered ahead of time
            group.wait_for_unshard()
        group._to_sharded()


def _param_groups(modules: list[weakref.ref[Any]]) -> Iterator[Any]:
    for module in filter(None, (reference() for reference in modules)):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        yield from (group for group in groups if group is not None)


def check_reduced(modules: list[weakref.ref[Any]], params: Iterable[Tensor], what: str) -> None:
    """Raises where fully_shard holds gradients back, so that p.grad lacks them.

    Args:
        modules: under fully_shard.
        params: whose gradients are needed.
        what: needs them.

    Raises:
        RuntimeError: saying what to do.
    """
    needed = set(map(id, params))

    def held(one: Any) -> bool:
        unsharded = getattr(one, "_unsharded_param", None)  # made by the first forward
        return one.unsharded_accumulated_grad is not None or (unsharded is not None and unsharded.grad is not None)

    for group in _param_groups(modules):
        part = [one for one in group.fsdp_params if id(one.sharded_param) in needed]
        if part and (group._partial_reduce_output is not None or any(map(held, part))):
            raise RuntimeError(
                f"{what} needs gradients that fully_shard holds back: leave set_requires_gradient_sync(True) in every pass (in "
                "accelerate and the Trainer: gradient accumulation with sync_each_batch=True)"
            )


def is_offloaded(params: Iterable[Tensor]) -> bool:
    """Whether shards rest in the host's memory and are computed with elsewhere: copies of them may be under way."""
    return any(is_distributed(p) and local(p).device.type == "cpu" != p.device_mesh.device_type for p in params)


def undecorated(model: M) -> M:
    """The module that torch.compile was given."""
    return getattr(model, "_orig_mod", model)


def is_sharded_module(model: nn.Module) -> bool:
    """Whether fully_shard has been applied to a module or something in it."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(isinstance(m, module.FSDPModule) for m in model.modules())
