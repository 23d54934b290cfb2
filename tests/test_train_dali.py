"""Images decoded by DALI compared with PIL's. On a machine without a GPU, DALI decodes on the CPU."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from pictures import STORED, encoded, make_folder, truncate
from PIL import Image

from flatops import cli
from flatops.train import data, train
from flatops.train.augment import drawing_from
from flatops.train.config import TrainConfig
from flatops.train.dali import central_window, random_window, upright
from flatops.train.order import CLEAN

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHERE = {"seed": 7, "epoch": 3, "stream": CLEAN}


@pytest.fixture
def tree(tmp_path):
    return make_folder(tmp_path / "images")


def settings(tree, **options) -> TrainConfig:
    return TrainConfig(
        **{"data": "folder", "data_dir": tree, "image_size": 16, "batch_size": 16, "decoder": "dali"} | options
    )


def needs_dali() -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")


def loaded(tree, workers, **options):
    return data.load(settings(tree, workers=workers, **options)).to(DEVICE, torch.channels_last)


def test_windows_are_inside_the_image_and_vary():
    image = Image.new("RGB", (31, 50))
    with drawing_from(1):
        windows = [random_window(image) for _ in range(200)]
    for top, left, height, width, mirrored in [*windows, central_window(image)]:
        assert 0 <= top and 0 < height and top + height <= 50 and 0 <= left and 0 < width and left + width <= 31
        assert mirrored in (0, 1)
    assert central_window(image) == (11, 2, 27, 27, 0)
    areas = [height * width / (31 * 50) for _, _, height, width, _ in windows]
    assert min(areas) < 0.2 and max(areas) > 0.8 and 60 < sum(w[4] for w in windows) < 140
    assert central_window(Image.new("L", (1, 1))) == (0, 0, 1, 1, 0)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_windows_are_drawn_in_images_that_are_upright(kind, orientation):
    assert upright(encoded(Image.new("RGB", (31, 50)), kind, orientation)).size == (31, 50)


def test_pixels_equal_those_of_pil(tree):
    """In the windows that the keys draw, for training and test images. PIL rounds between rows and columns."""
    needs_dali()
    image = Image.open(tree / "train/ant/001.png")
    for number, (orientation, kind) in enumerate(
        [(6, "PNG"), (8, "JPEG"), (3, "TIFF"), (5, "PNG"), (2, "TIFF"), (7, "JPEG")]
    ):
        name = f"{number:03}.{'png' if number % 2 else 'jpg'}"  # PIL and DALI go by the content
        (tree / "train/ant" / name).write_bytes(encoded(image, kind, orientation))
    deep = Image.fromarray(np.asarray(image)[..., 0] * np.uint16(257))
    for number, kind in ((7, "PNG"), (9, "TIFF"), (11, "PPM")):
        (tree / "train/ant" / f"{number:03}.png").write_bytes(encoded(deep, kind))
    images = loaded(tree, 0)
    keys = [[(CLEAN, 0, index) for index in range(16)], [(-1, 0, index) for index in range(10)]]
    for plan, source, transform in zip(keys, (images.images.train, images.images.test), images.images.transforms):
        [(pixels, indices)] = images._read(iter([plan]))
        assert indices.tolist() == [index for *_, index in plan]
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous(memory_format=torch.channels_last)
        for (stream, epoch, index), ours in zip(plan, pixels.cpu()):
            image = source.open(index)
            with drawing_from(images.images.config.seed, abs(stream), epoch, index):
                top, left, height, width, mirrored = transform(image)
            image = image.crop((left, top, left + width, top + height)).resize((16, 16), Image.Resampling.BILINEAR)
            wanted = np.asarray(image)[:, :: -1 if mirrored else 1].transpose(2, 0, 1).astype(int)
            off = np.abs(ours.numpy() - wanted)
            assert off.max() <= 8 and off.mean() < 1


def test_any_number_of_workers_and_every_start_give_the_same_batches(tree):
    needs_dali()
    alone = list(loaded(tree, 0, erasing=0.5).batches(16, **WHERE))
    assert len(alone) == 72 // 16
    images = loaded(tree, 2, erasing=0.5)
    for start in (0, 3, 1):  # by the same workers
        torch.testing.assert_close(list(images.batches(16, start=start, **WHERE)), alone[start:], rtol=0, atol=0)
    next(images.batches(16, **WHERE))  # abandoned
    torch.testing.assert_close(list(images.batches(16, **WHERE)), alone, rtol=0, atol=0)
    labels = [labels for _, labels in images.test_batches(10, range(3))]
    assert torch.cat(labels).tolist() == [0] * 8 + [1] * 8 + [2] * 8
    images.close()


def test_a_run_resumes_exactly(tree, tmp_path):
    needs_dali()
    options = {"model": "cnn", "method": "mrwp", "image_size": 16, "lr": 0.01}
    whole = train(settings(tree, epochs=2, workers=0, output=tmp_path / "whole", **options))
    train(settings(tree, epochs=2, workers=2, output=tmp_path / "part", checkpoint_every=6, **options))
    state = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["model"]
    other = torch.load(tmp_path / "part" / "last.pt", weights_only=True)["model"]
    torch.testing.assert_close(other, state, rtol=0, atol=0)
    assert len(whole) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["cut", "empty", "text", "gif", "float"])
def test_bad_images_stop_the_run_by_name(tree, workers, kind):
    needs_dali()
    name = tree / "train" / "bee" / "006.jpg"
    if kind == "cut":
        truncate(name)
    else:
        image = Image.open(name)
        files = {"gif": encoded(image, "GIF"), "float": encoded(image.convert("F"), "TIFF")}
        name.write_bytes(({"empty": b"", "text": b"no image"} | files)[kind])
    images = loaded(tree, workers, augment="none")
    with pytest.raises(ValueError, match=r"cannot read .*train/bee/006\.jpg: "):
        list(images.batches(16, **WHERE))
    images.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "cifar10", "image_size": None}, "decoder dali is for data folder, not cifar10"),
        ({"randaugment": "rand-m9"}, "leave out decoder dali"),
        ({"bad_images": "skip"}, "bad_images skip needs decoder pil"),
    ],
)
def test_options_that_dali_does_not_support_are_refused(tree, options, message):
    with pytest.raises(ValueError, match=message):
        settings(tree, **options)


def test_without_dali_one_line_says_what_to_install(tree, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert cli.main(["train", "--data", "folder", "--data-dir", str(tree), "--decoder", "dali"]) == 2
    assert "pip install nvidia-dali-cuda130" in capsys.readouterr().err
