"""Folders of images, decoded, cropped and resized by NVIDIA DALI, on the GPU if there is one.

Worker processes read the files and draw the crops from the keys of `workers`: neither the number of workers nor an
interruption changes the batches.
"""

from __future__ import annotations

import importlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .augment import drawing_from
from .decode import opened
from .workers import TEST, FromWorkers, Images, Key, attempt, shared

Encoded = tuple[Tensor, list[int], np.ndarray]  # a batch's files end to end, their lengths, and their Windows (B, 5)
WIDTH, HEIGHT, ORIENTATION = 256, 257, 274  # TIFF tags; the last is also an EXIF tag


def check_installed() -> None:
    """Raise ValueError unless DALI is installed."""
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        raise ValueError(f"decoder dali needs NVIDIA DALI: pip install nvidia-dali-cuda130 ({error})") from error


class Windows(Images):
    """Encoded image files by key, each with the window to crop."""

    def __getitem__(self, key: Key) -> tuple[np.ndarray, tuple[int, ...], int, list[tuple[str, str]]]:
        """The file, its window (top, left, height, width, mirrored), its index, and the reason if it is unreadable."""
        stream, epoch, index = key
        source, transform = (self.test if stream == TEST else self.train), self.transforms[stream == TEST]
        bad: list[tuple[str, str]] = []
        raw = attempt(source.read, source, index, bad)
        image = None if bad else attempt(lambda _: upright(raw), source, index, bad)
        if bad:
            return np.zeros(0, dtype=np.uint8), (0,) * 5, index, bad
        with nullcontext() if stream == TEST else drawing_from(self.config.seed, stream, epoch, index):
            return np.frombuffer(raw, dtype=np.uint8), transform(image), index, bad

    @staticmethod
    def collate(items: list[tuple]) -> tuple[Encoded, list[int], list[tuple[str, str]]]:
        """A batch, with its files in one tensor: one tensor per file would exhaust the file descriptors."""
        files, windows, indices, bad = zip(*items)
        encoded = shared(np.concatenate(files)), [len(file) for file in files], np.array(windows)
        return encoded, list(indices), [entry for some in bad for entry in some]


def upright(raw: bytes) -> Image.Image:
    """An image of the size to which DALI, which applies EXIF's orientation, decodes the file.

    Raises:
        ValueError: DALI cannot decode the file, or decodes it differently from PIL.
    """
    image = opened(raw)
    if image.format == "GIF":
        raise ValueError("DALI does not decode GIF: leave out decoder dali, or store it as PNG")
    orientation, (width, height) = 1, image.size
    if image.format == "TIFF":  # PIL may have rotated it already
        orientation, width, height = (image.tag_v2.get(tag, 1) for tag in (ORIENTATION, WIDTH, HEIGHT))
    else:
        with suppress(Exception):  # see decode.decoded
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            orientation = exif.get(ORIENTATION, 1)
    rotated = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
    return image if rotated == image.size else Image.new("1", rotated)


def random_window(image: Image.Image) -> tuple[int, ...]:
    """8 to 100 % of the area, aspect ratio 3:4 to 4:3, mirrored with probability 1/2."""
    from torchvision.transforms import RandomResizedCrop  # slow to import

    window = RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
    return *window, int(torch.rand(()) < 0.5)


def central_window(image: Image.Image) -> tuple[int, ...]:
    """The middle 7/8 of the shorter side."""
    width, height = image.size
    side = max(1, round(0.875 * min(width, height)))
    return (height - side) // 2, (width - side) // 2, side, side, 0


@dataclass
class FromDali(FromWorkers):
    """FromWorkers with `images` of type Windows."""

    def _read(self, keys: Iterator[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        planned: deque[list[Key]] = deque()  # batches that have not been returned yet
        given: deque[Tensor] = deque()  # indices of those that DALI has received

        def recorded() -> Iterator[list[Key]]:
            for batch in keys:
                planned.append(batch)
                yield batch

        def inputs() -> Iterator[tuple[Any, ...]]:
            for (files, lengths, windows), indices in itertools.chain([first], loaded):
                given.append(indices)
                yield (
                    [file.numpy() for file in files.split(lengths)],
                    *(windows[:, columns].astype(np.float32) for columns in (slice(0, 2), slice(2, 4))),
                    windows[:, 4].astype(np.int32),
                )

        loaded = self._loaded(recorded())
        first = next(loaded, None)
        if first is None:
            return
        pipeline = self._pipeline(inputs(), batch_size=len(first[1]))
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        while True:
            try:
                (images,) = pipeline.run(stream)
            except StopIteration:
                return
            except RuntimeError as error:
                if self.why_lost(error):
                    raise
                raise ValueError(self._unreadable(planned, error)) from error
            planned.popleft()
            pixels = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
            yield pixels.clone(memory_format=self.layout), given.popleft()

    def _pipeline(self, inputs: Iterator[tuple[Any, ...]], batch_size: int) -> Any:
        """The pipeline from files, windows and flags to uint8 images (B, size, size, 3)."""
        from nvidia.dali import fn, pipeline_def, types  # optional

        cuda = self.device.type == "cuda"

        @pipeline_def(
            batch_size=batch_size,
            num_threads=max(1, self.workers),
            device_id=(self.device.index or 0) if cuda else None,
        )
        def decoded() -> Any:
            files, starts, shapes, mirrored = fn.external_source(
                source=inputs,
                num_outputs=4,
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32],
                ndim=[1, 1, 1, 0],
            )
            pixels = {"normalized_anchor": False, "normalized_shape": False, "axis_names": "HW"}
            as_pil = {"output_type": types.RGB, "adjust_orientation": True}
            images = fn.decoders.image_slice(
                files, starts, shapes, device="mixed" if cuda else "cpu", **pixels, **as_pil
            )
            images = fn.resize(images, size=[self.size] * 2, interp_type=types.INTERP_TRIANGULAR, antialias=True)
            return fn.flip(images, horizontal=mirrored)

        return decoded()

    def _unreadable(self, planned: Iterable[list[Key]], error: Exception) -> str:
        """A message that names the image which failed: DALI does not, and may be ahead of the current batch."""
        for stream, _, index in itertools.chain(*planned):
            source, bad = (self.images.test if stream == TEST else self.images.train), []
            if attempt(source.open, source, index, bad) is None:
                return f"cannot read {': '.join(bad[0])}"
        return f"DALI failed with images that decoder pil can read: {error}"
