"""Our own checkpoints: whole fp32 weights under megatron-core's names, in torch.distributed.checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.conversion import Source
from megatron_sphinx.checkpoint.formats.base import File, Opened, Wanted, shape_of
from megatron_sphinx.checkpoint.formats.huggingface import SPHINX
from megatron_sphinx.checkpoint.keymap import Model, Rule, Stored, stored
from megatron_sphinx.checkpoint.manifest import MANIFEST, read_manifest
from megatron_sphinx.checkpoint.pieces import WEIGHTS, weight_shapes
from megatron_sphinx.checkpoint.steps import newest_of
from megatron_sphinx.checkpoint.stream import read_distributed
from megatron_sphinx.errors import CheckpointError

# Ours: the whole weights of megatron-core's layers (model/language.py), the tags and projections of model/vision.py.
_LAYER = "master/language.decoder.layers.{l}."
_MEGATRON_COMMON = (
    Rule("master/language.embedding.word_embeddings.weight", "v i", ("embedding",)),
    Rule(f"{_LAYER}input_layernorm.weight", "i", ("attention_norm",)),
    Rule(f"{_LAYER}self_attention.linear_qkv.weight", "(g * r h) i", ("q", "k", "v")),
    Rule(f"{_LAYER}self_attention.linear_proj.weight", "i (g p r h)", ("o",)),
    Rule(f"{_LAYER}pre_mlp_layernorm.weight", "i", ("ffn_norm",)),
    Rule("master/language.decoder.final_layernorm.weight", "i", ("norm",)),
    Rule("master/language.output_layer.weight", "v i", ("output",)),
    *(Rule(f"master/vision.{rule.name}", rule.axes, rule.weights) for rule in SPHINX),
)
MEGATRON = (
    *_MEGATRON_COMMON,
    Rule(f"{_LAYER}mlp.linear_fc1.weight", "(* f) i", ("gate", "up")),
    Rule(f"{_LAYER}mlp.linear_fc2.weight", "i f", ("down",)),
)
MEGATRON_MOE = (
    *_MEGATRON_COMMON,
    Rule(f"{_LAYER}mlp.router.weight", "e i", ("router",)),
    Rule(f"{_LAYER}mlp.experts.weight1", "e (* f) i", ("gate", "up")),
    Rule(f"{_LAYER}mlp.experts.weight2", "e i f", ("down",)),
)

_FILE = "weights"


def is_here(folder: Path) -> bool:
    """Whether a folder is such a checkpoint, or a run folder with one in it."""
    try:
        newest_of(folder)
    except CheckpointError:
        return False
    return True


def open_checkpoint(folder: Path) -> Opened:
    """Read what a checkpoint holds, not its tensors; of a run folder, the newest one.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path = newest_of(folder)
    manifest = read_manifest(path, "SOURCE")
    model = model_of(path, manifest)
    entries = {(_FILE, name): entry for name, entry in read_distributed(path, list(weight_shapes(path))).items()}
    return Opened(path, "megatron", "any", model, Source(str(path), list(stored_of(model)), entries), about=manifest)


def model_of(path: Path, manifest: Mapping[str, Any]) -> Model:
    """What a checkpoint holds.

    Raises:
        CheckpointError: it does not describe a model.
    """
    shapes, vision = weight_shapes(path), f"{WEIGHTS}vision."
    channels, queries = (shapes.get(f"{vision}{name}.0.weight", (0,))[-1] for name in ("visual_proj", "qformer_proj"))
    language = shape_of(manifest["identity"]["model"], path / MANIFEST)
    return Model(language, channels, queries, has_skip_token=f"{vision}skip_token" in shapes)


def stored_of(model: Model) -> Iterator[Stored]:
    """The whole weights of a model as they are stored, the vocabulary padded."""
    rules = MEGATRON_MOE if model.language.experts else MEGATRON
    return stored(rules, model, _FILE, vocabulary=model.language.padded_vocabulary)


def files(model: Model, wanted: Wanted) -> tuple[list[File], dict[str, Any]]:
    """The files of a checkpoint to be written, one a tensor, and what it says of itself."""
    found = [File(f"__0_{number}.distcp", (item,)) for number, item in enumerate(stored_of(model))]
    return found, {MANIFEST: {"step": 0, "bad_pairs": 0, "identity": {"model": model.language.shape}}}
