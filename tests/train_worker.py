"""The processes of test_train_distributed.py, under torchrun.

train_worker.py runs FILE: makes every run of RUNS and RESUMED in one process group and writes the results to FILE.
train_worker.py combined FILE: every method, with and without accumulation, loss scale and clipping; weights go to FILE.
train_worker.py FAULT RANK STEP ARGUMENTS...: `flatops train ARGUMENTS`, where process RANK fails in STEP.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.amp import GradScaler

from flatops import cli
from flatops.methods import METHODS
from flatops.train import TrainConfig, Trainer, checkpoint, engine, models, parallel
from flatops.train.world import World, joined


def perceptron(classes: int, channels: int) -> nn.Module:
    """Has no BatchNorm, whose statistics would differ between processes and from those of a single process."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 31), nn.ReLU(), nn.Linear(31, classes))


def dropping(classes: int, channels: int) -> nn.Module:
    """A network with its own randomness."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * channels, classes))


MODELS = {"perceptron": perceptron, "dropping": dropping, "cnn": models.cnn}
EVALUATION_BATCH = 100  # the digits' 450 test images: processes get different numbers of batches, the last is uneven


def config(method: str, **options: object) -> TrainConfig:
    return TrainConfig(method=method, epochs=2, batch_size=128, lr=0.02, **options)


def use(model: str) -> None:
    """Makes `cnn` another network."""
    models.cnn = MODELS[model]
    engine.EVALUATION_BATCH = EVALUATION_BATCH


# name: (network, configuration); equal up to rounding to one process with the same configuration
RUNS = {
    f"{name} {kind}": ("perceptron", config(method, parallel=kind, **options))
    for kind, runs in {
        "ddp": {"sgd": {}, "sam": {}, "asam": {}, "ssam": {"fisher_samples": 128}},
        "fsdp": {"sgd": {}, "sam": {}, "ssam": {"fisher_samples": 16}, "mrwp": {}, "marwp": {}},
    }.items()
    for name, options in runs.items()
    for method in [name]
}

# name: (network, configuration); stopped mid-epoch and resumed
RESUMED = {
    "side by side": ("cnn", config("mrwp", rwp_parallel=True, sigma_end=0.1)),
    "adaptive, side by side": ("cnn", config("marwp", rwp_parallel=True)),
    "local ascent": ("cnn", config("sam", ascent="local")),
    "dynamic mask": ("cnn", config("ssam", mask="dynamic")),
    "random states": ("dropping", config("arwp")),
    "shards": ("perceptron", config("marwp", parallel="fsdp")),
    "shards and a mask": ("cnn", config("ssam", parallel="fsdp", fisher_samples=4)),
}
STOP = 15  # of 20 steps


def finish(trainer: Trainer, stop: int | None = None) -> dict:
    """Trains to the end, or to a step; returns what a checkpoint would hold then."""

    class Stopped(Exception):
        pass

    def stop_there(trainer: Trainer) -> None:
        if trainer.steps_done == stop:
            raise Stopped

    try:
        while trainer.epoch < trainer.config.epochs:
            trainer.run_epoch(stop_there)
    except Stopped:
        pass
    return trainer.state_dict()


def run_all(world: World, file: Path) -> None:
    """Every run: its state and this process's whole weights; for RESUMED also the state after the stop, and stopped."""
    result = {}
    for name, (model, settings) in (RUNS | RESUMED).items():
        use(model)
        trainer = Trainer(settings, world)
        result[name] = {"state": finish(trainer)}
        result[name]["weights"] = parallel.full_state(trainer.model.state_dict())
        if name in RESUMED:
            stopped = file.with_name(f"{name}.pt")
            state = finish(Trainer(settings, world), STOP)
            if world.first:
                checkpoint.save(stopped, state)
            world.wait()
            trainer = Trainer(settings, world)
            trainer.load_state_dict(checkpoint.read(stopped))
            result[name]["resumed"] = finish(trainer)
    torch.save(result, file.with_name(f"{file.name}.{world.rank}"))


def combined(world: World, file: Path) -> None:
    """A few steps of every method, plain and in micro-batches under a loss scale: this process's weights."""
    use("perceptron")
    result = {}
    for method in METHODS:
        forms = [{}] + [{"ascent": "local"}] * (method == "sam") + [{"rwp_parallel": True}] * (method == "mrwp")
        for form in forms:
            some = {"fisher_samples": 16} if method == "ssam" else {}
            for accumulate in (1, 4):
                trainer = Trainer(config(method, accumulate=accumulate, clip_norm=0.5, **form, **some), world)
                if accumulate > 1:
                    trainer.gradient.scaler = GradScaler("cpu", init_scale=2.0**12)
                finish(trainer, 5)
                result[(method, *form, accumulate)] = [p.detach() for p in trainer.model.parameters()]
    torch.save(result, file.with_name(f"{file.name}.{world.rank}"))


def harm(fault: str, rank: int, step: int) -> None:
    """Makes a process die, hang or raise when it begins a step."""
    train_step = Trainer._train_step

    def harmed(self: Trainer, *batches: object) -> None:
        if self.world.rank == rank and self.steps_done == step:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "hang":  # but in a way that the launcher can end at once
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(1000)
            if fault == "terminate":  # the launcher, which forwards the signal
                os.kill(os.getppid(), signal.SIGTERM)
            if fault == "raise":
                raise ValueError("this process alone")
        train_step(self, *batches)

    Trainer._train_step = harmed


if __name__ == "__main__":
    if sys.argv[1] in ("runs", "combined"):
        with joined(60) as world:
            torch.set_num_threads(1)
            {"runs": run_all, "combined": combined}[sys.argv[1]](world, Path(sys.argv[2]))
    else:
        use("cnn")
        harm(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
        sys.exit(cli.main(["train", *sys.argv[4:]]))
