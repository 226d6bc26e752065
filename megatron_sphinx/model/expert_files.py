"""The weights of visual experts: read from any file that their libraries release, or drawn from the seed."""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model.architecture import VisualExpertConfig
from megatron_sphinx.model.drawing import DrawingFrom, in_threads
from megatron_sphinx.model.visual_experts import build_expert
from megatron_sphinx.parallel.seeding import generator
from megatron_sphinx.unpickling import load_torch

RANDOM = "random"  # in place of a file: weights are drawn


class LoadedExpert(NamedTuple):
    """A visual expert that was loaded.

    Attributes:
        model: its module.
        mark: the SHA-256 of its file, or `random <seed>`.
        seconds: how long its weights took.
    """

    model: nn.Module
    mark: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """How a library names the tensors of a visual expert in the files it releases.

    Attributes:
        library: what the library is called.
        marker: name of a tensor that only files of this library hold.
        prefix: what the names of the expert's tensors begin with; the other tensors belong to other models.
        names: parts of its tensors' names, and what replaces them, one after the other, to make timm's names.
    """

    library: str
    marker: str
    prefix: str = ""
    names: Mapping[str, str]


# Names that a file of each family of experts may have beside those of our module: timm's, or transformers' for the
# Q-Former.
RELEASED_NAMES: dict[str, tuple[TensorNames, ...]] = {
    "clip": (
        TensorNames(
            library="open_clip", marker="visual.class_embedding", prefix="visual.",
            names={
                "class_embedding": "cls_token", "positional_embedding": "pos_embed", "conv1": "patch_embed.proj",
                "transformer.resblocks": "blocks", "ln_pre": "norm_pre", "ln_post": "norm", "ln_": "norm",
                "in_proj_": "qkv.", "out_proj": "proj", "c_fc": "fc1", "c_proj": "fc2",
            },
        ),
        TensorNames(
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
        TensorNames(library="open_clip", marker="visual.trunk.stem.0.weight", prefix="visual.trunk.", names={}),
    ),
    "dinov2": (
        TensorNames(
            library="dinov2", marker="blocks.0.mlp.w12.weight", names={"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}
        ),
        TensorNames(
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

# What the names of an expert's tensors begin with in a checkpoint of LLaMA2-Accessory. Each shard has it whole.
# Source: the released accessory/model/LLM/llama_ens.py.
ACCESSORY_PREFIXES = {
    "clip": "llma.clip.",
    "convnext": "llma.openclip_convnext_xxl.",
    "dinov2": "llma.dinov2_vitg14.",
    "qformer": "llma.qformer.",
}

# Tensors that no feature needs: classifiers and projections behind them, BLIP-2's language model, DINOv2's mask.
UNUSED_TENSORS = (
    "classifier.", "head.fc.", "head.weight", "head.bias", "language_", "mask_token", "embeddings.mask_token",
    "embeddings.position_ids",
)  # fmt: skip


def load_experts(
    items: Sequence[VisualExpertConfig], seed: int, resize: str, *, device: torch.device, dtype: torch.dtype
) -> list[LoadedExpert]:
    """Load the visual experts of a mixture, on a GPU several at once, and beside them the files' digests.

    Args:
        items: the experts, and their files.
        seed: the run's seed.
        resize: of the mixture, see `load_expert`.
        device: where the experts go, each as soon as it is there; on `meta` they get shapes, and no numbers.
        dtype: what they compute in.

    Raises:
        ConfigError: what `load_expert` raises, for the first expert that has no weights.
    """

    def load(item: VisualExpertConfig) -> LoadedExpert:
        start = time.perf_counter()
        if device.type == "meta":
            with device:
                model = build_expert(item.expert)
        else:
            model = _with_weights(item, seed, resize)
        model.requires_grad_(False).eval().to(device=device, dtype=dtype).to(memory_format=torch.channels_last)
        return LoadedExpert(model, "", time.perf_counter() - start)

    paths = sorted({item.weights for item in items if item.weights != RANDOM})
    with ThreadPoolExecutor(len(paths) + 1, "digests") as pool:  # they only read, and need no core of their own
        marks = {path: pool.submit(_digest, path) for path in paths}
        loaded = in_threads(load, items)
        return [
            one._replace(mark=marks[item.weights].result() if item.weights in marks else _mark_of_random(seed))
            for item, one in zip(items, loaded, strict=True)
        ]


def load_expert(config: VisualExpertConfig, seed: int, resize: str = "antialiased") -> tuple[nn.Module, str]:
    """Build a visual expert with its weights, and identify them by the file's SHA-256, or by `random <seed>`.

    The file may have timm's names, or transformers' for the Q-Former; or those of RELEASED_NAMES; or be a checkpoint of
    LLaMA2-Accessory, any of its shards. Which one it is shows in the names of its tensors.

    Args:
        config: the expert, and its file.
        seed: the run's seed, from which weights without a file are drawn.
        resize: with `accessory`, DINOv2's position embeddings are fitted to the input as its own code fits them.

    Raises:
        ConfigError: no such file, not a checkpoint, or weights of another architecture (each difference counted).
    """
    model = _with_weights(config, seed, resize)
    return model, _mark_of_random(seed) if config.weights == RANDOM else _digest(config.weights)


def _mark_of_random(seed: int) -> str:
    """Identify weights that were drawn from a run's seed."""
    return f"{RANDOM} {seed}"


def _with_weights(config: VisualExpertConfig, seed: int, resize: str) -> nn.Module:
    """Build a visual expert on the CPU with its weights, as `load_expert` says; those of a file are mapped."""
    expert = config.expert
    if config.weights == RANDOM:
        with DrawingFrom(generator(seed, f"expert {config.name}")):
            return build_expert(expert)
    path = Path(config.weights)
    state, naming = translate(_read(path, config.name), expert.family)
    with torch.device("meta"):
        model = build_expert(expert)
    empty = model.state_dict()
    state = {name: value for name, value in state.items() if name in empty or not name.startswith(UNUSED_TENSORS)}
    if "pos_embed" in empty and "pos_embed" in state:
        is_released = resize == "accessory" and expert.family == "dinov2"
        state["pos_embed"] = _fit_positions(state["pos_embed"], empty["pos_embed"], is_released)
    differences = {
        "absent": sorted(empty.keys() - state.keys()),
        "unknown": sorted(state.keys() - empty.keys()),
        "of another shape": sorted(n for n in empty.keys() & state.keys() if empty[n].shape != state[n].shape),
    }
    if any(differences.values()):
        told = ", ".join(f"{len(names)} {what} ({names[0]})" for what, names in differences.items() if names)
        raise ConfigError(
            f"vision.experts: {config.name}: {path} holds weights of another architecture: by {naming}, tensors "
            f"{told}; give weights of {expert.model or 'Salesforce/blip2-opt-2.7b'}"
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model


def translate(state: Mapping[str, Tensor], family: str) -> tuple[dict[str, Tensor], str]:
    """Pick the tensors of a visual expert out of a file's, and give them the names that its module has.

    Args:
        state: all tensors of the file, by name.
        family: the expert's family, see VisualExpert.

    Returns:
        The tensors by their new names, and whose names the file has, in words.
    """
    place = ""
    if any(name.startswith("llma.") for name in state):
        prefix = ACCESSORY_PREFIXES.get(family, f"llma.{family}.")
        state, place = _under(prefix, state), f" under {prefix}*"
    for released in RELEASED_NAMES.get(family, ()):
        if released.marker in state:
            return _rename(_under(released.prefix, state), released), f"{released.library}'s names{place}"
    return dict(state), f"{'transformers' if family == 'qformer' else 'timm'}'s names{place}"


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, which their new names lack."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _rename(state: Mapping[str, Tensor], released: TensorNames) -> dict[str, Tensor]:
    """Give a library's tensors timm's names and shapes.

    timm has one tensor for queries, keys and values, and embeddings with a dimension for the batch.
    """
    renamed = {}
    for name, value in state.items():
        for old, new in released.names.items():
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
    """Map the tensors of a file into memory, so that only those which are used are read.

    Raises:
        ConfigError: no such file, or one that holds no tensors by name.
    """
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


def _digest(path: str) -> str:
    """Compute the SHA-256 of a file, or remember it."""
    status = Path(path).stat()
    return _sha256(Path(path), status.st_size, status.st_mtime_ns)


@lru_cache
def _sha256(path: Path, size: int, changed: int) -> str:
    """Compute the SHA-256 of a file, once for all experts in it.

    Args:
        path: the file.
        size: its bytes; with `changed` they tell the cache whether the file is still the same.
        changed: when it was changed, in nanoseconds.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fit_positions(saved: Tensor, target: Tensor, is_released: bool) -> Tensor:
    """Resample position embeddings of another input size to this model's; others are returned as they are.

    Args:
        saved: [1, 1 + patches, width] of the file, a class token first.
        target: [1, 1 + patches, width] of the model; only its shape counts.
        is_released: whether to resample as DINOv2's own code does; else antialiased.

    Source: facebookresearch/dinov2, dinov2/models/vision_transformer.py, interpolate_pos_encoding.
    """
    if saved.shape == target.shape or saved.ndim != 3 or saved.shape[-1] != target.shape[-1]:
        return saved
    native, side = (math.isqrt(count - 1) for count in (saved.shape[1], target.shape[1]))
    if saved.shape[:2] != (1, 1 + native * native):
        return saved
    if not is_released:
        fitted: Tensor = resample_abs_pos_embed(saved, new_size=[side, side], num_prefix_tokens=1)
        return fitted
    grid = saved[:, 1:].float().unflatten(1, (native, native)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / native  # the released code adds 0.1 against rounding down, and it moves every sample
    patches = nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([saved[:, :1], patches.flatten(2).transpose(1, 2).to(saved.dtype)], 1)
