"""The processes of a run under torchrun, and what they tell each other. torch.distributed does all of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# What gloo and NCCL say, in a plain RuntimeError, also out of the middle of a backward pass.
LOST = re.compile("gloo|NCCL|pair closure|closed by peer|Timed out waiting|[Ww]ait timeout|Socket Timeout")


@dataclass(frozen=True)
class World:
    """The processes of a run; by default this one alone. All of them call a method, or none.

    Args:
        rank: this process's number.
        size: how many there are.
        local_rank: this process's number on its machine, which is that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor summed over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers. It travels between CPUs: no GPU is waited for."""
        if self.size == 1:
            return number
        most = torch.tensor(number)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.largest(0)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with the first process's."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, src=0)

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, for the first; an empty list for the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.gather_object(value, values if self.first else None)
        return values if self.first else []

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first process, on all of them; and what it raises there, everywhere."""
        made: list[Any] = [None, None]
        if self.first:
            try:
                made[0] = make()
            except Exception as error:  # the others wait for an answer
                made[1] = error
        if self.size > 1:
            dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]


def launched() -> World:
    """This process's place among those that torchrun has started, as its environment tells."""
    rank, size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    return World(rank, size, local_rank) if size > 1 else World()


@contextmanager
def joined(timeout: float) -> Iterator[World]:
    """Join the processes that torchrun has started; one on its own has nobody to join.

    Args:
        timeout: seconds that a process waits for the others, at the start and in every exchange.

    Raises:
        ConnectionError: another process died, hung, or cannot be reached.
    """
    world = launched()
    if world.size == 1:
        yield world
        return
    # Gradients travel between GPUs where there are any; what is on the CPU never makes the CPU wait for a GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    failed = False
    try:
        with peer_errors():
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
            yield world
    except Exception:  # the others may be gone, and to take leave of them would be to wait for ever
        failed = True
        raise
    finally:
        if not failed and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn what torch.distributed raises when it loses another process into a ConnectionError of one line."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if not (isinstance(error, dist.DistError) or LOST.search(message)):
            raise
        # Less the line of gloo's source that it begins with, and the advice that it ends with.
        cause = re.sub(r"^\[[^]]*\] ", "", message).split(". ")[0].split("\n")[0]
        raise ConnectionError(f"another process died or hung, or the network failed: {cause}") from error
