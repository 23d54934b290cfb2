"""Processes that run functions of tests: started once, and joined anew by torch.distributed for every call."""

from __future__ import annotations

import atexit
import datetime
import functools
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

LIMIT = 240  # seconds per call, on a busy machine
MOST = 4


def _serve(inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    while True:
        function, rank, world, path, args = inbox.get()
        report = None
        try:
            timeout = datetime.timedelta(seconds=LIMIT / 2)
            dist.init_process_group("gloo", f"file://{path}", timeout, world, rank)
            function(*args)
            dist.barrier()  # or one that is ready would break the connections of the others
        except BaseException:
            report = f"process {rank}:\n{traceback.format_exc()}"
        finally:
            outbox.put(report)  # first: one that has failed must not wait for the others
            if dist.is_initialized():
                dist.destroy_process_group()


class _Pool:
    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")  # torch cannot be forked once it has started threads
        context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "flatops"])
        self.inboxes = [context.SimpleQueue() for _ in range(MOST)]
        self.outboxes = [context.Queue() for _ in range(MOST)]
        self.processes = [
            context.Process(target=_serve, args=pair, daemon=True) for pair in zip(self.inboxes, self.outboxes)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., None], world: int, args: tuple) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world):
                self.inboxes[rank].put((function, rank, world, os.path.join(folder, "store"), args))
            reports = []
            patience = LIMIT
            for rank in range(world):
                try:
                    reports.append(self.outboxes[rank].get(timeout=patience))
                except queue.Empty:
                    reports.append(f"process {rank}: no answer in {patience} s")
                if reports[-1] is not None:
                    patience = 3  # the others may be waiting for it
        return [report for report in reports if report is not None]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()


@functools.cache
def _pool() -> _Pool:
    pool = _Pool()
    atexit.register(pool.stop)
    return pool


def run(function: Callable[..., None], world: int, *args: Any) -> None:
    """Calls a function of a test file in a process group of `world` processes; raises what any of them raises."""
    reports = _pool().run(function, world, args)
    if reports:
        _pool().stop()  # some may be stuck
        _pool.cache_clear()
        raise AssertionError("\n\n".join(reports))
