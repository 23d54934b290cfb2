"""A backend for tests: the CUDA kernels, compiled by the host's compiler, with CUDA's threads emulated one by one.

It shows that the source is right: indices, sums, barriers, bits. What only a GPU can show (its compiler, its memory, its
speed) it does not.
"""

from __future__ import annotations

import functools
from pathlib import Path

from torch.utils import cpp_extension

from flatops import schemas
from flatops.backend import BACKENDS

ROOT = Path(__file__).parent.parent


@functools.cache
def register() -> bool:
    """Builds the backend `emulated`, where that has not been done, and adds it to flatops.backend.BACKENDS."""
    schemas.define("flatops_emulated")
    build = ROOT / "build" / "emulated"
    build.mkdir(parents=True, exist_ok=True)
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
