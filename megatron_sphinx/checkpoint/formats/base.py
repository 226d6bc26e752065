"""What all formats have in common: a checkpoint that has been opened, and the files of one to be written."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sphinx.checkpoint.conversion import Source
from megatron_sphinx.checkpoint.keymap import Model, Rule, Stored, stored
from megatron_sphinx.checkpoint.stream import Entry
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig

Entries = dict[tuple[str, str], Entry]


@dataclass(frozen=True)
class Opened:
    """A checkpoint that can be read.

    Attributes:
        folder: where it is.
        format: name of its format.
        layout: how its files divide it, for the reader.
        model: what it holds.
        source: its tensors.
        encoders: those of frozen experts: by expert, then by name.
        about: its configuration, as its own files have it.
    """

    folder: Path
    format: str
    layout: str
    model: Model
    source: Source
    encoders: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """How a checkpoint is to be written.

    Attributes:
        tensor_parallel: ranks that share its matrices, in formats with a file a rank.
        dtype: of its tensors; the source's unless given.
        shard_bytes: the most that a file holds, in formats that do not say how tensors are divided.
        is_sparse: in `accessory`, for experts: a slice of each on each rank, not whole ones.
    """

    tensor_parallel: int = 1
    dtype: torch.dtype | None = None
    shard_bytes: int = 5_000_000_000
    is_sparse: bool = False


@dataclass(frozen=True)
class File:
    """A file of tensors to be written.

    Attributes:
        name: of the file.
        tensors: in their order.
        verbatim: further tensors, copied as they are: names here, and what they are.
        under: the key of the mapping that holds them, in files of torch.save.
    """

    name: str
    tensors: tuple[Stored, ...]
    verbatim: tuple[tuple[str, Entry], ...] = ()
    under: str | None = None


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); give a whole checkpoint") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no keys; give a whole checkpoint")
    return found


def shape_of(values: Mapping[str, Any], path: Path) -> LanguageConfig:
    """The language model that a configuration file describes.

    Raises:
        CheckpointError: it lacks a value, or has one that cannot be.
    """
    try:
        return LanguageConfig(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not describe a LLaMA or a Mixtral ({error})") from error


def whole(rules: Sequence[Rule], model: Model, places: Mapping[str, str]) -> Iterator[Stored]:
    """Tensors that are stored whole, each in the file that an index names; in the first one if it names none."""
    first = next(iter(places.values()), "")
    for item in stored(rules, model, first):
        yield Stored(places.get(item.name, first), item.name, item.rule, item.box, item.sizes)


def width(entries: Entries, name: str, dimension: int = -1) -> int:
    """A size of the first tensor of this name; 0 where there is none."""
    return next((entry.shape[dimension] for (_, found), entry in entries.items() if found == name), 0)


def grouped(rules: Sequence[Rule], model: Model, wanted: Wanted, name: str) -> list[File]:
    """Files of whole tensors, none above `shard_bytes` unless one tensor is; `name` takes number and count."""
    files: list[list[Stored]] = [[]]
    size = 0
    for item in stored(rules, model, ""):
        count = torch.Size(item.shape).numel() * (wanted.dtype or torch.bfloat16).itemsize
        if files[-1] and size + count > wanted.shard_bytes:
            files.append([])
            size = 0
        files[-1].append(item)
        size += count
    if len(files) == 1 and "{" in name:
        return [File(name.split("-")[0] + ".safetensors", tuple(files[0]))]
    return [File(name.format(number + 1, len(files)), tuple(items)) for number, items in enumerate(files)]
