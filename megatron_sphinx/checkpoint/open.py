"""Opens a checkpoint of any format: what it is, and what tensors it holds, without reading them."""

from dataclasses import replace
from pathlib import Path

from megatron_sphinx.checkpoint.encoders import ENCODERS, read_encoders
from megatron_sphinx.checkpoint.formats.format import SourceCheckpoint
from megatron_sphinx.checkpoint.formats.registry import format_named, formats, names
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig


def open_checkpoint(folder: Path, shape: LanguageConfig | None = None, diff: Path | None = None) -> SourceCheckpoint:
    """Recognise a checkpoint and list what it holds, without reading its tensors.

    Args:
        folder: where it is.
        shape: shape of the model, for the one format that does not tell it, torch_dist.
        diff: a folder of LLaMA2-Accessory's -diff files, to be added to it.

    Raises:
        CheckpointError: it is of no known format, incomplete or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a checkpoint")
    checkpoint = _open(folder, shape, diff)
    checkpoint.source.check()
    beside = checkpoint.folder / ENCODERS
    return replace(checkpoint, encoders=read_encoders(beside)) if beside.is_dir() else checkpoint


def _open(folder: Path, shape: LanguageConfig | None, diff: Path | None) -> SourceCheckpoint:
    for form in formats():
        if diff is not None and form.open_sum is not None:
            return form.open_sum(folder, diff)
        if diff is None and form.is_here(folder):
            return form.open(folder, shape)
    files = ", ".join(file for name in names() for file in format_named(name).files)
    raise CheckpointError(
        f"{folder}: no checkpoint of a known format; give a folder with {files}, or a checkpoint of ours"
    )
