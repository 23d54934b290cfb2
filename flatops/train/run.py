"""`flatops train`: one run in its folder, with checkpoint, log and plot, until it is done or stopped."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from . import checkpoint, plots
from .config import TrainConfig
from .engine import Row, Trainer
from .report import Log, Screen, write_json
from .world import joined, peer_errors


def train(config: TrainConfig, console: Console | None = None) -> list[Row]:
    """Train one network and leave config.json, log.jsonl, last.pt and curves.png in the run's folder.

    Ctrl-C and SIGTERM finish the step, save, say how to resume, and stop; a second one stops at once.

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
    """
    with joined(config.timeout) as world:
        console = (console or Console()) if world.first else Console(quiet=True)
        state = checkpoint.read(config.resume) if config.resume else None
        trainer = Trainer(config, world)
        if state:
            trainer.load_state_dict(state)
        folder = world.from_first(lambda: make_folder(config))
        if world.first:
            write_json(folder / "config.json", checkpoint.pack_config(config) | trainer.options)
        with resumable(folder):
            run_epochs(trainer, folder, console)
        if world.first:
            title = f"{trainer.method.label} on {config.data}"
            plots.learning_curves(trainer.history, title, folder / "curves.png")
        seconds = sum(row["seconds"] for row in trainer.history)
        say(
            console,
            f"[bold]test accuracy {trainer.history[-1]['test_accuracy']:.1%}[/bold] after "
            f"{config.epochs} epochs, {seconds:.1f} s of training; see {folder}",
        )
        return trainer.history


def run_epochs(trainer: Trainer, folder: Path, console: Console) -> None:
    """Train to the end; show, log and save every epoch; save and stop where a signal asks for it."""
    config, world = trainer.config, trainer.world
    log = Log(folder / "log.jsonl" if world.first else None, trainer.history)

    def save() -> None:
        state = trainer.state_dict()
        if world.first:
            checkpoint.save(folder / checkpoint.NAME, state)

    def stop_if_asked() -> None:
        # Signals reach processes in different steps, or only one of them: they agree in every step, which costs 0.1 ms.
        number = world.largest(signals[0] if signals else 0)
        if not number:
            return
        save()
        say(
            console,
            f"Stopped after {trainer.steps_done} of {trainer.total_steps} steps; continue with\n"
            f"  flatops train --resume {folder}",
        )
        world.wait()  # one that left now would have torchrun end the first in the middle of its writing
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def on_step(trainer: Trainer) -> None:
        screen.step()
        if config.checkpoint_every and trainer.steps_done % config.checkpoint_every == 0:
            save()
        stop_if_asked()

    with Screen(trainer, console) as screen, deferred_signals() as signals:
        while trainer.epoch < config.epochs:
            row = trainer.run_epoch(on_step)
            log.add(row)
            screen.epoch(row)
            if not math.isfinite(row["train_loss"]):
                raise FloatingPointError(f"the loss became {row['train_loss']}: lower lr, sigma or rho")
            save()
            stop_if_asked()


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Say how to go on, where another process is lost."""
    try:
        with peer_errors():
            yield
    except ConnectionError as error:
        saved = (folder / checkpoint.NAME).is_file()
        advice = f"continue with: flatops train --resume {folder}" if saved else "nothing was saved yet"
        raise ConnectionError(f"{error}; {advice}") from error


def say(console: Console, message: str) -> None:
    """Print a message whole, without colouring its numbers or breaking its paths."""
    console.print(message, highlight=False, soft_wrap=True)


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
        folder = Path(
            "runs", f"{config.data}-{config.model}-{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of acting on them; the second one acts as usual."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield arrived
        return

    def defer(number: int, frame: object) -> None:
        arrived.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, defer) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        restore()
