"""`flatops train`: one run in its folder, with checkpoint, log and plot, until it is done or stopped."""

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
    """Train one network and leave config.json, log.jsonl, last.pt, best.pt and curves.png in the run's folder.

    best.pt is the checkpoint of the epoch of the highest test accuracy, with `ema` of the averaged weights. Both checkpoints hold
    the network as `model` and its average as `ema`, and `resume` continues from either.

    After Ctrl-C or SIGTERM it finishes the step, saves, says how to resume, and stops; after a second one at once.

    Under torchrun the processes train one network together; the first one prints and writes. A checkpoint resumes with any
    number of processes: with as many as before to the same bits, otherwise with other rounding and other random states.

    Args:
        config: what to train; `config.resume` continues a run, to the same bits as if it had never stopped.
        console: where to print; the terminal by default.

    Returns:
        One row per epoch: losses, accuracies, seconds.

    Raises:
        ValueError: an option out of range, an output folder in use, a checkpoint that does not fit.
        FileNotFoundError: nothing to resume there.
        FloatingPointError: the loss is no longer a number.
        KeyboardInterrupt: after Ctrl-C; SystemExit after SIGTERM.
        ConnectionError: another process died, hung, or cannot be reached.
        MemoryError: a step does not fit.
        OSError: a checkpoint cannot be written, the disk being full; the last one is intact.
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
            f"test accuracy {trainer.history[-1]['test_accuracy']:.1%} after {config.epochs} epochs, "
            f"{seconds:.1f} s of training; see {folder}",
            style="bold",
        )
        return trainer.history


def run_epochs(trainer: Trainer, folder: Path, console: Console) -> None:
    """Train to the end; show, log and save every epoch; save and stop after a signal."""
    config, world = trainer.config, trainer.world
    log = Log(folder / "log.jsonl" if world.first else None, trainer.history)
    board = Board(folder if world.first and config.tensorboard else None, trainer.history)
    accuracy = "ema_accuracy" if trainer.average else "test_accuracy"

    def save() -> None:
        if not trainer.is_finite():  # on all processes alike
            raise FloatingPointError("the loss is no longer a finite number: lower lr, sigma or rho")
        state = trainer.state_dict()
        if world.first:
            checkpoint.save(folder / checkpoint.NAME, state)
            if trainer.step == 0 and best(trainer.history, accuracy):
                checkpoint.keep_best(folder)

    def stop_if_asked() -> None:
        # Signals reach processes in different steps, or reach only one: so all agree in every step, which costs 0.1 ms.
        number = world.largest(signals[0] if signals else 0)
        if not number:
            return
        save()
        terminal.say(
            console,
            f"Stopped after {trainer.steps_done} of {trainer.total_steps} steps; continue with\n"
            f"  flatops train --resume {folder}",
        )
        world.wait()  # if one left now, torchrun would end the first while it writes
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def on_step(trainer: Trainer) -> None:
        screen.step()
        if config.checkpoint_every and trainer.steps_done % config.checkpoint_every == 0:
            save()
        stop_if_asked()

    def may_interrupt() -> bool:
        return world.size == 1 and trainer.data.waiting  # several processes agree after a step instead

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
                # Names that are not UTF-8 are written byte by byte.
                (folder / "bad_images.txt").write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
            if not math.isfinite(row["train_loss"]):
                raise FloatingPointError(f"the loss became {row['train_loss']}: lower lr, sigma or rho")
            save()
            if trainer.epoch < config.epochs:
                stop_if_asked()
    board.close()


def best(history: list[Row], accuracy: str) -> bool:
    """Whether the last epoch is the best so far."""
    return bool(history) and history[-1][accuracy] >= max(row[accuracy] for row in history)


@contextmanager
def memory_advice(config: TrainConfig, folder: Path | None = None) -> Iterator[None]:
    """Say which option to change when memory runs out; PyTorch raises one error for the GPU and several for the CPU."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_cpu = "allocate memory" in str(error) or isinstance(error, MemoryError)
        if not (isinstance(error, torch.OutOfMemoryError) or on_cpu):
            raise
        half = ", or use amp bf16" if config.amp == "none" else ""
        raise MemoryError(
            f"out of memory: raise accumulate (now {config.accumulate}) or lower batch_size (now {config.batch_size}){half}"
            + (
                f"; continue with: flatops train --resume {folder} --accumulate {2 * config.accumulate}"
                if folder and (folder / checkpoint.NAME).is_file()
                else ""
            )
        ) from error


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Say how to continue when another process is lost, worker processes included."""
    try:
        with peer_errors():
            yield
    except ConnectionError as error:
        saved = (folder / checkpoint.NAME).is_file()
        advice = f"continue with: flatops train --resume {folder}" if saved else "nothing was saved yet"
        raise ConnectionError(f"{error}; {advice}") from error


def make_folder(config: TrainConfig) -> Path:
    """The run's folder: the one asked for, that of the run it continues, or a new one under runs/.

    Raises:
        ValueError: the folder asked for is in use.
    """
    if config.output:
        folder = config.output
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is in use: choose another output, or continue its run with resume")
    elif config.resume:
        folder = checkpoint.locate(config.resume).parent
    else:
        return new_folder(
            Path("runs", f"{config.data}-{config.model}-{config.method}-{time.strftime('%Y%m%d-%H%M%S')}")
        )
    folder.mkdir(parents=True, exist_ok=True)
    if config.resume and (source := checkpoint.locate(config.resume).parent) != folder:
        for name in (checkpoint.NAME, checkpoint.BEST):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    return folder


def new_folder(folder: Path) -> Path:
    """A new folder of that name, with a number appended where runs start in the same second."""
    for number in itertools.count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            place.mkdir(parents=True)
        except FileExistsError:
            continue
        return place


class Interrupted(BaseException):
    """A signal arrived at a moment when it may interrupt."""


@contextmanager
def deferred_signals(may_interrupt: Callable[[], bool] = lambda: False) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of acting on them; the second one acts as usual.

    Args:
        may_interrupt: whether the first one may raise Interrupted now, as while waiting for images that may never come.
    """
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
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
