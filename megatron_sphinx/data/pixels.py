"""From the plan of a step to the pixels that encoder ranks encode: views of images, read and decoded by threads."""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_sphinx.data import images
from megatron_sphinx.data.canvas import Canvas, pixel_type
from megatron_sphinx.data.pairs import ImageReader, SampleIndex
from megatron_sphinx.errors import DataError, writing
from megatron_sphinx.model.architecture import VisionConfig
from megatron_sphinx.model.views import views_of


@dataclass(frozen=True)
class Pixels:
    """Views of some samples, ready to encode.

    Attributes:
        views: for each input side, pixels from 0 to 255 [views, 3, side, side].
        bad: indices of the views whose image could not be read; their pixels mean nothing.
    """

    views: dict[int, Tensor]
    bad: tuple[int, ...]


class PixelLoader:
    """Decodes the images of samples on a few threads; what cannot be decoded is written to the quarantine file.

    Args:
        index: of the samples.
        vision: how images are padded, resized and cut.
        workers: threads that read and decode.
        quarantine: file of JSON lines with shard, key, pair and reason.
        is_pinned: whether pixels lie in page-locked memory, from which a GPU copies them while it computes.
    """

    def __init__(
        self, index: SampleIndex, vision: VisionConfig, *, workers: int, quarantine: Path, is_pinned: bool = False
    ) -> None:
        self.index, self.vision, self.quarantine = index, vision, quarantine
        self._is_pinned = is_pinned
        self._reader, self._views = ImageReader(index), views_of(vision.parts)
        self._pool = ThreadPoolExecutor(workers, "decode")

    def submit(self, views: Sequence[tuple[int, int]]) -> "PendingPixels":
        """Begin to read views, given as (sample, number of the view)."""
        pixels = {side: self._zeros((len(views), 3, side, side)) for side in self.vision.sides}
        arrays = {side: tensor.numpy() for side, tensor in pixels.items()}
        wanted: dict[int, list[tuple[int, int]]] = {}
        for index, (sample, view) in enumerate(views):
            wanted.setdefault(sample, []).append((view, index))
        read = {sample: self._pool.submit(self._read, sample, places, arrays) for sample, places in wanted.items()}
        return PendingPixels(self, list(views), pixels, read)

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Make room for pixels."""
        kind = torch.uint8 if pixel_type(self.vision) is np.uint8 else torch.float32
        return torch.zeros(shape, dtype=kind, pin_memory=self._is_pinned)

    def _read(self, sample: int, wanted: Sequence[tuple[int, int]], arrays: dict[int, NDArray[Any]]) -> bool:
        """Decode a sample's image, and cut views of it into the arrays.

        Args:
            sample: number of the sample.
            wanted: (number of the view, its index in the arrays) for each view.
            arrays: for each input side [views, 3, side, side].

        Returns:
            False where the image cannot be read.
        """
        is_upright = self.vision.resize != "accessory" and self.index.is_upright(sample)
        try:
            canvas = Canvas(images.decode(self._reader.read(sample), is_upright=is_upright), self.vision)
        except (DataError, OSError) as error:
            self.report(sample, str(error))
            return False
        for view, index in wanted:
            for side, array in arrays.items():
                array[index] = canvas.cut(self._views[view], side)
        return True

    def report(self, sample: int, reason: str) -> None:
        """Write a sample to the quarantine file."""
        shard, key = self._reader.name(sample)
        line = json.dumps({"shard": shard, "key": key, "pair": sample, "reason": " ".join(reason.split())})
        with writing(self.quarantine.parent), self.quarantine.open("a") as file:
            file.write(line + "\n")


@dataclass(frozen=True)
class PendingPixels:
    """Views that threads are still reading.

    Attributes:
        loader: whose threads read them.
        views: (sample, number of the view) of each.
        pixels: for each input side the pixels [views, 3, side, side] that are being written.
        read: for each sample whether its image could be read, once that is known.
    """

    loader: PixelLoader
    views: list[tuple[int, int]]
    pixels: dict[int, Tensor]
    read: dict[int, "Future[bool]"]

    def report(self, index: int, reason: str) -> None:
        """Write the sample of one of the views to the quarantine file."""
        self.loader.report(self.views[index][0], reason)

    def wait(self) -> None:
        """Wait until all views are read."""
        wait(self.read.values())

    def result(self) -> Pixels:
        """Wait until all views are read, and return them."""
        bad = {sample for sample, is_read in self.read.items() if not is_read.result()}
        return Pixels(self.pixels, tuple(index for index, (sample, _) in enumerate(self.views) if sample in bad))


def wait_for(micro_batches: Iterable[PendingPixels]) -> None:
    """Wait until all views of some micro-batches are read."""
    for pixels in micro_batches:
        pixels.wait()
