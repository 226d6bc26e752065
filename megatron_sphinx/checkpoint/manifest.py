"""What a checkpoint of ours says of itself: a file of JSON, without which it is none."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.parsing import ParseError
from megatron_sphinx.paths import is_plain
from megatron_sphinx.ranges import Range
from megatron_sphinx.remote import is_remote, write_text
from megatron_sphinx.values import read_json

MANIFEST = "checkpoint.json"
PROVENANCE = "interpolation"  # what a mix was made of: a key of a manifest, and the name of a file elsewhere
FORMAT = 1  # of what is written; a newer one is refused


@dataclass(frozen=True, kw_only=True)
class WatchState:
    """What a run remembers to judge its losses: `divergence` in a manifest.

    Attributes:
        skipped: steps of the run that were skipped.
        in_a_row: the last of them, one behind the other.
        losses, norms: of the last steps that were trained.
    """

    skipped: Annotated[int, Range(least=0, most=99_999_999)]
    in_a_row: Annotated[int, Range(least=0, most=99_999_999)]
    losses: Annotated[tuple[float, ...], Range(least=-1e300, most=1e300)]
    norms: Annotated[tuple[float, ...], Range(least=0, most=1e300)]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint must say of itself.

    Attributes:
        step: steps that are done.
        bad_pairs: pairs so far whose image could not be read.
        divergence: what the run remembers to judge its losses.
        identity: what must agree with a run that goes on from it.
        files: digests of its files, by their names.
        layout: how the run was divided.
        config: everything that the run was told.
    """

    step: Annotated[int, Range(least=0, most=99_999_999, why="checkpoints are named by steps of eight digits")]
    bad_pairs: Annotated[int, Range(least=0, most=2**48)] = 0
    divergence: WatchState | None = None
    identity: dict[str, Any]
    files: dict[str, str]
    layout: dict[str, Any] | None = None
    config: dict[str, Any] | None = None


def read_manifest(path: Path, key: str = "checkpoint.resume") -> dict[str, Any]:
    """Read what a checkpoint says of itself, and see that its files are there.

    Args:
        path: the checkpoint.
        key: the configuration key that it was given by, for messages.

    Raises:
        CheckpointError: it is missing or incomplete, or names a file elsewhere.
    """
    try:
        manifest = read_json(path / MANIFEST, Manifest, FORMAT)
    except OSError as error:
        raise CheckpointError(f"{key}={path}: not a complete checkpoint; give a step_... folder") from error
    except ParseError as error:
        raise CheckpointError(
            f"{key}={path}: {MANIFEST} does not describe a checkpoint ({error}); give a step_... folder"
        ) from error
    if not manifest["files"]:
        raise CheckpointError(f"{key}={path}: {MANIFEST} names no files, so that it is no checkpoint; give another one")
    for name in manifest["files"]:
        if not is_plain(name):
            raise CheckpointError(f"{key}={path}: {MANIFEST} names {name!r}, no file in its folder; give another one")
        if not (path / name).is_file():
            raise CheckpointError(f"{key}={path}: {name} is missing; give an earlier one")
    return manifest


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write what a checkpoint says of itself, last of its files."""
    text = json.dumps({"format": FORMAT, **manifest}, indent=1)
    if is_remote(path):
        write_text(path / MANIFEST, text)
        return
    with (path / MANIFEST).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
