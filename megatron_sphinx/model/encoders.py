"""The mixture of frozen visual experts: pixels to feature tokens. It lives on encoder ranks and is never trained."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from megatron_sphinx.model.architecture import VisionConfig, VisualExpert
from megatron_sphinx.model.expert_files import load_experts
from megatron_sphinx.model.visual_experts import FAMILIES


class FrozenEncoders(nn.Module):
    """The mixture of visual experts, in eval mode, without gradients, in one fixed batch shape.

    Attributes:
        config: the mixture.
        sha256: digest of each expert's weights file, or `random <seed>`, by which a checkpoint knows the weights.
        load_seconds: how long the weights of each took to be drawn or read; several at once.
        dtype: what the experts compute in.
        device: where they are.
    """

    def __init__(self, config: VisionConfig, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.config = config
        loaded = load_experts(config.experts, seed, config.resize, device=device, dtype=dtype)
        self.experts = nn.ModuleList([one.model for one in loaded])
        names = [item.name for item in config.experts]
        self.sha256 = {name: one.mark for name, one in zip(names, loaded, strict=True)}
        self.load_seconds = {name: one.seconds for name, one in zip(names, loaded, strict=True)}
        self.eval()
        self.dtype, self.device = dtype, device
        for item in config.experts:
            for name in ("mean", "std"):
                value = torch.tensor(getattr(item.expert, name), device=device).view(3, 1, 1) * 255
                self.register_buffer(f"{item.name}_{name}", value, persistent=False)
        self._compiled: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {}
        self._uploads = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._uploads:
            self._uploads.wait_stream(torch.cuda.current_stream())  # for the means and deviations

    def train(self, mode: bool = True) -> "FrozenEncoders":
        """Stay in eval mode whatever `mode` is: frozen experts drop nothing and learn no statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *views: Mapping[int, Tensor]) -> Tensor:
        """Encode views, in batches of `config.batch_views`.

        Args:
            views: some views, behind them others, and so on: of each, for each input side of `config.sides`, pixels
                from 0 to 255, [views, 3, side, side].

        Returns:
            bf16 [views, config.feature_values]: the mixed tokens [1 + grid ** 2, channels], then the Q-Former's
            tokens, flattened. The bits of a view do not depend on the views beside it.
        """
        count, size = sum(len(next(iter(part.values()))) for part in views), self.config.views_at_once
        out = torch.empty(count, self.config.feature_values, dtype=torch.bfloat16, device=self.device)
        for first, inputs in self._batches(views, count):
            out[first : first + size] = self._encode(inputs)[: count - first]
        return out

    @torch.no_grad()
    def compile_experts(self) -> float:
        """Let torch.compile compile each expert for the one shape of a batch.

        Returns:
            The seconds that it took, a batch of zeros through each expert counted.
        """
        start = time.perf_counter()
        for item, model in zip(self.config.experts, self.experts, strict=True):
            self._compiled[item.name] = torch.compile(partial(_features, item.expert, model), dynamic=False)
            side = item.expert.pixels
            zeros = torch.zeros(self.config.views_at_once, 3, side, side, dtype=self.dtype, device=self.device)
            self._compiled[item.name](zeros.contiguous(memory_format=torch.channels_last))
        if self._uploads:
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _batches(self, views: Sequence[Mapping[int, Tensor]], count: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield the batches of some views: the number of the first one, and each expert's input.

        On a GPU pixels are uploaded and normalised on a stream of their own, as bytes: while one batch is encoded, the
        next one is made ready.
        """
        size = self.config.views_at_once
        for first in range(0, count, size):
            with torch.cuda.stream(self._uploads) if self._uploads else nullcontext():
                inputs = self._inputs(
                    {side: _cut([part[side] for part in views], first, first + size) for side in self.config.sides}
                )
            if self._uploads:
                encoding = torch.cuda.current_stream()
                encoding.wait_stream(self._uploads)
                for tensor in inputs:
                    tensor.record_stream(encoding)  # its memory is not used again before it is encoded
            yield first, inputs

    def _inputs(self, chunk: Mapping[int, Sequence[Tensor]]) -> list[Tensor]:
        """Normalise a batch of pixels, which lies in pieces, for each expert: [batch_views, 3, side, side]."""
        full = {side: self._full(pieces) for side, pieces in chunk.items()}
        inputs = []
        for item in self.config.experts:
            mean, std = self.get_buffer(f"{item.name}_mean"), self.get_buffer(f"{item.name}_std")
            pixels = (full[item.expert.pixels] - mean) / std
            inputs.append(pixels.to(self.dtype).contiguous(memory_format=torch.channels_last))
        return inputs

    def _full(self, pieces: Sequence[Tensor]) -> Tensor:
        """Bring a batch of pixels to the device, filled with zeros to the one shape that every batch has."""
        pixels = [piece.to(self.device, non_blocking=True).float() for piece in pieces]
        if missing := self.config.views_at_once - sum(map(len, pixels)):
            pixels.append(pixels[0].new_zeros(missing, *pixels[0].shape[1:]))
        return torch.cat(pixels) if len(pixels) > 1 else pixels[0]

    def _encode(self, inputs: list[Tensor]) -> Tensor:
        """Encode one batch of views, normalised for each expert, see `forward`."""
        mixed, queries = [], []
        for item, model, pixels in zip(self.config.experts, self.experts, inputs, strict=True):
            compute = self._compiled.get(item.name) or partial(_features, item.expert, model)
            if item.expert.family == "qformer":
                queries.append(compute(pixels)[0].flatten(1))
                continue
            whole, patches = compute(pixels)
            mixed.append(torch.cat([whole[:, None], self._repeat(patches, item.expert.grid)], 1))
        return torch.cat([torch.cat(mixed, 2).flatten(1), *queries], 1).to(torch.bfloat16)

    def _repeat(self, patches: Tensor, native: int) -> Tensor:
        """Repeat each patch to fill the mixture's grid, as the released code repeats ConvNeXt's 8x8.

        Args:
            patches: [views, native ** 2, channels], row by row.
            native: side of the square of patches that the expert gives.

        Returns:
            [views, grid ** 2, channels], row by row.
        """
        times = self.config.grid // native
        if times == 1:
            return patches
        square = patches.unflatten(1, (native, native))
        repeated: Tensor = square.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1, 2)
        return repeated


def _cut(parts: Sequence[Tensor], first: int, stop: int) -> list[Tensor]:
    """Cut rows `first` to `stop` out of tensors that lie one behind the other; a piece of each that has some."""
    pieces, at = [], 0
    for part in parts:
        pieces.append(part[max(0, first - at) : max(0, stop - at)])
        at += len(part)
    return [piece for piece in pieces if len(piece)]


def _features(expert: VisualExpert, model: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    """Compute what an expert gives for normalised pixels: the tokens of a Q-Former, or what FAMILIES says."""
    return (model(pixels),) if expert.family == "qformer" else FAMILIES[expert.family](model, pixels)
