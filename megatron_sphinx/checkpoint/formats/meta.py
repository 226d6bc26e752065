"""Meta's checkpoints of LLaMA 2, in any number of shards, and Mistral's of Mixtral, which look alike."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.encoders import Encoders
from megatron_sphinx.checkpoint.formats.format import (
    FOLLOWS,
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
from megatron_sphinx.checkpoint.mapping.axes import Model
from megatron_sphinx.checkpoint.mapping.conversion import TensorSource
from megatron_sphinx.checkpoint.mapping.rules import Rule, specs_of
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.settings.keys import SettingsFile, Values
from megatron_sphinx.settings.meta import META as META_KEYS
from megatron_sphinx.settings.meta import shape_of_params
from megatron_sphinx.tensors.read import read_torch

# Source: LLaMA 2's released llama/model.py (fairscale: the embedding is shared along its width).
# The two halves that rotary embeddings turn lie interleaved.
COMMON = (
    Rule("tok_embeddings.weight", "vocabulary hidden", ("embedding",), "hidden"),
    Rule("layers.{layer}.attention_norm.weight", "hidden", ("attention_norm",)),
    Rule("layers.{layer}.attention.wq.weight", "(group query pair half) hidden", ("q",), "group"),
    Rule("layers.{layer}.attention.wk.weight", "(group pair half) hidden", ("k",), "group"),
    Rule("layers.{layer}.attention.wv.weight", "(group half pair) hidden", ("v",), "group"),
    Rule("layers.{layer}.attention.wo.weight", "hidden (group query half pair)", ("o",), "group"),
    Rule("layers.{layer}.ffn_norm.weight", "hidden", ("ffn_norm",)),
    Rule("norm.weight", "hidden", ("norm",)),
    Rule("output.weight", "vocabulary hidden", ("output",), "vocabulary"),
)
META = (
    *COMMON,
    Rule("layers.{layer}.feed_forward.w1.weight", "ffn hidden", ("gate",), "ffn"),
    Rule("layers.{layer}.feed_forward.w3.weight", "ffn hidden", ("up",), "ffn"),
    Rule("layers.{layer}.feed_forward.w2.weight", "hidden ffn", ("down",), "ffn"),
)
# Source: mistralai's consolidated.00.pth of Mixtral-8x7B-v0.1.
META_MIXTRAL = (
    *COMMON,
    Rule("layers.{layer}.block_sparse_moe.gate.weight", "expert hidden", ("router",)),
    Rule("layers.{layer}.block_sparse_moe.w1", "(expert ffn) hidden", ("gate",)),
    Rule("layers.{layer}.block_sparse_moe.w3", "(expert ffn) hidden", ("up",)),
    Rule("layers.{layer}.block_sparse_moe.w2", "(expert ffn) hidden", ("down",)),
)
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_DERIVED = "rope.freqs"


def is_here(folder: Path) -> bool:
    """Tell whether a folder holds such a checkpoint."""
    return (folder / "consolidated.00.pth").is_file()


def _open(folder: Path, _: LanguageConfig | None) -> SourceCheckpoint:
    shards = shards_of(folder)
    found: Entries = {(file, name): entry for file in shards for name, entry in read_torch(folder / file).items()}
    entries = {key: entry for key, entry in found.items() if key[1] != _DERIVED}
    path, ranks = folder / "params.json", len(shards)
    params = read_json(path)
    experts = Values(params, path).section("moe").whole("num_experts", 0, least=0)
    ffn = size_of_tensor(entries, "layers.0.block_sparse_moe.w1", 0) // max(experts, 1) or (
        size_of_tensor(entries, "layers.0.feed_forward.w1.weight", 0) * ranks
    )
    vocabulary = size_of_tensor(entries, "tok_embeddings.weight", 0)
    model = Model(language_of(shape_of_params(params, ffn, vocabulary, path), path, entries))
    rules = META_MIXTRAL if experts else META
    specs = [spec for rank, file in enumerate(shards) for spec in specs_of(rules, model, file, rank=rank, ranks=ranks)]
    source = TensorSource(str(folder), specs, entries)
    positions = params.get("max_position_embeddings") or params.get("max_seq_len")
    return SourceCheckpoint(
        folder,
        "meta",
        f"{ranks} shards",
        model,
        source,
        description=params,
        kept={"max_position_embeddings": positions} if type(positions) is int else {},
        left_out={f"{file}: {name}": FOLLOWS for file, name in found if name == _DERIVED},
    )


def settings(folder: Path) -> Iterator[SettingsFile]:
    """List the configuration files of such a checkpoint."""
    path = folder / "params.json"
    yield SettingsFile(path, read_json(path), META_KEYS)


def shards_of(folder: Path) -> list[str]:
    """List the files of all ranks.

    Raises:
        CheckpointError: one is missing.
    """
    shards = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    if shards != [_name(rank) for rank in range(len(shards))]:
        raise CheckpointError(f"{folder}: its shards are {', '.join(shards)}; fetch the missing ones")
    return shards


def _plan(model: Model, options: WriteOptions, _: Encoders) -> WritePlan:
    if model.channels:
        raise CheckpointError("--to meta: has no place for projections and tags; use accessory")
    rules, ranks = META_MIXTRAL if model.language.experts else META, options.tensor_parallel
    if model.language.experts and ranks > 1:
        raise CheckpointError("--tensor-parallel: Mistral's checkpoints of experts are one file; use 1, or accessory")
    names = [_name(rank) for rank in range(ranks)]
    files = [
        PlannedFile(name, tuple(specs_of(rules, model, name, rank=rank, ranks=ranks)))
        for rank, name in enumerate(names)
    ]
    return WritePlan(files, {"params.json": params_of(model.language)})


def _name(rank: int) -> str:
    return f"consolidated.{rank:02d}.pth"


def params_of(shape: LanguageConfig) -> dict[str, Any]:
    """Return the params.json of a language model."""
    values: dict[str, Any] = {
        "dim": shape.hidden,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.groups,
        "vocab_size": shape.vocabulary,
        "norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "hidden_dim": shape.ffn,
    }
    if shape.experts:
        values["moe"] = {"num_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
    return values


FORMAT = Format(
    name="meta",
    is_here=is_here,
    open=_open,
    plan=_plan,
    settings=settings,
    files=("consolidated.00.pth",),
    options=frozenset({"tensor_parallel"}),
)
