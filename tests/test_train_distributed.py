"""The training program on two processes, under torchrun, on the CPU."""

from __future__ import annotations

import random
import re
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import train_worker
from pictures import make_folder
from torchrun import torchrun

from flatops import cli
from flatops.train import TrainConfig, Trainer, checkpoint, data, engine, models
from flatops.train.order import CLEAN
from flatops.train.world import World

pytestmark = pytest.mark.usefixtures("one_thread")
WORKER = Path(train_worker.__file__)
FILES = {"config.json", "log.jsonl", "last.pt", "best.pt", "curves.png"}


def train_together(*arguments: object, fault: tuple[str, int, int] = ("none", 0, 0)) -> subprocess.CompletedProcess:
    return torchrun(WORKER, *fault, "--threads", 1, *arguments)


def assert_close(left: object, right: object, rtol: float = 2e-3, atol: float = 2e-5) -> None:
    """Equal up to rounding, except times."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in (key for key in left if "second" not in str(key)):
            assert_close(left[key], right[key], rtol, atol)
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right):
            assert_close(one, other, rtol, atol)
    elif isinstance(left, (torch.Tensor, float)):
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol)
    else:
        assert left == right


def assert_same(left: object, right: object) -> None:
    """Equal to the bit, except times."""
    assert_close(left, right, rtol=0, atol=0)


# What two processes compute


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folder):
    """The result of every run of train_worker.py on each of two processes."""
    file = folder / "runs"
    done = torchrun(WORKER, "runs", file)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{file}.{rank}", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", [*train_worker.RUNS, *train_worker.RESUMED])
def test_processes_keep_the_same_weights(runs, name):
    first, second = (run[name]["weights"] for run in runs)
    parameters = [key for key in first if "running" not in key]
    assert_same({key: first[key] for key in parameters}, {key: second[key] for key in parameters})


@pytest.fixture
def alone(monkeypatch):
    """The trainer of the same run in this process."""

    def trainer(name: str) -> Trainer:
        model, config = (train_worker.RUNS | train_worker.RESUMED)[name]
        monkeypatch.setattr(models, "cnn", train_worker.MODELS[model])
        monkeypatch.setattr(engine, "EVALUATION_BATCH", train_worker.EVALUATION_BATCH)
        return Trainer(config)

    return trainer


@pytest.mark.parametrize("name", train_worker.RUNS)
def test_two_processes_compute_what_one_does(runs, alone, name):
    """The same batches, noise and masks, up to the rounding of sums, and the same form of checkpoint."""
    together, one = runs[0][name]["state"], train_worker.finish(alone(name))
    assert [process.keys() for process in together["processes"]] == [one["processes"][0].keys()] * 2
    del together["processes"], one["processes"]
    assert_close(together, one)


@pytest.mark.parametrize("name", train_worker.RESUMED)
def test_resume_equals_no_interruption_to_the_bit(runs, name):
    assert_same(runs[0][name]["resumed"], runs[0][name]["state"])


def test_each_process_has_its_own_random_state(runs):
    first, second = (p["random"]["torch"] for p in runs[0]["random states"]["state"]["processes"])
    assert not torch.equal(first, second)


def test_a_checkpoint_of_shards_resumes_on_one_process(runs, alone, folder):
    trainer = alone("shards")
    trainer.load_state_dict(checkpoint.read(folder / "shards.pt"))
    assert trainer.steps_done == train_worker.STOP
    together, one = runs[0]["shards"]["state"], train_worker.finish(trainer)
    for key in ("model", "optimizer", "history"):
        assert_close(together[key], one[key])


def test_a_checkpoint_of_parallel_mrwp_resumes_on_one_process(runs, alone, folder):
    trainer = alone("side by side")
    trainer.load_state_dict(checkpoint.read(folder / "side by side.pt"))
    losses = [row["test_loss"] for row in train_worker.finish(trainer)["history"]]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_accumulation_loss_scale_clipping_and_replicas_together(folder):
    """Each method takes the same steps in four micro-batches under a loss scale as in one; replicas stay equal."""
    done = torchrun(WORKER, "combined", folder / "combined")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(folder / f"combined.{rank}") for rank in range(2))
    assert first.keys() == second.keys() and len(first) == 20
    for name, weights in first.items():
        assert_same(weights, second[name])
        assert_close(weights, first[(*name[:-1], 1)], rtol=1e-3, atol=1e-5)


# Roles and micro-batches, in this process


def test_one_process_mixes_the_gradients_of_two_halves():
    trainer = Trainer(TrainConfig(method="mrwp", rwp_parallel=True, lam=0.25, sigma=0.0))
    [batch] = next(trainer._batches())
    halves = list(zip(*(tensor.split(32) for tensor in batch)))
    twin = Trainer(TrainConfig()).model.train()
    losses = [F.cross_entropy(twin(images), labels) for images, labels in halves]
    wanted = torch.autograd.grad(0.75 * losses[0] + 0.25 * losses[1], list(twin.parameters()))
    trainer.model.train()
    output = trainer.form.take(trainer.model, trainer.optimizer, trainer.gradient, batch)
    torch.testing.assert_close([p.grad for p in trainer.model.parameters()], list(wanted))
    torch.testing.assert_close(output.loss, sum(losses) / 2)
    assert len(output.logits) == 64


def test_processes_divide_every_batch():
    digits = data.load(TrainConfig())
    where = {"seed": 1, "epoch": 2, "stream": CLEAN}
    for whole, *parts in zip(
        digits.batches(64, **where), *(digits.batches(64, rank=p, world_size=4, **where) for p in range(4))
    ):
        assert torch.equal(whole[1], torch.cat([labels for _, labels in parts]))


# Errors


@pytest.mark.parametrize(
    "processes, options, message",
    [
        (2, {"batch_size": 63}, "batch_size 63 cannot be divided evenly among 2 processes"),
        (1, {"method": "mrwp", "rwp_parallel": True, "batch_size": 63}, "batch_size 63 .* among 2 halves"),
        (2, {"method": "sam", "rwp_parallel": True}, "sam has no option rwp_parallel"),
        (2, {"method": "mrwp", "ascent": "local"}, "mrwp has no option ascent"),
        (2, {"device": "cuda:1"}, "device cuda:1 is for one process"),
        (2, {"method": "mrwp", "rwp_parallel": True, "parallel": "fsdp"}, "one replica .* needs two"),
        (2, {"method": "sam", "ascent": "local", "parallel": "fsdp"}, "ascent local needs the whole network"),
        (2, {"channels_last": True, "parallel": "fsdp"}, "leave out channels_last"),
        (2, {"timeout": 0}, "timeout"),
    ],
    ids=str,
)
def test_incompatible_options_are_refused(processes, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(**options), World(size=processes))


def test_compare_is_for_one_process(monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["compare"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == "flatops compare (rank 1): compare runs in one process: start it without torchrun"


@pytest.mark.parametrize("other", [{"ascent": "local"}, {"method": "mrwp"}], ids=str)
def test_options_that_affect_the_weights_are_fixed_on_resume(other):
    trainer = Trainer(TrainConfig(method="sam"))
    state = Trainer(replace(trainer.config, parallel="fsdp", timeout=5)).state_dict()
    trainer.load_state_dict(state)
    with pytest.raises(ValueError, match=next(iter(other))):
        Trainer(TrainConfig(**{"method": "sam"} | other)).load_state_dict(state)


# Faults


def options(name: str, output: Path) -> list[object]:
    """The options with which `flatops train` is one of the runs of train_worker.py."""
    config, default = train_worker.RESUMED[name][1], TrainConfig()
    given = [f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]
    values = {f"--{name.replace('_', '-')}": getattr(config, name) for name in given}
    flags = [part for flag, value in values.items() for part in ([flag] if value is True else [flag, value])]
    return [*flags, "--output", output]


def complaints(done: subprocess.CompletedProcess) -> list[str]:
    """What flatops wrote to standard error, where Python wrote nothing."""
    assert "[rank" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("flatops train")]


def assert_ended_as(whole: dict, folder: Path) -> None:
    """A run that was interrupted and resumed ended as one that was not, to the bit."""
    saved = checkpoint.read(folder)
    assert_same(*({key: state[key] for key in whole.keys() - {"config"}} for state in (saved, whole)))
    assert {path.name for path in folder.iterdir()} == FILES


def test_a_killed_process_ends_the_run_and_resume_repairs_it(runs, tmp_path):
    """kill -9 at a random step."""
    step = random.randrange(6, 20)
    run = [*options("side by side", tmp_path / "run"), "--checkpoint-every", 3]
    done = train_together(*run, fault=("kill", 1, step))
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    [line] = complaints(done)
    assert "another process died or hung" in line and f"--resume {tmp_path / 'run'}" in line, step
    saved = checkpoint.read(tmp_path / "run")
    assert saved["epoch"] * 10 + saved["step"] == max(step // 3 * 3, step // 10 * 10)

    assert train_together("--resume", tmp_path / "run").returncode == 0
    assert_ended_as(runs[0]["side by side"]["state"], tmp_path / "run")


def test_a_folder_of_images_end_to_end_and_after_kill_9_to_the_bit(tmp_path):
    """bf16, mixup, erasing, EMA, accumulation and workers on two processes, of which one is killed mid-epoch."""
    root = make_folder(tmp_path / "images", train=32, val=9)
    run = [
        "--data",
        "folder",
        "--data-dir",
        root,
        "--image-size",
        16,
        "--batch-size",
        16,
        "--epochs",
        2,
        "--method",
        "mrwp",
    ]
    run += ["--amp", "bf16", "--mixup", 0.2, "--erasing", 0.3, "--ema", 0.9, "--accumulate", 2, "--workers", 1]
    assert train_together(*run, "--output", tmp_path / "whole").returncode == 0

    killed = [*run, "--output", tmp_path / "run", "--checkpoint-every", 2]
    done = train_together(*killed, fault=("kill", 1, 9))
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    [line] = complaints(done)
    assert "another process died or hung" in line
    saved = checkpoint.read(tmp_path / "run")
    assert (saved["epoch"], saved["step"]) == (1, 2)

    done = train_together("--resume", tmp_path / "run", "--workers", 0)
    assert done.returncode == 0, done.stderr
    whole = checkpoint.read(tmp_path / "whole")
    assert_same(whole["ema"], checkpoint.read(tmp_path / "run")["ema"])
    assert_ended_as(whole, tmp_path / "run")


def test_a_process_that_hangs_times_out(tmp_path):
    run = [*options("random states", tmp_path / "run"), "--timeout", 3]
    done = train_together(*run, fault=("hang", 1, 12))
    assert done.returncode != 0
    [line] = complaints(done)
    assert "another process died or hung" in line and f"--resume {tmp_path / 'run'}" in line
    assert checkpoint.read(tmp_path / "run")["epoch"] == 1


def test_a_process_that_fails_alone_is_named(tmp_path):
    done = train_together(*options("random states", tmp_path / "run"), fault=("raise", 1, 3))
    assert done.returncode != 0
    said = complaints(done)
    assert "flatops train (rank 1): this process alone" in said
    assert not any("(rank 1): another process" in line for line in said)


def test_sigterm_saves_shards_and_resume_is_exact(runs, tmp_path):
    """The launcher forwards the signal; processes stop after the same step, and the first one writes."""
    done = train_together(*options("shards and a mask", tmp_path / "run"), fault=("terminate", 1, 12))
    assert done.returncode != 0 and complaints(done) == []
    assert re.search(r"Stopped after 1\d of 20 steps", done.stdout)
    assert f"--resume {tmp_path / 'run'}" in done.stdout
    saved = checkpoint.read(tmp_path / "run")
    assert saved["epoch"] == 1 and 2 <= saved["step"] < 10 and len(saved["processes"]) == 2

    assert train_together("--resume", tmp_path / "run").returncode == 0
    assert_ended_as(runs[0]["shards and a mask"]["state"], tmp_path / "run")
