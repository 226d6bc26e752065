"""From features to embeddings: the trainable projections and tags, which live on the language ranks."""

import torch
from torch import Tensor, nn

from megatron_sphinx.model.architecture import VisionConfig


class VisualProjection(nn.Module):
    """Projects features of views to blocks of embeddings `[start][Q-Former][global][patches][end]`.

    Attributes:
        config: the mixture that the features come from.
        skip_token: [hidden], stands for a view that is skipped, without tags; None where none can be skipped.

    Source: visual_proj, qformer_proj, start_img, end_img of the released accessory/model/LLM/llama_ens.py.
    """

    def __init__(self, config: VisionConfig, hidden: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config

        def projection(channels: int) -> nn.Sequential:
            linear = nn.Linear(channels, hidden, device=device, dtype=dtype)
            return nn.Sequential(linear, nn.LayerNorm(hidden, device=device, dtype=dtype))

        self.visual_proj = projection(config.channels)
        self.qformer_proj = projection(config.qformer.channels) if config.qformer else None
        self.start_tag = nn.Parameter(torch.empty(hidden, dtype=dtype, device=device))
        self.end_tag = nn.Parameter(torch.empty(hidden, dtype=dtype, device=device))
        self.skip_token: nn.Parameter | None = None
        if config.has_skip_token:
            self.skip_token = nn.Parameter(torch.empty(hidden, dtype=dtype, device=device))

    def forward(self, features: Tensor) -> Tensor:
        """Project the features of views to embeddings.

        Args:
            features: [views, feature_values] as FrozenEncoders gives them; no views at all is fine, and still gives
                every weight here a (zero) gradient, so that each rank reduces the same tensors in each micro-batch.

        Returns:
            Embeddings [views, tokens_per_view, hidden].
        """
        views, mixed_values = len(features), self.config.mixed_tokens * self.config.channels
        features = features.to(self.start_tag.dtype)
        mixed = features[:, :mixed_values].unflatten(1, (self.config.mixed_tokens, self.config.channels))
        parts = [self.start_tag.expand(views, 1, -1), self.visual_proj(mixed), self.end_tag.expand(views, 1, -1)]
        if self.qformer_proj is not None and self.config.qformer is not None:
            expert = self.config.qformer
            queries = features[:, mixed_values:].unflatten(1, (expert.queries, expert.channels))
            parts.insert(1, self.qformer_proj(queries))
        return torch.cat(parts, 1)
