"""Datasets that torchvision downloads."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .world import World


def torchvision_sets(kind: Callable[..., Any], config: TrainConfig, world: World) -> list[Any]:
    """The training and the test set of a class of torchvision.datasets; the first process downloads them if need be. Collective.

    Args:
        kind: the class, called with (root, train=, download=).
        config: the run; its `data_dir` is where they lie or go to (default: data).
        world: the run's processes.

    Raises:
        OSError: the download broke off, or is damaged.
    """
    root = config.data_dir or Path("data")

    def sets(download: bool = False) -> list[Any]:
        return [kind(root, train=train, download=download) for train in (True, False)]

    def fetch() -> None:
        try:
            sets()
            return
        except RuntimeError:  # missing or damaged: torchvision compares checksums
            pass
        try:
            with server_timeout(config.timeout):
                sets(download=True)
        except Exception as error:  # urllib, http.client, socket, tarfile and torchvision have one each
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(
                f"cannot download {config.data} to {root}: {reason}; try again, or give the folder that has it as data_dir"
            ) from error

    world.from_first(fetch)
    return sets()


@contextmanager
def server_timeout(seconds: float) -> Iterator[None]:
    """Limit how long a server may send nothing: urllib has no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
