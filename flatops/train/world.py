"""The processes of a run under torchrun: joining them, agreeing, and errors when one is lost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from flatops import distributed

T = TypeVar("T")
# What gloo and NCCL say in plain RuntimeErrors, also in the middle of a backward pass.
LOST = re.compile("gloo|NCCL|pair closure|closed by peer|Timed out waiting|[Ww]ait timeout|Socket Timeout")


@dataclass(frozen=True)
class World:
    """The processes of a run, by default this one alone. Its methods are collective.

    Args:
        rank: of this process.
        size: number of processes.
        local_rank: rank among the processes of this machine, which is the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers. They travel between CPUs: no GPU is waited for."""
        if self.size == 1:
            return number
        most = torch.tensor(number)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.largest(0)


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns or raises on the first process, on all of them. Collective."""
    made = error = None
    if distributed.world()[0] == 0:
        try:
            made = make()
        except Exception as e:  # the others wait for an answer
            error = e
    made, said = distributed.gather_objects((made, error))[0]
    if said is not None:
        raise error or said
    return made


@contextmanager
def joined(timeout: float) -> Iterator[World]:
    """Join the processes that torchrun has started, if it has.

    Args:
        timeout: seconds to wait for the other processes, at the start and in every exchange.

    Raises:
        ConnectionError: another process died, hung, or cannot be reached.
    """
    world = World(*distributed.launched())
    if world.size == 1:
        yield world
        return
    # Gradients travel between GPUs, if there are any; what is on the CPU travels by gloo, which waits for no GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    failed = False
    try:
        with peer_errors():
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
            yield world
    except Exception:
        failed = True
        raise
    finally:
        if not failed and dist.is_initialized():  # destroy_process_group would wait for processes that are gone
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
        # Without gloo's line number in front and its advice at the end.
        cause = re.sub(r"^\[[^]]*\] ", "", message).split(". ")[0].split("\n")[0]
        raise ConnectionError(f"another process died or hung, or the network failed: {cause}") from error
