"""Errors a run can end with. Each message names what, where, and a way out, in one line."""

import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


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
        raise FolderError(
            f"run.folder={folder}: cannot be written ({error.strerror or error}); "
            f"make room or give another folder, then go on with checkpoint.resume=auto"
        ) from error


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
