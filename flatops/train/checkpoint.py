"""Checkpoints: written atomically, validated when read and when a run resumes; and random states."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import TrainConfig

FORMAT, VERSION = "flatops.train", 3
NAME, BEST = "last.pt", "best.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state to a file atomically: an existing file is replaced only once the new one is complete and on disk.

    Raises:
        OSError: the file cannot be written; the existing one is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # On a full disk torch.save fails again when it closes its archive, which hides the first error.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            kept = "; the previous one is intact" if path.exists() else ""
            reason = cause.strerror or str(cause)
            raise OSError(cause.errno, f"cannot save the checkpoint: {reason}{kept}", str(path)) from error
        raise


def keep_best(folder: Path) -> None:
    """Make a folder's last checkpoint also its best one, by a hard link if the file system supports them.

    Saving replaces the last checkpoint's file instead of overwriting it, so the link keeps its content.
    """
    temporary = folder / f".{BEST}.{os.getpid()}"
    try:
        try:
            os.link(folder / NAME, temporary)
        except OSError:
            shutil.copyfile(folder / NAME, temporary)
        temporary.replace(folder / BEST)
    finally:
        temporary.unlink(missing_ok=True)


def locate(path: Path) -> Path:
    """The checkpoint at a path, which is the file itself or a run's folder; FileNotFoundError if there is none."""
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {file}")
    return file


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, not a checkpoint of `flatops train`, or of another version.
    """
    file = locate(path)
    with file.open("rb") as opened:
        try:
            state = torch.load(opened, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # the zip reader and the unpickler raise any kind, even OSError
            raise ValueError(f"{file} is damaged or not a checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{file} is not a checkpoint of flatops train")
    if state["version"] != VERSION:
        raise ValueError(f"{file} has checkpoint version {state['version']}; this flatops reads version {VERSION}")
    return state


def pack_config(config: TrainConfig) -> dict[str, Any]:
    """A configuration as a dict of plain values, for checkpoints and JSON."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def unpack_config(state: dict[str, Any], resume: Path) -> TrainConfig:
    """A checkpoint's configuration, set to continue the run in its own folder."""
    config = dict(state["config"])
    if config["data_dir"] is not None:
        config["data_dir"] = Path(config["data_dir"])
    return TrainConfig(**config | {"resume": resume, "output": None})


# Options that a resumed run may change. All others determine the weights, bit for bit at the same world size.
MAY_DIFFER = {
    *("output", "resume", "checkpoint_every", "device", "threads", "parallel", "timeout", "accumulate"),
    *("data_dir", "workers", "bad_images", "tensorboard"),
}


def check_same_run(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ValueError naming every option that differs between a checkpoint's run and this one."""
    saved = {**asdict(TrainConfig()), **saved}  # options newer than the checkpoint have their defaults
    differ = [name for name in ours if name not in MAY_DIFFER and saved[name] != ours[name]]
    if differ:
        parts = ", ".join(f"{name} {saved[name]} (now {ours[name]})" for name in differ)
        raise ValueError(f"cannot resume: the checkpoint's run has {parts}")


def check_same_weights(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ValueError naming the weights whose shapes differ between a checkpoint's network and this one."""
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in (saved, ours)]
    differ = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
    if differ:
        which = ", ".join(differ[:3]) + (" ..." if len(differ) > 3 else "")
        raise ValueError(f"cannot resume: the checkpoint has another network; its weights differ in {which}")


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
    """Restore what random_state() returned; states of missing CUDA devices are ignored."""
    torch.set_rng_state(state["torch"])
    for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(cuda, device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
