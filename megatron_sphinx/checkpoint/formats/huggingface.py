"""Hugging Face's checkpoints of Llama and Mixtral; what SPHINX adds lies in a file of its own beside them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sphinx.checkpoint.encoders import Encoders
from megatron_sphinx.checkpoint.formats.format import (
    FOLLOWS,
    Entries,
    Format,
    PlannedFile,
    SourceCheckpoint,
    WriteOptions,
    WritePlan,
    WrittenTensors,
    finish_with_json,
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
from megatron_sphinx.settings.huggingface import (
    DEFAULTS,
    INTERNLM2,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    kept,
    shape_of,
    table_of,
)
from megatron_sphinx.settings.keys import SettingsFile, Values, shortened, shown
from megatron_sphinx.tensors.dtypes import BFLOAT16
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

_RULES = {LLAMA: HF_LLAMA, MISTRAL: HF_LLAMA, MIXTRAL: HF_MIXTRAL}
Reader = Callable[[Path], dict[str, Entry]]
# In the order in which transformers looks for them: a file of all tensors, or an index of several.
_WEIGHTS: dict[str, Reader] = {
    "model.safetensors": read_safetensors,
    "model.safetensors.index.json": read_safetensors,
    "pytorch_model.bin": read_torch,
    "pytorch_model.bin.index.json": read_torch,
}
_TIED = "embedding", "output"
_DERIVED = "rotary_emb.inv_freq"  # old files hold the frequencies, which follow from the configuration
_FILE = "model-{:05d}-of-{:05d}.safetensors"


def is_here(folder: Path) -> bool:
    """Tell whether a folder holds files as transformers writes them, of whatever model."""
    return any((folder / name).is_file() for name in _WEIGHTS)


def architecture_of(folder: Path) -> str:
    """Return the class of transformers that a checkpoint is of, as its configuration names it.

    Raises:
        CheckpointError: the configuration is missing or damaged.
    """
    values = read_json(folder / "config.json")
    names = values.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    if names:
        return shown(", ".join(map(str, names)))
    # transformers goes by the kind of the model alone
    kind = values.get("model_type")
    return next((name for name, defaults in DEFAULTS.items() if defaults.model_type == kind), "?")


def _known_architecture(folder: Path) -> str:
    architecture = architecture_of(folder)
    if architecture not in DEFAULTS:
        path, known = folder / "config.json", ", ".join(DEFAULTS)
        raise CheckpointError(f"{path}: architectures={architecture}: unknown; known: {known}")
    return architecture


def settings(folder: Path) -> Iterator[SettingsFile]:
    """List the configuration files of such a checkpoint.

    Raises:
        CheckpointError: it is of an unknown architecture, or there is none.
    """
    path = folder / "config.json"
    yield SettingsFile(path, read_json(path), table_of(_known_architecture(folder)))


def _open(folder: Path, _: LanguageConfig | None) -> SourceCheckpoint:
    return open_by_rules(folder, "hf", _RULES[_known_architecture(folder)])


def open_by_rules(folder: Path, form: str, rules: Sequence[Rule]) -> SourceCheckpoint:
    """List what a checkpoint of transformers holds by the rules of its architecture.

    Args:
        folder: where it is.
        form: name of the format.
        rules: table of the language model.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path, architecture = folder / "config.json", architecture_of(folder)
    values = read_json(path)
    found = _found(folder)
    language = language_of(shape_of(values, architecture, path), path, found.entries)
    if language.layers * max(language.experts, 1) > len(found.entries):
        raise CheckpointError(
            f"{path}: describes {language.layers} layers of {language.experts} experts, its files hold "
            f"{len(found.entries)} tensors; give files that belong together"
        )
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
    notes = found.notes
    if Values(values, path).flag("tie_word_embeddings"):
        notes += (f"{path}: tie_word_embeddings=true: {_tie(rules, found)}",)
    specs = [*_whole(rules, model, found.places), *specs_of(SPHINX, model, EXTRAS)]
    files = len({file for file, _ in found.entries})
    return SourceCheckpoint(
        folder,
        form,
        f"{files} file{'s' * (files > 1)}",
        model,
        TensorSource(str(folder), specs, found.entries | extras),
        description=values,
        kept=kept(values),
        left_out={f"{file}: {name}": FOLLOWS for file, name in found.derived},
        notes=notes,
    )


def _tie(rules: Sequence[Rule], found: "_Found") -> str:
    """Let the embedding be the output layer as well, unless the files have one; what was done, in words."""
    (embedding,), (output,) = ([rule.name for rule in rules if rule.weights == (name,)] for name in _TIED)
    files = {name: file for file, name in found.entries}
    if output in files:
        return f"{output}, which is there all the same, is taken"
    if embedding in files:  # else it will be missed
        file = files[embedding]
        found.entries[file, output], found.places[output] = found.entries[file, embedding], file
    return f"{output} is {embedding}; here they are two, and are written as two"


def _whole(rules: Sequence[Rule], model: Model, places: Mapping[str, str]) -> Iterator[TensorSpec]:
    """Tensors that are stored whole, each in the file that an index names; in the first one if it names none."""
    first = next(iter(places.values()), "")
    for spec in specs_of(rules, model, first):
        yield TensorSpec(places.get(spec.name, first), spec.name, spec.rule, spec.box, spec.sizes)


class _Found(NamedTuple):
    """What the files of a folder hold.

    Attributes:
        entries: the tensors by file and name.
        places: in which file each of them is expected.
        derived: file and name of those that follow from the configuration.
        notes: which files are passed over.
    """

    entries: Entries
    places: dict[str, str]
    derived: list[tuple[str, str]]
    notes: tuple[str, ...]


def _found(folder: Path) -> _Found:
    """Find the tensors where transformers looks first."""
    chosen, *others = [name for name in _WEIGHTS if (folder / name).is_file()]
    places = _weight_map(folder / chosen) if chosen.endswith(".json") else {}
    files = sorted(set(places.values())) or [chosen]
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: {shown(file)} is missing; fetch it again")
    read = _WEIGHTS[chosen]
    entries = {(file, name): entry for file in files for name, entry in read(folder / file).items()}
    derived = [key for key in entries if key[1].endswith(_DERIVED)]
    for key in derived:
        del entries[key]
    # what an index leaves out is taken all the same, as transformers does
    places = {name: file for file, name in reversed(entries)} | places
    kinds = {Path(name.removesuffix(".index.json")).suffix for name in _WEIGHTS}
    others += [
        path.name for path in sorted(folder.iterdir())
        if path.suffix in kinds and path.name not in (*files, *others, EXTRAS)
    ]  # fmt: skip
    note = f"{folder}: {chosen} is taken, as transformers does; {', '.join(others)} beside it left out"
    return _Found(entries, places, derived, (note,) if others else ())


def _weight_map(path: Path) -> dict[str, str]:
    """In which file an index says that each tensor is. Links to files are followed: downloads are full of them.

    Raises:
        CheckpointError: the index is damaged, or names what is no file beside it.
    """
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: weight_map holds no files by tensor; fetch it again")
    for name, file in places.items():
        if not is_plain(file):
            raise CheckpointError(
                f"{path}: {shown(name)}={shortened(file)}: is no file beside the index; "
                f"fetch it from a source you trust"
            )
    return places


def plan(model: Model, options: WriteOptions, _: Encoders) -> WritePlan:
    """Divide a model into files, and describe it."""
    architecture = MIXTRAL if model.language.experts else LLAMA
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
        nbytes = prod(spec.shape) * (options.dtype or BFLOAT16).itemsize
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
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": DEFAULTS[architecture].model_type,
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


def finish(written: WrittenTensors) -> None:
    """Write the configuration, with what the source's says beside the weights, and the index."""
    companions = dict(written.companions)
    if written.provenance is None:  # a mix has the files of its first input
        companions["config.json"] = companions["config.json"] | dict(written.source.kept)
    finish_with_json(replace(written, companions=companions))


FORMAT = Format(
    name="hf",
    is_here=is_here,
    open=_open,
    plan=plan,
    settings=settings,
    finish=finish,
    keeps_settings=True,
    files=("model.safetensors", "pytorch_model.bin"),
    options=frozenset({"shard_bytes"}),
)
