"""What stands for data, pictures and frozen encoders in a dry run: the right sizes, and nothing in them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megatron_sphinx.config import Config
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.canvas import pixel_type
from megatron_sphinx.data.packing import Segment
from megatron_sphinx.data.pixels import PixelLoader, Pixels
from megatron_sphinx.data.sources import Sources
from megatron_sphinx.data.streams import SampleSizes, TextSpans
from megatron_sphinx.device import Platform
from megatron_sphinx.model.architecture import VisionConfig
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.sizing.recorder import HOST, Recorder


class BlankBatches(BatchBuilder):
    """Micro-batches with everything but the tokens themselves: nothing is read."""

    def _fill(self, segment: Segment) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Put as many targets where they would stand."""
        targets = np.full(segment.length, -100, np.int64)
        # The end of the targets: a text that goes on in another row has one at each of its tokens.
        last = max(segment.length - 1, segment.targets)
        targets[last - segment.targets : last] = 0
        return np.zeros(segment.length, np.int64), targets

    def _check_ids(self, *_: object) -> None:
        """Accept everything: there are no ids."""


@dataclass(frozen=True)
class MadeUpSamples:
    """Square pictures with captions of one length."""

    caption_tokens: int
    bounds: Sequence[int] = (0, 2**20)

    def sizes(self, first: int, last: int) -> SampleSizes:
        """Give samples `first` to `last` the same sizes: width, height, tokens of the caption, targets."""
        return SampleSizes(*(np.full(last - first, n) for n in (1, 1, self.caption_tokens, self.caption_tokens + 1)))

    def cut(self, _sample: int, most_tokens: int) -> tuple[int, int]:
        """Cut a caption to so many tokens, each of which is a target, and the end of the text another."""
        return most_tokens, most_tokens + 1


@dataclass(frozen=True)
class MadeUpText:
    """One document without an end."""

    bounds: Sequence[int] = (0, 2**30)

    def spans(self, first: int, last: int) -> TextSpans:
        """Find tokens `first` to `last` in the one document."""
        return TextSpans(np.array([0]), np.array([first]), np.array([last - first]), np.array([False]))


class BlankPixels:
    """Stands for a PixelLoader: pictures of the right sizes, at once."""

    def __init__(self, recorder: Recorder, vision: VisionConfig) -> None:
        self.recorder, self.vision = recorder, vision

    def submit(self, views: Sequence[tuple[int, int]]) -> SimpleNamespace:
        """Begin to read views, given as (pair, number of the view); what comes of it is in the CPU's memory."""
        kind = torch.from_numpy(np.zeros(0, pixel_type(self.vision))).dtype
        with self.recorder.memory_for(HOST):
            pixels = {side: torch.empty(len(views), 3, side, side).to(kind) for side in self.vision.sides}
        return SimpleNamespace(views=views, wait=lambda: None, result=lambda: Pixels(pixels, ()))


class BlankEncoders(FrozenEncoders):
    """FrozenEncoders with weights of the right shapes. Every batch is alike, so the first one is run for all."""

    def __init__(self, recorder: Recorder, config: Config, platform: Platform) -> None:
        dtype = platform.encoder_dtype(config.vision.precision)
        drawn = tuple(replace(item, weights="random") for item in config.vision.experts)
        with unset_fake_temporarily(), torch.device("meta"):
            super().__init__(
                replace(config.vision, experts=drawn), device=torch.device("meta"), dtype=dtype, seed=config.run.seed
            )
        self.recorder, self.device = recorder, platform.device
        self._flops: dict[str, float] | None = None
        for module in self.modules():
            for kind in (module._parameters, module._buffers):
                for name, value in kind.items():
                    if value is not None:
                        kind[name] = self._blank(value)
        recorder.name("weights", *self.parameters())

    def _blank(self, value: Tensor) -> Any:
        """Make a tensor of the same shape, type and strides on the device."""
        blank = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device)
        return nn.Parameter(blank, requires_grad=False) if isinstance(value, nn.Parameter) else blank

    def _encode(self, inputs: list[Tensor]) -> Tensor:
        """Encode a batch, or count for it what the first one took."""
        if self._flops is None:
            before = dict(self.recorder.flops)
            with self.recorder.rise() as self._rise:
                out = super()._encode(inputs)
            self._flops = {kind: flops - before[kind] for kind, flops in self.recorder.flops.items()}
            return out
        for kind, flops in self._flops.items():
            self.recorder.flops[kind] += flops
        torch.empty(self._rise[0], dtype=torch.uint8)
        return torch.empty(self.config.views_at_once, self.config.feature_values, dtype=torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BlankContext(RankContext):
    """A RankContext that opens blank pictures and encoders.

    Attributes:
        recorder: counts what they ask for.
    """

    recorder: Recorder

    def pixels(self, _sources: Sources | None = None) -> PixelLoader:
        """Open pictures without content."""
        return cast(PixelLoader, BlankPixels(self.recorder, self.config.vision))

    def encoders(self) -> FrozenEncoders:
        """Make encoders without numbers in their weights."""
        return BlankEncoders(self.recorder, self.config, self.platform)
