"""What Megatron-LM writes of a GPT model by megatron.core.dist_checkpointing: layers and experts stacked."""

from collections.abc import Iterator
from pathlib import Path

from megatron_sphinx.checkpoint.encoders import Encoders
from megatron_sphinx.checkpoint.formats.format import (
    Format,
    PlannedFile,
    SourceCheckpoint,
    WriteOptions,
    WritePlan,
    WrittenTensors,
    distributed_file,
    finish_with_json,
)
from megatron_sphinx.checkpoint.json_files import read_json
from megatron_sphinx.checkpoint.mapping.axes import Model
from megatron_sphinx.checkpoint.mapping.conversion import TensorSource
from megatron_sphinx.checkpoint.mapping.rules import Rule, specs_of
from megatron_sphinx.checkpoint.weight_names import tensor_names
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.settings.keys import KeyTable, SettingsFile, Values
from megatron_sphinx.settings.megatron_lm import FIXED, HONOURED
from megatron_sphinx.tensors.distributed import write_metadata
from megatron_sphinx.tensors.read import read_distributed
from megatron_sphinx.tensors.write import TorchFile
from megatron_sphinx.unpickling import arguments_of

# Source: megatron.core.models.gpt, its sharded_state_dict; norms under the names that transformer-engine's layers have.
_COMMON = (
    Rule("embedding.word_embeddings.weight", "vocabulary hidden", ("embedding",)),
    Rule("decoder.layers.self_attention.linear_qkv.layer_norm_weight", "layer hidden", ("attention_norm",)),
    Rule("decoder.layers.self_attention.linear_qkv.weight", "layer (group * half pair) hidden", ("q", "k", "v")),
    Rule("decoder.layers.self_attention.linear_proj.weight", "layer hidden (group query half pair)", ("o",)),
    Rule("decoder.final_layernorm.weight", "hidden", ("norm",)),
    Rule("output_layer.weight", "vocabulary hidden", ("output",)),
)
TORCH_DIST = (
    *_COMMON,
    Rule("decoder.layers.mlp.linear_fc1.layer_norm_weight", "layer hidden", ("ffn_norm",)),
    Rule("decoder.layers.mlp.linear_fc1.weight", "layer (* ffn) hidden", ("gate", "up")),
    Rule("decoder.layers.mlp.linear_fc2.weight", "layer hidden ffn", ("down",)),
)
TORCH_DIST_MOE = (
    *_COMMON,
    Rule("decoder.layers.pre_mlp_layernorm.weight", "layer hidden", ("ffn_norm",)),
    Rule("decoder.layers.mlp.router.weight", "layer expert hidden", ("router",)),
    Rule("decoder.layers.mlp.experts.experts.linear_fc1.weight", "layer expert (* ffn) hidden", ("gate", "up")),
    Rule("decoder.layers.mlp.experts.experts.linear_fc2.weight", "layer expert hidden ffn", ("down",)),
)
_OTHER_NAMES = {  # megatron-core's own layers, without transformer-engine
    "decoder.layers.input_layernorm.weight": "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.pre_mlp_layernorm.weight": "decoder.layers.mlp.linear_fc1.layer_norm_weight",
}
_STATE = ("optimizer.", "chained_", "rerun_", "rng_state")  # what a training checkpoint holds beside the weights
_FILE = "weights"
_DIGITS = 12  # of an iteration
_COMMON_STATE = "common.pt"  # what all ranks have alike, beside tensors; Megatron-LM does not load without it


def _folder_of(folder: Path) -> Path:
    """The newest iteration in a Megatron-LM checkpoint folder, or the folder itself where it has none."""
    latest = folder / "latest_checkpointed_iteration.txt"
    if latest.is_file() and (number := latest.read_text(errors="replace").strip()[:_DIGITS]).isdecimal():
        return folder / f"iter_{int(number):07d}"
    return folder


def _is_here(folder: Path) -> bool:
    path = _folder_of(folder) / "metadata.json"
    if not (path.is_file() and (path.parent / ".metadata").is_file()):
        return False  # other programs call files so, too
    return read_json(path).get("sharded_backend") == "torch_dist"


def _settings(folder: Path) -> Iterator[SettingsFile]:
    """The arguments of Megatron-LM, where the checkpoint has them: those that change what the weights compute."""
    path = _folder_of(folder) / _COMMON_STATE
    if path.is_file() and (arguments := arguments_of(path)):
        yield SettingsFile(path, arguments, KeyTable(HONOURED, FIXED, arguments.keys()))


def _open(folder: Path, shape: LanguageConfig | None) -> SourceCheckpoint:
    """List the tensors of a checkpoint whose model has a given shape, which its files do not tell."""
    path = _folder_of(folder)
    if shape is None:
        raise CheckpointError(
            f"{path}: a torch_dist checkpoint does not tell its number of heads; name its shape: --preset"
        )
    tensors = tensor_names(path)
    names = [name for name in tensors if not name.startswith(_STATE)]
    common = path / _COMMON_STATE
    if common.is_file():
        _require_told(shape, Values(arguments_of(common), common), common)
    entries = {(_FILE, name): entry for name, entry in read_distributed(path, names).items()}
    model = Model(shape)
    rows = next((entry.shape[0] for (_, name), entry in entries.items() if name.startswith("embedding.")), None)
    specs = list(specs_of(_rules(model, names), model, _FILE, vocabulary=rows))
    left_out = {name: "is the optimizer's" for name in tensors if name not in names}
    source = TensorSource(str(path), specs, entries)
    return SourceCheckpoint(path, "torch_dist", "any", model, source, left_out=left_out)


def _require_told(shape: LanguageConfig, told: Values, path: Path) -> None:
    """Compare the shape that the user names with what Megatron-LM was told, as far as the checkpoint has it."""
    for key, name in HONOURED.items():
        mine = getattr(shape, name)
        read = told.number if isinstance(mine, float) else told.whole
        is_compared = name != "groups" and (shape.experts or name != "experts_per_token")
        if is_compared and told.has(key) and read(key) != mine:
            raise CheckpointError(f"{path}: {key}={read(key)}, --preset has model.{name}={mine}; name its own shape")
    is_grouped = told.has("num_query_groups") and told.flag("group_query_attention")
    groups = told.whole("num_query_groups") if is_grouped else shape.heads
    if told.has("num_attention_heads") and groups != shape.groups:
        raise CheckpointError(
            f"{path}: num_query_groups={groups}, --preset has model.groups={shape.groups}; name its own shape"
        )


def _rules(model: Model, names: list[str]) -> tuple[Rule, ...]:
    """The rules by the names that are there."""

    def renamed(rule: Rule) -> Rule:
        synonyms = {one: other for pair in _OTHER_NAMES.items() for one, other in (pair, pair[::-1])}
        other = synonyms.get(rule.name, rule.name)
        return rule if rule.name in names or other not in names else Rule(other, rule.axes, rule.weights, rule.shard)

    return tuple(renamed(rule) for rule in (TORCH_DIST_MOE if model.language.experts else TORCH_DIST))


def _plan(model: Model, _: WriteOptions, __: Encoders) -> WritePlan:
    if model.channels:
        raise CheckpointError("--to torch_dist: has no place for projections and tags; use megatron or hf")
    rules = TORCH_DIST_MOE if model.language.experts else TORCH_DIST
    specs = enumerate(specs_of(rules, model, _FILE, vocabulary=model.language.padded_vocabulary))
    files = [PlannedFile(distributed_file(number), (spec,)) for number, spec in specs]
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    return WritePlan(files, {"metadata.json": backends | {"common_backend": "torch", "common_backend_version": 1}})


def _finish(written: WrittenTensors) -> None:
    """Write the places of the tensors, and the file of small things that Megatron-LM looks for."""
    write_metadata(written.folder, written.files)
    if written.provenance is None:  # a mix has that of its first input
        TorchFile(written.folder / _COMMON_STATE, {}).close()
    finish_with_json(written)


FORMAT = Format(
    name="torch_dist",
    is_here=_is_here,
    open=_open,
    plan=_plan,
    settings=_settings,
    companions=frozenset({_COMMON_STATE}),
    finish=_finish,
    is_distributed=True,
)
