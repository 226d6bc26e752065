"""Errors a run can end with. Each message names what, where, and a way out, in one line."""

import errno
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

_ROOM = "make room or give another folder"
_TYPED = "give a folder whose path holds folders only"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: f"the quota is used up: {_ROOM}",
    errno.EFBIG: f"the largest size of a file is reached, see ulimit -f: raise it, {_ROOM}",
    errno.EACCES: "get the right to write there, or give another folder",
    errno.EPERM: "get the right to write there, or give another folder",
    errno.EROFS: "it is mounted for reading only: give another folder",
    errno.ENOTDIR: _TYPED,
    errno.EEXIST: _TYPED,
    errno.EISDIR: "a folder is in the place of a file: remove it, or give another folder",
    errno.ENOENT: "nothing can be made there: give a folder on a file system that keeps files",
    errno.ELOOP: _TYPED,
    errno.ENAMETOOLONG: "give a folder with a shorter name",
    errno.EINVAL: "the file system does not take such a name: give another folder",
    errno.EIO: "the disk or the server of files fails: look at it, or give another folder",
    errno.ESTALE: "the server of files has lost it: mount it again, or give another folder",
    errno.EMFILE: "too many files are open, see ulimit -n: raise it",
    errno.ENFILE: "too many files are open on this machine: close some",
    errno.ETXTBSY: "the file is being run: give another folder",
}

_OF_PATHS = (errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ELOOP)


class SphinxError(Exception):
    """Base of every error this package raises on purpose; the command prints it without a traceback."""

    exit_status = 2
    is_shared = False  # whether every rank of the job raises it


class _OneLineError(Exception):
    """An error whose message stays one line, whatever names and values of the user's it quotes."""

    def __str__(self) -> str:
        return re.sub(r"[\x00-\x1f\x7f]+", " ", super().__str__())


class ConfigError(_OneLineError, SphinxError, ValueError):
    """A configuration value that cannot work."""


class MeetingError(ConfigError):
    """The ranks of a job cannot meet: a wrong address, a rank that is missing, or two of one number.

    Attributes:
        is_told: whether the first rank has said it, and this rank has only heard it.
    """

    def __init__(self, message: str, *, is_told: bool = False) -> None:
        super().__init__(message)
        self.is_told = is_told


class DataError(_OneLineError, SphinxError, ValueError):
    """Data that is missing, damaged, or does not match its index."""


class CheckpointError(_OneLineError, SphinxError, ValueError):
    """A checkpoint that cannot be written, or does not match what was asked of it."""


class OtherDataError(CheckpointError):
    """Steps since a checkpoint were trained on other data than those before it."""


class FolderError(SphinxError, OSError):
    """The run folder cannot be written."""


class DivergedError(SphinxError, ArithmeticError):
    """A loss or gradient that is not finite, or spikes; the weights were left as they were before the step."""

    exit_status = 1
    is_shared = True


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write into the run folder into one line for the user."""
    try:
        yield
    except FolderError:  # which is an OSError
        raise
    except OSError as error:
        reason = _obstacle(folder) if error.errno in _OF_PATHS else ""
        raise FolderError(
            f"run.folder={folder}: cannot be written ({reason or error.strerror or error}); "
            f"{remedy_of(error)}, then go on with checkpoint.resume=auto"
        ) from error


def _obstacle(folder: Path) -> str:
    """Say what is in the place of a folder or of one above it; empty where nothing is."""
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.exists():
            return f"{place} is a link to {os.readlink(place)}, which leads nowhere"
        if place.exists():
            return "" if place.is_dir() else f"{place} is a file"
    return ""


def remedy_of(error: BaseException) -> str:
    """Say what to do about a file that cannot be written, by the system's number of the error."""
    number = error.errno if isinstance(error, OSError) else errno.ENOSPC  # what others hide is nearly always that
    return _REMEDIES.get(number or 0, "see that it can be written, or give another folder")


def nearest(name: str, known: list[str]) -> str:
    """Say how to go on after a name that is not known: with the nearest known one, or with the list of all."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def shortened(value: object, most: int = 200) -> str:
    """Write a value for a message: on one line, without control characters, and not longer than `most` signs."""
    try:
        text = str(value)
    except ValueError:  # a number with thousands of digits
        return "a number with thousands of digits"
    text = " ".join(text[: 4 * most].split()) + text[4 * most :][:1]
    text = "".join(f"\\u{ord(sign):04x}" if unicodedata.category(sign) in ("Cc", "Cs") else sign for sign in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
