"""Errors a run can end with. Each message names what, where, and a way out, in one line."""

from difflib import get_close_matches


class SphinxError(Exception):
    """Base of every error this package raises on purpose; the command prints it without a traceback."""

    exit_status = 2
    is_shared = False  # whether every rank of the job raises it


class ConfigError(SphinxError, ValueError):
    """A configuration value that cannot work."""


class DataError(SphinxError, ValueError):
    """Data that is missing, damaged, or does not match its index."""


class CheckpointError(SphinxError, ValueError):
    """A checkpoint that cannot be written, or does not match what was asked of it."""


class FolderError(SphinxError, OSError):
    """The run folder cannot be written."""


class DivergedError(SphinxError, ArithmeticError):
    """The loss is not finite; the weights were left as they were before the step."""

    exit_status = 1


def nearest(name: str, known: list[str]) -> str:
    """How to go on after a name that is not known: the nearest known one, or all of them."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
