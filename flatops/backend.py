"""Which kernels run: the compiled ones where they were built, else the reference.

The order of precedence: an operator's `backend=` argument, the context manager `flatops.backend(...)`, the environment
variable FLATOPS_BACKEND, and then the best backend that the tensors' device has.
"""

from __future__ import annotations

import os
import warnings

import torch

from flatops import reference, schemas

schemas.define("flatops")
_library = schemas.define("flatops_ref")
for _name in schemas.SCHEMAS:
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")

try:
    from flatops import _C
except ImportError as error:
    _C = None
    WHY_NOT_COMPILED = str(
        error
    )  # "No module named ..." in a source tree, a missing symbol after torch has changed
else:
    WHY_NOT_COMPILED = ""
    if _C.torch_version.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"flatops was compiled for torch {_C.torch_version} and this is torch {torch.__version__}; "
            "install flatops again, with --no-cache-dir --force-reinstall --no-deps"
        )

# name -> (namespace of its operators, the device types it serves; None for every type)
BACKENDS: dict[str, tuple[str, frozenset[str] | None]] = {
    "reference": ("flatops_ref", None),
    "cpp": ("flatops", frozenset({"cpu"})),
}


def _valid(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return name


_forced: str | None = os.environ.get("FLATOPS_BACKEND") or None
_warned: set[str] = set()


class backend:  # noqa: N801 - a context manager, spelled like torch.no_grad
    """Runs the operators within it on one backend.

    Args:
        name: 'reference' or 'cpp'.

    Raises:
        ValueError: for a name that is no backend.

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
    """The backend that serves `device`: `name` if given, else what is forced, else the best there is.

    Raises:
        ValueError: for an unknown name, or a backend that does not serve the device.
        RuntimeError: for a backend that was not compiled.
    """
    name = name if name is not None else _forced
    if name is None:
        if device.type == "cpu" and _C is not None:
            return "cpp"
        _warn_slow(device.type)
        return "reference"
    devices = BACKENDS[_valid(name)][1]
    if devices is not None and device.type not in devices:
        raise ValueError(
            f"backend {name!r} does not serve {device.type} tensors: use 'reference' or move them"
        )
    if name == "cpp" and _C is None:
        raise RuntimeError(
            f"backend 'cpp' was not compiled ({WHY_NOT_COMPILED}): run pip install flatops again"
        )
    return name


@torch.compiler.disable
def _warn(device_type: str) -> None:
    _warned.add(device_type)
    why = f": {WHY_NOT_COMPILED}" if device_type == "cpu" else ""
    warnings.warn(
        f"flatops has no compiled kernels for {device_type} tensors here and falls back on its slow reference{why}",
        stacklevel=5,
    )


def _warn_slow(device_type: str) -> None:
    if device_type not in _warned:
        _warn(device_type)


def operators(device: torch.device, name: str | None = None):
    """The namespace of operators, `torch.ops.<namespace>`, that serves `device`."""
    return getattr(torch.ops, BACKENDS[choose(device, name)][0])
