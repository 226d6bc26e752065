"""Writes a checkpoint in another format: file by file, resumable, visible when it is complete and proven."""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from megatron_sphinx.checkpoint.bar import progress_bar
from megatron_sphinx.checkpoint.companions import with_companions
from megatron_sphinx.checkpoint.digests import Algorithm, is_as_written
from megatron_sphinx.checkpoint.encoders import read_encoders, write_encoders
from megatron_sphinx.checkpoint.formats.format import (
    Format,
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
from megatron_sphinx.checkpoint.pruning import prune
from megatron_sphinx.checkpoint.selection import select
from megatron_sphinx.checkpoint.streams import TensorStreams
from megatron_sphinx.checkpoint.tally import balance
from megatron_sphinx.checkpoint.targets import is_taken, partial_of, publish
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.model.expert_choice import KeptExperts
from megatron_sphinx.remote import copy_file
from megatron_sphinx.tensors.dtypes import Array, bits, converted
from megatron_sphinx.tensors.entries import Entry
from megatron_sphinx.tensors.read import is_intact

_NOT_ASKED = "of an expert that was not asked for"


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
    kept: KeptExperts | None = None,
    ignored: Collection[str] = (),
    algorithm: Algorithm = "xxh3_128",
    verify: bool = False,
    show: bool = False,
) -> ConversionReport:
    """Write a checkpoint in another format; a run that was stopped goes on where it was.

    Imports no torch. Takes a few MB for each thread, and two tensors of the source where they lie in several chunks.

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
        kept: the MoE experts that the target has; all unless given.
        ignored: keys of the source's configuration that the user says are of no matter.
        algorithm: of the digests of what is written, for the format that keeps them.
        verify: read everything back and compare it with the source.
        show: whether there is a progress bar.

    Raises:
        CheckpointError: the source is incomplete, damaged or unknown; the target exists, cannot be written, or cannot
            hold such a model; what was read back differs.
        ConfigError: `kept` does not fit the source.
    """
    if is_taken(target):
        raise CheckpointError(f"{target}: exists; give another TARGET, or remove it")
    opened, to = open_checkpoint(source, shape, diff, ignored), format_named(form)
    if verify:
        _check_files(opened)
    chosen = _with_encoders(opened if kept is None else prune(opened, kept), experts, encoders)
    checkpoint, companions = with_companions(chosen, to)
    options = replace(options, views=views or options.views, dtype=to.dtype or options.dtype)
    plan = _plan(checkpoint, to, options)
    specs = [spec for file in plan.files for spec in file.tensors]
    conversion = Conversion(checkpoint.source, specs)
    differing = tuple((spec.name, most) for spec, most in conversion.differing_copies())
    how = (options, kept, companions, algorithm)
    told = _write(target, checkpoint, to, plan, conversion, *how, verify=verify, show=show)
    parameters = sum(prod(spec.shape) for spec in specs)
    notes = (*checkpoint.notes, *_not_told(checkpoint, plan), *told)
    line = _balance(opened, checkpoint, conversion, len(specs))
    return ConversionReport(len(plan.files), len(specs), parameters, differing, notes, line)


def _write(
    target: Path,
    checkpoint: SourceCheckpoint,
    to: Format,
    plan: WritePlan,
    conversion: Conversion,
    options: WriteOptions,
    kept: KeptExperts | None,
    companions: Mapping[str, Path],
    algorithm: Algorithm,
    *,
    verify: bool,
    show: bool,
) -> list[str]:
    """Write the target under a hidden name, and give it its own when it is complete; what must be told of it."""
    partial = partial_of(target)
    try:
        with Journal([partial], task_of(to.name, options, checkpoint.model, kept), _inputs(checkpoint)) as journal:
            streams = TensorStreams(partial, checkpoint, to, plan, conversion, options.dtype, algorithm)
            streams.write(journal, show)
            if not to.has_encoders:
                write_encoders(partial, checkpoint.encoders, checkpoint.source.maps)
            for name, path in companions.items():
                copy_file(path, partial / name)
            known = {name: journal.done[name] for name in streams.contents}
            to.finish(WrittenTensors(partial, streams.contents, checkpoint, plan.companions, known))
            if verify:
                _verify(partial, checkpoint, {(spec.file, spec.name) for spec, _ in conversion.copies}, show)
            journal.end()
            publish(partial, target)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{target}: could not be written ({reason}); put that right and run it again") from error
    return streams.notes


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


def task_of(form: str, options: WriteOptions, model: Model, kept: KeptExperts | None = None) -> list[str]:
    """Say what a conversion does, in the words by which one that was stopped is recognised: they must not change."""
    names = ("tensor_parallel", "dtype", "shard_bytes", "is_sparse")
    told = {name: repr(getattr(options, name)) for name in names}
    told["dtype"] = f"torch.{options.dtype.name}" if options.dtype else "None"
    values = ", ".join(f"{name}={value}" for name, value in told.items())
    task = [form, f"Wanted({values})", str(model)]  # as the class of the options was called at first
    return task if kept is None else [*task, f"keep_experts={kept}"]


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


def _check_files(checkpoint: SourceCheckpoint) -> None:
    """Compare the files of a checkpoint with the checksums that its manifest, or torch.save in them, has for them.

    Raises:
        CheckpointError: one differs.
    """
    folder = checkpoint.folder
    damaged = [name for name, digest in checkpoint.checksums.items() if not is_as_written(folder / name, digest)]
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
    source, written = checkpoint.source, open_checkpoint(partial, checkpoint.model.language, is_finished=False)
    conversion = Conversion(written.source, source.specs)
    with progress_bar("verifying", sum(entry.nbytes for entry in source.entries.values()), show) as bar:
        for spec in source.specs:
            entry = source.entries[spec.file, spec.name]
            made, original = conversion.make(spec), source.maps.read(entry)
            if "vocabulary" in spec.box:  # padding is not kept
                made, original = (value[: spec.sizes["vocabulary"]] for value in (made, original))
            if not _is_same(made, converted(original, made.dtype)) and (spec.file, spec.name) not in copies:
                raise CheckpointError(f"{partial}: {spec.name} read back differs; the disk or the memory is faulty")
            conversion.release()
            source.maps.release()
            bar.update(entry.nbytes)


def _is_same(one: Array, other: Array) -> bool:
    """Whether two tensors are the same to the bit."""
    return np.array_equal(bits(one), bits(other))
