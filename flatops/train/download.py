"""Datasets that torchvision downloads."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .world import from_first


def torchvision_sets(kind: Callable[..., Any], config: TrainConfig) -> list[Any]:
    """The training and the test set of a torchvision dataset. Collective: the first process downloads them.

    Args:
        kind: the dataset's class, called with (root, train=, download=).
        config: the run; its `data_dir` is where they are or go to (default: data).

    Raises:
        OSError: the download failed, or is damaged.
    """
    root = config.data_dir or Path("data")

    def sets(download: bool = False) -> list[Any]:
        return [kind(root, train=train, download=download) for train in (True, False)]

    def fetch() -> None:
        try:
            sets()
            return
        except RuntimeError:  # missing or damaged: torchvision verifies checksums
            pass
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(config.timeout)  # urllib has no timeout of its own
        try:
            sets(download=True)
        except Exception as error:  # urllib, http.client, socket, tarfile and torchvision each raise their own
            reason = (str(error) or type(error).__name__).splitlines()[0]
            advice = "try again, or set data_dir to a folder that has it"
            raise OSError(f"cannot download {config.data} to {root}: {reason}; {advice}") from error
        finally:
            socket.setdefaulttimeout(before)

    from_first(fetch)
    return sets()
