"""Folders of images that NVIDIA DALI decodes, crops and resizes, on the GPU where there is one.

Worker processes read the files and draw the crops by the keys of `workers`: neither the number of workers nor an
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
WIDTH, HEIGHT, ORIENTATION = 256, 257, 274  # tags of TIFF; the last is one of EXIF too


def check_installed() -> None:
    """Raise ValueError unless there is DALI."""
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        raise ValueError(f"decoder dali needs NVIDIA DALI: pip install nvidia-dali-cuda130 ({error})") from error


class Windows(Images):
    """Single image files by key, not decoded, and the window to cut out of each."""

    def __getitem__(self, key: Key) -> tuple[np.ndarray, tuple[int, ...], int, list[tuple[str, str]]]:
        """The file, its window (top, left, height, width, mirrored), its index, and why it could not be read."""
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
        """A batch, whose files travel as one tensor: a tensor for each would use up the file descriptors."""
        files, windows, indices, bad = zip(*items)
        encoded = shared(np.concatenate(files)), [len(file) for file in files], np.array(windows)
        return encoded, list(indices), [entry for some in bad for entry in some]


def upright(raw: bytes) -> Image.Image:
    """An image of the size that DALI decodes it to: DALI follows EXIF.

    Raises:
        ValueError: DALI does not decode it, or not as PIL does.
    """
    image = opened(raw)
    if image.format == "GIF":
        raise ValueError("DALI does not decode GIF: leave out decoder dali, or store it as PNG")
    orientation, (width, height) = 1, image.size
    if image.format == "TIFF":  # PIL may have turned it already
        orientation, width, height = (image.tag_v2.get(tag, 1) for tag in (ORIENTATION, WIDTH, HEIGHT))
    else:
        with suppress(Exception):  # see decode.decoded
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            orientation = exif.get(ORIENTATION, 1)
    turned = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
    return image if turned == image.size else Image.new("1", turned)


def random_window(image: Image.Image) -> tuple[int, ...]:
    """8 to 100 % of the area with sides of 3:4 to 4:3, mirrored or not."""
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
    """See FromWorkers; `images` are Windows."""

    def _read(self, keys: Iterator[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        planned: deque[list[Key]] = deque()  # batches that are on their way
        given: deque[Tensor] = deque()  # indices of those that DALI has been given

        def noted() -> Iterator[list[Key]]:
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

        loaded = self._loaded(noted())
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
        """From files, windows and flags to uint8 images (B, size, size, 3)."""
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
        """Which image DALI could not decode: it does not say which, and may be ahead of the batch that is asked for."""
        for stream, _, index in itertools.chain(*planned):
            source, bad = (self.images.test if stream == TEST else self.images.train), []
            if attempt(source.open, source, index, bad) is None:
                return f"cannot read {': '.join(bad[0])}"
        return f"DALI failed, with images that decoder pil can read: {error}"
