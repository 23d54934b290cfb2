"""The training program: methods, data, checkpoints, resume, interruption, comparison, command line."""

from __future__ import annotations

import copy
import json
import math
import random
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from flatops import cli
from flatops.methods import METHODS
from flatops.train import CompareConfig, TrainConfig, Trainer, checkpoint, compare, data, models, steps, train
from flatops.train.config import used_options
from flatops.train.memory import InMemory
from flatops.train.order import CLEAN, PERTURBED

pytestmark = pytest.mark.usefixtures("one_thread")


def quiet() -> Console:
    return Console(file=StringIO(), width=120)


def text(console: Console) -> str:
    return console.file.getvalue()


def assert_same_weights(left: dict, right: dict) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# Methods


@pytest.mark.parametrize("method, amp", [*((m, "none") for m in sorted(METHODS)), ("mrwp", "bf16"), ("sam", "bf16")])
def test_every_method_learns_the_digits_in_two_epochs(method, amp):
    trainer = Trainer(TrainConfig(method=method, epochs=2, amp=amp))
    first, second = trainer.run_epoch(), trainer.run_epoch()
    assert second["test_loss"] < first["test_loss"] < 2.3
    assert second["test_accuracy"] > 0.8


@pytest.mark.parametrize("method", sorted(METHODS))
def test_defaults_and_given_options_reach_the_optimizer(method):
    config = TrainConfig(method=method)
    defaults = used_options(config)
    others = {"mask": "dynamic", "pattern": "layer"}
    given = {name: others.get(name, 0.25) for name in defaults if name != "fisher_samples"}
    for options in (defaults, given):
        optimizer = steps.create_optimizer(nn.Linear(2, 2).parameters(), replace(config, **options))
        assert isinstance(optimizer, torch.optim.SGD)
        wanted = {name: value for name, value in options.items() if name != "fisher_samples"}
        assert {name: optimizer.param_groups[0][name] for name in wanted} == wanted


@pytest.mark.parametrize("method", ["sam", "mrwp"])
def test_batchnorm_statistics_come_from_the_clean_pass_alone(method):
    trainer = Trainer(TrainConfig(method=method))
    twin = Trainer(TrainConfig(method=method)).model.train()
    batches = next(trainer._batches())
    twin(batches[0][0])
    trainer.model.train()
    trainer._train_step(*batches)
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, trainer.model.get_buffer(name)), name


@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
def test_ssam_makes_a_new_mask_every_epoch(mask):
    trainer = Trainer(TrainConfig(method="ssam", mask=mask, sparsity=0.8, epochs=3, batch_size=512))
    weights = sum(p.numel() for p in trainer.model.parameters())
    kept, masks = [], []
    for _ in range(3):
        trainer.run_epoch()
        [held] = trainer.optimizer.masks.values()
        kept.append(sum(int(live.sum()) for live in held.live().values()))
        masks.append(held.bits.clone())
    assert kept == [weights - math.ceil(0.8 * weights)] * 3
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    assert trainer.optimizer.param_groups[0]["updates"] == (3 if mask == "fisher" else 2)


def test_patterns_that_fix_the_sparsity_and_masks_without_samples():
    trainer = Trainer(TrainConfig(method="ssam", pattern="1:4", epochs=1, batch_size=512))
    trainer.run_epoch()
    assert "sparsity" not in trainer.options and trainer.optimizer.param_groups[0]["sparsity"] == 0.75
    assert "fisher_samples" not in used_options(TrainConfig(method="ssam", mask="dynamic"))


def test_the_mixed_step_is_the_weighted_sum_of_two_gradients():
    trainer = Trainer(TrainConfig(method="mrwp", sigma=0.0, lam=0.25))
    batches = next(trainer._batches())
    twin = Trainer(TrainConfig()).model.train()
    losses = [nn.functional.cross_entropy(twin(images), labels) for images, labels in batches]
    wanted = torch.autograd.grad(0.75 * losses[0] + 0.25 * losses[1], list(twin.parameters()))
    trainer.model.train()
    steps.mixed(trainer.model, trainer.optimizer, trainer.gradient, *batches)
    torch.testing.assert_close([p.grad for p in trainer.model.parameters()], list(wanted))


def test_schedules_warm_up_fall_to_zero_and_ramp_sigma():
    trainer = Trainer(TrainConfig(method="rwp", epochs=2, warmup_epochs=1, lr=0.1, sigma=0.01, sigma_end=0.03))
    seen = []
    trainer.run_epoch(lambda t: seen.append((t.optimizer.param_groups[0]["lr"], t.optimizer.param_groups[0]["sigma"])))
    row = trainer.run_epoch()
    rates = [rate for rate, _ in seen]
    assert rates == sorted(rates) and max(rates) == 0.1
    assert row["lr"] == pytest.approx(0) and row["sigma"] == pytest.approx(0.03)
    assert seen[-1][1] == pytest.approx(0.02)


def test_channels_last_and_timm_models_train():
    trainer = Trainer(TrainConfig(model="resnet18", method="mrwp", epochs=1, batch_size=512, channels_last=True))
    assert trainer.model.conv1.in_channels == 1
    assert trainer.run_epoch()["train_loss"] > 0


# Data


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_label_noise_replaces_the_exact_share_always_by_another_class(fraction):
    clean, noisy = data.load(TrainConfig()), data.load(TrainConfig(label_noise=fraction))
    changed = noisy.train[1] != clean.train[1]
    assert changed.sum() == noisy.wrong == round(fraction * len(changed))
    assert torch.equal(noisy.test[1], clean.test[1])
    assert 0 <= noisy.train[1].min() and noisy.train[1].max() < 10


def test_label_noise_follows_the_seed():
    one, same, other = (data.load(TrainConfig(label_noise=0.3, seed=seed)).train[1] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_batches_cover_an_epoch_once_and_streams_are_independent():
    digits = data.load(TrainConfig())
    numbered = InMemory((torch.arange(1347.0).reshape(-1, 1, 1, 1), digits.train[1]), digits.test, 10)
    order = {}
    for stream in (CLEAN, PERTURBED):
        order[stream] = torch.cat([x.flatten() for x, _ in numbered.batches(64, seed=0, epoch=3, stream=stream)])
        assert len(order[stream]) == 1344 == len(order[stream].unique())
    assert (order[CLEAN] == order[PERTURBED]).float().mean() < 0.02
    late = torch.cat([x.flatten() for x, _ in numbered.batches(64, seed=0, epoch=3, stream=CLEAN, start=20)])
    assert torch.equal(late, order[CLEAN][20 * 64 :])


# Checkpoints and resume


class Stopped(Exception):
    pass


def train_whole(config):
    trainer = Trainer(config)
    while trainer.epoch < config.epochs:
        trainer.run_epoch()
    return trainer


def train_in_two_parts(config, stop, folder):
    """Saves after `stop` steps, discards the trainer, and finishes with a new one."""

    def stop_there(trainer):
        if trainer.steps_done == stop:
            checkpoint.save(folder / checkpoint.NAME, trainer.state_dict())
            raise Stopped

    first = Trainer(config)
    with pytest.raises(Stopped):
        while True:
            first.run_epoch(stop_there)
    second = Trainer(config)
    second.load_state_dict(checkpoint.read(folder))
    while second.epoch < config.epochs:
        second.run_epoch()
    return second


def timeless(history):
    return [{name: value for name, value in row.items() if "second" not in name} for row in history]


def assert_same_run(left, right):
    assert_same_weights(left.model.state_dict(), right.model.state_dict())
    assert timeless(left.history) == timeless(right.history)


@pytest.mark.parametrize("stop", [21, 30], ids=["between epochs", "in mid-epoch"])
@pytest.mark.parametrize("method", ["sgd", "mrwp", "arwp", "sam", "ssam", "ssam dynamic"])
def test_resume_equals_no_interruption_to_the_bit(method, stop, tmp_path):
    options = {"mrwp": {"sigma_end": 0.1}, "ssam dynamic": {"mask": "dynamic"}}.get(method, {})
    config = TrainConfig(method=method.split()[0], epochs=2, label_noise=0.2, **options)
    assert_same_run(train_in_two_parts(config, stop, tmp_path), train_whole(config))


def test_resume_restores_the_random_states_that_dropout_draws_from(monkeypatch, tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    monkeypatch.setattr(models, "cnn", lambda classes, channels: copy.deepcopy(network))
    config = TrainConfig(epochs=2)
    assert_same_run(train_in_two_parts(config, 30, tmp_path), train_whole(config))


def test_random_state_is_restored():
    state = checkpoint.random_state()
    draws = [(torch.rand(1).item(), np.random.rand(), random.random()) for _ in range(2)]
    checkpoint.set_random_state(state)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == draws[0]


def test_ctrl_c_saves_and_says_how_to_resume(monkeypatch, tmp_path):
    config = TrainConfig(method="sam", epochs=2, output=tmp_path / "run")
    step, steps = Trainer._train_step, iter(range(1000))

    def step_then_ctrl_c(self, *batches):
        if next(steps) == 25:
            signal.raise_signal(signal.SIGINT)
        step(self, *batches)

    console = quiet()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_train_step", step_then_ctrl_c)
        train(config, console)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "26 of 42 steps" in text(console) and f"--resume {config.output}" in text(console)

    history = train(replace(config, output=None, resume=config.output), quiet())
    whole = train_whole(config)
    assert timeless(history) == timeless(whole.history)
    assert_same_weights(checkpoint.read(config.output)["model"], whole.model.state_dict())
    assert len((config.output / "log.jsonl").read_text().splitlines()) == 2


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    config = TrainConfig(epochs=1, output=tmp_path / "run")
    history = train(config, quiet())
    assert train(replace(config, output=None, resume=config.output), quiet()) == history


def test_a_failed_save_keeps_the_last_checkpoint(monkeypatch, tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.read(path)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


def damaged(path):
    checkpoint.save(path, {"epoch": 1})
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "no checkpoint"),
        (lambda path: path.write_bytes(b""), "damaged or not a checkpoint"),
        (lambda path: path.write_text("not a checkpoint"), "damaged or not a checkpoint"),
        (damaged, "damaged or not a checkpoint"),
        (lambda path: torch.save({"model": {}}, path), "not a checkpoint of flatops train"),
        (lambda path: torch.save({"format": checkpoint.FORMAT, "version": 99}, path), "version 99"),
    ],
    ids=["missing", "empty", "text", "truncated", "foreign", "newer"],
)
def test_unusable_checkpoints_are_refused_by_name(write, message, tmp_path):
    path = tmp_path / "last.pt"
    write(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        train(TrainConfig(resume=path), quiet())
    assert str(path) in str(caught.value)


def test_a_checkpoint_cut_at_any_length_is_damaged_and_named(tmp_path, capsys):
    """Even where torch looks for the end of the archive before the beginning of the file."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, Trainer(TrainConfig()).state_dict())
    whole = path.read_bytes()
    lengths = sorted({0, 1, 2, 3, 100, 500, *range(0, len(whole), 509), *range(len(whole) - 30, len(whole))})
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged or not a checkpoint") as caught:
            checkpoint.read(tmp_path)
        assert str(path) in str(caught.value)
    for length in (0, 1, 500, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        for command in (["train", "--resume"], ["landscape"]):
            assert cli.main([*command, str(tmp_path)]) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert f"{path} is damaged or not a checkpoint" in line


@pytest.mark.parametrize(
    "other", [{"method": "sam"}, {"model": "resnet18"}, {"epochs": 9}, {"label_noise": 0.1}], ids=str
)
def test_a_checkpoint_of_another_run_is_refused_before_anything_changes(other, tmp_path):
    checkpoint.save(tmp_path / "last.pt", Trainer(TrainConfig()).state_dict())
    trainer = Trainer(TrainConfig(**other))
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=next(iter(other))):
        trainer.load_state_dict(checkpoint.read(tmp_path))
    assert_same_weights(before, trainer.model.state_dict())


def test_an_option_missing_in_an_old_checkpoint_has_its_default():
    state = Trainer(TrainConfig()).state_dict()
    del state["config"]["validation"]
    Trainer(TrainConfig()).load_state_dict(state)
    with pytest.raises(ValueError, match="validation 0.0 .now 0.5."):
        Trainer(TrainConfig(validation=0.5)).load_state_dict(state)


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "mnist"}, "unknown data 'mnist'; choose from .*digits"),
        ({"model": "resnet19"}, "unknown model 'resnet19'; did you mean resnet18"),
        ({"method": "adam"}, "unknown method 'adam'; choose from sgd"),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"batch_size": 2000}, "batch_size 2000 exceeds the 1347 training images"),
        ({"method": "sgd", "sigma": 0.1}, "sgd has no option sigma"),
        ({"method": "rwp", "rho": 0.1}, "rwp has no option rho"),
        ({"method": "rwp", "sigma": -0.1}, "sigma"),
        ({"method": "sam", "rho": float("nan")}, "rho"),
        ({"method": "mrwp", "lam": 1.5}, "lam"),
        ({"method": "sam", "sparsity": 0.5}, "sam has no option sparsity"),
        ({"method": "ssam", "sparsity": 1.0}, "sparsity"),
        ({"method": "ssam", "pattern": "5:4"}, "pattern '5:4'"),
        ({"method": "ssam", "pattern": "2:4", "sparsity": 0.5}, "pattern 2:4 has no option sparsity"),
        ({"method": "ssam", "mask": "dynamic", "fisher_samples": 64}, "mask dynamic .* fisher_samples"),
    ],
    ids=str,
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"lr": float("nan")},
        {"weight_decay": -1},
        {"label_noise": 1.1},
        {"seed": -1},
        {"warmup_epochs": 41},
        {"checkpoint_every": 0},
        {"threads": 0},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TrainConfig(**options)


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="in use"):
        train(TrainConfig(epochs=1, output=tmp_path), quiet())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="the loss became"):
        train(TrainConfig(epochs=3, lr=1e30, output=tmp_path / "run"), quiet())


# Comparison


def test_compare_says_which_methods_its_schedule_favours():
    """In words, if the schedule favours a method: the default schedule."""
    from flatops.train.compare import caveat

    assert "favours the flat-minima methods" in caveat(CompareConfig(seeds=5))
    assert "favours" not in caveat(CompareConfig(epochs=10))


def test_compare_writes_every_number_and_a_plot(tmp_path):
    console = quiet()
    config = CompareConfig(methods=("sgd", "mrwp"), seeds=2, epochs=1, sigma=0.03, output=tmp_path)
    result = compare(config, console)
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert [row["method"] for row in saved["summary"]] == ["sgd", "mrwp"]
    assert saved["summary"][0]["time_to_sgd"] == 1
    assert saved["summary"][1]["options"] == {"sigma": 0.03, "lam": 0.5}
    assert len(saved["runs"]) == 4 and saved["machine"]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "m-RWP" in text(console) and "One schedule for all" in text(console)
    alone = train_whole(TrainConfig(method="mrwp", epochs=1, sigma=0.03, label_noise=0.3, seed=1))
    assert timeless(result["runs"][3]["history"]) == timeless(alone.history)


def test_compare_shows_ssam_and_its_options(tmp_path):
    console = quiet()
    config = CompareConfig(methods=("sam", "ssam"), seeds=1, epochs=1, rho=0.1, sparsity=0.75, output=tmp_path)
    result = compare(config, console)
    assert result["summary"][0]["options"] == {"rho": 0.1}
    assert result["summary"][1]["options"]["sparsity"] == 0.75
    assert "SSAM" in text(console) and "sparsity 0.75" in text(console)
    assert CompareConfig().methods == ("sgd", "rwp", "mrwp", "sam", "ssam")


def test_too_many_samples_for_a_mask_are_refused(capsys, tmp_path):
    run = ["--method", "ssam", "--fisher-samples", "5000", "--output", str(tmp_path / "run")]
    assert cli.main(["train", *run]) == 2
    assert "1344 samples and 5000 are asked for" in capsys.readouterr().err


def test_compare_refuses_an_option_that_no_method_knows(tmp_path):
    with pytest.raises(ValueError, match="none of sgd, sam has the option sigma"):
        compare(CompareConfig(methods=("sgd", "sam"), sigma=0.1, output=tmp_path), quiet())


# Command line


def test_the_command_trains_and_resumes(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "flatops", "train", "--method", "mrwp", "--epochs", "1", "--output", str(run)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "log.jsonl", "last.pt", "best.pt", "curves.png"} == {path.name for path in run.iterdir()}
    [row] = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert f"{row['test_accuracy']:.1%}" in done.stdout
    assert json.loads((run / "config.json").read_text())["sigma"] == METHODS["mrwp"].options["sigma"]
    assert cli.main(["train", "--resume", str(run)]) == 0  # method and epochs come from the checkpoint


def test_errors_are_one_line_and_status_2(capsys, tmp_path):
    for arguments in (
        ["train", "--data", "mnist"],
        ["train", "--resume", str(tmp_path)],
        ["compare", "--methods", "sgd", "--rho", "1"],
    ):
        assert cli.main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"flatops {arguments[0]}: ") and err.count("\n") == 1
    assert cli.main(["fly"]) == 2 and "unknown command 'fly'" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(["train", "--model", "resnet18"]) == 2
    assert "timm is missing; install it with: pip install 'flatops[train]'" in capsys.readouterr().err


def test_info_loads_nothing_that_only_training_needs():
    code = (
        "import sys; from flatops.cli import main; main(['info', '--json']); "
        "assert not {'matplotlib', 'sklearn', 'timm', 'flatops.train'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_ctrl_c_is_status_130(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", interrupted)
    assert cli.main(["train"]) == 130
