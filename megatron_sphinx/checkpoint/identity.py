"""Who is who: plain values of two runs or checkpoints compared key by key."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megatron_sphinx.errors import CheckpointError


class Difference(NamedTuple):
    """A key, with dots, and both of its values; None where there is none."""

    key: str
    one: Any
    other: Any


def differences(one: Any, other: Any, key: str = "") -> Iterator[Difference]:
    """Compare mappings of mappings to their leaves, in the order of their keys."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in sorted(one.keys() | other.keys()):
            yield from differences(one.get(name), other.get(name), f"{key}.{name}" if key else name)
    elif one != other:
        yield Difference(key, one, other)


def require_same(title: str, made: Mapping[str, Any], here: Mapping[str, Any], way_out: str) -> None:
    """Compare what a checkpoint was made with to what this run has.

    Args:
        title: how the message begins.
        made: of the checkpoint.
        here: of this run; what else the checkpoint tells does not count.
        way_out: how the message ends.

    Raises:
        CheckpointError: they differ; every difference is named.
    """
    found = list(differences({name: made.get(name) for name in here}, here))
    if found:
        named = "; with ".join(f"{key}={had}, this run has {has}" for key, had, has in found)
        raise CheckpointError(f"{title}: was made with {named}; {way_out}")
