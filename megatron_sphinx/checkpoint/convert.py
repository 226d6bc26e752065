"""Writes a checkpoint in another format: file by file, resumable, visible when it is complete and proven."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_sphinx.checkpoint.conversion import Conversion
from megatron_sphinx.checkpoint.digests import THREADS, sha256_of
from megatron_sphinx.checkpoint.formats import accessory, huggingface, megatron, meta, torch_dist
from megatron_sphinx.checkpoint.formats.base import File, Opened, Wanted
from megatron_sphinx.checkpoint.journal import Journal
from megatron_sphinx.checkpoint.manifest import MANIFEST, write_manifest
from megatron_sphinx.checkpoint.selection import select
from megatron_sphinx.checkpoint.stream import Entry, create, is_intact, read_safetensors
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.unpickling import write_metadata

FORMATS = ("hf", "internlm2", "meta", "accessory", "megatron", "torch_dist")
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
Experts = Mapping[str, Mapping[str, Entry]]
ENCODERS = "encoders"  # the folder of frozen experts, a file each
_PIECE = 2**20  # elements that are made at a time: few enough to stay in a core's cache


@dataclass(frozen=True)
class Converted:
    """What a conversion has done.

    Attributes:
        files: that were written, those of a run before it that was stopped counted.
        tensors: in them.
        parameters: in those.
        differing: tensors that the ranks of the source should hold alike, but do not, with the most they differ by.
    """

    files: int
    tensors: int
    parameters: int
    differing: tuple[tuple[str, float], ...]


def open_checkpoint(folder: Path, shape: LanguageConfig | None = None, diff: Path | None = None) -> Opened:
    """Recognise a checkpoint and read what it holds, not its tensors.

    Args:
        folder: where it is.
        shape: of the model, for the one format that does not tell it, torch_dist.
        diff: a folder of LLaMA2-Accessory's -diff files, to be added to it.

    Raises:
        CheckpointError: it is of no known format, incomplete or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a checkpoint")
    opened: Opened | None = None
    if diff is not None:
        if not (accessory.is_here(folder) or meta.is_here(folder)):
            raise CheckpointError(f"--diff {diff}: can be added to a checkpoint of meta or accessory; {folder} is none")
        opened = accessory.open_checkpoint(folder, diff)
    elif torch_dist.is_here(folder):
        opened = torch_dist.open_checkpoint(folder, shape)
    for module in (huggingface, accessory, meta, megatron):
        if opened is None and module.is_here(folder):
            opened = module.open_checkpoint(folder)
    if opened is not None:
        opened.source.check()
        beside = opened.folder / ENCODERS
        return replace(opened, encoders=_encoders(beside)) if beside.is_dir() else opened
    raise CheckpointError(
        f"{folder}: no checkpoint of a known format; give a folder with model.safetensors, pytorch_model.bin, "
        f"consolidated.00.pth, consolidated.00-of-NN.model.pth, or a checkpoint of ours"
    )


def convert(
    source: Path,
    target: Path,
    form: str,
    wanted: Wanted,
    *,
    shape: LanguageConfig | None = None,
    diff: Path | None = None,
    views: int = 1,
    experts: Sequence[str] = (),
    encoders: Path | None = None,
    verify: bool = False,
    show: bool = False,
) -> Converted:
    """Write a checkpoint in another format. A run that was stopped goes on where it was.

    Memory: a few MB for each thread, and two tensors of the source where they lie in several chunks.

    Args:
        source: folder of a checkpoint.
        target: folder to make.
        form: one of FORMATS.
        wanted: how it is divided.
        shape: of the model, for a source of the one format that does not tell it, torch_dist.
        diff: a folder of LLaMA2-Accessory's -diff files, to be added to the source.
        views: of a picture, by which LLaMA2-Accessory has modules of their own.
        experts: which of the visual experts of a released model to keep; all unless given.
        encoders: folder of frozen experts, a file each, that the target shall have; the source's unless given.
        verify: read everything back and compare it with the source.
        show: whether there is a progress bar.

    Raises:
        CheckpointError: the source is incomplete, damaged or unknown; the target exists, cannot be written, or cannot
            hold such a model; what was read back differs.
    """
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists; give another TARGET, or remove it")
    opened = open_checkpoint(source, shape, diff)
    if verify:
        _check_files(opened)
    opened = replace(opened, encoders=_encoders(encoders)) if encoders else opened
    opened = _selected(opened, experts) if experts else opened
    wanted = replace(wanted, dtype=torch.float32) if form == "megatron" else wanted
    files, companions = _plan(opened, form, wanted, views)
    conversion = Conversion(opened.source, [item for file in files for item in file.tensors])
    differing = tuple((item.name, most) for item, most in conversion.differing_copies())
    partial = target.with_name(f".{target.name}.partial")
    try:
        frozen = [entry for of in opened.encoders.values() for entry in of.values()]
        task = [form, str(wanted), str(opened.model)]
        journal = Journal([partial], task, [*opened.source.entries.values(), *frozen])
        digests = _write_files(partial, files, opened, conversion, journal, form, wanted.dtype, show)
        if form != "accessory":
            _write_encoders(partial, opened)
        _write_companions(partial, files, opened, conversion, form, wanted.dtype, companions, digests)
        if verify:
            _verify(partial, opened, show)
        journal.end()
        os.replace(partial, target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: could not be written ({error.strerror or error}); put that right and run it again"
        ) from error
    tensors = [item for file in files for item in file.tensors]
    return Converted(len(files), len(tensors), sum(torch.Size(item.shape).numel() for item in tensors), differing)


def _selected(opened: Opened, experts: Sequence[str]) -> Opened:
    """A checkpoint with some of its visual experts, which no longer are those that it was trained with."""
    identity = {name: part for name, part in opened.about.get("identity", {}).items() if name != "vision"}
    return select(replace(opened, about={**opened.about, "identity": identity}), experts)


def _plan(opened: Opened, form: str, wanted: Wanted, views: int) -> tuple[list[File], dict[str, Any]]:
    if form != "accessory" and form != "meta" and wanted.tensor_parallel > 1:
        raise CheckpointError(
            f"--tensor-parallel {wanted.tensor_parallel}: {form} does not divide tensors; leave it out"
        )
    if form in ("hf", "internlm2"):
        return huggingface.files(opened.model, wanted, is_internlm2=form == "internlm2")
    if form == "meta":
        return meta.files(opened.model, wanted)
    if form == "accessory":
        return accessory.files(opened.model, wanted, opened.encoders, views=views)
    if form == "torch_dist":
        return torch_dist.files(opened.model, wanted)
    return megatron.files(opened.model, wanted)


def _encoders(folder: Path) -> Experts:
    """Frozen experts that lie in files of their own."""
    found = {path.stem: read_safetensors(path) for path in sorted(folder.glob("*.safetensors"))}
    known = ", ".join(accessory.ENCODERS)
    if not found:
        raise CheckpointError(f"{folder}: holds no *.safetensors of frozen experts; known: {known}")
    if unknown := sorted(found.keys() - set(accessory.ENCODERS)):
        raise CheckpointError(f"{folder}: {unknown[0]}: unknown; known: {known}")
    return found


def _size(file: File, conversion: Conversion, dtype: torch.dtype | None) -> int:
    sizes = [torch.Size(item.shape).numel() * (dtype or conversion.dtype_of(item)).itemsize for item in file.tensors]
    return sum(sizes) + sum(entry.nbytes for _, entry in file.verbatim)


def _write_files(
    partial: Path,
    files: Sequence[File],
    opened: Opened,
    conversion: Conversion,
    journal: Journal,
    form: str,
    dtype: torch.dtype | None,
    show: bool,
) -> dict[str, str]:
    """Write the files of tensors that are not yet there, several at a time, and note each one; their digests."""
    sizes = {file.name: _size(file, conversion, dtype) for file in files}
    has_digest = form == "megatron"

    def write(file: File, bar: Any) -> str:
        _write(partial / file.name, file, opened, conversion, dtype, bar)
        return sha256_of(partial / file.name) if has_digest else "-"

    with (
        progress_bar("converting", sum(sizes.values()), show) as bar,
        ThreadPoolExecutor(THREADS, "convert", torch.set_num_threads, (1,)) as pool,  # a piece is too small for two
    ):
        bar.update(sum(sizes[name] for name in journal.done))
        waiting = {pool.submit(write, file, bar): file.name for file in files if file.name not in journal.done}
        try:
            for future in as_completed(waiting):
                journal.note(waiting[future], future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return {file.name: journal.done[file.name] for file in files}


def _write(path: Path, file: File, opened: Opened, conversion: Conversion, dtype: torch.dtype | None, bar: Any) -> None:
    planned = {
        **{item.name: (item.shape, dtype or conversion.dtype_of(item)) for item in file.tensors},
        **{name: (entry.shape, entry.dtype) for name, entry in file.verbatim},
    }
    out = create(path, planned, under=file.under)

    def put(name: str, value: Tensor) -> None:
        out.put(name, value)
        conversion.release()
        with bar.get_lock():
            bar.update(value.nbytes)

    for item in file.tensors:
        for piece in item.pieces(_PIECE):
            put(item.name, conversion.make(piece, planned[item.name][1]))
    for name, entry in file.verbatim:
        put(name, opened.source.maps.read(entry))
    out.close()


def _write_encoders(partial: Path, opened: Opened) -> None:
    """Write frozen experts into files of their own."""
    for expert, entries in opened.encoders.items():
        path = partial / ENCODERS / f"{expert}.safetensors"
        path.parent.mkdir(exist_ok=True)
        out = create(path, {name: (entry.shape, entry.dtype) for name, entry in entries.items()})
        for name, entry in entries.items():
            out.put(name, opened.source.maps.read(entry))
            opened.source.maps.release()
        out.close()


def _write_companions(
    partial: Path,
    files: Sequence[File],
    opened: Opened,
    conversion: Conversion,
    form: str,
    dtype: torch.dtype | None,
    companions: dict[str, Any],
    digests: Mapping[str, str],
) -> None:
    """Write what is beside the tensors: tokenizer, index, configuration."""
    for name in TOKENIZERS:
        if (opened.folder / name).is_file():
            shutil.copyfile(opened.folder / name, partial / name)
    if form in ("megatron", "torch_dist"):
        items = {file.name: file.tensors[0] for file in files}
        of_file = {name: (item.name, item.shape, dtype or conversion.dtype_of(item)) for name, item in items.items()}
        write_metadata(partial, of_file)
    if form == "torch_dist":
        torch.save({}, partial / "common.pt")
    if form == "megatron":
        _write_manifest(partial, companions.pop(MANIFEST), opened, digests)
    for name, content in companions.items():
        write_json(partial / name, content)


def _write_manifest(partial: Path, manifest: dict[str, Any], opened: Opened, digests: Mapping[str, str]) -> None:
    """Write what a checkpoint of ours says of itself, and what its source says of the encoders and the tokenizer."""
    known = opened.about.get("identity", {})
    manifest["identity"] |= {name: known[name] for name in ("vision", "tokenizer") if name in known}
    if (partial / "tokenizer.model").is_file():
        manifest["identity"]["tokenizer"] = sha256_of(partial / "tokenizer.model")
    write_manifest(partial, manifest | {"files": {".metadata": sha256_of(partial / ".metadata"), **digests}})


def _check_files(opened: Opened) -> None:
    """Compare the files of a checkpoint with the checksums that its format has for them.

    Raises:
        CheckpointError: one differs.
    """
    if opened.format == "megatron":
        damaged = [name for name, digest in opened.about["files"].items() if sha256_of(opened.folder / name) != digest]
    else:
        paths = sorted({path for entry in opened.source.entries.values() for path in entry.paths})
        damaged = [path.name for path in paths if path.suffix in (".pth", ".bin") and not is_intact(path)]
    if damaged:
        raise CheckpointError(f"{opened.folder}: {damaged[0]} is damaged (its checksum differs); fetch it again")


def _verify(partial: Path, opened: Opened, show: bool) -> None:
    """Read everything back and make the source's tensors of it.

    Raises:
        CheckpointError: one differs.
    """
    back = open_checkpoint(partial, opened.model.language)
    conversion = Conversion(back.source, opened.source.stored)
    with progress_bar("verifying", sum(entry.nbytes for entry in opened.source.entries.values()), show) as bar:
        for item in opened.source.stored:
            entry = opened.source.entries[item.file, item.name]
            made = conversion.make(item)
            wanted = opened.source.maps.read(entry)
            if "v" in item.box:  # padding is not kept
                made, wanted = (value[: item.sizes["v"]] for value in (made, wanted))
            if not torch.equal(made, wanted.to(made.dtype)) and item not in {copy for copy, _ in conversion.copies}:
                raise CheckpointError(f"{partial}: {item.name} read back differs; the disk or the memory is faulty")
            conversion.release()
            opened.source.maps.release()
            bar.update(entry.nbytes)


def write_json(path: Path, content: Any) -> None:
    """Write a file that is complete or invisible."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def progress_bar(what: str, size: int, show: bool) -> Any:
    """A bar of bytes, if it is to be shown."""
    return tqdm(desc=what, total=size, unit="B", unit_scale=True, disable=not show, dynamic_ncols=True, mininterval=1.0)
