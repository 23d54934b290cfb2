"""The training loop: one run, from its weights at a seed to its weights at the end."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

import flatops

from . import checkpoint, data, methods, models, parallel
from .config import TrainConfig
from .world import World

# One epoch, a line of the log. The training figures are means over its steps and all processes, at the weights of
# each step's first pass (perturbed ones for RWP) and on the labels as given, wrong ones included.
Row = dict[str, float]
EVALUATION_BATCH = 512


class Trainer:
    """One run at one point of its training, and the means to go on.

    Everything random follows from the seed, the epoch and the step, so that two runs may take turns in one
    process and a resumed one equals an uninterrupted one to the bit.

    Several processes train one network: each has a trainer, takes its part of every batch, and calls what the others call.

    Args:
        config: what to train, on what, how.
        world: the processes that train it; by default this one alone.

    Raises:
        ValueError: unknown data, model, method or device, or an option out of range.
    """

    def __init__(self, config: TrainConfig, world: World = World()) -> None:
        self.config, self.world = config, world
        self.method, self.options = methods.choose(config, world.size), methods.used_options(config)
        self.device = choose_device(config.device, world)
        set_threads(config)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.data = data.load(config).to(self.device, layout)
        seed_everything(config.seed)
        self.model = models.create(config.model, self.data.classes, self.data.channels)
        self.model.to(self.device, memory_format=layout)
        self.network = self.model  # what runs; `model` has the weights and their names
        self.parallel = (config.parallel or "ddp") if world.size > 1 else None
        if self.parallel:
            self.network = parallel.distribute(self.model, self.parallel, self.device)
        self.steps_per_epoch = len(self.data.train[1]) // config.batch_size
        self.optimizer = methods.create_optimizer(
            self.model.parameters(), config, self.steps_per_epoch, world.size
        )
        self.total_steps = config.epochs * self.steps_per_epoch
        self.schedules = self._schedules()
        if config.compile:
            self.model.compile()  # in place: the names in the state_dict stay
        self.epoch = 0  # epochs done
        self.history: list[Row] = []
        self._begin_epoch()

    @property
    def steps_done(self) -> int:
        """Steps since the start of the run."""
        return self.epoch * self.steps_per_epoch + self.step

    def run_epoch(self, on_step: Callable[[Trainer], None] = lambda trainer: None) -> Row:
        """Train to the end of the epoch, evaluate, and return the epoch's row.

        Args:
            on_step: called after every step; the state is whole there, to be saved or left for good.
        """
        if self.step == 0:
            self._seed()
        self.network.train()
        started = time.perf_counter() - self.seconds
        if self.step == 0 and "fisher_samples" in self.options:
            self._update_mask()
        for batches in self._batches():
            self._train_step(*batches)
            self.seconds = time.perf_counter() - started
            on_step(self)
        train_loss, train_accuracy = self._train_means()  # waits for the device
        self.seconds = time.perf_counter() - started
        test_loss, test_accuracy = self.evaluate()
        group = self.optimizer.param_groups[0]
        self.epoch += 1
        row = {
            "epoch": self.epoch,
            **{name: float(group[name]) for name in ("lr", "sigma", "rho") if name in group},
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "seconds": self.seconds,
            "images_per_second": self.steps_per_epoch * self.config.batch_size / self.seconds,
        }
        self.history.append(row)
        self._begin_epoch()
        return row

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the test data, with the first process's BatchNorm statistics."""
        self.network.eval()
        self.world.broadcast(self.model.buffers())
        sums = torch.zeros(2, device=self.device)
        batches = self.data.test_batches(EVALUATION_BATCH)
        last = len(batches) - 1
        # All take as many turns, for the others may gather weights from this one's shards; what is in surplus does not count.
        for turn in range(self.world.rank, len(batches) + self.world.rank, self.world.size):
            output = self._forward(batches[min(turn, last)])
            if turn <= last:
                count(sums, output, batches[turn])
        loss, correct = (self.world.sum(sums) / len(self.data.test[1])).tolist()
        return loss, correct

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on, whole on the first process; the same for any number of them."""
        return {
            "config": checkpoint.pack_config(self.config),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "model": parallel.whole(self.model.state_dict()),
            "optimizer": parallel.whole(self.optimizer.state_dict()),
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "processes": self.world.gather({"sums": self.sums.cpu(), "random": checkpoint.random_state()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict() of a run with the same configuration.

        With as many processes as that run had, to the same bits as if it had never stopped. With another number the sums are
        rounded otherwise, and the random states are new ones, which follow from the seed, the step and the process.

        Raises:
            ValueError: that run's data, model, method or schedule is another; nothing has changed then.
        """
        check_same_run(state["config"], checkpoint.pack_config(self.config))
        parallel.load_model(self.model, state["model"])
        parallel.load_optimizer(self.optimizer, state["optimizer"])
        for schedule, its_state in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(its_state)
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.history = list(state["history"])
        saved = state["processes"]
        if len(saved) == self.world.size:
            self.sums = saved[self.world.rank]["sums"].to(self.device)
            checkpoint.set_random_state(saved[self.world.rank]["random"])
        else:
            if self.world.first:
                self.sums = sum(process["sums"] for process in saved).to(self.device)
            self._seed(self.step)

    def _schedules(self) -> list[LambdaLR | flatops.CosineRamp]:
        """The learning rate, and sigma where it moves; all of them step with the optimizer."""
        warmup = round(self.config.warmup_epochs * self.steps_per_epoch)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total_steps - warmup)))

        schedules: list[LambdaLR | flatops.CosineRamp] = [LambdaLR(self.optimizer, factor)]
        if "sigma_end" in self.options:
            start, end = self.options["sigma"], self.options["sigma_end"]
            schedules.append(flatops.CosineRamp(self.optimizer, "sigma", start, end, self.total_steps))
        return schedules

    def _begin_epoch(self) -> None:
        self.step = 0  # steps done in this epoch
        self.seconds = 0.0  # time they took
        self.sums = torch.zeros(2, device=self.device)  # their summed losses and right answers

    def _seed(self, *step: int) -> None:
        """Seed this process for the epoch, or for what is left of it after a step; the first one's epoch as one alone would."""
        process = (self.world.rank, *step) if step or not self.world.first else ()
        seed_everything(self.config.seed, self.epoch, *process)

    def _batches(self) -> zip[tuple[data.Batch, ...]]:
        """This process's batches of each step that is left in the epoch, one per shuffle that the method draws from."""
        streams = (data.CLEAN, data.PERTURBED)[: self.method.batches]
        return zip(*(self._shuffle(stream, start=self.step, **self._part()) for stream in streams))

    def _shuffle(self, stream: int, **which: int) -> Iterator[data.Batch]:
        return self.data.batches(
            self.config.batch_size, seed=self.config.seed, epoch=self.epoch, stream=stream, **which
        )

    def _part(self) -> dict[str, int]:
        """Which piece of a batch is this process's."""
        return {"part": self.world.rank, "parts": self.world.size}

    def _update_mask(self) -> None:
        samples, part, processes = self.options["fisher_samples"], {}, self.world.size
        # Replicas have a share each, which the optimizer sums; shards take every sample together.
        if self.parallel == "ddp":
            least, more = divmod(samples, processes)
            if not least:
                raise ValueError(f"fisher_samples {samples} is not one for each of {processes} processes")
            samples, part = least + (self.world.rank < more), self._part()
        self.optimizer.update_mask(
            self.model,
            F.cross_entropy,
            self._shuffle(data.FISHER, **part),
            samples=samples,
            progress=False,
        )

    def _train_step(self, *batches: data.Batch) -> None:
        output = self.method.step(self.network, self.optimizer, self._forward, *batches)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for schedule in self.schedules:
            schedule.step()
        count(self.sums, output, batches[0])
        self.step += 1

    def _forward(self, batch: data.Batch) -> methods.Output:
        images, labels = batch
        # DistributedDataParallel would hand on buffers in every evaluation batch too, of which processes have unlike numbers.
        network = self.network if self.model.training else self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            logits = network(images)
        smoothing = self.config.label_smoothing if self.model.training else 0.0
        return methods.Output(F.cross_entropy(logits.float(), labels, label_smoothing=smoothing), logits)

    def _train_means(self) -> list[float]:
        sums = self.world.sum(self.sums.clone())
        return (sums / (self.steps_per_epoch * self.config.batch_size)).tolist()


@torch.no_grad()
def count(sums: torch.Tensor, output: methods.Output, batch: data.Batch) -> None:
    """Add a batch's summed loss and right answers to `sums` (2,), without waiting for the device."""
    _, labels = batch
    sums += torch.stack([output.loss * len(labels), (output.logits.argmax(1) == labels).sum()])


def choose_device(name: str, world: World = World()) -> torch.device:
    """The device of that name; auto is CUDA where there is one. Each of several processes has a GPU of its own.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world.size > 1 and name.startswith("cuda:"):
        raise ValueError(f"device {name} is for one process: give cuda, and each takes its own")
    if world.size > 1 and name == "cuda":
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    if world.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def set_threads(config: TrainConfig) -> None:
    """Give PyTorch its CPU threads; more than one slows the built-in cnn down."""
    if config.threads is not None or config.model == "cnn":
        torch.set_num_threads(config.threads or 1)


def seed_everything(seed: int, *path: int) -> None:
    """Seed the generators of torch, numpy and Python from a run's seed and a path such as the epoch."""
    word = int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])
    torch.manual_seed(word)
    np.random.seed(word)
    random.seed(word)


# All else decides the weights, to the bit but for how many processes round them.
MAY_DIFFER = {"output", "resume", "checkpoint_every", "device", "threads", "parallel", "timeout"}


def check_same_run(saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError naming every option in which a checkpoint's run and the one asked for differ."""
    differ = [name for name in asked if name not in MAY_DIFFER and saved.get(name) != asked[name]]
    if differ:
        parts = ", ".join(f"{name} {saved.get(name)} (asked for: {asked[name]})" for name in differ)
        raise ValueError(f"cannot resume: the checkpoint's run has {parts}")
