"""The formats of checkpoints by name. A module of a format is imported when it is first asked for: no run needs all."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, cast

from megatron_sphinx.errors import CheckpointError

if TYPE_CHECKING:  # the names of the formats are told without
    from megatron_sphinx.checkpoint.formats.format import Format

_HERE = "megatron_sphinx.checkpoint.formats"
# The module of each format, whose `FORMAT` is its record.
_MODULES = {
    "hf": f"{_HERE}.huggingface",
    "internlm2": f"{_HERE}.internlm2",
    "meta": f"{_HERE}.meta",
    "accessory": f"{_HERE}.accessory",
    "megatron": f"{_HERE}.megatron",
    "torch_dist": f"{_HERE}.torch_dist",
}
# A download may hold a model in several formats: these are looked for first, in this order.
_PREFERRED = ("torch_dist", "internlm2", "hf", "accessory")


def register(name: str, module: str) -> None:
    """Make a format known.

    Args:
        name: what users call it.
        module: the module, importable, whose `FORMAT` is its record.
    """
    _MODULES[name] = module


def names() -> tuple[str, ...]:
    """Return the names of all formats, without importing any."""
    return tuple(_MODULES)


def format_named(name: str) -> Format:
    """Return the record of a format.

    Raises:
        CheckpointError: there is none of this name.
    """
    if name not in _MODULES:
        raise CheckpointError(f"{name}: is no format of checkpoints; use one of {', '.join(_MODULES)}")
    return cast("Format", import_module(_MODULES[name]).FORMAT)


def formats() -> Iterator[Format]:
    """List all formats in the order in which a checkpoint is tried to be recognised as one."""
    others = (name for name in _MODULES if name not in _PREFERRED)
    yield from map(format_named, (*_PREFERRED, *others))
