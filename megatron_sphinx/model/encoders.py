"""The mixture of frozen visual experts: pixels to feature tokens. It lives on encoder ranks and is never trained."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_sphinx.model.architecture import VisionConfig
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

    def train(self, mode: bool = True) -> "FrozenEncoders":
        """Stay in eval mode whatever `mode` is: frozen experts drop nothing and learn no statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, views: Mapping[int, Tensor]) -> Tensor:
        """Encode views, in batches of `config.batch_views`.

        Args:
            views: for each input side of `config.sides`, pixels from 0 to 255, [views, 3, side, side].

        Returns:
            bf16 [views, config.feature_values]: the mixed tokens [1 + grid ** 2, channels], then the Q-Former's
            tokens, flattened. The bits of a view do not depend on the views beside it.
        """
        count = len(next(iter(views.values())))
        out = torch.empty(count, self.config.feature_values, dtype=torch.bfloat16, device=self.device)
        size = self.config.batch_views
        for first in range(0, count, size):
            chunk = {side: self._full(pixels[first : first + size]) for side, pixels in views.items()}
            out[first : first + size] = self._encode(chunk)[: count - first]
        return out

    def _full(self, pixels: Tensor) -> Tensor:
        """Fill a batch of pixels with zeros to the one shape that every batch has."""
        missing = self.config.batch_views - len(pixels)
        pixels = pixels.to(self.device, torch.float32)
        return torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]) if missing else pixels

    def _encode(self, chunk: Mapping[int, Tensor]) -> Tensor:
        """Encode one batch of views, [batch_views, 3, side, side] for each input side, see `forward`."""
        mixed, queries = [], []
        for item, model in zip(self.config.experts, self.experts, strict=True):
            mean, std = self.get_buffer(f"{item.name}_mean"), self.get_buffer(f"{item.name}_std")
            pixels = (chunk[item.expert.pixels] - mean) / std
            pixels = pixels.to(self.dtype).contiguous(memory_format=torch.channels_last)
            if item.expert.family == "qformer":
                queries.append(model(pixels).flatten(1))
                continue
            whole, patches = FAMILIES[item.expert.family](model, pixels)
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
