"""Configuration files of checkpoints: JSON that holds keys."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_sphinx.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        CheckpointError: the file is missing or damaged, or holds no keys.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); give a whole checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no keys; give a whole checkpoint")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON that is complete or invisible."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
