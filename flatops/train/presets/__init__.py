"""Recipes of the papers, a file each beside this one: options of `flatops train` by name, and where they come from."""

from __future__ import annotations

import difflib
import sys
from importlib.resources import files
from typing import Any

from ..config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def names() -> list[str]:
    """Every preset."""
    found = (entry.name for entry in files(__package__).iterdir())
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def read(name: str) -> dict[str, Any]:
    """The options that a preset sets.

    Raises:
        ValueError: there is none of that name.
    """
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"unknown preset {name!r}; {hint}There are {', '.join(known)}")
    return tomllib.loads((files(__package__) / f"{name}.toml").read_text(encoding="utf-8"))


def recipe(name: str, **options: Any) -> TrainConfig:
    """The configuration of a preset, with other options where they are given.

    Raises:
        ValueError: there is no such preset, or an option is out of range.
    """
    return TrainConfig(**read(name) | options)
