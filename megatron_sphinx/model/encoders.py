"""The frozen visual experts: pixels to feature tokens. They live on encoder ranks and are never trained."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model.architecture import Expert, ExpertConfig, VisionConfig
from megatron_sphinx.parallel.seeding import stream_seed


class QFormer(nn.Module):
    """BLIP-2's vision model and Q-Former, without its language model.

    Source: BLIP-2, arXiv:2301.12597; transformers' Blip2Model.get_qformer_features.
    """

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        try:
            from transformers import (
                Blip2QFormerConfig,
                Blip2QFormerModel,
                Blip2VisionConfig,
                Blip2VisionModel,
            )
        except ImportError as error:
            raise ConfigError(
                "vision.experts: the Q-Former is built by transformers, which is not installed; "
                "pip install 'megatron-sphinx[qformer]'"
            ) from error
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
        """[views, 3, side, side] to [views, queries, channels]."""
        patches = self.vision_model(pixels).last_hidden_state
        queries = self.query_tokens.expand(len(pixels), -1, -1)
        out: Tensor = self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
        return out


def _vit(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model.forward_features(pixels)  # class token and patches, all behind the last norm
    return tokens[:, 0], tokens[:, 1:]


def _convnext(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    patches = model.head.norm(model.forward_features(pixels)).flatten(2).transpose(1, 2)
    return patches.mean(1), patches


def _cnn(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    patches = model.forward_features(pixels).flatten(2).transpose(1, 2)
    return patches.mean(1), patches


# What an expert's family gives: one global vector [views, channels] and patches [views, native grid ** 2, channels],
# row by row. Source: encode_image of the released accessory/model/LLM/llama_ens.py; CLIP without its last projection.
FAMILIES: dict[str, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    "clip": _vit,
    "dinov2": _vit,
    "convnext": _convnext,
    "cnn": _cnn,
}


class FrozenEncoders(nn.Module):
    """The mixture of visual experts, in eval mode, without gradients, in one fixed batch shape.

    Attributes:
        sha256: digest of each expert's weights file, or `random <seed>`; what a checkpoint refers to.
    """

    def __init__(self, config: VisionConfig, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.config = config
        self.experts = nn.ModuleList()
        self.sha256: dict[str, str] = {}
        for item in config.experts:
            model, self.sha256[item.name] = load_expert(item, seed)
            self.experts.append(model)
        self.requires_grad_(False).eval()
        self.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)
        self.dtype, self.device = dtype, device
        for item in config.experts:
            for name in ("mean", "std"):
                value = torch.tensor(getattr(item.expert, name), device=device).view(3, 1, 1) * 255
                self.register_buffer(f"{item.name}_{name}", value, persistent=False)

    def train(self, mode: bool = True) -> "FrozenEncoders":
        """Stay in eval mode: frozen experts drop nothing and learn no statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, views: Mapping[int, Tensor]) -> Tensor:
        """Encode views.

        Args:
            views: for each input side of `config.sides`, pixels uint8 [views, 3, side, side].

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
        """The batch, filled with zeros to the one shape that every batch has."""
        missing = self.config.batch_views - len(pixels)
        pixels = pixels.to(self.device, torch.float32)
        return torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]) if missing else pixels

    def _encode(self, chunk: Mapping[int, Tensor]) -> Tensor:
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
        """Each patch repeated to fill the mixture's grid, as the released code repeats ConvNeXt's 8x8."""
        times = self.config.grid // native
        if times == 1:
            return patches
        square = patches.unflatten(1, (native, native))
        repeated: Tensor = square.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1, 2)
        return repeated


def build_expert(expert: Expert) -> nn.Module:
    """The module of an expert, its weights as its library draws them."""
    if expert.family == "qformer":
        return QFormer(expert)
    model: nn.Module = timm.create_model(expert.model, num_classes=0, **expert.options)
    return model


def load_expert(config: ExpertConfig, seed: int) -> tuple[nn.Module, str]:
    """An expert with its weights, and what identifies them.

    Raises:
        ConfigError: no such file, not a checkpoint, or weights of another architecture (each difference counted).
    """
    if config.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, f"expert {config.name}"))
            return build_expert(config.expert), f"random {seed}"
    path = Path(config.weights)
    state = _read(path, config.name)
    with torch.device("meta"):
        model = build_expert(config.expert)
    wanted = model.state_dict()
    state = {name: value for name, value in state.items() if name in wanted or not _is_head(name)}
    if "pos_embed" in wanted and "pos_embed" in state:
        state["pos_embed"] = _fit_positions(state["pos_embed"], wanted["pos_embed"])
    absent = sorted(wanted.keys() - state.keys())
    unused = sorted(state.keys() - wanted.keys())
    misshaped = sorted(n for n in wanted.keys() & state.keys() if wanted[n].shape != state[n].shape)
    if absent or unused or misshaped:
        found = [f"{len(names)} {what} ({names[0]})" for what, names in
                 (("absent", absent), ("unknown", unused), ("of another shape", misshaped)) if names]  # fmt: skip
        raise ConfigError(
            f"vision.experts: {config.name}: {path} holds weights of another architecture: tensors {', '.join(found)}; "
            f"give weights of {config.expert.model or 'Salesforce/blip2-opt-2.7b'}"
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model, hashlib.file_digest(path.open("rb"), "sha256").hexdigest()


def _read(path: Path, name: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"vision.experts: {name}: {path}: no such file; give a weights file, or random") from error
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"vision.experts: {name}: {path} cannot be read as weights: {reason}") from error
    return dict(state.get("state_dict", state))


def _is_head(name: str) -> bool:
    """Tensors that stand behind the features: classifiers, projections, and BLIP-2's language model."""
    return name.startswith(("classifier.", "head.fc.", "head.weight", "head.bias", "language_", "mask_token"))


def _fit_positions(saved: Tensor, wanted: Tensor) -> Tensor:
    """Position embeddings of another input size, resampled to this one."""
    if saved.shape == wanted.shape or saved.shape[-1] != wanted.shape[-1]:
        return saved
    side = round((wanted.shape[1] - 1) ** 0.5)
    fitted: Tensor = resample_abs_pos_embed(saved, new_size=[side, side], num_prefix_tokens=1)
    return fitted
