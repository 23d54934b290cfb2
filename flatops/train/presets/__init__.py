"""The papers' recipes, one TOML file each, with options of `flatops train` and their sources."""

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
    """The names of all presets."""
    found = (entry.name for entry in files(__package__).iterdir())
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def read(name: str) -> dict[str, Any]:
    """The options of a preset, or ValueError."""
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"unknown preset {name!r}; {hint}choose from {', '.join(known)}")
    return tomllib.loads((files(__package__) / f"{name}.toml").read_text(encoding="utf-8"))


def recipe(name: str, **options: Any) -> TrainConfig:
    """A preset's configuration, with some options overridden; ValueError if it is unknown or an option out of range."""
    return TrainConfig(**read(name) | options)
