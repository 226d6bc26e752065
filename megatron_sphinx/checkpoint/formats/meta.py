"""Meta's checkpoints of LLaMA 2, in any number of shards, and Mistral's of Mixtral, which look alike."""

import re
from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.conversion import Source
from megatron_sphinx.checkpoint.formats.base import Entries, File, Opened, Wanted, read_json, shape_of, width
from megatron_sphinx.checkpoint.keymap import Model, Rule, stored
from megatron_sphinx.checkpoint.stream import read_torch
from megatron_sphinx.errors import CheckpointError

# Source: LLaMA 2's released llama/model.py (fairscale: the embedding is shared along its width).
# The two halves that rotary embeddings turn lie interleaved.
COMMON = (
    Rule("tok_embeddings.weight", "v i", ("embedding",), "i"),
    Rule("layers.{l}.attention_norm.weight", "i", ("attention_norm",)),
    Rule("layers.{l}.attention.wq.weight", "(g p h r) i", ("q",), "g"),
    Rule("layers.{l}.attention.wk.weight", "(g h r) i", ("k",), "g"),
    Rule("layers.{l}.attention.wv.weight", "(g r h) i", ("v",), "g"),
    Rule("layers.{l}.attention.wo.weight", "i (g p r h)", ("o",), "g"),
    Rule("layers.{l}.ffn_norm.weight", "i", ("ffn_norm",)),
    Rule("norm.weight", "i", ("norm",)),
    Rule("output.weight", "v i", ("output",), "v"),
)
META = (
    *COMMON,
    Rule("layers.{l}.feed_forward.w1.weight", "f i", ("gate",), "f"),
    Rule("layers.{l}.feed_forward.w3.weight", "f i", ("up",), "f"),
    Rule("layers.{l}.feed_forward.w2.weight", "i f", ("down",), "f"),
)
# Source: mistralai's consolidated.00.pth of Mixtral-8x7B-v0.1.
META_MIXTRAL = (
    *COMMON,
    Rule("layers.{l}.block_sparse_moe.gate.weight", "e i", ("router",)),
    Rule("layers.{l}.block_sparse_moe.w1", "(e f) i", ("gate",)),
    Rule("layers.{l}.block_sparse_moe.w3", "(e f) i", ("up",)),
    Rule("layers.{l}.block_sparse_moe.w2", "(e f) i", ("down",)),
)
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_DERIVED = "rope.freqs"  # follows from the configuration


def is_here(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    return (folder / "consolidated.00.pth").is_file()


def open_checkpoint(folder: Path) -> Opened:
    """Read what a checkpoint holds, not its tensors.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    shards = shards_of(folder)
    entries: Entries = {
        (file, name): entry for file in shards for name, entry in read_torch(folder / file).items() if name != _DERIVED
    }
    path = folder / "params.json"
    about = read_json(path)
    experts = (about.get("moe") or {}).get("num_experts", 0)
    ffn = width(entries, "layers.0.block_sparse_moe.w1", 0) // max(experts, 1) or (
        width(entries, "layers.0.feed_forward.w1.weight", 0) * len(shards)
    )
    model = Model(shape_of(shape(about, ffn, width(entries, "output.weight", 0) * len(shards)), path))
    rules = META_MIXTRAL if experts else META
    items = [
        item for rank, file in enumerate(shards) for item in stored(rules, model, file, rank=rank, ranks=len(shards))
    ]
    return Opened(folder, "meta", f"{len(shards)} shards", model, Source(str(folder), items, entries), about=about)


def shards_of(folder: Path) -> list[str]:
    """The files of all ranks.

    Raises:
        CheckpointError: one is missing.
    """
    found = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    if found != [_name(rank) for rank in range(len(found))]:
        raise CheckpointError(f"{folder}: its shards are {', '.join(found)}; fetch the missing ones")
    return found


def shape(about: dict[str, Any], ffn: int, vocabulary: int) -> dict[str, Any]:
    """The language model of a params.json; two widths are those of the tensors, which it may leave open."""
    moe = about.get("moe") or {}
    values = {
        "layers": about.get("n_layers"),
        "hidden": about.get("dim"),
        "ffn": ffn,
        "heads": about.get("n_heads"),
        "groups": about.get("n_kv_heads") or about.get("n_heads"),
        "vocabulary": vocabulary,
        "experts": moe.get("num_experts", 0),
        "rope_theta": float(about.get("rope_theta") or (1e6 if moe else 1e4)),
        "norm_epsilon": about.get("norm_eps", 1e-5),
    }
    return values | ({"experts_per_token": moe.get("num_experts_per_tok", 2)} if moe else {})


def files(model: Model, wanted: Wanted) -> tuple[list[File], dict[str, Any]]:
    """The files of a checkpoint to be written, and its configuration.

    Raises:
        CheckpointError: the format has no such model, or its matrices cannot be shared by so many ranks.
    """
    if model.channels:
        raise CheckpointError("--to meta: has no place for projections and tags; use accessory")
    rules, ranks = META_MIXTRAL if model.language.experts else META, wanted.tensor_parallel
    if model.language.experts and ranks > 1:
        raise CheckpointError("--tensor-parallel: Mistral's checkpoints of experts are one file; use 1, or accessory")
    found = [
        File(_name(rank), tuple(stored(rules, model, _name(rank), rank=rank, ranks=ranks))) for rank in range(ranks)
    ]
    return found, {"params.json": params(model)}


def _name(rank: int) -> str:
    return f"consolidated.{rank:02d}.pth"


def params(model: Model) -> dict[str, Any]:
    """What a params.json says of a language model."""
    of = model.language
    values: dict[str, Any] = {
        "dim": of.hidden,
        "n_layers": of.layers,
        "n_heads": of.heads,
        "n_kv_heads": of.groups,
        "vocab_size": of.vocabulary,
        "norm_eps": of.norm_epsilon,
        "rope_theta": of.rope_theta,
        "hidden_dim": of.ffn,
    }
    if of.experts:
        values["moe"] = {"num_experts": of.experts, "num_experts_per_tok": of.experts_per_token}
    return values
