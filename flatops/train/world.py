"""The processes of a run under torchrun: joining them, agreeing on values, and errors when one is lost."""

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
# Marks gloo's and NCCL's errors for a lost peer, which are plain RuntimeErrors, also in the middle of a backward pass.
LOST = re.compile("gloo|NCCL|pair closure|closed by peer|Timed out waiting|[Ww]ait timeout|Socket Timeout")


@dataclass(frozen=True)
class World:
    """The processes of a run, by default only this one. Its methods are collective.

    Args:
        rank: rank of this process.
        size: world size.
        local_rank: rank on this machine, and the index of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def largest(self, number: int) -> int:
        """The maximum of the processes' numbers, exchanged between CPUs without a host sync."""
        if self.size == 1:
            return number
        maximum = torch.tensor(number)
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        return int(maximum)

    def wait(self) -> None:
        """Wait for all processes."""
        self.largest(0)


def from_first(make: Callable[[], T]) -> T:
    """Call `make` on the first process, and return or raise its outcome on all of them. Collective."""
    result = error = None
    if distributed.world()[0] == 0:
        try:
            result = make()
        except Exception as e:  # raised below: the others are waiting
            error = e
    result, first_error = distributed.gather_objects((result, error))[0]
    if first_error is not None:
        raise error or first_error
    return result


@contextmanager
def joined(timeout: float) -> Iterator[World]:
    """Join the processes that torchrun started, if it did.

    Args:
        timeout: seconds to wait for the other processes, at the start and in every collective.

    Raises:
        ConnectionError: another process died, hung, or cannot be reached.
    """
    world = World(*distributed.launched())
    if world.size == 1:
        yield world
        return
    # NCCL for tensors on GPUs; gloo for those on the CPU, without a host sync.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    failed = False
    try:
        with peer_errors():
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
            yield world
    except Exception:  # of any kind: other processes may be gone, and destroy_process_group would wait for them
        failed = True
        raise
    finally:
        if not failed and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn torch.distributed's errors for a lost process into a ConnectionError with a one-line message."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if not (isinstance(error, dist.DistError) or LOST.search(message)):
            raise
        # Drop gloo's line number and advice.
        cause = re.sub(r"^\[[^]]*\] ", "", message).split(". ")[0].split("\n")[0]
        raise ConnectionError(f"another process died or hung, or the network failed: {cause}") from error
