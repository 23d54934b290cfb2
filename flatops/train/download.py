"""Datasets that torchvision downloads."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .world import from_first


def torchvision_sets(kind: Callable[..., Any], config: TrainConfig) -> list[Any]:
    """The training and the test set of a class of torchvision.datasets. Collective: the first process downloads them.

    Args:
        kind: the class, called with (root, train=, download=).
        config: the run; its `data_dir` is where they are or go to (default: data).

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
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(config.timeout)  # a server may be silent for so long; urllib has no limit of its own
        try:
            sets(download=True)
        except Exception as error:  # urllib, http.client, socket, tarfile and torchvision have one each
            reason = (str(error) or type(error).__name__).splitlines()[0]
            advice = "try again, or give the folder that has it as data_dir"
            raise OSError(f"cannot download {config.data} to {root}: {reason}; {advice}") from error
        finally:
            socket.setdefaulttimeout(before)

    from_first(fetch)
    return sets()
