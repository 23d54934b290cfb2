"""Recipes of the training program: precision, accumulation, clipping, averaging, presets, metrics, disks."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.amp import GradScaler

from flatops import cli
from flatops.methods import METHODS
from flatops.train import TrainConfig, Trainer, checkpoint, models, presets, profile, train
from flatops.train.config import used_options, with_method
from flatops.train.metrics import Metrics
from flatops.train.run import best
from flatops.train.steps import choose
from flatops.train.world import World

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def perceptron(monkeypatch):
    """A network without BatchNorm, for which micro-batches add up to the batch."""

    def made(classes, channels):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 31), nn.ReLU(), nn.Linear(31, classes))

    monkeypatch.setattr(models, "cnn", made)


def quiet() -> Console:
    return Console(file=StringIO(), width=200)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def steps(trainer: Trainer, count: int) -> None:
    trainer.network.train()
    for _, batches in zip(range(count), trainer._batches()):
        trainer._train_step(*batches)


def config(method: str = "sgd", **options) -> TrainConfig:
    some = {"fisher_samples": 16} if method == "ssam" else {}
    return TrainConfig(**{"method": method, "epochs": 2, "lr": 0.02} | some | options)


# Precision, accumulation, clipping


@pytest.mark.parametrize("method", sorted(METHODS))
def test_micro_batches_give_the_same_step(method, perceptron):
    results = []
    for accumulate in (1, 4):
        trainer = Trainer(config(method, accumulate=accumulate, clip_norm=0.5))
        if method == "ssam":
            trainer.update_mask()
        steps(trainer, 5)
        results.append(weights(trainer))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_loss_scale_makes_no_difference_with_accumulation_and_clipping(method):
    """To the bit, including m-ARWP's F, which would show the scale."""
    results = []
    for scaled in (False, True):
        trainer = Trainer(config(method, accumulate=2, clip_norm=0.5, **({"eta": 3.0} if "arwp" in method else {})))
        if scaled:
            trainer.gradient.scaler = GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
        steps(trainer, 5)
        fisher = list(getattr(trainer.optimizer, "fisher", {}).values())
        results.append([*weights(trainer), *fisher])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_float16_skips_overflows_and_continues(method, perceptron):
    trainer = Trainer(config(method, amp="fp16", accumulate=2, clip_norm=1.0, batch_size=128))
    trainer.gradient.scaler = GradScaler("cpu", init_scale=2.0**40)  # far too large: the first steps overflow
    before = weights(trainer)
    steps(trainer, 1)
    torch.testing.assert_close(weights(trainer), before, rtol=0, atol=0)
    assert trainer.gradient.scaler.get_scale() == 2.0**39
    trainer.gradient.scaler = GradScaler("cpu", init_scale=2.0**10)
    steps(trainer, 8)
    after = weights(trainer)
    assert all(torch.isfinite(p).all() for p in after) and not torch.equal(before[0], after[0])


def test_the_step_is_clipped():
    trainer = Trainer(config(lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=1e-3))
    before = weights(trainer)
    steps(trainer, 1)
    moved = torch.cat([(p - q).flatten() for p, q in zip(weights(trainer), before)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_resume_restores_the_loss_scale(tmp_path, perceptron):
    settings = config("sam", amp="fp16", batch_size=256)
    whole, part = Trainer(settings), Trainer(settings)
    for trainer in (whole, part):
        trainer.gradient.scaler = GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    whole.run_epoch()
    whole.run_epoch()
    part.run_epoch()
    checkpoint.save(tmp_path / "last.pt", part.state_dict())
    resumed = Trainer(settings)
    resumed.load_state_dict(checkpoint.read(tmp_path))
    resumed.run_epoch()
    assert resumed.gradient.scaler.state_dict() == whole.gradient.scaler.state_dict()
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options, kind", [({"base": "adamw"}, torch.optim.AdamW), ({"nesterov": True}, torch.optim.SGD)], ids=str
)
@pytest.mark.parametrize("method", ["sgd", "marwp", "ssam"])
def test_base_optimizers(method, options, kind):
    trainer = Trainer(config(method, batch_size=256, **options))
    assert isinstance(trainer.optimizer, kind)
    assert trainer.optimizer.param_groups[0].get("nesterov", False) == options.get("nesterov", False)
    steps(trainer, 2)


def test_rho_follows_its_schedule():
    trainer = Trainer(config("sam", rho=0.1, rho_end=0.3))
    for _ in range(2):
        row = trainer.run_epoch()
    assert row["rho"] == pytest.approx(0.3) and trainer.history[0]["rho"] == pytest.approx(0.2)


# Mixing, averaging, metrics


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}], ids=str)
def test_mixed_batches_have_mixed_labels(options):
    trainer = Trainer(config(label_smoothing=0.1, **options))
    plain = Trainer(config())
    [(images, labels)] = next(trainer._batches())
    [(before, hard)] = next(plain._batches())
    torch.testing.assert_close(labels.sum(1), torch.ones(64))
    share = labels[torch.arange(64), hard]
    assert not torch.equal(images, before) and share.max() < 1
    if "cutmix" not in options:
        lam = ((images - before.flip(0)).norm() / (before - before.flip(0)).norm()).item()
        torch.testing.assert_close(images, lam * before + (1 - lam) * before.flip(0))
    again, other = (next(Trainer(config(label_smoothing=0.1, seed=s, **options))._batches())[0] for s in (0, 1))
    assert torch.equal(again[0], images) and not torch.equal(other[0], images)
    assert trainer.run_epoch()["train_loss"] > 0


def test_processes_mix_in_the_same_proportion():
    shares = []
    for rank in range(2):
        trainer = Trainer(config(mixup=0.4))
        trainer.world = World(rank, 2)
        [(_, labels)] = next(trainer._batches())
        shares.append(labels.max(1).values.min().item())  # of the larger part, where two classes mix
    assert shares[0] == pytest.approx(shares[1]) and 0.5 <= shares[0] < 1


def test_ema_is_the_recursion_and_is_evaluated():
    trainer = Trainer(config("rwp", ema=0.9, batch_size=256))
    wanted = None

    def follow(trainer):
        nonlocal wanted
        decay = trainer.average.get_decay(trainer.steps_done)
        state = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        wanted = wanted or state
        wanted = {k: v.lerp(state[k], 1 - decay) if v.is_floating_point() else state[k] for k, v in wanted.items()}

    row = trainer.run_epoch(follow)
    torch.testing.assert_close(dict(trainer.average.module.state_dict()), wanted)
    twin = copy.deepcopy(trainer.average.module).eval()
    images, labels = trainer.data.test
    assert row["ema_accuracy"] == pytest.approx((twin(images).argmax(1) == labels).float().mean().item())
    assert row["ema_accuracy"] != row["test_accuracy"]


def test_metrics_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1000, 8, generator=generator)
    labels = torch.randint(8, (1000,), generator=generator)
    labels[::10] = -100
    metrics = Metrics(torch.device("cpu"), 8)
    for part in range(0, 1000, 300):
        some = slice(part, part + 300)
        metrics.add(F.cross_entropy(logits[some], labels[some]), logits[some], labels[some])
    found = metrics.result()
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    confidence, guess = logits.softmax(1).max(1)
    right = (guess == labels).float()
    gap = sum(
        abs((right[inside] - confidence[inside]).sum())
        for low in range(15)
        for inside in [(confidence > low / 15) & (confidence <= (low + 1) / 15)]
    )
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx(right.mean().item())
    assert found["top5"] == pytest.approx((logits.topk(5).indices == labels[:, None]).any(1).float().mean().item())
    assert found["ece"] == pytest.approx(gap.item() / len(labels), rel=1e-4)
    few = Metrics(torch.device("cpu"), 5)
    few.add(torch.tensor(1.0), torch.eye(5), torch.arange(5))
    assert few.result().keys() == {"loss", "accuracy", "ece"}
    with pytest.raises(ValueError, match="none of the test images"):
        Metrics(torch.device("cpu"), 5).result()


def test_the_best_checkpoint_is_kept(tmp_path, monkeypatch):
    scores = iter([0.5, 0.9, 0.9, 0.2])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, model=None: {"loss": 1.0, "accuracy": next(scores)})
    monkeypatch.setattr("flatops.train.report.COLUMNS", {})
    train(config(epochs=4, batch_size=512, output=tmp_path / "run"), quiet())
    assert checkpoint.read(tmp_path / "run" / "best.pt")["epoch"] == 3
    assert checkpoint.read(tmp_path / "run")["epoch"] == 4
    assert not best([], "test_accuracy")


def test_the_best_checkpoint_is_that_of_the_average(tmp_path, monkeypatch):
    scores = iter([0.9, 0.1, 0.1, 0.9])  # of the weights and of their average, twice
    monkeypatch.setattr(Trainer, "evaluate", lambda self, model=None: {"loss": 1.0, "accuracy": next(scores)})
    train(config(epochs=2, batch_size=512, ema=0.9, output=tmp_path / "run"), quiet())
    assert checkpoint.read(tmp_path / "run" / "best.pt")["epoch"] == 2


def test_mixed_labels_are_smoothed_once():
    trainer = Trainer(config(label_smoothing=0.1, mixup=0.4))
    [batch] = next(trainer._batches())
    with torch.no_grad():
        output = trainer.gradient.forward(batch)
    wanted = -(output.logits.float().log_softmax(1) * batch[1]).sum(1).mean()
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_runs_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flatops.train.run.time.strftime", lambda form: "now")
    for seed in (0, 1, 2):
        train(config(epochs=1, batch_size=512, seed=seed), quiet())
    names = [f"digits-cnn-sgd-now{end}" for end in ("", "-2", "-3")]
    assert [json.loads((tmp_path / "runs" / name / "config.json").read_text())["seed"] for name in names] == [0, 1, 2]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    settings = config(epochs=2, batch_size=128, checkpoint_every=1, output=tmp_path / "run")
    step, good = Trainer._train_step, []

    def poisoned(self, *batches):
        if self.steps_done == 12:
            good.append((tmp_path / "run" / "last.pt").read_bytes())
            with torch.no_grad():
                next(self.model.parameters()).fill_(torch.nan)
        step(self, *batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError, match="no longer a finite number"):
        patch.setattr(Trainer, "_train_step", poisoned)
        train(settings, quiet())
    assert (tmp_path / "run" / "last.pt").read_bytes() == good[0]
    assert all(t.isfinite().all() for t in checkpoint.read(tmp_path / "run")["model"].values())


def test_a_run_resumed_in_another_folder_copies_its_checkpoints(tmp_path):
    settings = config(epochs=1, batch_size=512, output=tmp_path / "a")
    train(settings, quiet())
    train(replace(settings, resume=tmp_path / "a", output=tmp_path / "b"), quiet())
    for name in ("last.pt", "best.pt"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_tensorboard_gets_every_row_once(tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config(epochs=2, batch_size=512, output=tmp_path / "run", tensorboard=True)
    history = train(settings, quiet())
    train(replace(settings, output=None, resume=tmp_path / "run"), quiet())
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("test/accuracy")] == [1, 2]
    assert events.Scalars("test/loss")[1].value == pytest.approx(history[1]["test_loss"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main(["train", "--tensorboard", "--epochs", "1", "--output", str(tmp_path / "other")]) == 2
    assert "flatops[tensorboard]" in capsys.readouterr().err


# Presets and networks


@pytest.mark.parametrize("name", presets.names())
def test_presets_are_runs_with_their_source(name):
    settings = presets.recipe(name, epochs=50)
    assert settings.epochs == 50
    for method in METHODS:  # its own method, and the baselines that it is compared with
        other = with_method(settings, method)
        choose(other)
        used_options(other)
    assert with_method(settings, settings.method) == settings
    text = (Path(presets.__file__).parent / f"{name}.toml").read_text()
    assert text.startswith("#") and "arXiv" in text
    models.create(settings.model, 10, 3, 224) if "vit" in name or "cifar" in name else None


def test_the_command_line_overrides_presets(monkeypatch):
    seen = []
    monkeypatch.setattr("flatops.train.train", seen.append)
    assert cli.main(["train", "--preset", "cifar100-resnet18-mrwp", "--lam", "0.7", "--epochs", "3"]) == 0
    [settings] = seen
    assert (settings.method, settings.lam, settings.epochs, settings.sigma) == ("mrwp", 0.7, 3, 0.015)


def test_an_unknown_preset_suggests_similar_ones(capsys):
    assert cli.main(["train", "--preset", "imagenet-resnet50"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "did you mean imagenet-resnet50-" in line and "cifar100-resnet18-mrwp" in line


def test_networks_by_name():
    assert models.create("torchvision:resnet18", 7, 3).fc.out_features == 7
    small = models.create("resnet18_cifar", 10, 3)
    assert small.conv1.stride == (1, 1) and small(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert models.create("vit_tiny_patch16_224", 4, 3, 32)(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    for name, message in {
        "torchvision:resnet19": "did you mean torchvision:resnet1",
        "vit_tiny_patch16_224_cifar": "only a plain ResNet",
        "resnet19_cifar": "unknown model",
    }.items():
        with pytest.raises(ValueError, match=message):
            models.create(name, 10, 3)
    with pytest.raises(ValueError, match="3 channels, not 1"):
        models.create("torchvision:resnet18", 10, 1)


# Errors and failures


@pytest.mark.parametrize(
    "options, message",
    [
        ({"accumulate": 3}, "accumulate 3 does not divide a process's 64 images"),
        ({"mixup": 0.2, "batch_size": 63}, "mixup and cutmix pair images"),
        ({"randaugment": "rand-m9"}, "randaugment is for photographs"),
        ({"classes": 7}, "classes is 7, but digits has 10"),
        ({"method": "rwp", "rho_end": 0.1}, "rwp has no option rho_end"),
        ({"base": "adamw", "nesterov": True}, "nesterov"),
        ({"ema": 1.0}, "ema must lie"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"erasing": 1.5}, "erasing"),
        ({"workers": -1}, "workers"),
        ({"ema": 0.9, "parallel": "fsdp"}, "ema needs the whole network"),
    ],
    ids=str,
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(**options))


def test_a_checkpoint_of_another_network_is_refused_by_its_weights():
    state = Trainer(config()).state_dict()
    state["model"]["0.weight"] = torch.zeros(1)
    trainer = Trainer(config())
    before = weights(trainer)
    with pytest.raises(ValueError, match="has another network; its weights differ in 0.weight"):
        trainer.load_state_dict(state)
    torch.testing.assert_close(weights(trainer), before, rtol=0, atol=0)


def test_out_of_memory_is_a_one_line_error(monkeypatch, capsys, tmp_path):
    """A real allocation that fails, after the first epoch."""
    step = Trainer._train_step

    def greedy(self, *batches):
        if self.epoch == 1:
            torch.empty(2**55)
        step(self, *batches)

    monkeypatch.setattr(Trainer, "_train_step", greedy)
    run = tmp_path / "run"
    assert cli.main(["train", "--epochs", "2", "--batch-size", "256", "--output", str(run)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "out of memory: raise accumulate (now 1) or lower batch_size (now 256), or use amp bf16" in line
    assert f"--resume {run} --accumulate 2" in line
    monkeypatch.setattr(Trainer, "_train_step", step)
    assert cli.main(["train", "--resume", str(run), "--accumulate", "2"]) == 0


NO_MOUNT = 77
SMALL_DISK = f"""
mount -t tmpfs -o size=$1 tmpfs small || exit {NO_MOUNT}
shift
cd small
"$@"
status=$?
cp -a run ..
exit $status
"""


def on_a_small_disk(size: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    """`flatops train` in a file system of that size, mounted in its own namespace; `folder` gets its final contents."""
    (folder / "small").mkdir()
    namespace = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else [])]
    program = [sys.executable, "-m", "flatops", "train", "--output", "run", *options]
    command = [*namespace, "sh", "-c", SMALL_DISK, "sh", size, *program]
    done = (
        subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=300)
        if shutil.which("unshare")
        else None
    )
    if done is None or done.returncode == NO_MOUNT or done.stderr.startswith("unshare:"):
        pytest.skip("no small disk to fill: only Linux has unshare, and a container may forbid it or the mount")
    return done


@pytest.mark.parametrize("size, saved", [("500k", True), ("200k", False)], ids=["the second", "the first"])
def test_a_full_disk_is_a_one_line_error_and_loses_no_checkpoint(size, saved, tmp_path):
    """A checkpoint has 300 kB: where two of them do not fit, the second cannot be written, and the first is kept."""
    options = ["--epochs", "2", "--batch-size", "256", "--threads", "1"]
    done = on_a_small_disk(size, tmp_path, *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot save the checkpoint: No space left on device" in done.stderr
    assert ("the previous one is intact" in done.stderr) == saved
    run = tmp_path / "run"
    assert not list(run.glob(".*")) and len(list(run.glob("*.pt"))) == 2 * saved
    if saved:
        assert len((run / "log.jsonl").read_text().splitlines()) == 2  # the second epoch was trained
        assert cli.main(["train", "--resume", str(run)]) == 0
        assert cli.main(["train", "--output", str(tmp_path / "whole"), *options]) == 0
        ends = [checkpoint.read(folder)["model"] for folder in (run, tmp_path / "whole")]
        torch.testing.assert_close(*ends, rtol=0, atol=0)


# Profile


def test_profile_times_every_method_relative_to_sgd(capsys):
    settings = TrainConfig(data="synthetic", image_size=8, batch_size=32, fisher_samples=None)
    rows = profile(settings, quiet(), rounds=2)
    assert [row["method"] for row in rows] == list(METHODS) and rows[0]["ratio"] == 1
    for row in rows:
        assert row["milliseconds"] > 0
        assert sum(row[part] for part in ("passes", "flatops", "optimizer")) == pytest.approx(1)
    assert rows[1]["flatops"] > 0


def test_rows_add_up_and_are_json(tmp_path):
    [row] = train(config(epochs=1, output=tmp_path / "run"), quiet())
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text()) == row
    parts = sum(row[f"{part}_seconds"] for part in ("data", "passes", "flatops", "optimizer"))
    assert 0 < parts <= row["seconds"]
    assert os.path.samefile(tmp_path / "run" / "best.pt", tmp_path / "run" / "last.pt")
