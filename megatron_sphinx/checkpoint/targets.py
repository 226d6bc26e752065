"""Where a checkpoint that is being made lies until it is complete.

On this machine that is a hidden name beside its own. Behind a URL nothing can be renamed: there it lies under its own
name from the beginning, with a journal in it for as long as it is unfinished, by which readers refuse it.
"""

import os
import shutil
from pathlib import Path

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.remote import is_remote, remove_files, require_package

JOURNAL = ".files"


def is_taken(target: Path) -> bool:
    """Tell whether a target is there already, but for one behind a URL that a run before has left unfinished.

    Raises:
        CheckpointError: it cannot be looked at.
    """
    if is_remote(target):
        return is_reachable_folder(target) and not is_unfinished(target)
    return os.path.lexists(target)


def is_reachable_folder(folder: Path) -> bool:
    """Tell whether a folder is there.

    Raises:
        CheckpointError: what is behind its URL cannot be reached.
        ConfigError: nothing that is installed reads such a URL.
    """
    if is_remote(folder):
        require_package(folder)
    try:
        return folder.is_dir()
    except Exception as error:  # each file system has errors of its own
        fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(f"{folder}: cannot be reached ({fault}); check the URL, and fsspec's settings") from error


def require_finished(folder: Path) -> None:
    """Raise CheckpointError where what is in a folder has not been written to its end."""
    if is_unfinished(folder):
        raise CheckpointError(f"{folder}: is not finished; run the command that makes it again")


def is_unfinished(folder: Path) -> bool:
    """Tell whether a folder is being written, or was left in the middle of that."""
    return (folder / JOURNAL).is_file()


def partial_of(target: Path) -> Path:
    """Return the folder in which a target is made."""
    return target if is_remote(target) else target.with_name(f".{target.name}.partial")


def publish(partial: Path, target: Path) -> None:
    """Give what is complete its own name."""
    if not is_remote(target):
        os.replace(partial, target)


def remove(partial: Path) -> None:
    """Remove what is not to become a target."""
    if is_remote(partial):
        remove_files(partial)
    else:
        shutil.rmtree(partial, ignore_errors=True)
