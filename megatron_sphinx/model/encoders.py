"""The frozen visual experts: pixels to feature tokens. They live on encoder ranks and are never trained."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model.architecture import VisionConfig, VisualExpert, VisualExpertConfig
from megatron_sphinx.parallel.seeding import stream_seed
from megatron_sphinx.unpickling import load_torch


class QFormer(nn.Module):
    """BLIP-2's vision model and Q-Former, without its language model.

    Source: BLIP-2, arXiv:2301.12597; transformers' Blip2Model.get_qformer_features.
    """

    def __init__(self, expert: VisualExpert) -> None:
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


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a library names an expert in the files it releases.

    Attributes:
        library: the library.
        marker: a tensor that only such a file holds.
        prefix: where the expert stands in the file; what stands elsewhere belongs to other models.
        names: parts of its tensors' names, and what replaces them, one after the other, to make timm's names.
    """

    library: str
    marker: str
    prefix: str = ""
    names: Mapping[str, str]


# Layouts that an expert's file may have beside its own, which is timm's, or transformers' for the Q-Former.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "clip": (
        Layout(
            library="open_clip", marker="visual.class_embedding", prefix="visual.",
            names={
                "class_embedding": "cls_token", "positional_embedding": "pos_embed", "conv1": "patch_embed.proj",
                "transformer.resblocks": "blocks", "ln_pre": "norm_pre", "ln_post": "norm", "ln_": "norm",
                "in_proj_": "qkv.", "out_proj": "proj", "c_fc": "fc1", "c_proj": "fc2",
            },
        ),
        Layout(
            library="transformers", marker="vision_model.embeddings.class_embedding", prefix="vision_model.",
            names={
                "embeddings.class_embedding": "cls_token", "embeddings.position_embedding.weight": "pos_embed",
                "embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks",
                "pre_layrnorm": "norm_pre", "post_layernorm": "norm", "layer_norm": "norm", "self_attn": "attn",
                "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "proj",
            },
        ),
    ),
    "convnext": (
        Layout(library="open_clip", marker="visual.trunk.stem.0.weight", prefix="visual.trunk.", names={}),
    ),
    "dinov2": (
        Layout(library="dinov2", marker="blocks.0.mlp.w12.weight", names={"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}),
        Layout(
            library="transformers", marker="embeddings.cls_token",
            names={
                "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
                "embeddings.patch_embeddings.projection": "patch_embed.proj", "encoder.layer.": "blocks.",
                "attention.attention.query": "attn.q", "attention.attention.key": "attn.k",
                "attention.attention.value": "attn.v", "attention.output.dense": "attn.proj",
                "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
                "weights_in": "fc1", "weights_out": "fc2", "layernorm": "norm",
            },
        ),
    ),
}  # fmt: skip

# Where a checkpoint of LLaMA2-Accessory holds the experts, whole in each shard.
# Source: the released accessory/model/LLM/llama_ens.py.
ACCESSORY = {
    "clip": "llma.clip.",
    "convnext": "llma.openclip_convnext_xxl.",
    "dinov2": "llma.dinov2_vitg14.",
    "qformer": "llma.qformer.",
}

# Tensors that no feature needs: classifiers and projections behind them, BLIP-2's language model, DINOv2's mask.
UNUSED = (
    "classifier.", "head.fc.", "head.weight", "head.bias", "language_", "mask_token", "embeddings.mask_token",
    "embeddings.position_ids",
)  # fmt: skip


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
            model, self.sha256[item.name] = load_expert(item, seed, config.resize)
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


def build_expert(expert: VisualExpert) -> nn.Module:
    """The module of an expert, its weights as its library draws them."""
    if expert.family == "qformer":
        return QFormer(expert)
    model: nn.Module = timm.create_model(expert.model, num_classes=0, **expert.options)
    return model


def encoder_work(expert: VisualExpert) -> tuple[int, int]:
    """What one view takes; needs no memory.

    Returns:
        FLOPs, two for each multiply-add of matrix products and convolutions; and the numbers that are held at once
        where most are: a module's input, its output, and what goes around it.
    """
    most = 0

    def count(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal most
        sizes = [value.numel() for value in (*inputs, output) if isinstance(value, Tensor)]
        most = max(most, sum(sizes) + min(sizes, default=0))

    with torch.device("meta"):
        model = build_expert(expert).eval().requires_grad_(False)
        pixels = torch.empty(1, 3, expert.pixels, expert.pixels)
    for module in model.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        if expert.family == "qformer":
            model(pixels)
        else:
            FAMILIES[expert.family](model, pixels)
    total: int = counter.get_total_flops()
    return total, most


def load_expert(config: VisualExpertConfig, seed: int, resize: str = "antialiased") -> tuple[nn.Module, str]:
    """An expert with its weights, and what identifies them.

    The file may be timm's, or transformers' for the Q-Former; or of one of LAYOUTS; or a checkpoint of
    LLaMA2-Accessory, any of its shards. Which one it is shows in the names of its tensors.

    Args:
        config: the expert, and its file.
        seed: of weights that are drawn.
        resize: with `accessory`, DINOv2's position embeddings are fitted to the input as its own code fits them.

    Raises:
        ConfigError: no such file, not a checkpoint, or weights of another architecture (each difference counted).
    """
    expert = config.expert
    if config.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, f"expert {config.name}"))
            return build_expert(expert), f"random {seed}"
    path = Path(config.weights)
    state, names = translate(_read(path, config.name), expert.family)
    with torch.device("meta"):
        model = build_expert(expert)
    wanted = model.state_dict()
    state = {name: value for name, value in state.items() if name in wanted or not name.startswith(UNUSED)}
    if "pos_embed" in wanted and "pos_embed" in state:
        is_released = resize == "accessory" and expert.family == "dinov2"
        state["pos_embed"] = _fit_positions(state["pos_embed"], wanted["pos_embed"], is_released)
    differences = {
        "absent": sorted(wanted.keys() - state.keys()),
        "unknown": sorted(state.keys() - wanted.keys()),
        "of another shape": sorted(n for n in wanted.keys() & state.keys() if wanted[n].shape != state[n].shape),
    }
    if any(differences.values()):
        found = ", ".join(f"{len(some)} {what} ({some[0]})" for what, some in differences.items() if some)
        raise ConfigError(
            f"vision.experts: {config.name}: {path} holds weights of another architecture: by {names}, tensors "
            f"{found}; give weights of {expert.model or 'Salesforce/blip2-opt-2.7b'}"
        )
    model.load_state_dict(state, strict=True, assign=True)
    status = path.stat()
    return model, _sha256(path, status.st_size, status.st_mtime_ns)


def translate(state: Mapping[str, Tensor], family: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of an expert out of a file's, under the names of its module.

    Returns:
        The tensors, and the names by which they were found.
    """
    place = ""
    if any(name.startswith("llma.") for name in state):
        prefix = ACCESSORY.get(family, f"llma.{family}.")
        state, place = _under(prefix, state), f" under {prefix}*"
    for layout in LAYOUTS.get(family, ()):
        if layout.marker in state:
            return _rename(_under(layout.prefix, state), layout), f"{layout.library}'s names{place}"
    return dict(state), f"{'transformers' if family == 'qformer' else 'timm'}'s names{place}"


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _rename(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Timm's names and shapes: one tensor of queries, keys and values; embeddings with a dimension for the batch."""
    renamed = {}
    for name, value in state.items():
        for old, new in layout.names.items():
            name = name.replace(old, new)
        while name in ("cls_token", "pos_embed") and value.ndim < 3:
            value = value[None]
        renamed[name] = value
    renamed.pop("proj", None)  # open_clip's projection of the image's feature
    for name, value in list(renamed.items()):
        if ".attn.q." not in name:
            continue
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed and renamed[part].shape == value.shape for part in parts):
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def _read(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory, so that only those which are used are read."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        payload: Any = load_torch(path, is_mapped=is_zipfile(path))
    except FileNotFoundError as error:
        raise ConfigError(f"vision.experts: {name}: {path}: no such file; give a weights file, or random") from error
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"vision.experts: {name}: {path} cannot be read as weights: {reason}") from error
    for key in ("model", "state_dict"):
        payload = payload.get(key, payload) if isinstance(payload, dict) else payload
    if not isinstance(payload, dict):
        raise ConfigError(
            f"vision.experts: {name}: {path} holds a {type(payload).__name__}, not tensors by name; give a state dict"
        )
    return {key: value for key, value in payload.items() if isinstance(value, Tensor)}


@lru_cache
def _sha256(path: Path, size: int, changed: int) -> str:
    """Digest of a file, once for all experts of it; size and time of change say whether it is still the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fit_positions(saved: Tensor, wanted: Tensor, is_released: bool) -> Tensor:
    """Position embeddings of another input size, resampled to this one: antialiased, or as DINOv2's code does.

    Source: facebookresearch/dinov2, dinov2/models/vision_transformer.py, interpolate_pos_encoding.
    """
    if saved.shape == wanted.shape or saved.ndim != 3 or saved.shape[-1] != wanted.shape[-1]:
        return saved
    native, side = (math.isqrt(count - 1) for count in (saved.shape[1], wanted.shape[1]))
    if saved.shape[:2] != (1, 1 + native * native):
        return saved
    if not is_released:
        fitted: Tensor = resample_abs_pos_embed(saved, new_size=[side, side], num_prefix_tokens=1)
        return fitted
    grid = saved[:, 1:].float().unflatten(1, (native, native)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / native
    patches = nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([saved[:, :1], patches.flatten(2).transpose(1, 2).to(saved.dtype)], 1)
