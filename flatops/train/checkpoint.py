"""Checkpoints: written whole or not at all, read with care, and the random states that they hold."""

from __future__ import annotations

import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import TrainConfig

FORMAT, VERSION = "flatops.train", 2
NAME = "last.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state to a file; until it is complete and on disk, the file that was there stays.

    Raises:
        OSError: the file cannot be written; what was there is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def locate(path: Path) -> Path:
    """The checkpoint file that a path names: the file itself, or the one in a run's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {file}")
    return file


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not a checkpoint of `flatops train`, or of another version.
    """
    file = locate(path)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises whatever the zip reader or the unpickler met
        raise ValueError(f"{file} is damaged or not a checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{file} is not a checkpoint of flatops train")
    if state["version"] != VERSION:
        raise ValueError(
            f"{file} has checkpoint version {state['version']}; this flatops reads version {VERSION}"
        )
    return state


def pack_config(config: TrainConfig) -> dict[str, Any]:
    """A configuration as plain values, for checkpoints and JSON."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def unpack_config(state: dict[str, Any], resume: Path) -> TrainConfig:
    """The configuration of a checkpoint, as the one that continues it in its own folder."""
    return TrainConfig(**state["config"] | {"resume": resume, "output": None})


def random_state() -> dict[str, Any]:
    """The states of the generators of torch, numpy and Python, as tensors and plain values."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": numpy,
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what random_state() returned; a machine with fewer or no CUDA devices takes what it can."""
    torch.set_rng_state(state["torch"])
    for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(cuda, device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
