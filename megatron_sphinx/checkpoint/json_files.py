"""Configuration files of checkpoints: JSON that holds keys."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.remote import is_remote, write_text

_MOST_BYTES = 2**26  # of such a file; what is behind them is cut off, and so no JSON
_MOST_SHOWN = 200  # characters of a reason in a message


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        CheckpointError: the file is missing or damaged, or holds no keys.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        content = json.loads(text[:_MOST_BYTES].decode(), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        fault = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:_MOST_SHOWN]
        raise CheckpointError(f"{path}: cannot be read ({fault}); give a whole checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no keys; give a whole checkpoint")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping whose keys are there once: of two values, programs take one or the other."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return values


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON that is complete or invisible."""
    if is_remote(path):
        write_text(path, json.dumps(content, indent=1) + "\n")
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
