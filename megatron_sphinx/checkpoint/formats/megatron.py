"""Our own checkpoints: whole fp32 weights under megatron-core's names, in torch.distributed.checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.digests import algorithm_of, digest_of, sha256_of
from megatron_sphinx.checkpoint.encoders import Encoders
from megatron_sphinx.checkpoint.formats.format import (
    Format,
    PlannedFile,
    SourceCheckpoint,
    WriteOptions,
    WritePlan,
    WrittenTensors,
    distributed_file,
    language_of,
)
from megatron_sphinx.checkpoint.manifest import MANIFEST, PROVENANCE, read_manifest, write_manifest
from megatron_sphinx.checkpoint.mapping.axes import VISION_WEIGHTS, Model
from megatron_sphinx.checkpoint.mapping.conversion import TensorSource
from megatron_sphinx.checkpoint.mapping.rules import Rule, TensorSpec, canonical_rules, specs_of
from megatron_sphinx.checkpoint.steps import newest_of
from megatron_sphinx.checkpoint.weight_names import MASTER, tensor_names, weight_shapes
from megatron_sphinx.data.tokenizer_files import tokenizers_in
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.tensors.distributed import write_metadata
from megatron_sphinx.tensors.dtypes import FLOAT32
from megatron_sphinx.tensors.read import read_distributed

# Ours: the whole weights of megatron-core's layers (model/language.py), the tags and projections of model/vision.py.
_LAYER = "master/language.decoder.layers.{layer}."
_MEGATRON_COMMON = (
    Rule("master/language.embedding.word_embeddings.weight", "vocabulary hidden", ("embedding",)),
    Rule(f"{_LAYER}input_layernorm.weight", "hidden", ("attention_norm",)),
    Rule(f"{_LAYER}self_attention.linear_qkv.weight", "(group * half pair) hidden", ("q", "k", "v")),
    Rule(f"{_LAYER}self_attention.linear_proj.weight", "hidden (group query half pair)", ("o",)),
    Rule(f"{_LAYER}pre_mlp_layernorm.weight", "hidden", ("ffn_norm",)),
    Rule("master/language.decoder.final_layernorm.weight", "hidden", ("norm",)),
    Rule("master/language.output_layer.weight", "vocabulary hidden", ("output",)),
    *canonical_rules(VISION_WEIGHTS, "master/vision."),
)
MEGATRON = (
    *_MEGATRON_COMMON,
    Rule(f"{_LAYER}mlp.linear_fc1.weight", "(* ffn) hidden", ("gate", "up")),
    Rule(f"{_LAYER}mlp.linear_fc2.weight", "hidden ffn", ("down",)),
)
MEGATRON_MOE = (
    *_MEGATRON_COMMON,
    Rule(f"{_LAYER}mlp.router.weight", "expert hidden", ("router",)),
    Rule(f"{_LAYER}mlp.experts.weight1", "expert (* ffn) hidden", ("gate", "up")),
    Rule(f"{_LAYER}mlp.experts.weight2", "expert hidden ffn", ("down",)),
)

_FILE = "weights"
_KEPT = "transformers"  # the key of a manifest with what transformers' configuration says beside the weights


def is_here(folder: Path) -> bool:
    """Tell whether a folder is such a checkpoint, or a run folder with one in it."""
    try:
        newest_of(folder)
    except CheckpointError:
        return False
    return True


def _open(folder: Path, _: LanguageConfig | None) -> SourceCheckpoint:
    """What a checkpoint holds; in a run folder the newest one is taken."""
    path = newest_of(folder)
    manifest = read_manifest(path, "SOURCE")
    model = model_of(path, manifest)
    weights = weight_shapes(path)
    entries = {(_FILE, name): entry for name, entry in read_distributed(path, list(weights)).items()}
    source, kept = TensorSource(str(path), list(specs_of_model(model)), entries), manifest.get(_KEPT)
    return SourceCheckpoint(
        path,
        "megatron",
        "any",
        model,
        source,
        description=manifest,
        checksums=manifest["files"],
        kept=kept if isinstance(kept, dict) else {},
        left_out={name: "is the optimizer's" for name in tensor_names(path) if name not in weights},
    )


def model_of(path: Path, manifest: Mapping[str, Any]) -> Model:
    """Return the weights that a checkpoint has.

    Raises:
        CheckpointError: its manifest does not describe a model.
    """
    shapes, vision = weight_shapes(path), f"{MASTER}vision."
    channels, queries = (shapes.get(f"{vision}{name}.0.weight", (0,))[-1] for name in ("visual_proj", "qformer_proj"))
    language = language_of(manifest["identity"].get("model"), path / MANIFEST, shapes)
    return Model(language, channels, queries, has_skip_token=f"{vision}skip_token" in shapes)


def specs_of_model(model: Model) -> Iterator[TensorSpec]:
    """List the whole weights of a model as they are stored, the vocabulary padded."""
    rules = MEGATRON_MOE if model.language.experts else MEGATRON
    return specs_of(rules, model, _FILE, vocabulary=model.language.padded_vocabulary)


def _plan(model: Model, _: WriteOptions, __: Encoders) -> WritePlan:
    specs = enumerate(specs_of_model(model))
    files = [PlannedFile(distributed_file(number), (spec,)) for number, spec in specs]
    return WritePlan(files, {MANIFEST: {"step": 0, "bad_pairs": 0, "identity": {"model": model.language.shape}}})


def _finish(written: WrittenTensors) -> None:
    """Write the places of the tensors and the manifest; a mix has that of its first input, and says what it is of."""
    folder, source = written.folder, written.source
    write_metadata(folder, written.files)
    if written.provenance is not None:
        manifest = {**source.description, PROVENANCE: written.provenance}
    else:
        manifest = {**written.companions[MANIFEST]} | ({_KEPT: dict(source.kept)} if source.kept else {})
        manifest["identity"] = manifest["identity"] | _identity_of_source(folder, source)
    algorithm = algorithm_of(next(iter(written.checksums.values())))
    own = digest_of(folder / ".metadata", algorithm)
    write_manifest(folder, {**manifest, "files": {".metadata": own, **written.checksums}})


def _identity_of_source(folder: Path, source: SourceCheckpoint) -> dict[str, Any]:
    """What the source of a conversion says of its encoders and tokenizer; a tokenizer that was copied is hashed."""
    known = source.description.get("identity", {})
    identity = {name: known[name] for name in ("vision", "tokenizer") if name in known}
    if beside := tokenizers_in(folder):
        identity["tokenizer"] = sha256_of(beside[0])
    return identity


FORMAT = Format(
    name="megatron",
    is_here=is_here,
    open=_open,
    plan=_plan,
    dtype=FLOAT32,
    finish=_finish,
    has_manifest=True,
    keeps_settings=True,
    is_distributed=True,
)
