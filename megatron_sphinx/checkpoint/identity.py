"""Who is who: plain values of two runs or checkpoints compared key by key."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megatron_sphinx.errors import CheckpointError

_NESTED = ("vision", "data")


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


def comparable(made: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prepare two identities of runs to be compared.

    The order of the experts counts, since their features are concatenated in it. The fingerprint of a stream of data
    counts where both are known: an older checkpoint has none, and data of others is read in the background first.
    """
    one, other = ({**identity, **{name: dict(identity.get(name, {})) for name in _NESTED}} for identity in (made, here))
    for identity in (one, other):
        identity["vision"]["order"] = list(identity["vision"].get("experts", {}))
    for stream in ("pairs", "text"):
        both = [identity["data"].get(stream) or {} for identity in (one, other)]
        if not all(about.get("fingerprint") for about in both):
            for identity, about in zip((one, other), both, strict=True):
                kept = {name: value for name, value in about.items() if name != "fingerprint"}
                identity["data"][stream] = kept or None
    return one, other


def inherited(here: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a run's identity by what the checkpoint that it goes on from knows and the run does not know yet.

    So the fingerprint of data is compared at the latest when the run goes on once more.
    """
    data = dict(here.get("data", {}))
    for stream in ("pairs", "text"):
        about, before = data.get(stream), made.get("data", {}).get(stream)
        if about and before and about.get("fingerprint") is None:
            data[stream] = {**about, "fingerprint": before.get("fingerprint")}
    return {**here, "data": data} if data else dict(here)


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
