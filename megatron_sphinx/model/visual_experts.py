"""How each visual expert is built, and what features it gives.

timm builds all of them but the Q-Former, which transformers does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model.architecture import VisualExpert


class QFormer(nn.Module):
    """BLIP-2's vision model and Q-Former, without its language model.

    Source: BLIP-2, arXiv:2301.12597; transformers' Blip2Model.get_qformer_features.
    """

    def __init__(self, expert: VisualExpert) -> None:
        super().__init__()
        import_libraries([expert])
        from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        vision: dict[str, Any] = dict(zip(names, expert.options.get("vision", ()), strict=False))  # type: ignore[call-overload]
        qformer: dict[str, Any] = dict(zip(names, expert.options.get("qformer", ()), strict=False))  # type: ignore[call-overload]
        vision_config = Blip2VisionConfig(image_size=expert.pixels, patch_size=14, **vision)
        qformer_config = Blip2QFormerConfig(encoder_hidden_size=vision_config.hidden_size, **qformer)
        self.vision_model = Blip2VisionModel(vision_config)
        self.qformer = Blip2QFormerModel(qformer_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, expert.queries, expert.channels))
        nn.init.normal_(self.query_tokens, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute query tokens [views, queries, channels] from pixels [views, 3, side, side]."""
        patches = self.vision_model(pixels).last_hidden_state
        queries = self.query_tokens.expand(len(pixels), -1, -1)
        out: Tensor = self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
        return out


def _vit(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a vision transformer: its class token, and its patches, all after the last norm."""
    tokens = model.forward_features(pixels)
    return tokens[:, 0], tokens[:, 1:]


def _of_map(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of a map of features [views, channels, rows, columns], and its patches, row by row."""
    patches = features.flatten(2).transpose(1, 2)
    return patches.mean(1), patches


def _convnext(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a ConvNeXt: the mean of its patches, and the patches after the head's norm."""
    return _of_map(model.head.norm(model.forward_features(pixels)))


def _cnn(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of another convolutional network: the mean of its patches, and the patches."""
    return _of_map(model.forward_features(pixels))


def _cnn_stride16(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a convolutional network where its patches are 16 pixels wide: their mean, and the patches.

    They tell what lies where better than the features at its end, each of which has seen most of the picture. The
    stages behind them are not computed.
    """
    stage = [info["reduction"] for info in model.feature_info].index(16)
    [features] = model.forward_intermediates(pixels, indices=[stage], stop_early=True, intermediates_only=True)
    return _of_map(features)


# What an expert's family gives: one global vector [views, channels] and patches [views, native grid ** 2, channels],
# row by row. Source: encode_image of the released accessory/model/LLM/llama_ens.py; CLIP without its last projection.
FAMILIES: dict[str, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    "clip": _vit,
    "dinov2": _vit,
    "convnext": _convnext,
    "cnn": _cnn,
    "cnn_stride16": _cnn_stride16,
}


def import_libraries(experts: Sequence[VisualExpert]) -> None:
    """Import what builds these experts. Two threads that import at once may wait for each other.

    Raises:
        ConfigError: it is not installed.
    """
    if not any(expert.family == "qformer" for expert in experts):
        return
    try:
        from transformers import Blip2QFormerModel, Blip2VisionModel  # noqa: F401  # it imports what is asked for
    except ImportError as error:
        raise ConfigError(
            "vision.experts: the Q-Former is built by transformers, which is not installed; "
            "pip install 'megatron-sphinx[qformer]'"
        ) from error


def build_expert(expert: VisualExpert) -> nn.Module:
    """Build the module of a visual expert, with weights as its library draws them."""
    if expert.family == "qformer":
        return QFormer(expert)
    model: nn.Module = timm.create_model(expert.model, num_classes=0, **expert.options)
    return model
