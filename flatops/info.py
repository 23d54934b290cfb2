"""`flatops info`: versions, what was compiled, and the backend of each device."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

import flatops
from flatops.backend import _C, BACKENDS, WHY_NOT_COMPILED, choose


def cpu_name() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> dict[str, Any]:
    """Versions, the compiled core, threads, and every device with the backend of its tensors."""
    devices = {"cpu": cpu_name()}
    devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    core: dict[str, Any] = {"built": _C is not None}
    if _C is None:
        core["why"] = WHY_NOT_COMPILED
    else:
        core |= {
            "compiler": _C.compiler,
            "torch": _C.torch_version,
            "simd": _C.simd(),
            "simd_levels": list(_C.simd_levels()),
            "cuda": _C.cuda_version,
            "cuda_archs": list(_C.cuda_archs),
        }
    return {
        "versions": {
            "flatops": flatops.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "triton": _version("triton"),
        },
        "core": core,
        "threads": torch.get_num_threads(),
        "backends": list(BACKENDS),
        "devices": {key: {"name": name, "backend": choose(torch.device(key))} for key, name in devices.items()},
    }


def show(report: dict[str, Any]) -> None:
    """Print a report as a table."""
    from rich.table import Table
    from rich.text import Text

    from flatops import terminal

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, version in report["versions"].items():
        table.add_row(name, version or "not installed")
    core = report["core"]
    if core["built"]:
        table.add_row("core", f"compiled by {core['compiler']} for torch {core['torch']}")
        levels = ", ".join(core["simd_levels"])
        table.add_row("SIMD", Text.assemble(core["simd"], (f"  (supported by this CPU: {levels})", "dim")))
        built_for = f"{core['cuda']} for {' '.join(core['cuda_archs'])}"
        table.add_row("CUDA", built_for if core["cuda"] else "not compiled: no usable nvcc was found")
    else:
        table.add_row("core", Text.assemble(("not compiled", "red"), f": {core['why']}"))
    table.add_row("threads", str(report["threads"]))
    for name, device in report["devices"].items():
        table.add_row(name, Text.assemble(f"{device['name']}  →  backend ", (device["backend"], "bold")))
    terminal.say(terminal.console(), table)
