"""LLaMA2-Accessory's checkpoints: one file a tensor rank, frozen experts whole in each."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.encoders import RELEASED, Encoders
from megatron_sphinx.checkpoint.formats import meta
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
from megatron_sphinx.checkpoint.formats.meta import COMMON, META, params_of
from megatron_sphinx.checkpoint.json_files import read_json
from megatron_sphinx.checkpoint.mapping.axes import Model
from megatron_sphinx.checkpoint.mapping.conversion import TensorSource
from megatron_sphinx.checkpoint.mapping.rules import Rule, specs_of
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.settings.keys import Fixed, KeyTable, SettingsFile, Values
from megatron_sphinx.settings.meta import ACCESSORY as ACCESSORY_KEYS
from megatron_sphinx.settings.meta import shape_of_params
from megatron_sphinx.tensors.entries import Entry
from megatron_sphinx.tensors.read import read_torch
from megatron_sphinx.tensors.write import TorchFile

_PREFIX = "llma."  # of all names; files of differences may lack it


def _under(prefix: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(Rule(prefix + rule.name, rule.axes, rule.weights, rule.shard) for rule in rules)


# Source: LLaMA2-Accessory, accessory/model/LLM/llama_ens.py.
_ACCESSORY_EXTRAS = (
    Rule("visual_proj.0.weight", "hidden channel", ("visual_proj.0.weight",)),
    Rule("visual_proj.0.bias", "hidden", ("visual_proj.0.bias",)),
    Rule("visual_proj.1.weight", "hidden", ("visual_proj.1.weight",)),
    Rule("visual_proj.1.bias", "hidden", ("visual_proj.1.bias",)),
    Rule("qformer_proj.0.weight", "hidden qformer", ("qformer_proj.0.weight",)),
    Rule("qformer_proj.0.bias", "hidden", ("qformer_proj.0.bias",)),
    Rule("qformer_proj.1.weight", "hidden", ("qformer_proj.1.weight",)),
    Rule("qformer_proj.1.bias", "hidden", ("qformer_proj.1.bias",)),
    Rule("start_img", "1 1 hidden", ("start_tag",)),
    Rule("end_img", "1 1 hidden", ("end_tag",)),
)
ACCESSORY = _under("llma.", META + _ACCESSORY_EXTRAS)
# Source: accessory/model/LLM/mixtral.py: whole experts, each on one rank.
ACCESSORY_BASE = _under("llma.", (
    *COMMON,
    *_ACCESSORY_EXTRAS,
    Rule("layers.{layer}.feed_forward.gate.weight", "expert hidden", ("router",)),
    Rule("layers.{layer}.feed_forward.experts.{expert}.w1.weight", "ffn hidden", ("gate",), "expert"),
    Rule("layers.{layer}.feed_forward.experts.{expert}.w3.weight", "ffn hidden", ("up",), "expert"),
    Rule("layers.{layer}.feed_forward.experts.{expert}.w2.weight", "hidden ffn", ("down",), "expert"),
))  # fmt: skip
# Source: accessory/model/LLM/mixtral_sparse.py: a slice of every expert on each rank, w2 transposed.
ACCESSORY_SPARSE = _under("llma.", (
    *COMMON,
    *_ACCESSORY_EXTRAS,
    Rule("layers.{layer}.feed_forward.gate.weight", "expert hidden", ("router",)),
    Rule("layers.{layer}.feed_forward.w1", "(expert ffn) hidden", ("gate",), "ffn"),
    Rule("layers.{layer}.feed_forward.w3", "(expert ffn) hidden", ("up",), "ffn"),
    Rule("layers.{layer}.feed_forward.w2", "(expert ffn) hidden", ("down",), "ffn"),
))  # fmt: skip

_SHARD = re.compile(r"consolidated\.(\d\d)-of-(\d\d)\.model\.pth")
_DIFF = re.compile(r"consolidated\.(\d\d)-of-(\d\d)\.model-diff\.pth")
_DERIVED = "llma.rope.freqs"


def _is_here(folder: Path) -> bool:
    return any(_SHARD.fullmatch(path.name) for path in folder.iterdir())


def _open(folder: Path, _: LanguageConfig | None) -> SourceCheckpoint:
    shards = _shards_of(folder, _SHARD)
    return _opened(folder, {file: read_torch(folder / file) for file in shards}, "config.json")


def _open_sum(folder: Path, diff: Path) -> SourceCheckpoint:
    """A checkpoint of this format, or of Meta's, and a folder of consolidated.NN-of-MM.model-diff.pth to be added."""
    is_meta = meta.is_here(folder)
    if not (is_meta or _is_here(folder)):
        raise CheckpointError(f"--diff {diff}: can be added to a checkpoint of meta or accessory; {folder} is none")
    shards = meta.shards_of(folder) if is_meta else _shards_of(folder, _SHARD)
    bases = [read_torch(folder / file) for file in shards]
    sums = [_sum(base, added) for base, added in zip(bases, _read_diff(diff, len(shards)), strict=True)]
    return _opened(folder, dict(zip(shards, sums, strict=True)), "params.json" if is_meta else "config.json")


def _opened(folder: Path, shards: dict[str, dict[str, Entry]], config: str) -> SourceCheckpoint:
    """What a checkpoint holds.

    Args:
        folder: where it is.
        shards: the tensors in each rank's file, in the order of ranks.
        config: name of the file of its configuration.
    """
    ranks = len(shards)
    entries, encoders, left_out = _sorted_out(folder, shards)
    values = read_json(folder / config)
    experts = size_of_tensor(entries, "llma.layers.0.feed_forward.gate.weight", 0)
    is_sparse = "llma.layers.0.feed_forward.w1" in {name for _, name in entries}
    ffn = _ffn(entries, ranks, experts, is_sparse=is_sparse)
    vocabulary, path = size_of_tensor(entries, "llma.tok_embeddings.weight", 0), folder / config
    Values(values, path).section("moe")  # or an error
    moe = {"moe": {**(values.get("moe") or {}), "num_experts": experts}} if experts else {}
    language = language_of(shape_of_params(values | moe, ffn, vocabulary, path), path, entries)
    model = Model(
        language,
        channels=size_of_tensor(entries, "llma.visual_proj.0.weight"),
        queries=size_of_tensor(entries, "llma.qformer_proj.0.weight"),
    )
    rules = _rules(model, is_sparse=is_sparse)
    specs = [spec for rank, file in enumerate(shards) for spec in specs_of(rules, model, file, rank=rank, ranks=ranks)]
    kind = (", sparse" if is_sparse else ", base") if experts else ""
    kinds = read_json(folder / "meta.json") if (folder / "meta.json").is_file() else {}
    return SourceCheckpoint(
        folder,
        "accessory",
        f"{ranks} tensor ranks{kind}",
        model,
        TensorSource(str(folder), specs, entries),
        encoders,
        {"config.json": values, "meta.json": kinds},
        left_out=left_out,
    )


def _sorted_out(folder: Path, shards: dict[str, dict[str, Entry]]) -> tuple[Entries, Encoders, dict[str, str]]:
    """The tensors of the model by file and full name, those of frozen experts, which every file has, and the rest."""
    entries: Entries = {}
    encoders: dict[str, dict[str, Entry]] = {}
    left_out: dict[str, str] = {}
    for file, tensors in shards.items():
        for name, entry in tensors.items():
            name = _full_name(name)
            expert = name.split(".")[1]
            if expert in RELEASED.values():
                if encoders.setdefault(expert, {}).setdefault(name, entry) is not entry:
                    left_out[f"{file}: {name}"] = "the first rank's file has it too"
            elif (file, name) in entries:
                raise CheckpointError(
                    f"{folder}: {file} holds {name} twice, with and without llma.; remove one of them"
                )
            elif name == _DERIVED:
                left_out[f"{file}: {name}"] = FOLLOWS
            else:
                entries[file, name] = entry
    return entries, encoders, left_out


def _settings(folder: Path) -> Iterator[SettingsFile]:
    """The configuration files; a folder of Meta's may be opened with differences added."""
    if not _is_here(folder):
        yield from meta.settings(folder) if meta.is_here(folder) else ()
        return
    yield SettingsFile(folder / "config.json", read_json(folder / "config.json"), ACCESSORY_KEYS)
    if (folder / "meta.json").is_file():
        yield SettingsFile(
            folder / "meta.json", read_json(folder / "meta.json"), KeyTable((), {"llama_type": _TYPE}, ())
        )


def _shards_of(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    """The files of all ranks, whose names match a pattern."""
    shards = sorted(path.name for path in folder.iterdir() if pattern.fullmatch(path.name)) if folder.is_dir() else []
    ranks = int(shards[0].split("-of-")[1][:2]) if shards else 1
    if [int(name.split(".")[1][:2]) for name in shards] != list(range(ranks)):
        raise CheckpointError(f"{folder}: has {len(shards)} of {ranks} shards ({', '.join(shards)}); fetch all of them")
    return shards


def _full_name(name: str) -> str:
    """A tensor's name with the prefix that older files leave out."""
    return name if name.startswith(_PREFIX) else f"{_PREFIX}{name}"


def _read_diff(folder: Path, ranks: int) -> list[dict[str, Entry]]:
    """The differences, rank by rank."""
    shards = _shards_of(folder, _DIFF)
    if len(shards) != ranks:
        raise CheckpointError(f"--diff {folder}: has {len(shards)} shards, SOURCE {ranks}; convert SOURCE to as many")
    return [read_torch(folder / file) for file in shards]


def _sum(base: dict[str, Entry], diff: dict[str, Entry]) -> dict[str, Entry]:
    """Tensors with their differences, and those that only the differences have."""
    total = {_full_name(name): entry for name, entry in base.items()}
    for name, entry in ((_full_name(name), entry) for name, entry in diff.items()):
        if name in total and total[name].shape != entry.shape:
            shapes = f"{list(entry.shape)}, SOURCE's {list(total[name].shape)}"
            raise CheckpointError(f"--diff: {name} has shape {shapes}; give the difference from this SOURCE")
        total[name] = replace(total[name], added=entry) if name in total else entry
    return total


def _ffn(entries: Entries, ranks: int, experts: int, *, is_sparse: bool) -> int:
    """Width of the feed-forward layers."""
    if not experts:
        return size_of_tensor(entries, "llma.layers.0.feed_forward.w1.weight", 0) * ranks
    if is_sparse:
        return size_of_tensor(entries, "llma.layers.0.feed_forward.w1", 0) * ranks // experts
    return size_of_tensor(entries, "llma.layers.0.feed_forward.experts.0.w1.weight", 0)


def _rules(model: Model, *, is_sparse: bool) -> tuple[Rule, ...]:
    if not model.language.experts:
        return ACCESSORY
    return ACCESSORY_SPARSE if is_sparse else ACCESSORY_BASE


def _plan(model: Model, options: WriteOptions, encoders: Encoders) -> WritePlan:
    """Files, one a rank, each with all frozen experts."""
    if model.has_skip_token:
        raise CheckpointError("--to accessory: has no skip token; use hf or megatron")
    rules, ranks = _rules(model, is_sparse=options.is_sparse), options.tensor_parallel
    verbatim = tuple((name, entry) for expert in encoders.values() for name, entry in expert.items())
    names = [f"consolidated.{rank:02d}-of-{ranks:02d}.model.pth" for rank in range(ranks)]
    files = [
        PlannedFile(name, tuple(specs_of(rules, model, name, rank=rank, ranks=ranks)), verbatim)
        for rank, name in enumerate(names)
    ]
    return WritePlan(
        files, {"config.json": _config(model.language), "meta.json": {"llama_type": _llama_type(model, options)}}
    )


# Source: the modules of accessory/model/LLM/.
_TYPES = ("llama", "llama_ens", "llama_ens5", "llama_ens10", "llama_ens_light", "llama_ens5_light", "mixtral",
          "mixtral_sparse", "mixtral_sparse_ens", "mixtral_sparse_ens5")  # fmt: skip


_TYPE = Fixed(_TYPES, f"is none of the modules known here, {', '.join(_TYPES)}")


def _llama_type(model: Model, options: WriteOptions) -> str:
    """The released module that has this model."""
    kind = ("mixtral_sparse" if options.is_sparse else "mixtral") if model.language.experts else "llama"
    if not model.channels:
        return kind
    views, is_light = options.views, not model.queries and not model.language.experts
    name = f"{kind}_ens{views if views > 1 else ''}{'_light' if is_light else ''}"
    if name not in _TYPES:
        way_out = "; use --sparse" if kind == "mixtral" and name.replace("mixtral", "mixtral_sparse") in _TYPES else ""
        raise CheckpointError(f"--views {views}: LLaMA2-Accessory has no {name}, but {', '.join(_TYPES)}{way_out}")
    return name


def _config(shape: LanguageConfig) -> dict[str, Any]:
    values = params_of(shape)
    if shape.experts:
        return values
    multiple, factor = _multiple(shape.hidden, values.pop("hidden_dim"))
    return values | {"multiple_of": multiple} | ({"ffn_dim_multiplier": factor} if factor != 1 else {})


def _multiple(hidden: int, ffn: int) -> tuple[int, float]:
    """`multiple_of` and `ffn_dim_multiplier` by which the released code finds the width of the feed-forward layers."""
    plain = int(2 * 4 * hidden / 3)
    for multiple in (256, 1024, 4096, 128, 64, 32, 16, 8, 4, 2, 1):
        if -(-plain // multiple) * multiple == ffn:
            return multiple, 1.0
    return 1, (ffn + 0.5) / plain  # the released code rounds down


FORMAT = Format(
    name="accessory",
    is_here=_is_here,
    open=_open,
    plan=_plan,
    settings=_settings,
    files=("consolidated.00-of-NN.model.pth",),
    options=frozenset({"tensor_parallel", "is_sparse", "views"}),
    create_file=partial(TorchFile, under="model"),
    full_name=_full_name,
    open_sum=_open_sum,
    has_encoders=True,
)
