"""LLaMA2-Accessory's checkpoints: one file a tensor rank, frozen experts whole in each."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.conversion import Source
from megatron_sphinx.checkpoint.formats import meta
from megatron_sphinx.checkpoint.formats.base import Entries, File, Opened, Wanted, read_json, shape_of, width
from megatron_sphinx.checkpoint.formats.meta import COMMON, META, params
from megatron_sphinx.checkpoint.formats.meta import shape as shape_of_params
from megatron_sphinx.checkpoint.keymap import Model, Rule, stored
from megatron_sphinx.checkpoint.stream import Entry, read_torch
from megatron_sphinx.errors import CheckpointError


def _under(prefix: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(Rule(prefix + rule.name, rule.axes, rule.weights, rule.shard) for rule in rules)


# Source: LLaMA2-Accessory, accessory/model/LLM/llama_ens.py.
_ACCESSORY_EXTRAS = (
    Rule("visual_proj.0.weight", "i c", ("visual_proj.0.weight",)),
    Rule("visual_proj.0.bias", "i", ("visual_proj.0.bias",)),
    Rule("visual_proj.1.weight", "i", ("visual_proj.1.weight",)),
    Rule("visual_proj.1.bias", "i", ("visual_proj.1.bias",)),
    Rule("qformer_proj.0.weight", "i d", ("qformer_proj.0.weight",)),
    Rule("qformer_proj.0.bias", "i", ("qformer_proj.0.bias",)),
    Rule("qformer_proj.1.weight", "i", ("qformer_proj.1.weight",)),
    Rule("qformer_proj.1.bias", "i", ("qformer_proj.1.bias",)),
    Rule("start_img", "o u i", ("start_tag",)),
    Rule("end_img", "o u i", ("end_tag",)),
)
ACCESSORY = _under("llma.", META + _ACCESSORY_EXTRAS)
# Source: accessory/model/LLM/mixtral.py: whole experts, each on one rank.
ACCESSORY_BASE = _under("llma.", (
    *COMMON,
    *_ACCESSORY_EXTRAS,
    Rule("layers.{l}.feed_forward.gate.weight", "e i", ("router",)),
    Rule("layers.{l}.feed_forward.experts.{e}.w1.weight", "f i", ("gate",), "e"),
    Rule("layers.{l}.feed_forward.experts.{e}.w3.weight", "f i", ("up",), "e"),
    Rule("layers.{l}.feed_forward.experts.{e}.w2.weight", "i f", ("down",), "e"),
))  # fmt: skip
# Source: accessory/model/LLM/mixtral_sparse.py: a slice of every expert on each rank, w2 transposed.
ACCESSORY_SPARSE = _under("llma.", (
    *COMMON,
    *_ACCESSORY_EXTRAS,
    Rule("layers.{l}.feed_forward.gate.weight", "e i", ("router",)),
    Rule("layers.{l}.feed_forward.w1", "(e f) i", ("gate",), "f"),
    Rule("layers.{l}.feed_forward.w3", "(e f) i", ("up",), "f"),
    Rule("layers.{l}.feed_forward.w2", "(e f) i", ("down",), "f"),
))  # fmt: skip

# The experts of the released models, in the order of their channels, and where its files hold them.
RELEASED = {
    "clip_vit_l14": "clip",
    "clip_convnext_xxl": "openclip_convnext_xxl",
    "dinov2_vitg14": "dinov2_vitg14",
    "blip2_qformer": "qformer",
}
ENCODERS = tuple(RELEASED.values())
_SHARD = re.compile(r"consolidated\.(\d\d)-of-(\d\d)\.model\.pth")
_DIFF = re.compile(r"consolidated\.(\d\d)-of-(\d\d)\.model-diff\.pth")
_DERIVED = "llma.rope.freqs"  # follows from the configuration


def is_here(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    return any(_SHARD.fullmatch(path.name) for path in folder.iterdir())


def open_checkpoint(folder: Path, diff: Path | None = None) -> Opened:
    """Read what a checkpoint holds, not its tensors.

    Args:
        folder: where it is.
        diff: a folder of consolidated.NN-of-MM.model-diff.pth, to be added to it; it may then be one of Meta's.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    is_meta = diff is not None and meta.is_here(folder)
    shards = meta.shards_of(folder) if is_meta else shards_of(folder, _SHARD)
    ranks = len(shards)
    found = [read_torch(folder / file) for file in shards]
    if diff is not None:
        found = [_sum(*pair) for pair in zip(found, _read_diff(diff, ranks), strict=True)]
    entries: Entries = {}
    encoders: dict[str, dict[str, Entry]] = {}
    for file, tensors in zip(shards, found, strict=True):
        for name, entry in tensors.items():
            name = _full(name)
            expert = name.split(".")[1]
            if expert in ENCODERS:
                encoders.setdefault(expert, {}).setdefault(name, entry)
            elif (file, name) in entries:
                raise CheckpointError(
                    f"{folder}: {file} holds {name} twice, with and without llma.; remove one of them"
                )
            elif name != _DERIVED:
                entries[file, name] = entry
    about = read_json(folder / ("params.json" if is_meta else "config.json"))
    experts = width(entries, "llma.layers.0.feed_forward.gate.weight", 0)
    is_sparse = ("llma.layers.0.feed_forward.w1") in {name for _, name in entries}
    ffn = _ffn(entries, ranks, experts, is_sparse=is_sparse)
    about_experts = {"moe": {**about.get("moe", {}), "num_experts": experts}} if experts else {}
    language = shape_of(
        shape_of_params(about | about_experts, ffn, width(entries, "llma.output.weight", 0) * ranks),
        folder / "config.json",
    )
    model = Model(
        language,
        channels=width(entries, "llma.visual_proj.0.weight"),
        queries=width(entries, "llma.qformer_proj.0.weight"),
    )
    rules = _rules(model, is_sparse=is_sparse)
    items = [item for rank, file in enumerate(shards) for item in stored(rules, model, file, rank=rank, ranks=ranks)]
    kind = (", sparse" if is_sparse else ", base") if experts else ""
    kinds = read_json(folder / "meta.json") if (folder / "meta.json").is_file() else {}
    return Opened(
        folder,
        "accessory",
        f"{ranks} tensor ranks{kind}",
        model,
        Source(str(folder), items, entries),
        encoders,
        {"config.json": about, "meta.json": kinds},
    )


def shards_of(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    """The files of all ranks.

    Raises:
        CheckpointError: one is missing.
    """
    found = sorted(path.name for path in folder.iterdir() if pattern.fullmatch(path.name)) if folder.is_dir() else []
    ranks = int(found[0].split("-of-")[1][:2]) if found else 1
    if [int(name.split(".")[1][:2]) for name in found] != list(range(ranks)):
        raise CheckpointError(f"{folder}: has {len(found)} of {ranks} shards ({', '.join(found)}); fetch all of them")
    return found


def _full(name: str) -> str:
    return name if name.startswith("llma.") else f"llma.{name}"


def _read_diff(folder: Path, ranks: int) -> list[dict[str, Entry]]:
    """The differences, rank by rank."""
    shards = shards_of(folder, _DIFF)
    if len(shards) != ranks:
        raise CheckpointError(f"--diff {folder}: has {len(shards)} shards, SOURCE {ranks}; convert SOURCE to as many")
    return [read_torch(folder / file) for file in shards]


def _sum(base: dict[str, Entry], diff: dict[str, Entry]) -> dict[str, Entry]:
    """Tensors with their differences, and those that only the differences have."""
    found = {_full(name): entry for name, entry in base.items()}
    for name, entry in ((_full(name), entry) for name, entry in diff.items()):
        if name in found and found[name].shape != entry.shape:
            shapes = f"{list(entry.shape)}, SOURCE's {list(found[name].shape)}"
            raise CheckpointError(f"--diff: {name} has shape {shapes}; give the difference from this SOURCE")
        found[name] = replace(found[name], added=entry) if name in found else entry
    return found


def _ffn(entries: Entries, ranks: int, experts: int, *, is_sparse: bool) -> int:
    if not experts:
        return width(entries, "llma.layers.0.feed_forward.w1.weight", 0) * ranks
    if is_sparse:
        return width(entries, "llma.layers.0.feed_forward.w1", 0) * ranks // experts
    return width(entries, "llma.layers.0.feed_forward.experts.0.w1.weight", 0)


def _rules(model: Model, *, is_sparse: bool) -> tuple[Rule, ...]:
    if not model.language.experts:
        return ACCESSORY
    return ACCESSORY_SPARSE if is_sparse else ACCESSORY_BASE


def files(
    model: Model, wanted: Wanted, encoders: Mapping[str, Mapping[str, Entry]], *, views: int = 1
) -> tuple[list[File], dict[str, Any]]:
    """The files of a checkpoint to be written, and its configuration.

    Args:
        model: what it holds.
        wanted: how it is divided.
        encoders: frozen experts, which go into every file.
        views: of a picture, by which the released code has classes of its own.

    Raises:
        CheckpointError: the format has no such model, or its matrices cannot be shared by so many ranks.
    """
    if model.has_skip_token:
        raise CheckpointError("--to accessory: has no skip token; use hf or megatron")
    rules, ranks = _rules(model, is_sparse=wanted.is_sparse), wanted.tensor_parallel
    verbatim = tuple((name, entry) for expert in encoders.values() for name, entry in expert.items())
    found = []
    for rank in range(ranks):
        name = _name(rank, ranks)
        found.append(File(name, tuple(stored(rules, model, name, rank=rank, ranks=ranks)), verbatim, under="model"))
    return found, {"config.json": _config(model), "meta.json": {"llama_type": _llama_type(model, views, wanted)}}


def _name(rank: int, ranks: int) -> str:
    return f"consolidated.{rank:02d}-of-{ranks:02d}.model.pth"


# Source: the modules of accessory/model/LLM/.
_TYPES = ("llama", "llama_ens", "llama_ens5", "llama_ens10", "llama_ens_light", "llama_ens5_light", "mixtral",
          "mixtral_sparse", "mixtral_sparse_ens", "mixtral_sparse_ens5")  # fmt: skip


def _llama_type(model: Model, views: int, wanted: Wanted) -> str:
    """The released module that has this model."""
    kind = ("mixtral_sparse" if wanted.is_sparse else "mixtral") if model.language.experts else "llama"
    if not model.channels:
        return kind
    is_light = not model.queries and not model.language.experts
    found = f"{kind}_ens{views if views > 1 else ''}{'_light' if is_light else ''}"
    if found not in _TYPES:
        way_out = "; use --sparse" if kind == "mixtral" and found.replace("mixtral", "mixtral_sparse") in _TYPES else ""
        raise CheckpointError(f"--views {views}: LLaMA2-Accessory has no {found}, but {', '.join(_TYPES)}{way_out}")
    return found


def _config(model: Model) -> dict[str, Any]:
    values = params(model)
    if model.language.experts:
        return values
    multiple, mult = _multiple(model.language.hidden, values.pop("hidden_dim"))
    return values | {"multiple_of": multiple} | ({"ffn_dim_multiplier": mult} if mult != 1 else {})


def _multiple(hidden: int, ffn: int) -> tuple[int, float]:
    """`multiple_of` and `ffn_dim_multiplier` by which the released code finds the width of the feed-forward layers."""
    plain = int(2 * 4 * hidden / 3)
    for multiple in (256, 1024, 4096, 128, 64, 32, 16, 8, 4, 2, 1):
        if -(-plain // multiple) * multiple == ffn:
            return multiple, 1.0
    return 1, (ffn + 0.5) / plain  # the released code rounds down
