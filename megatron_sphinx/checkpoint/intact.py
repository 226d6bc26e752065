"""Which checkpoint a run goes on from: the newest that every rank sees and whose files are as they were written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_sphinx.checkpoint.collective import from_first, gathered
from megatron_sphinx.checkpoint.digests import is_as_written
from megatron_sphinx.checkpoint.manifest import read_manifest
from megatron_sphinx.errors import CheckpointError

if TYPE_CHECKING:  # tools read checkpoints without megatron-core, whose import takes seconds
    from megatron_sphinx.parallel.groups import ProcessGroups

_SEEN_SECONDS = 90.0  # a network's file system may show a new file after a minute


class SavedStep(NamedTuple):
    """A checkpoint to go on from.

    Attributes:
        path: its folder.
        manifest: what it says of itself.
        faults: why newer ones were passed over.
    """

    path: Path
    manifest: dict[str, Any]
    faults: list[str]


def first_intact(groups: ProcessGroups, paths: Sequence[Path]) -> SavedStep | None:
    """Find the first of some checkpoints that is as it was written; every language rank calls this, together.

    Args:
        groups: of this rank.
        paths: the checkpoints, on every rank; None is returned where there are none.

    Raises:
        CheckpointError: all are damaged, or a rank does not see what the first one sees.
    """
    faults: list[str] = []
    for path in paths:
        manifest, fault = from_first(groups, lambda path=path: _manifest(path))  # type: ignore[misc]
        if manifest is not None:
            unseen, fault = _faults(groups, path, manifest)
            if unseen:
                raise CheckpointError(unseen)
            if not fault:
                return SavedStep(path, manifest, faults)
        faults.append(fault)
    if faults:
        raise CheckpointError(faults[0] + (f"; {len(faults) - 1} earlier ones are no better" if faults[1:] else ""))
    return None


def _manifest(path: Path) -> tuple[dict[str, Any] | None, str]:
    """What a checkpoint says of itself, or why that cannot be read."""
    try:
        return read_manifest(path), ""
    except CheckpointError as error:
        return None, str(error)


def _faults(groups: ProcessGroups, path: Path, manifest: Mapping[str, Any]) -> tuple[str, str]:
    """What some rank does not see of a checkpoint that the first one sees, and what is damaged in it."""
    unseen = damaged = ""
    try:
        if _is_seen(path, manifest):
            verify_files(groups, path, manifest)
        else:
            unseen = (
                f"run.folder: rank {groups.seat.rank} on {gethostname()} does not see all files of {path}, "
                f"which the first rank sees; give a folder on storage that all nodes share"
            )
    except CheckpointError as error:
        damaged = str(error)
    except OSError as error:
        damaged = f"checkpoint.resume={path}: cannot be read ({error}); give an earlier one"
    faults = gathered(groups, (unseen, damaged))
    first = [next(filter(None, texts), "") for texts in zip(*faults, strict=True)]
    return first[0], first[1]


def verify_files(
    groups: ProcessGroups, path: Path, manifest: Mapping[str, Any], key: str = "checkpoint.resume"
) -> None:
    """Compare the checksums of a checkpoint's files, this rank a share of them.

    Args:
        groups: of this rank.
        path: the checkpoint.
        manifest: what it says of itself.
        key: the configuration key that it was given by, for the message.

    Raises:
        CheckpointError: a file is damaged.
    """
    for number, (name, digest) in enumerate(manifest["files"].items()):
        if number % groups.layout.language == groups.seat.rank and not is_as_written(path / name, digest):
            raise CheckpointError(f"{key}={path}: {name} is damaged (its checksum differs); give an earlier one")


def _is_seen(path: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether this rank sees a checkpoint's files, a network's file system given time to show what is new."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while not all((path / name).is_file() for name in manifest["files"]):
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True
