"""A backend for tests: the CUDA kernels compiled for the host, with CUDA's threads emulated one at a time.

It tests the source: indices, sums, barriers, bits; but not what depends on a GPU: its compiler, memory and speed.
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
    """Builds the backend `emulated` if necessary, and adds it to flatops.backend.BACKENDS."""
    schemas.define("flatops_emulated")
    build = ROOT / "build" / f"torch-{torch.__version__}" / "emulated"  # ninja does not track torch's headers
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "one at a time", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        (build / "lock").unlink(missing_ok=True)  # torch's own, which a killed build leaves and torch waits for
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
