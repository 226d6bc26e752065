"""What a checkpoint of ours says of itself: a file of JSON, without which it is none."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.paths import is_plain

MANIFEST = "checkpoint.json"
PROVENANCE = "interpolation"  # what a mix was made of: a key of a manifest, and the name of a file elsewhere
_KINDS = {"step": int, "identity": dict, "files": dict}


def read_manifest(path: Path, key: str = "checkpoint.resume") -> dict[str, Any]:
    """Read what a checkpoint says of itself, and see that its files are there.

    Args:
        path: the checkpoint.
        key: the configuration key that it was given by, for messages.

    Raises:
        CheckpointError: it is missing or incomplete, or names a file elsewhere.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{key}={path}: not a complete checkpoint; give a step_... folder") from error
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), kind) for key, kind in _KINDS.items()):
        raise CheckpointError(f"{key}={path}: {MANIFEST} does not describe a checkpoint; give a step_... folder")
    for name in manifest["files"]:
        if not is_plain(name):
            raise CheckpointError(f"{key}={path}: {MANIFEST} names {name!r}, no file in its folder; give another one")
        if not (path / name).is_file():
            raise CheckpointError(f"{key}={path}: {name} is missing; give an earlier one")
    return manifest


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write what a checkpoint says of itself, last of its files."""
    with (path / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
