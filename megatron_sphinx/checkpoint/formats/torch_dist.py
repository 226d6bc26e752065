"""What Megatron-LM writes of a GPT model by megatron.core.dist_checkpointing: layers and experts stacked."""

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_sphinx.checkpoint.conversion import Source
from megatron_sphinx.checkpoint.formats.base import File, Opened, Wanted, read_json
from megatron_sphinx.checkpoint.keymap import Model, Rule, stored
from megatron_sphinx.checkpoint.stream import read_distributed
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.unpickling import metadata_of

# Source: megatron.core.models.gpt, its sharded_state_dict; norms under the names that transformer-engine's layers have.
_COMMON = (
    Rule("embedding.word_embeddings.weight", "v i", ("embedding",)),
    Rule("decoder.layers.self_attention.linear_qkv.layer_norm_weight", "l i", ("attention_norm",)),
    Rule("decoder.layers.self_attention.linear_qkv.weight", "l (g * r h) i", ("q", "k", "v")),
    Rule("decoder.layers.self_attention.linear_proj.weight", "l i (g p r h)", ("o",)),
    Rule("decoder.final_layernorm.weight", "i", ("norm",)),
    Rule("output_layer.weight", "v i", ("output",)),
)
TORCH_DIST = (
    *_COMMON,
    Rule("decoder.layers.mlp.linear_fc1.layer_norm_weight", "l i", ("ffn_norm",)),
    Rule("decoder.layers.mlp.linear_fc1.weight", "l (* f) i", ("gate", "up")),
    Rule("decoder.layers.mlp.linear_fc2.weight", "l i f", ("down",)),
)
TORCH_DIST_MOE = (
    *_COMMON,
    Rule("decoder.layers.pre_mlp_layernorm.weight", "l i", ("ffn_norm",)),
    Rule("decoder.layers.mlp.router.weight", "l e i", ("router",)),
    Rule("decoder.layers.mlp.experts.experts.linear_fc1.weight", "l e (* f) i", ("gate", "up")),
    Rule("decoder.layers.mlp.experts.experts.linear_fc2.weight", "l e i f", ("down",)),
)
_OTHER_NAMES = {  # megatron-core's own layers, without transformer-engine
    "decoder.layers.input_layernorm.weight": "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.pre_mlp_layernorm.weight": "decoder.layers.mlp.linear_fc1.layer_norm_weight",
}
_STATE = ("optimizer.", "chained_", "rerun_", "rng_state")  # what a training checkpoint holds beside the weights
_FILE = "weights"


def folder_of(folder: Path) -> Path:
    """The newest iteration of a Megatron-LM checkpoint folder, or the folder itself."""
    latest = folder / "latest_checkpointed_iteration.txt"
    if latest.is_file() and (number := latest.read_text().strip()).isdigit():
        return folder / f"iter_{int(number):07d}"
    return folder


def is_here(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    path = folder_of(folder) / "metadata.json"
    return path.is_file() and read_json(path).get("sharded_backend") == "torch_dist"


def open_checkpoint(folder: Path, shape: LanguageConfig | None) -> Opened:
    """Read what a checkpoint holds, not its tensors.

    Args:
        folder: where it is.
        shape: of the model, which such a checkpoint does not tell.

    Raises:
        CheckpointError: a file is missing or damaged, or no shape is given.
    """
    path = folder_of(folder)
    if shape is None:
        raise CheckpointError(
            f"{path}: a torch_dist checkpoint does not tell its number of heads; name its shape: --preset"
        )
    names = [
        name
        for name, about in metadata_of(path).state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata) and not name.startswith(_STATE)
    ]
    entries = {(_FILE, name): entry for name, entry in read_distributed(path, names).items()}
    model = Model(shape)
    rows = next((entry.shape[0] for (_, name), entry in entries.items() if name.startswith("embedding.")), None)
    items = stored(_rules(model, names), model, _FILE, vocabulary=rows)
    return Opened(path, "torch_dist", "any", model, Source(str(path), list(items), entries))


def _rules(model: Model, names: list[str]) -> tuple[Rule, ...]:
    """The rules by the names that are there."""

    def named(rule: Rule) -> Rule:
        others = {one: other for pair in _OTHER_NAMES.items() for one, other in (pair, pair[::-1])}
        other = others.get(rule.name, rule.name)
        return rule if rule.name in names or other not in names else Rule(other, rule.axes, rule.weights, rule.shard)

    return tuple(named(rule) for rule in (TORCH_DIST_MOE if model.language.experts else TORCH_DIST))


def files(model: Model, wanted: Wanted) -> tuple[list[File], dict[str, Any]]:
    """The files of a checkpoint to be written, one a tensor, and what it says of itself.

    Raises:
        CheckpointError: the format has no such model.
    """
    if model.channels:
        raise CheckpointError("--to torch_dist: has no place for projections and tags; use megatron or hf")
    rules = TORCH_DIST_MOE if model.language.experts else TORCH_DIST
    items = stored(rules, model, _FILE, vocabulary=model.language.padded_vocabulary)
    found = [File(f"__0_{number}.distcp", (item,)) for number, item in enumerate(items)]
    about = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    return found, {"metadata.json": about | {"common_backend": "torch", "common_backend_version": 1}}
