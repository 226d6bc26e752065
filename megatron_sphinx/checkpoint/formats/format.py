"""A format of checkpoints as a record: how it is recognised, read and written.

Converting, mixing and inspecting know formats by this record alone. A new format is one file that makes its record,
and one line in the registry.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_sphinx.checkpoint.encoders import Encoders
from megatron_sphinx.checkpoint.json_files import write_json
from megatron_sphinx.checkpoint.manifest import PROVENANCE
from megatron_sphinx.checkpoint.mapping.axes import Model
from megatron_sphinx.checkpoint.mapping.conversion import TensorSource
from megatron_sphinx.checkpoint.mapping.rules import TensorSpec
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.settings.keys import SettingsFile, shown
from megatron_sphinx.tensors.entries import Entry
from megatron_sphinx.tensors.read import read_file
from megatron_sphinx.tensors.write import FileContents, TensorFile, create_file
from megatron_sphinx.values import build

FOLLOWS = "follows from the configuration"  # why frequencies are left out
Entries = dict[tuple[str, str], Entry]  # tensors by file and name


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint that can be read.

    Attributes:
        folder: where it is.
        format: name of its format.
        layout: how its files divide it, for the reader.
        model: the weights that it has.
        source: its tensors.
        encoders: the tensors of frozen experts: by expert, then by name.
        description: what its own files say of it: its configuration, or its manifest.
        checksums: digests of its files by name, where its manifest has them.
        kept: what its configuration says beside the weights, in transformers' words: tokens, positions.
        left_out: tensors in its files that are not among those of `source`: why, by the tensor's name.
        notes: what its reader must be told, a line each.
    """

    folder: Path
    format: str
    layout: str
    model: Model
    source: TensorSource
    encoders: Encoders = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WriteOptions:
    """How a checkpoint is to be divided and written.

    Attributes:
        tensor_parallel: ranks that share its matrices, in formats with a file a rank.
        dtype: type of its tensors; the source's unless given.
        shard_bytes: the most that a file holds, in formats that do not say how tensors are divided.
        is_sparse: in `accessory`, with MoE experts: whether each rank has a slice of each expert, not whole ones.
        views: views of a picture, by which LLaMA2-Accessory has modules of their own.
    """

    tensor_parallel: int = 1
    dtype: np.dtype | None = None
    shard_bytes: int = 5_000_000_000
    is_sparse: bool = False
    views: int = 1


@dataclass(frozen=True)
class PlannedFile:
    """A file of tensors to be written.

    Attributes:
        name: the file's name.
        tensors: its tensors, in their order.
        verbatim: further tensors that are copied unchanged: their names in the file, and where they lie now.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    verbatim: tuple[tuple[str, Entry], ...] = ()


class WritePlan(NamedTuple):
    """The files of a checkpoint to be written.

    Attributes:
        files: those of tensors.
        companions: what is written beside them: content of JSON files, by name.
    """

    files: list[PlannedFile]
    companions: dict[str, Any]


@dataclass(frozen=True)
class WrittenTensors:
    """A folder whose files of tensors are complete, for what a format writes beside them.

    Attributes:
        folder: where they are.
        files: the tensors of each file, by its name.
        source: the checkpoint that they were made of; of several ones, the first.
        companions: what the plan has beside the tensors.
        checksums: digests of the files, for formats with a manifest.
        provenance: for a mix, what it was made of.
    """

    folder: Path
    files: Mapping[str, FileContents]
    source: SourceCheckpoint
    companions: Mapping[str, Any] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] | None = None


class Member(NamedTuple):
    """A tensor of a checkpoint as its files hold it.

    Attributes:
        file: the file that a copy of the checkpoint has it in.
        name: its name in that file.
        key: file and name in the entries of the checkpoint, where it is among them.
        entry: where it lies.
    """

    file: str
    name: str
    key: tuple[str, str]
    entry: Entry


def finish_with_json(written: WrittenTensors) -> None:
    """Write the companions of a checkpoint, and what a mix was made of, as files of JSON."""
    for name, content in written.companions.items():
        write_json(written.folder / name, content)
    if written.provenance is not None:
        write_json(written.folder / f"{PROVENANCE}.json", written.provenance)


def _as_it_is(name: str) -> str:
    return name


def _no_settings(_: Path) -> Iterator[SettingsFile]:
    return iter(())


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of checkpoints: all that the offline programs know of it.

    Attributes:
        name: what --to takes and messages say.
        is_here: tells whether a folder holds a checkpoint of this format.
        open: lists what the checkpoint in a folder holds, given the shape of the model for formats that do not tell
            it; raises CheckpointError where a file is missing or damaged.
        plan: divides a model and frozen experts into files; raises CheckpointError where the format has no such model.
        files: names of files by which people know it, for the message that a folder holds no known format.
        companions: names of files beside the tensors that a mix copies; configurations and texts it copies anyway.
        options: the fields of WriteOptions, beside dtype, that `plan` heeds.
        dtype: type of all its tensors, if the format has only one.
        read_file: lists the tensors of a file.
        create_file: begins a file of tensors.
        full_name: returns the name that `open` lists a tensor by, given the tensor's name in its file.
        finish: writes what is beside the tensors when these are complete.
        settings: lists the configuration files in a folder, each with the table of the keys that it may have.
        open_sum: opens a checkpoint with differences in another folder added, if the format has such.
        has_encoders: whether frozen experts lie in its files of tensors.
        has_manifest: whether it keeps checksums of its files.
        keeps_settings: whether its configuration has a place for what transformers' has beside the weights.
        is_distributed: whether torch.distributed.checkpoint keeps it: here, one tensor a file.
    """

    name: str
    is_here: Callable[[Path], bool]
    open: Callable[[Path, LanguageConfig | None], SourceCheckpoint]
    plan: Callable[[Model, WriteOptions, Encoders], WritePlan]
    files: tuple[str, ...] = ()
    companions: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()
    dtype: np.dtype | None = None
    read_file: Callable[[Path], dict[str, Entry]] = read_file
    create_file: Callable[[Path, FileContents], TensorFile] = create_file
    full_name: Callable[[str], str] = _as_it_is
    finish: Callable[[WrittenTensors], None] = finish_with_json
    settings: Callable[[Path], Iterator[SettingsFile]] = _no_settings
    open_sum: Callable[[Path, Path], SourceCheckpoint] | None = None
    has_encoders: bool = False
    has_manifest: bool = False
    keeps_settings: bool = False
    is_distributed: bool = False

    def members(self, checkpoint: SourceCheckpoint) -> Iterator[Member]:
        """List all tensors in the files of a checkpoint of this format, those that its rules pass over too."""
        entries = checkpoint.source.entries
        if self.is_distributed:
            for number, (key, entry) in enumerate(entries.items()):
                yield Member(distributed_file(number), key[1], key, entry)
            return
        for file in dict.fromkeys(file for file, _ in entries):
            for name, entry in self.read_file(checkpoint.folder / file).items():
                yield Member(file, name, (file, self.full_name(name)), entry)


def distributed_file(number: int) -> str:
    """Return the name that torch.distributed.checkpoint gives a file of the first rank."""
    return f"__0_{number}.distcp"


def language_of(values: Any, path: Path, tensors: Collection[object] | None = None) -> LanguageConfig:
    """Make the language model that a configuration file describes.

    Args:
        values: the fields of the model.
        path: the file.
        tensors: those of the checkpoint, where each layer has some of its own; a model of more layers is refused
            before its tensors are listed.

    Raises:
        CheckpointError: the file lacks a value, or has one that cannot be.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path}: does not describe a LLaMA or a Mixtral; give a whole checkpoint")
    try:
        language = build(LanguageConfig, values)
    except (TypeError, ValueError) as error:
        fault = shown(" ".join(str(error).split()))
        raise CheckpointError(f"{path}: does not describe a LLaMA or a Mixtral ({fault})") from error
    if tensors is not None and language.layers > len(tensors):
        raise CheckpointError(
            f"{path}: describes {language.layers} layers, its files hold {len(tensors)} tensors; "
            f"give files that belong together"
        )
    return language


def size_of_tensor(entries: Entries, name: str, dimension: int = -1) -> int:
    """Return a size of the first tensor of a name; 0 where there is none."""
    return next((entry.shape[dimension] for (_, other), entry in entries.items() if other == name), 0)
