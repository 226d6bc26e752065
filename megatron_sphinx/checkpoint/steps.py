"""The checkpoints of a run folder: which there are, which are out of the way of a run, and which are old enough to go.

A checkpoint of a step is a folder `step_` and eight digits that holds a manifest. Any other name is the user's own:
nothing here takes, moves or removes it.
"""

import os
import re
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path

from megatron_sphinx.checkpoint.manifest import MANIFEST
from megatron_sphinx.checkpoint.targets import is_reachable_folder
from megatron_sphinx.errors import CheckpointError

_STEP, _REMAINS = re.compile(r"step_\d{8}"), re.compile(r"\.step_\d{8}\.(partial|pruned)")


def name_of(step: int) -> str:
    """Return the name of the checkpoint after so many steps."""
    return f"step_{step:08d}"


def complete(folder: Path) -> list[Path]:
    """List the complete checkpoints of a folder, oldest first."""
    return [path for path in _steps(folder) if (path / MANIFEST).is_file()]


def require_folder(folder: Path) -> None:
    """Raise CheckpointError where a checkpoint is to be read from a folder that is not there."""
    if not is_reachable_folder(folder):
        raise CheckpointError(f"{folder}: no such folder; give the folder of a checkpoint")


def newest_of(folder: Path) -> Path:
    """Return the checkpoint that a folder is, or the newest complete one in it.

    Raises:
        CheckpointError: there is none.
    """
    if (folder / MANIFEST).is_file():
        return folder
    for place in (folder, folder / "checkpoints"):
        if steps := complete(place):
            return steps[-1]
    raise CheckpointError(f"{folder}: holds no complete checkpoint; train first")


def off_the_line(folder: Path, start: Path | None, done: int) -> list[Path]:
    """List the steps in a folder that a run does not come from: later ones, or all where it begins elsewhere.

    Args:
        folder: the checkpoints of the run.
        start: the checkpoint that it goes on from, whatever it is called and wherever a link puts it; None where it
            begins anew.
        done: steps that are done in that checkpoint.
    """
    own = folder.resolve()
    if start is None or own not in (start.parent.resolve(), start.resolve().parent):
        return _steps(folder)
    return [path for path in _steps(folder) if path.name > name_of(done) and path.resolve() != start.resolve()]


def set_aside(folder: Path, steps: Iterable[Path]) -> Path:
    """Move steps to a new folder `superseded_<number>` in the folder of checkpoints, which is returned.

    The newest goes first: killed on the way, none is left that is later than those that are gone.
    """
    aside = next(path for number in count(1) if not (path := folder / f"superseded_{number}").exists())
    aside.mkdir()
    for path in sorted(steps, reverse=True):
        path.rename(aside / path.name)
    return aside


def publish(partial: Path, target: Path) -> None:
    """Give a checkpoint that is whole its name; what has that name is set aside."""
    if target.exists():
        set_aside(target.parent, [target])
    os.replace(partial, target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def prune(newest: Path, *, keep: int, protected: Collection[Path]) -> list[str]:
    """Remove the oldest of the checkpoints before one, so that `keep` are left with it.

    Args:
        newest: it has been verified; what is later, and so not of the run that wrote it, is left alone.
        keep: how many stay, that one counted.
        protected: checkpoints that stay beside them.

    Returns:
        A line for each that could not be removed; it stays under a hidden name.
    """
    older = [path for path in complete(newest.parent) if path.name < newest.name]
    safe = {path.resolve() for path in protected}
    lines = []
    for path in older[: max(0, len(older) - (keep - 1))]:
        if path.resolve() not in safe:
            doomed = path.with_name(f".{path.name}.pruned")  # so that no part of it is taken for a checkpoint
            try:
                path.rename(doomed)
                _remove(doomed)
            except OSError as error:
                lines.append(f"{path}: could not be removed whole ({error.strerror or error}); remove it yourself")
    return lines


def remove_remains(folder: Path) -> None:
    """Remove what a process that was killed has left half written, or half removed, as far as it can be."""
    for path in folder.glob(".step_*"):
        if _REMAINS.fullmatch(path.name):
            with suppress(OSError):
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; of one that a link leads to, the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _steps(folder: Path) -> list[Path]:
    """Every step in a folder, complete or not, oldest first."""
    return sorted(path for path in folder.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir())
