"""Data of the training program: folders, CIFAR, synthetic images; augmentation, worker processes, unreadable images."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import tarfile
import threading
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import CLASSES, STORED, encoded, make_folder, truncate
from PIL import Image
from rich.console import Console
from torchvision import datasets

from flatops import cli
from flatops.train import TrainConfig, Trainer, augment, checkpoint, data, train
from flatops.train.dataset import DATASETS, reading, register
from flatops.train.datasets import folder
from flatops.train.decode import decoded
from flatops.train.memory import InMemory
from flatops.train.order import CLEAN, FISHER, IGNORED, PERTURBED
from flatops.train.workers import FromWorkers

WHERE = {"seed": 1, "epoch": 2}


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test(one_thread, monkeypatch):
    streams = []
    to = FromWorkers.to
    monkeypatch.setattr(FromWorkers, "to", lambda self, *where: streams.append(self) or to(self, *where))
    yield
    for each in streams:
        each.close()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def own_tree(tree, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tree, tmp_path / "images")


def config(root, **options) -> TrainConfig:
    defaults = {"epochs": 2, "batch_size": 16, "image_size": 16, "workers": 0, "lr": 0.02}
    return TrainConfig(data="folder", data_dir=root, **defaults | options)


def loaded(root, **options):
    settings = config(root, **options)
    return data.load(settings).to(torch.device("cpu"), torch.contiguous_format)


def assert_same(left, right) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# Streams from worker processes


def test_any_number_of_workers_gives_the_same_batches(tree):
    """Includes random crops, flips, RandAugment and erasing, and every start within the epoch."""
    options = {"randaugment": "rand-m9-mstd0.5", "erasing": 0.5, "cutout": 4}
    streams = [CLEAN, PERTURBED]
    alone = list(loaded(tree, **options).steps(streams, 16, **WHERE))
    assert len(alone) == 72 // 16 and alone[0][0][0].shape == (16, 3, 16, 16)
    for workers in (1, 2):
        images = loaded(tree, workers=workers, **options)
        for start in (0, 3):  # by the same workers
            assert_same(list(images.steps(streams, 16, start=start, **WHERE)), alone[start:])
    other = list(loaded(tree, **options).steps(streams, 16, seed=1, epoch=3))
    assert not torch.equal(other[0][0][0], alone[0][0][0])


def test_processes_divide_every_batch(tree):
    images = loaded(tree, erasing=0.5)
    whole = list(images.batches(16, stream=CLEAN, **WHERE))
    parts = [list(images.batches(16, stream=CLEAN, rank=p, world_size=2, **WHERE)) for p in range(2)]
    for batch, *pieces in zip(whole, *parts):
        assert_same(batch, tuple(map(torch.cat, zip(*pieces))))


def test_an_abandoned_epoch_leaves_nothing_to_the_next(tree):
    images = loaded(tree, workers=2)
    wanted = list(images.batches(16, stream=CLEAN, **WHERE))
    next(images.batches(8, stream=FISHER, **WHERE))
    assert_same(list(images.batches(16, stream=CLEAN, **WHERE)), wanted)
    tests = [labels for _, labels in images.test_batches(10, range(3))]
    assert torch.cat(tests).tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_reading_images_does_not_change_the_random_state(tree):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in (0, 1):
        list(loaded(tree, workers=workers, randaugment="rand-m5").batches(16, stream=CLEAN, **WHERE))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_images_are_uint8_until_they_are_on_the_device(tree):
    images = loaded(tree, augment="none")
    pixels, number, bad = images.images[CLEAN, 0, 5]
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 16, 16) and number == 5 and not bad
    [(batch, labels), *_] = images.test_batches(24, [0])
    assert batch.dtype == torch.float32 and labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8


@pytest.mark.parametrize("method, workers", [("mrwp", (2, 0)), ("ssam", (0, 2))])
def test_resume_is_exact_with_workers_and_everything_random(tree, tmp_path, method, workers):
    """Mid-epoch, with another number of workers."""
    options = {
        "mixup": 0.2,
        "cutmix": 1.0,
        "ema": 0.9,
        "erasing": 0.3,
        "amp": "bf16",
        "accumulate": 2,
        "clip_norm": 1.0,
    }
    if method == "ssam":
        options |= {"fisher_samples": 16, "rho_end": 0.05}
    settings = config(tree, method=method, randaugment="rand-m9", **options)

    class Stopped(Exception):
        pass

    def stop(trainer):
        if trainer.steps_done == 6:
            checkpoint.save(tmp_path / checkpoint.NAME, trainer.state_dict())
            raise Stopped

    trainers = [Trainer(replace(settings, workers=count)) for count in (0, *workers)]
    for _ in range(2):
        trainers[0].run_epoch()
    with pytest.raises(Stopped):
        for _ in range(2):
            trainers[1].run_epoch(stop)
    trainers[2].load_state_dict(checkpoint.read(tmp_path))
    trainers[2].run_epoch()
    whole, resumed = (t.state_dict() for t in (trainers[0], trainers[2]))
    for key in ("model", "ema"):
        assert_same(whole[key], resumed[key])
    assert_same(whole["optimizer"]["state"], resumed["optimizer"]["state"])
    assert whole["optimizer"]["param_groups"] == resumed["optimizer"]["param_groups"]
    for one, other in zip(whole["history"], resumed["history"]):
        assert {k: v for k, v in one.items() if "second" not in k} == {
            k: v for k, v in other.items() if "second" not in k
        }


# Image files


def ramp() -> np.ndarray:
    """A picture of 16 x 16 with all grey values, and one corner that differs from its mirror image."""
    return np.arange(256, dtype=np.uint8).reshape(16, 16)[:12]


def tiff(pixels: np.ndarray, bits: int, kind: int = 1) -> bytes:
    """A grey TIFF of a kind that PIL reads and does not write: 12 bits, or signed (kind 2)."""
    height, width = pixels.shape
    text = "".join(format(int(value), f"0{bits}b") for value in pixels.flatten())
    content = int(text, 2).to_bytes(len(text) // 8, "big")
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: 1,
        273: 134,
        277: 1,
        278: height,
        279: len(content),
        339: kind,
    }
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


SIXTEEN = Image.fromarray(ramp() * np.uint16(257))


@pytest.mark.parametrize(
    "file",
    [
        *(encoded(SIXTEEN, kind) for kind in ("PNG", "TIFF", "PPM")),
        encoded(Image.frombytes("I;16B", SIXTEEN.size, np.asarray(SIXTEEN).astype(">u2").tobytes()), "TIFF"),
        encoded(Image.fromarray(ramp()), "PNG"),
        encoded(Image.fromarray(ramp()), "GIF"),
    ],
    ids=["png 16", "tiff 16", "pgm 16", "tiff 16 big-endian", "png 8", "gif"],
)
def test_deep_images_keep_their_grey_values(file):
    assert np.array_equal(np.asarray(decoded(file)), np.repeat(ramp()[..., None], 3, axis=2))


def test_twelve_bits_are_scaled_by_their_range():
    assert np.array_equal(np.asarray(decoded(tiff(ramp() * np.uint16(16), 12)))[..., 0], ramp())


@pytest.mark.parametrize(
    "file, kind",
    [
        (encoded(Image.fromarray(ramp().astype(np.float32)), "TIFF"), "floats"),
        (encoded(Image.fromarray(ramp().astype(np.int32)), "TIFF"), "32-bit"),
        (tiff(ramp(), 16, kind=2), "signed"),
    ],
    ids=["float", "int32", "signed"],
)
def test_numbers_without_a_range_are_bad_images(own_tree, file, kind):
    (own_tree / "train" / "ant" / "002.jpg").write_bytes(file)
    [(name, reason)] = loaded(own_tree).images[CLEAN, 0, 2][2]
    assert name.endswith("ant/002.jpg") and kind in reason and "8 or 16 bits per channel" in reason


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind, mode", [("JPEG", "L"), ("PNG", "L"), ("PNG", "I;16"), ("TIFF", "L"), ("WEBP", "RGB")])
def test_images_are_turned_upright(kind, mode, orientation):
    image = SIXTEEN if mode == "I;16" else Image.fromarray(ramp()).convert(mode)
    exact = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    pixels = np.asarray(decoded(encoded(image, kind, orientation, **exact)))
    assert pixels.shape == (12, 16, 3)
    assert np.abs(pixels[..., 0].astype(int) - ramp()).max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_make_an_image_bad():
    image = Image.fromarray(ramp())
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01"):
        assert decoded(encoded(image, "JPEG", exif=exif)).size == (16, 12)


# What lies in a folder


def found(root: Path, split: str = "train") -> list[str]:
    """The names of a split's images, and what was left out."""
    return [os.fsdecode(name) for name in folder.find_images(root / split, folder.find_classes(root / split))[0]]


def test_hidden_files_and_folders_are_ignored(own_tree):
    before, ant = found(own_tree), own_tree / "train" / "ant"
    for hidden in (ant / ".ipynb_checkpoints", own_tree / "train" / ".cache"):
        shutil.copytree(own_tree / "train" / "bee", hidden)
    (ant / "._000.jpg").write_bytes(b"\0\5\x16\7")
    assert found(own_tree) == before and len(before) == 72


def test_links_are_followed_but_not_in_circles(own_tree, tmp_path):
    ant, bee, elsewhere = own_tree / "train" / "ant", own_tree / "train" / "bee", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (ant / "000.jpg").rename(elsewhere / "moved.jpg")
    for link, target in {
        ant / "more": elsewhere,  # followed
        ant / "linked.jpg": elsewhere / "moved.jpg",  # an image
        ant / "lost.jpg": tmp_path / "nowhere",  # unreadable; reported when it is read
        ant / "self": ".",
        ant / "again": "../ant",
        ant / "up": "../..",
        elsewhere / "back": ant,
        bee / "other": "../cat",
        own_tree / "train" / "cat" / "other": "../bee",
        own_tree / "train" / "everything": ".",
        elsewhere / "knot.jpg": "knot.jpg",
    }.items():
        link.symlink_to(target)
    os.mkfifo(ant / "pipe.jpg")  # a reader would wait for it forever
    names = found(own_tree)
    ours = [name.removeprefix("ant/") for name in names if name.startswith("ant/") and not name[4:7].isdigit()]
    assert ours == ["linked.jpg", "lost.jpg", "more/knot.jpg", "more/moved.jpg"]
    assert len(names) == 23 + 4 + 4 * 24  # bees in cat and cats in bee, once
    assert loaded(own_tree).left_out == {"links to a parent folder": 6}


def test_ignored_file_types_are_reported_once(own_tree, tmp_path):
    ant = own_tree / "train" / "ant"
    (ant / "001.png").rename(ant / "001.JFIF")
    for name in ("a.heic", "b.heic", "notes.txt", "README"):
        (ant / name).touch()
    (own_tree / "val" / "bee" / "b.HEIC").touch()
    console = Console(file=StringIO(), width=200)
    train(config(own_tree, epochs=1, output=tmp_path / "run"), console)
    assert console.file.getvalue().count("ignored: .heic (3), .txt (1), no extension (1)") == 1
    assert len(found(own_tree)) == 72


def test_a_folder_that_cannot_be_listed_is_an_error(own_tree, monkeypatch):
    scandir, locked = os.scandir, own_tree / "train" / "ant" / "locked"
    locked.mkdir()

    def refusing(place):
        if str(place) == str(locked):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="locked"):
        found(own_tree)


# Images that cannot be read


def spoil(root) -> set[str]:
    """Makes three training images and a test image unreadable."""
    empty = root / "train" / "bee" / "001.png"
    empty.write_bytes(b"")
    text = root / "train" / "cat" / "000.jpg"
    text.write_text("not an image")
    cut = truncate(root / "train" / "ant" / "002.jpg")
    test = truncate(root / "val" / "ant" / "003.png")
    return {str(path) for path in (empty, text, cut, test)}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_stop_the_run_by_name(own_tree, workers, capsys, tmp_path):
    cut = truncate(own_tree / "train" / "ant" / "002.jpg")
    run = ["--data", "folder", "--data-dir", str(own_tree), "--image-size", "16", "--batch-size", "24"]
    run += ["--epochs", "1", "--workers", str(workers), "--output", str(tmp_path / "run")]
    assert cli.main(["train", *run]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(cut) in line and "runcated" in line and "bad_images skip" in line


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_counted_named_and_skipped(own_tree, workers, tmp_path):
    bad = spoil(own_tree)
    console = Console(file=StringIO(), width=200)
    settings = config(own_tree, bad_images="skip", workers=workers, epochs=1, batch_size=24, output=tmp_path / "run")
    [row] = train(settings, console)
    assert row["bad_images"] == len(bad)
    said = console.file.getvalue()
    assert all(name in said for name in bad)
    listed = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert {line.split(": ")[0] for line in listed} == bad
    assert 0 <= row["test_accuracy"] <= 1


def test_bad_images_are_replaced_by_others_drawn_by_the_key(own_tree):
    spoil(own_tree)
    images = loaded(own_tree, bad_images="skip", augment="none")
    _, number, [(name, reason)] = images.images[CLEAN, 0, 2]
    assert name.endswith("ant/002.jpg") and "runcated" in reason
    assert images.images[CLEAN, 0, 2][1] == number != 2
    taken = {images.images[CLEAN, epoch, index][1] for epoch in range(10) for index in (2, 25, 48)}
    assert len(taken) > 15 and not taken & {2, 25, 48}  # not always the same one, and no other bad one
    batches = list(images.batches(8, stream=CLEAN, **WHERE))
    assert len(batches) == 9 and all(len(labels) == 8 for _, labels in batches)
    [(_, labels)] = images.test_batches(24, [0])
    assert labels[3] == IGNORED and (labels == IGNORED).sum() == 1


def test_names_that_are_not_utf_8_are_listed_as_bytes_and_remembered(own_tree, tmp_path):
    place = os.fsencode(own_tree / "train" / "ant") + b"/\xe9[x].jpg"
    Path(os.fsdecode(place)).write_bytes(b"no image")
    settings = config(own_tree, bad_images="skip", epochs=1, output=tmp_path / os.fsdecode(b"\xe9[run]"))
    console = Console(file=StringIO(), width=200)
    history = train(settings, console)
    assert (settings.output / "bad_images.txt").read_bytes() == place + b": cannot identify image file\n"
    assert train(replace(settings, output=None, resume=settings.output), console) == history
    assert (
        console.file.getvalue().count(os.fsdecode(place)) == 2 and f"see {settings.output}" in console.file.getvalue()
    )


def test_a_folder_of_unreadable_images_is_refused(tmp_path):
    root = make_folder(tmp_path / "images", train=2, val=1)
    for path in (root / "train").rglob("*.*"):
        path.write_bytes(b"")
    for workers in (0, 2):
        with pytest.raises(ValueError, match="^6 training images in a row cannot be read, the first .*/train/"):
            list(loaded(root, bad_images="skip", batch_size=2, workers=workers).batches(2, stream=CLEAN, **WHERE))
        stopping = loaded(root, batch_size=2, workers=workers)
        assert len(stopping.images[CLEAN, 0, 2][2]) == 1  # it has not tried all of them
        with pytest.raises(ValueError, match="cannot read .*; use bad_images skip"):
            list(stopping.batches(2, stream=CLEAN, **WHERE))


def test_unreadable_test_images_are_refused(own_tree, capsys):
    for path in (own_tree / "val").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the test images"):
        Trainer(config(own_tree, bad_images="skip")).run_epoch()


def test_unreadable_images_are_remembered_on_resume(own_tree, tmp_path):
    spoil(own_tree)
    settings = config(own_tree, bad_images="skip", epochs=2)
    trainer = Trainer(settings)
    trainer.run_epoch()
    other = Trainer(settings)
    other.load_state_dict(trainer.state_dict())
    assert other.bad == trainer.bad != {}


def test_a_reader_that_is_killed_is_named(tree, tmp_path, capsys):
    class Killed(Exception):
        pass

    def kill(trainer):
        for process in trainer.data.loader._iterator._workers:
            process.kill()

    step = Trainer._train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", lambda self, *batches: (step(self, *batches), kill(self)))
        arguments = [
            "--data-dir",
            str(tree),
            "--image-size",
            "16",
            "--batch-size",
            "4",
            "--workers",
            "1",
            "--epochs",
            "2",
        ]
        assert cli.main(["train", "--data", "folder", *arguments, "--output", str(tmp_path / "run")]) == 2
    assert "a worker process was killed" in capsys.readouterr().err


# Failures of worker processes


def test_a_full_shared_memory_is_named(tree, monkeypatch):
    """In a worker, as far as possible without privileges: its files cannot grow."""

    def poor(worker):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    monkeypatch.setattr("flatops.train.workers.ignore_signals", poor)
    with pytest.raises(ConnectionError, match="/dev/shm is full.*--workers 0"):
        list(loaded(tree, workers=1, timeout=60).batches(16, stream=CLEAN, **WHERE))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's loader when it is half built
def test_processes_that_cannot_be_started_are_reported(tree, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.multiprocessing, "Queue", full)
    with pytest.raises(ConnectionError, match="cannot start .*No space left.*/dev/shm.*--workers 0"):
        list(loaded(tree, workers=1).batches(16, stream=CLEAN, **WHERE))


@pytest.fixture
def stuck(monkeypatch):
    """Reading some images of a split never ends, and workers ignore SIGTERM; with `killing` the run gets SIGTERM."""
    opened, how, run = folder.Files.open, {"split": "train", "killing": False}, os.getpid()

    def hang(self, index):
        if self.labels[index] == 2 and os.path.basename(self.root) == how["split"]:
            if how["killing"]:
                threading.Timer(0.3, os.kill, (run, signal.SIGTERM)).start()
            if torch.utils.data.get_worker_info():
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            time.sleep(1000)
        return opened(self, index)

    monkeypatch.setattr(folder.Files, "open", hang)
    monkeypatch.setattr("flatops.train.workers.PATIENCE", 0.1)
    return how


def test_stuck_readers_time_out(tree, stuck, tmp_path):
    trainer = Trainer(config(tree, workers=2, timeout=1))
    with pytest.raises(ConnectionError, match="sent nothing for 1 s .timeout.*--workers 0"), reading(trainer.data):
        try:
            trainer.run_epoch()
        finally:
            workers = list(trainer.data.loader._iterator._workers)
    for worker in workers:
        worker.join(10)
    assert len(workers) == 2 and not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("split, workers", [("train", 0), ("train", 1), ("val", 0), ("val", 1)])
def test_sigterm_saves_and_ends_a_run_that_waits_for_images(tree, stuck, tmp_path, split, workers):
    """It resumes to the bit as if it had not waited: in a step, and in an evaluation."""
    stuck |= {"split": split, "killing": True}
    settings = config(tree, batch_size=2, workers=workers, epochs=1, output=tmp_path / "run")
    console = Console(file=StringIO())
    with pytest.raises(SystemExit) as ended:
        train(settings, console)
    assert ended.value.code == 128 + signal.SIGTERM and "continue with" in console.file.getvalue()
    saved = checkpoint.read(settings.output)
    assert saved["epoch"] == 0 and (saved["step"] == 36) == (split == "val")

    stuck["split"] = None
    train(replace(settings, workers=0, output=None, resume=settings.output), console)
    whole = Trainer(config(tree, batch_size=2, epochs=1))
    whole.run_epoch()
    assert_same(checkpoint.read(settings.output)["model"], whole.state_dict()["model"])


# Unsuitable folders


def without_val(root):
    shutil.rmtree(root / "val")


def empty_class(root):
    shutil.rmtree(root / "train" / "bee")
    (root / "train" / "bee").mkdir()
    (root / "train" / "bee" / "notes.txt").touch()


def another_class(root):
    (root / "val" / "dog").mkdir()


def one_class(root):
    for split in ("train", "val"):
        for name in CLASSES[1:]:
            shutil.rmtree(root / split / name)


@pytest.mark.parametrize(
    "damage, options, message",
    [
        (without_val, {}, "no folder .*val: data_dir needs train/ and val/"),
        (empty_class, {}, r"class folder .*bee has no images.*; it has \.txt \(1\)"),
        (another_class, {}, "3 classes in train/ and 4 in val/; only in one: dog"),
        (one_class, {}, "train has 1 class folders"),
        (None, {"classes": 1000}, "classes is 1000, but folder has 3"),
        (None, {"batch_size": 100}, "exceeds the 72 training images"),
        (None, {"randaugment": "much"}, "timm does not know randaugment 'much'"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_unsuitable_folder_is_refused(own_tree, damage, options, message):
    if damage:
        damage(own_tree)
    with pytest.raises(ValueError, match=message):
        Trainer(config(own_tree, **options))


def test_a_folder_has_to_be_named():
    with pytest.raises(ValueError, match="data folder needs data_dir"):
        Trainer(TrainConfig(data="folder"))


def test_other_images_are_refused_on_resume(own_tree):
    state = Trainer(config(own_tree)).state_dict()
    moved = own_tree.rename(own_tree.with_name("moved"))
    Trainer(config(moved)).load_state_dict(state)  # the same in another place
    (moved / "train" / "ant" / "000.jpg").unlink()
    with pytest.raises(ValueError, match="trained on 72 images of 3 classes.*has 71 images"):
        Trainer(config(moved)).load_state_dict(state)


# In memory


def test_crops_and_flips_equal_those_of_a_loop():
    images = torch.randint(256, (5, 2, 6, 7), dtype=torch.uint8)
    padded = torch.nn.functional.pad(images, (2,) * 4)
    down, right = np.array([0, 1, 2, 3, 4]), np.array([4, 0, 2, 1, 3])
    mirrored = np.array([False, True, False, True, True])
    made = augment.moved(padded, down, right, mirrored, 6, 7)
    for i, image in enumerate(padded):
        crop = image[:, down[i] : down[i] + 6, right[i] : right[i] + 7]
        assert torch.equal(made[i], crop.flip(2) if mirrored[i] else crop)


def test_cutout_and_erasing_leave_the_mean_colour():
    images = torch.full((64, 3, 32, 32), 200, dtype=torch.uint8)
    how = {"mean": (100.0,) * 3, "std": (50.0,) * 3}
    cut = augment.Augment(cutout=16, **how)(images, [0], 64, slice(0, 64))
    holes = (cut == 0).sum((1, 2, 3)) / 3
    assert holes.max() == 256 and holes.min() >= 64 and set(cut.unique().tolist()) == {0.0, 2.0}
    some = augment.Augment(cutout=16, cutout_probability=0.5, **how)(images, [0], 64, slice(0, 64))
    spared = (some == 2).all(3).all(2).all(1)
    assert 16 < spared.sum() < 48 and torch.equal(some[~spared], cut[~spared])
    erased = augment.Augment(erasing=0.5, **how)(images, [0], 64, slice(0, 64))
    holes = (erased == 0).sum((1, 2, 3)) / 3
    assert 16 < (holes > 0).sum() < 48 and holes.max() < 0.37 * 1024


def test_synthetic_images_have_the_requested_size_and_classes():
    trainer = Trainer(TrainConfig(data="synthetic", image_size=12, classes=7, batch_size=256, epochs=1))
    assert trainer.data.size == 12 and trainer.data.classes == 7 and trainer.steps_per_epoch == 4
    images, _ = next(trainer._batches())[0]
    assert images.dtype == torch.float32 and abs(images.mean()) < 0.05 and abs(images.std() - 1) < 0.05
    assert trainer.run_epoch()["train_loss"] > 0


def test_a_dataset_is_a_function_that_registers_its_name(monkeypatch):
    monkeypatch.setitem(DATASETS, "stripes", None)

    @register("stripes")
    def stripes(config: TrainConfig) -> InMemory:
        labels = torch.arange(100) % 2
        images = labels.float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8) * torch.tensor([1.0, -1.0] * 4)
        return InMemory((images, labels), (images, labels), classes=2)

    trainer = Trainer(TrainConfig(data="stripes", epochs=1, batch_size=10, validation=0.2, label_noise=0.1))
    assert (trainer.data.train_size, trainer.data.test_size, trainer.data.wrong) == (80, 20, 8)
    assert trainer.run_epoch()["test_accuracy"] > 0.5
    with pytest.raises(ValueError, match="randaugment is for photographs, not for stripes"):
        data.load(TrainConfig(data="stripes", randaugment="rand-m9"))


# CIFAR


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 with 40 images: its archive, its folder and torchvision's checksums."""
    folder = tmp_path / "made" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(count):
        return {"data": rng.integers(256, size=(count, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(count)]}

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [write("data_batch_1", batch(40))])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write("test_batch", batch(20))])
    names, checksum = write("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": names, "key": "label_names", "md5": checksum})
    archive = tmp_path / "made" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


@pytest.fixture
def server(cifar, monkeypatch):
    """Serves the archive, but only its first half while `server.cut`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        cut = False

        def do_GET(self):
            content = cifar.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET" and Handler.cut:
                content = content[: len(content) // 2]
            self.wfile.write(content if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{running.server_port}/cifar.tar.gz")
        yield Handler
        running.shutdown()


def cifar_config(root, **options) -> TrainConfig:
    return TrainConfig(data="cifar10", data_dir=root, batch_size=16, epochs=1, workers=0, **options)


def test_cifar_from_a_local_folder(cifar):
    data_in_memory = data.load(cifar_config(cifar.parent, cutout=8))
    assert data_in_memory.train[0].shape == (40, 3, 32, 32) and data_in_memory.train[0].dtype == torch.uint8
    whole = list(data_in_memory.batches(16, stream=CLEAN, **WHERE))
    parts = [list(data_in_memory.batches(16, stream=CLEAN, rank=p, world_size=2, **WHERE)) for p in range(2)]
    for batch, *pieces in zip(whole, *parts):
        assert_same(batch, tuple(map(torch.cat, zip(*pieces))))
    late = list(data_in_memory.batches(16, stream=CLEAN, start=1, **WHERE))
    assert_same(late, whole[1:])


def test_cifar_with_randaugment_comes_from_workers(cifar):
    trainer = Trainer(cifar_config(cifar.parent, randaugment="rand-m9-mstd0.5", cutout=8))
    assert isinstance(trainer.data, FromWorkers)
    assert trainer.run_epoch()["train_loss"] > 0


def test_an_interrupted_download_is_reported_and_can_be_repeated(server, tmp_path, capsys):
    server.cut = True
    root = tmp_path / "data"
    with pytest.raises(OSError, match=f"cannot download cifar10 to {root}: .*try again"):
        data.load(cifar_config(root))
    server.cut = False
    assert len(data.load(cifar_config(root)).train[1]) == 40


def test_a_silent_server_times_out(cifar, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/cifar.tar.gz")
        with pytest.raises(OSError, match="cannot download cifar10 .*timed out"):
            data.load(cifar_config(tmp_path / "data", timeout=0.2))
    assert socket.getdefaulttimeout() is None


def test_a_download_without_a_network_is_reported(cifar, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    run = ["train", "--data", "cifar10", "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "run")]
    assert cli.main(run) == 2
    assert "cannot download cifar10" in capsys.readouterr().err


# Held-out images


def test_held_out_images_replace_the_test_images():
    whole, one = data.load(TrainConfig()), data.load(TrainConfig(validation=0.25, label_noise=0.3, seed=1))
    images, labels = one.test
    assert (one.train_size, one.test_size) == (1010, 337) and one.wrong == 303
    key = {image.numpy().tobytes(): int(label) for image, label in zip(*whole.train)}
    assert all(key[image.numpy().tobytes()] == label for image, label in zip(images, labels))  # right labels
    seen = {image.numpy().tobytes() for image in one.train[0]}
    assert not seen & {image.numpy().tobytes() for image in images}
    assert seen | {image.numpy().tobytes() for image in images} == key.keys()


def test_held_out_images_follow_the_seed():
    one, same, other = (data.load(TrainConfig(validation=0.2, seed=seed)).test[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_cifar_holds_out_too(cifar):
    kept = data.load(cifar_config(cifar.parent, validation=0.2))
    assert kept.test_size == 8 and kept.train_size == 32 and kept.test[0].dtype == torch.uint8
    seen, held = ({image.numpy().tobytes() for image in images} for images, _ in (kept.train, kept.test))
    whole = data.load(cifar_config(cifar.parent)).train[0]
    assert not seen & held and seen | held == {image.numpy().tobytes() for image in whole}


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_validation_share_out_of_range(share):
    with pytest.raises(ValueError, match="validation must be at least 0 and less than 1"):
        TrainConfig(validation=share)


def test_what_cannot_be_held_out(tree):
    with pytest.raises(ValueError, match="validation needs images in memory.*move images into val/"):
        data.load(config(tree, validation=0.2))
    with pytest.raises(ValueError, match="of 1347 training images selects none: raise it"):
        data.load(TrainConfig(validation=1e-4))
