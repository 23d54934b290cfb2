"""Chooses the kernels that run.

In order of precedence: an operator's `backend=` argument, the context manager `flatops.backend(...)`, the environment
variable FLATOPS_BACKEND, the fastest backend available for the tensors' device.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame

from flatops import reference, schemas

F = TypeVar("F", bound=Callable[..., Any])


def _triton_kernel(name: str) -> Callable[..., Any]:
    """The Triton operator `name`, imported at its first call: Triton is optional, and slow to import."""

    def kernel(*args: Any) -> Any:
        return importlib.import_module("flatops.kernels").OPERATORS[name](*args)

    return kernel


def _constant_in_graphs(function: F) -> F:
    """Same as torch.compiler.assume_constant_result, which would import the compiler (as slow as importing torch)."""
    setattr(function, "_dynamo_marked_constant", True)
    return function


def outside_graphs(function: F) -> F:
    """Same as torch.compiler.disable: compiled code breaks its graph at this function.

    For functions that change and restore weights: they ask what kernels have already changed, which tracing cannot
    know. torch.compiler.disable itself would import the compiler and add a Python frame.
    """
    setattr(function, "_torchdynamo_disable", True)  # when a caller is traced
    setattr(function, "_torchdynamo_disable_msg", "flatops perturbs and restores weights between graphs, not in them")
    skip = eval_frame._FrameAction.SKIP  # when called between graphs: neither this nor what it calls is traced
    eval_frame.set_code_exec_strategy(inspect.unwrap(function).__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


schemas.define("flatops")
for _namespace, _kernel in (("flatops_ref", lambda name: getattr(reference, name)), ("flatops_triton", _triton_kernel)):
    _library = schemas.define(_namespace)
    for _name in schemas.SCHEMAS:
        _library.impl(_name, _kernel(_name), "CompositeExplicitAutograd")

# Without build isolation: in an isolated build, installers such as uv compile against another torch.
_REINSTALL = "reinstall flatops with --no-build-isolation --no-cache-dir --force-reinstall --no-deps (README, Install)"

_C: Any = None  # the compiled core, if it was built
try:
    _C = importlib.import_module("flatops._C")
except ImportError as error:
    WHY_NOT_COMPILED = str(error)  # "No module named ..." in a source tree, a missing symbol after a change of torch
else:
    WHY_NOT_COMPILED = ""
    if _C.torch_version.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"flatops was compiled for torch {_C.torch_version} and this is torch {torch.__version__}: {_REINSTALL}"
        )


def _triton_version() -> tuple[int, ...] | None:
    try:
        return tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return None


TRITON = _triton_version()

# name -> (namespace of its operators, the device types it supports; None: all)
BACKENDS: dict[str, tuple[str, frozenset[str] | None]] = {
    "reference": ("flatops_ref", None),
    "cpp": ("flatops", frozenset({"cpu"})),
    "cuda": ("flatops", frozenset({"cuda"})),
    "triton": ("flatops_triton", frozenset({"cuda", "cpu"})),  # cpu: only in Triton's interpreter
}


@_constant_in_graphs
def why_not(name: str, device: torch.device) -> str:
    """Why a backend cannot be used on a device, and what to do about it; empty if it can."""
    devices = BACKENDS[name][1]
    if devices is not None and device.type not in devices:
        return f"it does not support {device.type} tensors: use 'reference' or move them"
    if name in ("cpp", "cuda") and _C is None:
        return f"it was not compiled for this torch ({WHY_NOT_COMPILED}): {_REINSTALL}"
    if name == "cuda":
        return _why_not_cuda(device)
    if name == "triton":
        return _why_not_triton(device)
    return ""


def _runs_on(code: str, device: int) -> bool:
    """Whether a binary for `code`, such as sm_90 or compute_120, runs on compute capability `device`, such as 90."""
    kind, arch = code.split("_")
    if not arch.isdigit():  # sm_90a runs on no other capability
        return int(arch[:-1]) == device
    # Machine code (sm) runs on later minor versions of its major version, PTX (compute) on every later version.
    return int(arch) <= device and (kind == "compute" or int(arch) // 10 == device // 10)


def _why_not_cuda(device: torch.device) -> str:
    if not _C.cuda_archs:
        return f"it was not compiled because there was no nvcc: install a CUDA toolkit and {_REINSTALL}"
    major, minor = torch.cuda.get_device_capability(device)
    if any(_runs_on(code, 10 * major + minor) for code in _C.cuda_archs):
        return ""
    return (
        f"it was compiled for {' '.join(_C.cuda_archs)} and {torch.cuda.get_device_name(device)} is sm_{major}{minor}: "
        f"set TORCH_CUDA_ARCH_LIST={major}.{minor} and {_REINSTALL}"
    )


def _why_not_triton(device: torch.device) -> str:
    if TRITON is None:
        return "Triton is not installed: run pip install triton"
    if TRITON < (3, 6):  # its square roots and divisions flush subnormal numbers
        return f"Triton is {'.'.join(map(str, TRITON))} and 3.6 or later is needed: run pip install -U triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        return "on a CPU it runs only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    if device.type == "cuda" and interpreted:
        return "TRITON_INTERPRET=1 is set, and the interpreter cannot read a GPU's memory: unset it"
    return ""


def _valid(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return name


_forced: str | None = os.environ.get("FLATOPS_BACKEND") or None


class backend:  # spelled like torch.no_grad
    """A context manager: operators inside it run on one backend.

    Args:
        name: 'reference', 'cpp', 'cuda' or 'triton'.

    Raises:
        ValueError: for any other name.

    Example:
        >>> with flatops.backend("reference"):
        ...     norms = flatops.ops.filter_norms(params)
    """

    def __init__(self, name: str) -> None:
        self.name = _valid(name)

    def __enter__(self) -> None:
        global _forced
        self.previous, _forced = _forced, self.name

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self.previous


def choose(device: torch.device, name: str | None = None) -> str:
    """The backend for a device: `name` if given, else that of the context or environment, else the fastest available.

    Raises:
        ValueError: for an unknown name, or a backend that does not support the device.
        RuntimeError: for a backend that was not compiled, or not for this GPU.
    """
    name = name if name is not None else _forced
    if name is None:
        return _best(device)
    if why := why_not(_valid(name), device):
        devices = BACKENDS[name][1]
        error = ValueError if devices is not None and device.type not in devices else RuntimeError
        raise error(f"backend {name!r} cannot be used: {why}")
    return name


@_constant_in_graphs
def _best(device: torch.device) -> str:
    """The fastest backend available for a device; warns once if that is the reference."""
    wanted = ("cuda", "triton") if device.type == "cuda" else ("cpp",)
    reasons = []
    for name in wanted:
        if not (why := why_not(name, device)):
            return name
        reasons.append(f"{name}: {why}")
    _warn(f"no compiled kernels for {device.type} tensors, so flatops uses its slow reference. {'; '.join(reasons)}")
    return "reference"


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=6)


def operators(device: torch.device, name: str | None = None) -> Any:
    """The namespace of the chosen backend's operators, `torch.ops.<namespace>`."""
    return getattr(torch.ops, BACKENDS[choose(device, name)][0])
