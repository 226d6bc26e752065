"""Hugging Face's checkpoints of Llama and Mixtral; what SPHINX adds lies in a file of its own beside them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sphinx.checkpoint.encoders import Encoders
from megatron_sphinx.checkpoint.formats.format import (
    Entries,
    Format,
    PlannedFile,
    SourceCheckpoint,
    WriteOptions,
    WritePlan,
    language_of,
    size_of_tensor,
)
from megatron_sphinx.checkpoint.json_files import read_json
from megatron_sphinx.checkpoint.mapping.axes import VISION_WEIGHTS, Model
from megatron_sphinx.checkpoint.mapping.conversion import TensorSource
from megatron_sphinx.checkpoint.mapping.rules import Rule, TensorSpec, canonical_rules, specs_of
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.paths import is_plain
from megatron_sphinx.tensors.entries import Entry
from megatron_sphinx.tensors.read import read_safetensors, read_torch

EXTRAS = "sphinx.safetensors"

# Source: transformers, models/llama/modeling_llama.py.
_HF_COMMON = (
    Rule("model.embed_tokens.weight", "vocabulary hidden", ("embedding",)),
    Rule("model.layers.{layer}.input_layernorm.weight", "hidden", ("attention_norm",)),
    Rule("model.layers.{layer}.self_attn.q_proj.weight", "(group query half pair) hidden", ("q",)),
    Rule("model.layers.{layer}.self_attn.k_proj.weight", "(group half pair) hidden", ("k",)),
    Rule("model.layers.{layer}.self_attn.v_proj.weight", "(group half pair) hidden", ("v",)),
    Rule("model.layers.{layer}.self_attn.o_proj.weight", "hidden (group query half pair)", ("o",)),
    Rule("model.layers.{layer}.post_attention_layernorm.weight", "hidden", ("ffn_norm",)),
    Rule("model.norm.weight", "hidden", ("norm",)),
    Rule("lm_head.weight", "vocabulary hidden", ("output",)),
)
HF_LLAMA = (
    *_HF_COMMON,
    Rule("model.layers.{layer}.mlp.gate_proj.weight", "ffn hidden", ("gate",)),
    Rule("model.layers.{layer}.mlp.up_proj.weight", "ffn hidden", ("up",)),
    Rule("model.layers.{layer}.mlp.down_proj.weight", "hidden ffn", ("down",)),
)
# Source: transformers, models/mixtral: the names that its released checkpoints have.
HF_MIXTRAL = (
    *_HF_COMMON,
    Rule("model.layers.{layer}.block_sparse_moe.gate.weight", "expert hidden", ("router",)),
    Rule("model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight", "ffn hidden", ("gate",)),
    Rule("model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight", "ffn hidden", ("up",)),
    Rule("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight", "hidden ffn", ("down",)),
)
SPHINX = canonical_rules(VISION_WEIGHTS)  # what SPHINX has beside a language model, in the file EXTRAS

_LLAMA, _MIXTRAL, INTERNLM2 = "LlamaForCausalLM", "MixtralForCausalLM", "InternLM2ForCausalLM"
_RULES = {_LLAMA: HF_LLAMA, _MIXTRAL: HF_MIXTRAL}
Reader = Callable[[Path], dict[str, Entry]]
_INDEXES: dict[str, Reader] = {
    "model.safetensors.index.json": read_safetensors,
    "pytorch_model.bin.index.json": read_torch,
}
_SINGLE: dict[str, Reader] = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_torch}
_DERIVED = "rotary_emb.inv_freq"  # old files hold the frequencies, which follow from the configuration
_FILE = "model-{:05d}-of-{:05d}.safetensors"


def is_here(folder: Path) -> bool:
    """Tell whether a folder holds files as transformers writes them, of whatever model."""
    return any((folder / name).is_file() for name in (*_INDEXES, *_SINGLE))


def architecture_of(folder: Path) -> str:
    """Return the class of transformers that a checkpoint is of, as its configuration names it.

    Raises:
        CheckpointError: the configuration is missing or damaged.
    """
    return str(next(iter(read_json(folder / "config.json").get("architectures") or ["?"])))


def _open(folder: Path, _: LanguageConfig | None) -> SourceCheckpoint:
    path, architecture = folder / "config.json", architecture_of(folder)
    if architecture not in _RULES:
        known = ", ".join((*_RULES, INTERNLM2))
        raise CheckpointError(f"{path}: architectures={architecture}: unknown; known: {known}")
    return open_by_rules(folder, "hf", _RULES[architecture])


def open_by_rules(folder: Path, form: str, rules: Sequence[Rule]) -> SourceCheckpoint:
    """List what a checkpoint of transformers holds by the rules of its architecture.

    Args:
        folder: where it is.
        form: name of the format.
        rules: table of the language model.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path = folder / "config.json"
    values = read_json(path)
    language = language_of(_shape(values, path), path)
    entries, places = _entries(folder)
    extras: Entries = {}
    if (folder / EXTRAS).is_file():
        extras = {(EXTRAS, name): entry for name, entry in read_safetensors(folder / EXTRAS).items()}
    names = {name for _, name in extras}
    model = Model(
        language,
        channels=size_of_tensor(extras, "visual_proj.0.weight"),
        queries=size_of_tensor(extras, "qformer_proj.0.weight"),
        has_skip_token="skip_token" in names,
    )
    specs = [*_whole(rules, model, places), *specs_of(SPHINX, model, EXTRAS)]
    files = len({file for file, _ in entries})
    source = TensorSource(str(folder), specs, entries | extras)
    return SourceCheckpoint(folder, form, f"{files} file{'s' * (files > 1)}", model, source, description=values)


def _whole(rules: Sequence[Rule], model: Model, places: Mapping[str, str]) -> Iterator[TensorSpec]:
    """Tensors that are stored whole, each in the file that an index names; in the first one if it names none."""
    first = next(iter(places.values()), "")
    for spec in specs_of(rules, model, first):
        yield TensorSpec(places.get(spec.name, first), spec.name, spec.rule, spec.box, spec.sizes)


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
    entries = {
        (file, name): entry
        for file, read in files.items()
        for name, entry in read(folder / file).items()
        if not name.endswith(_DERIVED)
    }
    return entries, places or {name: file for file, name in entries}


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


def _shape(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of the language model that a config.json describes."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # `dynamic`, as InternLM2 has it, changes positions behind max_position_embeddings only
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "dynamic", None):
        raise CheckpointError(f"{path}: rope_scaling={rope}: positions are not scaled here; give a model without it")
    if config.get("tie_word_embeddings"):
        raise CheckpointError(f"{path}: tie_word_embeddings=true: the output layer has weights of its own here")
    theta = config.get("rope_theta") or rope.get("rope_theta") or 10000.0
    experts = config.get("num_local_experts", 0)
    values = {
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "ffn": config.get("intermediate_size"),
        "heads": config.get("num_attention_heads"),
        "groups": config.get("num_key_value_heads") or config.get("num_attention_heads"),
        "vocabulary": config.get("vocab_size"),
        "experts": experts,
        "rope_theta": float(theta),
        "norm_epsilon": config.get("rms_norm_eps", 1e-5),
    }
    return values | ({"experts_per_token": config.get("num_experts_per_tok", 2)} if experts else {})


def plan(model: Model, options: WriteOptions, _: Encoders) -> WritePlan:
    """Divide a model into files, and describe it."""
    architecture = _MIXTRAL if model.language.experts else _LLAMA
    return plan_by_rules(model, options, _RULES[architecture], config_of(model.language, architecture))


def plan_by_rules(model: Model, options: WriteOptions, rules: Sequence[Rule], config: dict[str, Any]) -> WritePlan:
    """Divide a model into files by the rules of an architecture.

    Args:
        model: what is written.
        options: how it is divided.
        rules: table of the language model.
        config: content of config.json.
    """
    files = _grouped(rules, model, options)
    index = _index(files)
    if model.channels:
        files.append(PlannedFile(EXTRAS, tuple(specs_of(SPHINX, model, EXTRAS))))
    return WritePlan(files, {"config.json": config} | index)


def _grouped(rules: Sequence[Rule], model: Model, options: WriteOptions) -> list[PlannedFile]:
    """Files of whole tensors, none above `shard_bytes` unless one tensor is."""
    files: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs_of(rules, model, ""):
        nbytes = torch.Size(spec.shape).numel() * (options.dtype or torch.bfloat16).itemsize
        if files[-1] and size + nbytes > options.shard_bytes:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += nbytes
    if len(files) == 1:
        return [PlannedFile("model.safetensors", tuple(files[0]))]
    return [PlannedFile(_FILE.format(number + 1, len(files)), tuple(specs)) for number, specs in enumerate(files)]


def _index(files: list[PlannedFile]) -> dict[str, Any]:
    """The index of several files, which says where each tensor is."""
    if len(files) == 1:
        return {}
    places = {spec.name: file.name for file in files for spec in file.tensors}
    return {"model.safetensors.index.json": {"metadata": {}, "weight_map": places}}


def config_of(shape: LanguageConfig, architecture: str) -> dict[str, Any]:
    """Return the config.json of a language model of an architecture that transformers knows."""
    kinds = {_LLAMA: "llama", _MIXTRAL: "mixtral", INTERNLM2: "internlm2"}
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
    return values | ({"bias": False} if architecture == INTERNLM2 else {"attention_bias": False})


FORMAT = Format(
    name="hf",
    is_here=is_here,
    open=_open,
    plan=plan,
    files=("model.safetensors", "pytorch_model.bin"),
    options=frozenset({"shard_bytes"}),
)
