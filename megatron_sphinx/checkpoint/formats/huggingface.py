"""Hugging Face's checkpoints: Llama, Mixtral, InternLM2; what SPHINX adds lies in a file of its own beside them."""

from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.conversion import Source
from megatron_sphinx.checkpoint.formats.base import (
    Entries,
    File,
    Opened,
    Wanted,
    grouped,
    read_json,
    shape_of,
    whole,
    width,
)
from megatron_sphinx.checkpoint.keymap import WEIGHTS, Model, Rule, stored
from megatron_sphinx.checkpoint.stream import read_safetensors, read_torch
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.paths import is_plain

EXTRAS = "sphinx.safetensors"

# Source: transformers, models/llama/modeling_llama.py.
_HF_COMMON = (
    Rule("model.embed_tokens.weight", "v i", ("embedding",)),
    Rule("model.layers.{l}.input_layernorm.weight", "i", ("attention_norm",)),
    Rule("model.layers.{l}.self_attn.q_proj.weight", "(g p r h) i", ("q",)),
    Rule("model.layers.{l}.self_attn.k_proj.weight", "(g r h) i", ("k",)),
    Rule("model.layers.{l}.self_attn.v_proj.weight", "(g r h) i", ("v",)),
    Rule("model.layers.{l}.self_attn.o_proj.weight", "i (g p r h)", ("o",)),
    Rule("model.layers.{l}.post_attention_layernorm.weight", "i", ("ffn_norm",)),
    Rule("model.norm.weight", "i", ("norm",)),
    Rule("lm_head.weight", "v i", ("output",)),
)
HF_LLAMA = (
    *_HF_COMMON,
    Rule("model.layers.{l}.mlp.gate_proj.weight", "f i", ("gate",)),
    Rule("model.layers.{l}.mlp.up_proj.weight", "f i", ("up",)),
    Rule("model.layers.{l}.mlp.down_proj.weight", "i f", ("down",)),
)
# Source: transformers, models/mixtral: the names that its released checkpoints have.
HF_MIXTRAL = (
    *_HF_COMMON,
    Rule("model.layers.{l}.block_sparse_moe.gate.weight", "e i", ("router",)),
    Rule("model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", "f i", ("gate",)),
    Rule("model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", "f i", ("up",)),
    Rule("model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", "i f", ("down",)),
)
# Source: internlm/internlm2-7b, modeling_internlm2.py.
HF_INTERNLM2 = (
    Rule("model.tok_embeddings.weight", "v i", ("embedding",)),
    Rule("model.layers.{l}.attention_norm.weight", "i", ("attention_norm",)),
    Rule("model.layers.{l}.attention.wqkv.weight", "(g * r h) i", ("q", "k", "v")),
    Rule("model.layers.{l}.attention.wo.weight", "i (g p r h)", ("o",)),
    Rule("model.layers.{l}.ffn_norm.weight", "i", ("ffn_norm",)),
    Rule("model.layers.{l}.feed_forward.w1.weight", "f i", ("gate",)),
    Rule("model.layers.{l}.feed_forward.w3.weight", "f i", ("up",)),
    Rule("model.layers.{l}.feed_forward.w2.weight", "i f", ("down",)),
    Rule("model.norm.weight", "i", ("norm",)),
    Rule("output.weight", "v i", ("output",)),
)
# What SPHINX has beside a language model, in a file of its own beside a Hugging Face checkpoint.
SPHINX = tuple(
    Rule(name, WEIGHTS[name], (name,))
    for name in WEIGHTS
    if name.startswith(("visual", "qformer", "start", "end", "skip"))
)

TABLES = {"LlamaForCausalLM": HF_LLAMA, "MixtralForCausalLM": HF_MIXTRAL, "InternLM2ForCausalLM": HF_INTERNLM2}
_INDEXES = {"model.safetensors.index.json": read_safetensors, "pytorch_model.bin.index.json": read_torch}
_SINGLE = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_torch}
_DERIVED = "rotary_emb.inv_freq"  # old files hold the frequencies, which follow from the configuration


def is_here(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    return any((folder / name).is_file() for name in (*_INDEXES, *_SINGLE))


def open_checkpoint(folder: Path) -> Opened:
    """Read what a checkpoint holds, not its tensors.

    Raises:
        CheckpointError: a file is missing or damaged, or it is of a model that is not known.
    """
    path = folder / "config.json"
    about = read_json(path)
    architecture = next(iter(about.get("architectures") or ["?"]))
    if architecture not in TABLES:
        raise CheckpointError(f"{path}: architectures={architecture}: unknown; known: {', '.join(TABLES)}")
    language = shape_of(_shape(about, path), path)
    entries, places = _entries(folder)
    extras: Entries = {}
    if (folder / EXTRAS).is_file():
        extras = {(EXTRAS, name): entry for name, entry in read_safetensors(folder / EXTRAS).items()}
    names = {name for _, name in extras}
    model = Model(
        language,
        channels=width(extras, "visual_proj.0.weight"),
        queries=width(extras, "qformer_proj.0.weight"),
        has_skip_token="skip_token" in names,
    )
    items = [*whole(TABLES[architecture], model, places), *stored(SPHINX, model, EXTRAS)]
    files = len({file for file, _ in entries})
    return Opened(
        folder,
        "internlm2" if architecture.startswith("InternLM2") else "hf",
        f"{files} file{'s' * (files > 1)}",
        model,
        Source(str(folder), items, entries | extras),
        about=about,
    )


def _entries(folder: Path) -> tuple[Entries, dict[str, str]]:
    """The tensors, and in which file an index says that each is."""
    places: dict[str, str] = {}
    for name, read in _INDEXES.items():
        if (folder / name).is_file():
            places = _weight_map(folder / name)
            files = dict.fromkeys(sorted(set(places.values())), read)
            break
    else:
        name = next(name for name in _SINGLE if (folder / name).is_file())  # many repositories hold both
        files = {name: _SINGLE[name]}
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: {file} is missing; fetch it again")
    found = {
        (file, name): entry
        for file, read in files.items()
        for name, entry in read(folder / file).items()
        if not name.endswith(_DERIVED)
    }
    return found, places or {name: file for file, name in found}


def _weight_map(path: Path) -> dict[str, str]:
    """In which file an index says that each tensor is. Links to files are followed: downloads are full of them.

    Raises:
        CheckpointError: the index is damaged, or names what is no file beside it.
    """
    places = read_json(path).get("weight_map", {})
    if not isinstance(places, dict):
        raise CheckpointError(f"{path}: weight_map holds no files by tensor; fetch it again")
    for name, file in places.items():
        if not is_plain(file):
            raise CheckpointError(
                f"{path}: {name}={file!r}: is no file beside the index; fetch it from a source you trust"
            )
    return places


def _shape(about: dict[str, Any], path: Path) -> dict[str, Any]:
    rope = about.get("rope_parameters") or about.get("rope_scaling") or {}
    # `dynamic`, as InternLM2 has it, changes positions behind max_position_embeddings only
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "dynamic", None):
        raise CheckpointError(f"{path}: rope_scaling={rope}: positions are not scaled here; give a model without it")
    if about.get("tie_word_embeddings"):
        raise CheckpointError(f"{path}: tie_word_embeddings=true: the output layer has weights of its own here")
    theta = about.get("rope_theta") or rope.get("rope_theta") or 10000.0
    experts = about.get("num_local_experts", 0)
    values = {
        "layers": about.get("num_hidden_layers"),
        "hidden": about.get("hidden_size"),
        "ffn": about.get("intermediate_size"),
        "heads": about.get("num_attention_heads"),
        "groups": about.get("num_key_value_heads") or about.get("num_attention_heads"),
        "vocabulary": about.get("vocab_size"),
        "experts": experts,
        "rope_theta": float(theta),
        "norm_epsilon": about.get("rms_norm_eps", 1e-5),
    }
    return values | ({"experts_per_token": about.get("num_experts_per_tok", 2)} if experts else {})


def files(model: Model, wanted: Wanted, *, is_internlm2: bool = False) -> tuple[list[File], dict[str, Any]]:
    """The files of a checkpoint to be written, and its configuration.

    Raises:
        CheckpointError: the format has no such model.
    """
    if is_internlm2 and model.language.experts:
        raise CheckpointError("--to internlm2: has no experts; use hf")
    architecture = (
        "InternLM2ForCausalLM" if is_internlm2
        else "MixtralForCausalLM" if model.language.experts
        else "LlamaForCausalLM"
    )  # fmt: skip
    found = grouped(TABLES[architecture], model, wanted, "model-{:05d}-of-{:05d}.safetensors")
    if model.channels:
        found.append(File(EXTRAS, tuple(stored(SPHINX, model, EXTRAS))))
    return found, {"config.json": _config(model.language, architecture)} | _index(found)


def _index(found: list[File]) -> dict[str, Any]:
    names = [file for file in found if file.name != EXTRAS]
    if len(names) == 1:
        return {}
    places = {item.name: file.name for file in names for item in file.tensors}
    return {"model.safetensors.index.json": {"metadata": {}, "weight_map": places}}


def _config(shape: LanguageConfig, architecture: str) -> dict[str, Any]:
    kinds = {"LlamaForCausalLM": "llama", "MixtralForCausalLM": "mixtral", "InternLM2ForCausalLM": "internlm2"}
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": kinds[architecture],
        "hidden_act": "silu",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "vocab_size": shape.vocabulary,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if shape.experts:
        values |= {"num_local_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
    return values | ({"bias": False} if architecture.startswith("Intern") else {"attention_bias": False})
