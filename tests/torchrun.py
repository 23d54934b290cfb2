"""torchrun as a user runs it, with two processes of one thread each."""

from __future__ import annotations

import os
import subprocess
import sys


def torchrun(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs a script (the first argument) with the others. When a process dies, the other gets 30 s to report it."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *map(str, arguments),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout, env=env)
