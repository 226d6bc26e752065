"""What a cascade writes: a new folder, which appears as a whole or not at all."""

import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_sphinx.errors import DataError, remedy_of


def check_new(folder: Path) -> None:
    """Refuse a folder for results in which something would be overwritten.

    Raises:
        DataError: it is there and not empty, or it is no folder.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DataError(f"output={folder}: is no folder; give a new one")
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"output={folder}: is not empty, and nothing is overwritten; give a new folder")


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a new folder, which appears when all of them are whole.

    Args:
        folder: where they go; it may be there already, empty.
        files: contents by names, in which `/` leads into a folder.

    Raises:
        DataError: the folder is not new, or cannot be written.
    """
    check_new(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        for name, content in files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        partial.rename(folder)
    except OSError as error:
        raise DataError(f"output={folder}: cannot be written ({error.strerror}); {remedy_of(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def png(image: Image.Image) -> bytes:
    """Return the content of a picture's file as PNG."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def json_of(content: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file that people can read."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
