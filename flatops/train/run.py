"""`flatops train`: one run in its folder, with checkpoints, log and plot, until it ends or is stopped."""

from __future__ import annotations

import itertools
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from flatops import terminal
from flatops.methods import METHODS

from . import checkpoint, plots
from .config import TrainConfig
from .dataset import reading
from .engine import Row, Trainer
from .report import Board, Log, Screen, write_json
from .world import from_first, joined, peer_errors


def train(config: TrainConfig, console: Console | None = None) -> list[Row]:
    """Train one network and write config.json, log.jsonl, last.pt, best.pt and curves.png to the run's folder.

    best.pt is the checkpoint of the epoch with the highest test accuracy (with `ema`, of the averaged weights). Both
    checkpoints hold the network as `model` and its average as `ema`, and `resume` continues from either.

    After Ctrl-C or SIGTERM it finishes the step, saves, prints how to resume, and stops; after a second one at once.

    Under torchrun the processes train one network together; rank 0 prints and writes. A checkpoint resumes with any
    number of processes: with the same number bit for bit, otherwise with other rounding and other random states.

    Args:
        config: the run's options; with `config.resume` it continues bit for bit as if it had never stopped.
        console: where to print; the terminal by default.

    Returns:
        One row per epoch: losses, accuracies, seconds.

    Raises:
        ValueError: an option out of range, an output folder in use, or a checkpoint of another run.
        FileNotFoundError: no checkpoint to resume.
        FloatingPointError: the loss is no longer finite.
        KeyboardInterrupt: after Ctrl-C; SystemExit after SIGTERM.
        ConnectionError: another process died, hung, or cannot be reached.
        MemoryError: out of memory.
        OSError: a checkpoint cannot be written, for example to a full disk; the previous one is intact.
    """
    with joined(config.timeout) as world:
        console = (console or terminal.console()) if world.first else Console(quiet=True)
        state = checkpoint.read(config.resume) if config.resume else None
        with memory_advice(config):
            trainer = Trainer(config, world)
        if state:
            trainer.load_state_dict(state)
        folder = from_first(lambda: make_folder(config))
        if world.first:
            write_json(folder / "config.json", checkpoint.pack_config(config) | trainer.options)
        with resumable(folder), memory_advice(config, folder), reading(trainer.data):
            run_epochs(trainer, folder, console)
        if world.first:
            title = f"{METHODS[config.method].label} on {config.data}"
            plots.learning_curves(trainer.history, title, folder / "curves.png")
        seconds = sum(row["seconds"] for row in trainer.history)
        terminal.say(
            console,
            f"test accuracy {trainer.history[-1]['test_accuracy']:.1%} after epoch {config.epochs} "
            f"and {seconds:.1f} s of training; see {folder}",
            style="bold",
        )
        return trainer.history


def run_epochs(trainer: Trainer, folder: Path, console: Console) -> None:
    """Train to the end; print, log and save every epoch; save and stop after a signal."""
    config, world = trainer.config, trainer.world
    log = Log(folder / "log.jsonl" if world.first else None, trainer.history)
    board = Board(folder if world.first and config.tensorboard else None, trainer.history)
    accuracy = "ema_accuracy" if trainer.average else "test_accuracy"

    def save() -> None:
        if not trainer.is_finite():  # the same on all processes
            raise FloatingPointError("the loss is no longer a finite number: lower lr, sigma or rho")
        state = trainer.state_dict()
        if world.first:
            checkpoint.save(folder / checkpoint.NAME, state)
            if trainer.step == 0 and best(trainer.history, accuracy):
                checkpoint.keep_best(folder)

    def stop_if_asked() -> None:
        # A signal may reach processes in different steps, or only one of them: all agree in every step (0.1 ms).
        number = world.largest(signals[0] if signals else 0)
        if not number:
            return
        save()
        terminal.say(
            console,
            f"Stopped after {trainer.steps_done} of {trainer.total_steps} steps; continue with\n"
            f"  flatops train --resume {folder}",
        )
        world.wait()  # if one exited now, torchrun would kill rank 0 while it writes
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def on_step(trainer: Trainer) -> None:
        screen.step()
        if config.checkpoint_every and trainer.steps_done % config.checkpoint_every == 0:
            save()
        stop_if_asked()

    def may_interrupt() -> bool:
        return world.size == 1 and trainer.data.waiting  # several processes agree between steps instead

    with Screen(trainer, console) as screen, deferred_signals(may_interrupt) as signals:
        while trainer.epoch < config.epochs:
            try:
                row = trainer.run_epoch(on_step)
            except Interrupted:
                stop_if_asked()
                raise
            log.add(row)
            board.add(row)
            screen.epoch(row)
            if trainer.bad and world.first:
                lines = (f"{name}: {reason}\n" for name, reason in sorted(trainer.bad.items()))
                # Names that are not UTF-8 keep their bytes.
                (folder / "bad_images.txt").write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
            if not math.isfinite(row["train_loss"]):
                raise FloatingPointError(f"the loss became {row['train_loss']}: lower lr, sigma or rho")
            save()
            if trainer.epoch < config.epochs:
                stop_if_asked()
    board.close()


def best(history: list[Row], accuracy: str) -> bool:
    """Whether the last epoch has the highest accuracy so far."""
    return bool(history) and history[-1][accuracy] >= max(row[accuracy] for row in history)


@contextmanager
def memory_advice(config: TrainConfig, folder: Path | None = None) -> Iterator[None]:
    """Turn out-of-memory errors, of which PyTorch raises several kinds, into one that says which option to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_cpu = "allocate memory" in str(error) or isinstance(error, MemoryError)
        if not (isinstance(error, torch.OutOfMemoryError) or on_cpu):
            raise
        accumulate = config.accumulate
        advice = f"raise accumulate (now {accumulate}) or lower batch_size (now {config.batch_size})"
        advice += ", or use amp bf16" if config.amp == "none" else ""
        if folder and (folder / checkpoint.NAME).is_file():
            advice += f"; continue with: flatops train --resume {folder} --accumulate {2 * accumulate}"
        raise MemoryError(f"out of memory: {advice}") from error


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Add how to continue to the error for a lost process, also a worker process."""
    try:
        with peer_errors():
            yield
    except ConnectionError as error:
        saved = (folder / checkpoint.NAME).is_file()
        advice = f"continue with: flatops train --resume {folder}" if saved else "nothing was saved yet"
        raise ConnectionError(f"{error}; {advice}") from error


def make_folder(config: TrainConfig) -> Path:
    """The run's folder: `output` (ValueError if it is in use), that of the resumed run, or a new one under runs/."""
    if config.output:
        folder = config.output
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is in use: choose another output, or continue its run with resume")
    elif config.resume:
        folder = checkpoint.locate(config.resume).parent
    else:
        name = f"{config.data}-{config.model}-{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
        return new_folder(Path("runs", name))
    folder.mkdir(parents=True, exist_ok=True)
    if config.resume and (source := checkpoint.locate(config.resume).parent) != folder:
        for name in (checkpoint.NAME, checkpoint.BEST):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    return folder


def new_folder(folder: Path) -> Path:
    """Make a folder, with a number appended to its name if another run started in the same second."""
    for number in itertools.count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            place.mkdir(parents=True)
        except FileExistsError:
            continue
        return place


class Interrupted(BaseException):
    """A signal arrived when it was allowed to interrupt."""


@contextmanager
def deferred_signals(may_interrupt: Callable[[], bool] = lambda: False) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of acting on them; the second one acts as usual.

    Args:
        may_interrupt: whether the first may raise Interrupted now, for example while the trainer waits for images.
    """
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # others cannot handle signals
        yield arrived
        return

    def defer(number: int, frame: object) -> None:
        arrived.append(number)
        restore()
        if may_interrupt():
            raise Interrupted

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, defer) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        restore()
