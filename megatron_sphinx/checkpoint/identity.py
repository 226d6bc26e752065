"""What a run or a checkpoint is recognised by: plain values, compared key by key."""

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


def in_order(vision: Mapping[str, Any]) -> dict[str, Any]:
    """Let the order of the experts count when this part of two identities is compared."""
    return {**vision, "order": list(vision.get("experts") or {})}


def comparable(made: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prepare two identities of runs to be compared.

    The order of the experts counts, since their features are concatenated in it. The fingerprint of a stream of data
    counts where both are known: an older checkpoint has none, and data of others is read in the background first. One
    that says nothing of the order of its text was made when there was but one.
    """
    one, other = ({**identity, "vision": in_order(identity.get("vision", {}))} for identity in (made, current))
    for identity in (one, other):
        identity["data"] = dict(identity.get("data", {}))
        if identity["data"].get("text"):
            identity["data"].setdefault("text_order", "documents")
    for stream in ("pairs", "text"):
        both = [identity["data"].get(stream) or {} for identity in (one, other)]
        if not all(data.get("fingerprint") for data in both):
            for identity, data in zip((one, other), both, strict=True):
                kept = {name: value for name, value in data.items() if name != "fingerprint"}
                identity["data"][stream] = kept or None
    return one, other


def inherited(current: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Give a run's identity the fingerprints of the checkpoint that it goes on from, as far as that knows them.

    They are the run's own, or the run ends; a checkpoint that it saves before it knows must not say otherwise.
    """
    data = dict(current.get("data", {}))
    for stream in ("pairs", "text"):
        now, before = data.get(stream), made.get("data", {}).get(stream)
        if now and before and before.get("fingerprint"):
            data[stream] = {**now, "fingerprint": before["fingerprint"]}
    return {**current, "data": data} if data else dict(current)


def require_same(title: str, made: Mapping[str, Any], current: Mapping[str, Any], way_out: str) -> None:
    """Compare what a checkpoint was made with to what this run has.

    Args:
        title: how the message begins.
        made: what the checkpoint was made with.
        current: what this run has; what else the checkpoint tells does not count.
        way_out: how the message ends.

    Raises:
        CheckpointError: they differ; every difference is named.
    """
    differing = list(differences({name: made.get(name) for name in current}, current))
    if differing:
        named = "; with ".join(f"{key}={before}, this run has {now}" for key, before, now in differing)
        raise CheckpointError(f"{title}: was made with {named}; {way_out}")
