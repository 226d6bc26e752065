"""Writes a checkpoint in another format: file by file, resumable, visible when it is complete and proven."""

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from megatron_sphinx.checkpoint.bar import progress_bar
from megatron_sphinx.checkpoint.companions import with_companions
from megatron_sphinx.checkpoint.digests import THREADS, sha256_of
from megatron_sphinx.checkpoint.encoders import read_encoders, write_encoders
from megatron_sphinx.checkpoint.formats.format import (
    Format,
    PlannedFile,
    SourceCheckpoint,
    WriteOptions,
    WritePlan,
    WrittenTensors,
)
from megatron_sphinx.checkpoint.formats.registry import format_named
from megatron_sphinx.checkpoint.journal import Journal
from megatron_sphinx.checkpoint.mapping.axes import Model
from megatron_sphinx.checkpoint.mapping.conversion import Conversion
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.checkpoint.selection import select
from megatron_sphinx.checkpoint.tally import balance
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.tensors.entries import Entry
from megatron_sphinx.tensors.read import is_intact
from megatron_sphinx.tensors.write import FileContents

_NOT_ASKED = "of an expert that was not asked for"
_PIECE = 2**20  # elements that are made at a time: few enough to stay in a core's cache


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion has done.

    Attributes:
        files: files of tensors that were written, those of a run before it that was stopped counted.
        tensors: tensors in the files.
        parameters: elements of the tensors.
        differing: tensors that the ranks of the source should hold alike, but do not, with the most they differ by.
        notes: what its reader must be told of the source, a line each.
        balance: what has become of the tensors of the source, in a line.
    """

    files: int
    tensors: int
    parameters: int
    differing: tuple[tuple[str, float], ...]
    notes: tuple[str, ...]
    balance: str


def convert(
    source: Path,
    target: Path,
    form: str,
    options: WriteOptions,
    *,
    shape: LanguageConfig | None = None,
    diff: Path | None = None,
    views: int | None = None,
    experts: Sequence[str] = (),
    encoders: Path | None = None,
    ignored: Collection[str] = (),
    verify: bool = False,
    show: bool = False,
) -> ConversionReport:
    """Write a checkpoint in another format; a run that was stopped goes on where it was.

    Memory: a few MB for each thread, and two tensors of the source where they lie in several chunks.

    Args:
        source: folder of a checkpoint.
        target: folder to make.
        form: name of a registered format.
        options: how the target is divided.
        shape: shape of the model, for a source of the one format that does not tell it, torch_dist.
        diff: a folder of LLaMA2-Accessory's -diff files, to be added to the source.
        views: views of a picture, if they are not those of `options`.
        experts: which of the visual experts of a released model to keep; all unless given.
        encoders: folder of frozen experts, a file each, that the target shall have; the source's unless given.
        ignored: keys of the source's configuration that the user says are of no matter.
        verify: read everything back and compare it with the source.
        show: whether there is a progress bar.

    Raises:
        CheckpointError: the source is incomplete, damaged or unknown; the target exists, cannot be written, or cannot
            hold such a model; what was read back differs.
    """
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists; give another TARGET, or remove it")
    opened, to = open_checkpoint(source, shape, diff, ignored), format_named(form)
    if verify:
        _check_files(opened)
    checkpoint, companions = with_companions(_with_encoders(opened, experts, encoders), to)
    options = replace(options, views=views or options.views, dtype=to.dtype or options.dtype)
    plan = _plan(checkpoint, to, options)
    specs = [spec for file in plan.files for spec in file.tensors]
    conversion = Conversion(checkpoint.source, specs)
    differing = tuple((spec.name, most) for spec, most in conversion.differing_copies())
    writer = _write(target, checkpoint, to, plan, conversion, options, companions, verify=verify, show=show)
    parameters = sum(prod(spec.shape) for spec in specs)
    notes = (*checkpoint.notes, *_not_told(checkpoint, plan), *writer.notes)
    line = _balance(opened, checkpoint, conversion, len(specs))
    return ConversionReport(len(plan.files), len(specs), parameters, differing, notes, line)


def _write(
    target: Path,
    checkpoint: SourceCheckpoint,
    to: Format,
    plan: WritePlan,
    conversion: Conversion,
    options: WriteOptions,
    companions: Mapping[str, Path],
    *,
    verify: bool,
    show: bool,
) -> "_Writer":
    """Write the target under a hidden name, and give it its own when it is complete."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        with Journal([partial], task_of(to.name, options, checkpoint.model), _inputs(checkpoint)) as journal:
            writer = _Writer(partial, checkpoint, to, plan, conversion, options.dtype)
            writer.write_tensors(journal, show)
            writer.write_companions(journal.done, companions)
            if verify:
                _verify(partial, checkpoint, {(spec.file, spec.name) for spec, _ in conversion.copies}, show)
            journal.end()
            os.replace(partial, target)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{target}: could not be written ({reason}); put that right and run it again") from error
    return writer


def _not_told(checkpoint: SourceCheckpoint, plan: WritePlan) -> list[str]:
    """Say what transformers' configuration has by default, since nothing beside the source tells it."""
    keys = ("bos_token_id", "eos_token_id", "max_position_embeddings")
    missing = [key for key in keys if key not in checkpoint.kept] if "config.json" in plan.companions else []
    if not missing or "model_type" not in plan.companions["config.json"]:
        return []
    return [f"{checkpoint.folder}: does not tell {', '.join(missing)}; config.json has the architecture's own default"]


def _balance(opened: SourceCheckpoint, checkpoint: SourceCheckpoint, conversion: Conversion, made: int) -> str:
    """What has become of the tensors of a source.

    Args:
        opened: the source.
        checkpoint: the source with the encoders that the target has.
        conversion: what made the target's tensors.
        made: how many these are.
    """
    frozen, kept = (
        {f"{expert}: {name}" for expert, entries in one.encoders.items() for name in entries}
        for one in (opened, checkpoint)
    )
    left_out = dict(opened.left_out)
    left_out |= dict.fromkeys(sorted(frozen - kept), _NOT_ASKED)
    unused = opened.source.entries.keys() - checkpoint.source.entries.keys()
    left_out |= dict.fromkeys((f"{file}: {name}" for file, name in sorted(unused)), _NOT_ASKED)
    left_out |= {f"{spec.file}: {spec.name}": "another rank's file has it too" for spec, _ in conversion.copies}
    read = len(checkpoint.source.stored) - len(conversion.copies)
    parts = [(read, f"made into {made}"), (len(frozen & kept), "of frozen experts copied")]
    return balance(str(opened.folder), parts, left_out)


def task_of(form: str, options: WriteOptions, model: Model) -> list[str]:
    """Say what a conversion does, in the words by which one that was stopped is recognised: they must not change."""
    names = ("tensor_parallel", "dtype", "shard_bytes", "is_sparse")
    values = ", ".join(f"{name}={getattr(options, name)!r}" for name in names)
    return [form, f"Wanted({values})", str(model)]  # as the class of the options was called at first


def _with_encoders(checkpoint: SourceCheckpoint, experts: Sequence[str], folder: Path | None) -> SourceCheckpoint:
    """A checkpoint with other frozen experts, and with some of its visual experts, as far as these are given."""
    if folder:
        checkpoint = replace(checkpoint, encoders=read_encoders(folder))
    if not experts:
        return checkpoint
    # the visual experts no longer are those that it was trained with
    identity = {name: part for name, part in checkpoint.description.get("identity", {}).items() if name != "vision"}
    return select(replace(checkpoint, description={**checkpoint.description, "identity": identity}), experts)


def _inputs(checkpoint: SourceCheckpoint) -> Iterator[Entry]:
    """All tensors that are read, those of frozen experts too."""
    yield from checkpoint.source.entries.values()
    for entries in checkpoint.encoders.values():
        yield from entries.values()


def _plan(checkpoint: SourceCheckpoint, to: Format, options: WriteOptions) -> WritePlan:
    if "tensor_parallel" not in to.options and options.tensor_parallel > 1:
        raise CheckpointError(
            f"--tensor-parallel {options.tensor_parallel}: {to.name} does not divide tensors; leave it out"
        )
    return to.plan(checkpoint.model, options, checkpoint.encoders)


class _Writer:
    """Writes the files of a checkpoint into a folder.

    Args:
        partial: the folder.
        checkpoint: what is converted.
        to: the format of what is written.
        plan: the files.
        conversion: makes their tensors.
        dtype: type of their elements; the source's if None.
    """

    def __init__(
        self,
        partial: Path,
        checkpoint: SourceCheckpoint,
        to: Format,
        plan: WritePlan,
        conversion: Conversion,
        dtype: torch.dtype | None,
    ) -> None:
        self._partial, self._checkpoint, self._to, self._plan = partial, checkpoint, to, plan
        self._conversion, self._dtype = conversion, dtype
        self._contents = {file.name: self._contents_of(file) for file in plan.files}
        self._is_stopped = Event()
        self._infinite: dict[str, int] = {}

    @property
    def notes(self) -> list[str]:
        """What must be told of what was written, a line each."""
        return [
            f"{name}: {count} values are infinite in fp16, whose largest one is 65,504; --dtype bf16 holds larger ones"
            for name, count in sorted(self._infinite.items())
        ]

    def _contents_of(self, file: PlannedFile) -> FileContents:
        return {
            **{spec.name: (spec.shape, self._dtype or self._conversion.dtype_of(spec)) for spec in file.tensors},
            **{name: (entry.shape, entry.dtype) for name, entry in file.verbatim},
        }

    def write_tensors(self, journal: Journal, show: bool) -> None:
        """Write the files of tensors that are not yet there, several at a time, and note each one."""
        sizes = {name: _nbytes(contents) for name, contents in self._contents.items()}

        def write(file: PlannedFile, bar: Any) -> str:
            self._write(file, bar)
            return sha256_of(self._partial / file.name) if self._to.has_manifest else "-"

        with (
            progress_bar("converting", sum(sizes.values()), show) as bar,
            ThreadPoolExecutor(THREADS, "convert", torch.set_num_threads, (1,)) as pool,  # a piece is too small for two
        ):
            bar.update(sum(sizes[name] for name in journal.done))
            left = [file for file in self._plan.files if file.name not in journal.done]
            waiting = {pool.submit(write, file, bar): file.name for file in left}
            try:
                for future in as_completed(waiting):
                    journal.note(waiting[future], future.result())
            finally:  # also where the user has stopped it: a file may be large
                self._is_stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _write(self, file: PlannedFile, bar: Any) -> None:
        contents, maps = self._contents[file.name], self._checkpoint.source.maps
        out = self._to.create_file(self._partial / file.name, contents)

        def put(name: str, value: Tensor) -> None:
            if self._is_stopped.is_set():
                raise CancelledError
            out.put(name, value)
            self._conversion.release()
            with bar.get_lock():
                bar.update(value.nbytes)

        for spec in file.tensors:
            for piece in spec.split(_PIECE):
                value = self._conversion.make(piece, contents[spec.name][1])
                if self._dtype == torch.float16 and (count := int(value.isinf().sum())):
                    with bar.get_lock():
                        self._infinite[spec.name] = self._infinite.get(spec.name, 0) + count
                put(spec.name, value)
        for name, entry in file.verbatim:
            put(name, maps.read(entry))
        out.close()

    def write_companions(self, checksums: Mapping[str, str], companions: Mapping[str, Path]) -> None:
        """Write what is beside the tensors: frozen experts, tokenizer, index, configuration.

        Args:
            checksums: sha256 of the files of tensors, if the format keeps them.
            companions: files that are copied, by their names.
        """
        if not self._to.has_encoders:
            write_encoders(self._partial, self._checkpoint.encoders, self._checkpoint.source.maps)
        for name, path in companions.items():
            shutil.copyfile(path, self._partial / name)
        known = {name: checksums[name] for name in self._contents}
        self._to.finish(WrittenTensors(self._partial, self._contents, self._checkpoint, self._plan.companions, known))


def _nbytes(contents: FileContents) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in contents.values())


def _check_files(checkpoint: SourceCheckpoint) -> None:
    """Compare the files of a checkpoint with the checksums that its manifest, or torch.save in them, has for them.

    Raises:
        CheckpointError: one differs.
    """
    folder = checkpoint.folder
    damaged = [name for name, digest in checkpoint.checksums.items() if sha256_of(folder / name) != digest]
    paths = sorted({path for entry in checkpoint.source.entries.values() for path in entry.paths})
    damaged += [path.name for path in paths if path.suffix in (".pth", ".bin") and not is_intact(path)]
    if damaged:
        raise CheckpointError(f"{folder}: {damaged[0]} is damaged (its checksum differs); fetch it again")


def _verify(partial: Path, checkpoint: SourceCheckpoint, copies: Set[tuple[str, str]], show: bool) -> None:
    """Read everything back and make the source's tensors of it.

    Args:
        partial: what was written.
        checkpoint: what it was made of.
        copies: tensors of it, by file and name, instead of which another rank's were taken; they may differ.
        show: whether there is a progress bar.

    Raises:
        CheckpointError: one differs.
    """
    source, written = checkpoint.source, open_checkpoint(partial, checkpoint.model.language)
    conversion = Conversion(written.source, source.specs)
    with progress_bar("verifying", sum(entry.nbytes for entry in source.entries.values()), show) as bar:
        for spec in source.specs:
            entry = source.entries[spec.file, spec.name]
            made, original = conversion.make(spec), source.maps.read(entry)
            if "vocabulary" in spec.box:  # padding is not kept
                made, original = (value[: spec.sizes["vocabulary"]] for value in (made, original))
            if not torch.equal(made, original.to(made.dtype)) and (spec.file, spec.name) not in copies:
                raise CheckpointError(f"{partial}: {spec.name} read back differs; the disk or the memory is faulty")
            conversion.release()
            source.maps.release()
            bar.update(entry.nbytes)
