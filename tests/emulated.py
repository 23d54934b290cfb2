"""A backend for tests: the CUDA kernels, compiled by the host's compiler, with CUDA's threads emulated one by one.

It shows that the source is right: indices, sums, barriers, bits. What only a GPU can show (its compiler, its memory, its
speed) it does not.
"""

from __future__ import annotations

import fcntl
import functools
from pathlib import Path

import torch
from torch.utils import cpp_extension

from flatops import schemas
from flatops.backend import BACKENDS

ROOT = Path(__file__).parent.parent


@functools.cache
def register() -> bool:
    """Builds the backend `emulated`, where that has not been done, and adds it to flatops.backend.BACKENDS."""
    schemas.define("flatops_emulated")
    build = ROOT / "build" / f"torch-{torch.__version__}" / "emulated"  # ninja does not look at torch's headers
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "one at a time", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        (build / "lock").unlink(missing_ok=True)  # torch's own, for which it waits for ever once a build was killed
        cpp_extension.load(
            "flatops_emulated",
            [str(ROOT / "tests" / "emulation" / name) for name in ("bindings.cpp", "kernels.cpp")],
            extra_include_paths=[str(ROOT / "tests" / "emulation"), str(ROOT / "csrc")],
            extra_cflags=["-O2", "-g0", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-w"],
            build_directory=str(build),
            is_python_module=False,
        )
    BACKENDS["emulated"] = ("flatops_emulated", frozenset({"cpu"}))
    return True
