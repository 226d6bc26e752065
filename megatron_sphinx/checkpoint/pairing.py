"""Whether checkpoints belong together, and which of their tensors: what must hold before they are mixed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_sphinx.checkpoint.blend import MixedTensor
from megatron_sphinx.checkpoint.formats.format import SourceCheckpoint
from megatron_sphinx.checkpoint.formats.registry import format_named
from megatron_sphinx.checkpoint.identity import differences, in_order
from megatron_sphinx.checkpoint.mapping.axes import VISION_WEIGHTS
from megatron_sphinx.checkpoint.tokenizers import same_tokenizer
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.settings.keys import shortened
from megatron_sphinx.tensors.dtypes import bits
from megatron_sphinx.tensors.entries import Entry

Scope = Literal["all", "language"]


_WAY_OUT = "give checkpoints with the same model, encoders and tokenizer"


def require_alike(first: SourceCheckpoint, other: SourceCheckpoint) -> list[str]:
    """Check that two checkpoints are of one model in one format, with one tokenizer and the same frozen experts.

    Returns:
        What differs and changes no weight, a line each: the mix has it as the first one.

    Raises:
        CheckpointError: they are not; the first difference is named.
    """
    if other.format != first.format:
        raise CheckpointError(
            f"{other.folder}: is {other.format}, {first.folder} is {first.format}; convert one of them first"
        )
    ours, theirs = (dict(one.description.get("identity", {})) for one in (first, other))
    for identity in (ours, theirs):
        if "vision" in identity:
            identity["vision"] = in_order(identity["vision"])
    for name in ("model", "vision", "tokenizer"):
        if name in ours and name in theirs and ours[name] != theirs[name]:
            key, our_value, their_value = next(differences(ours[name], theirs[name], name))
            raise CheckpointError(
                f"{other.folder}: was made with {key}={their_value}, {first.folder} with {our_value}; "
                f"{_way_out(our_value, their_value)}"
            )
    ours, theirs = (_settings(one) for one in (first, other))
    for key, our_value, their_value in differences(ours, theirs):
        raise CheckpointError(
            f"{other.folder}: has {key}={shortened(their_value)}, {first.folder} has {shortened(our_value)}; {_WAY_OUT}"
        )
    notes = same_tokenizer(first, other)
    _require_same_encoders(first, other)
    own, others = (_plain(one.kept) for one in (first, other))
    return notes + [
        f"{other.folder}: {key}={shortened(theirs)}, {first.folder} has {shortened(mine)}, which the mix takes"
        for key, mine, theirs in differences(own, others)
    ]


def _way_out(*values: object) -> str:
    """What to do where two runs differ; experts without weights are drawn from the seed of each run."""
    if all(str(value).startswith("random ") for value in values):
        return (
            "its experts have no weights but those drawn from run.seed, which differs: give them a file "
            "(vision.experts.0.weights=PATH), or train both runs with one run.seed"
        )
    return _WAY_OUT


def _settings(checkpoint: SourceCheckpoint) -> dict[str, object]:
    """What a model is, beside the shapes of its tensors."""
    same = ("heads", "groups", "rope_theta", "norm_epsilon", "experts_per_token")  # shapes have messages of their own
    shape = {name: value for name, value in checkpoint.model.language.shape.items() if name in same}
    return {"model": shape, "rope_scaling": checkpoint.kept.get("rope_scaling")}


def _plain(kept: Mapping[str, object]) -> dict[str, object]:
    """What transformers has beside the weights, without what is not set."""
    return {key: value for key, value in kept.items() if value is not None}


def _require_same_encoders(first: SourceCheckpoint, other: SourceCheckpoint) -> None:
    """Check that two checkpoints have the same frozen experts, to the bit."""
    ours, theirs = (
        {(expert, name): entry for expert, entries in one.encoders.items() for name, entry in entries.items()}
        for one in (first, other)
    )
    for expert, name in sorted(ours.keys() ^ theirs.keys()):
        has, lacks = (first, other) if (expert, name) in ours else (other, first)
        raise CheckpointError(
            f"{lacks.folder}: holds no {name} of {expert}, {has.folder} does; give checkpoints with the same encoders"
        )
    for key, entry in ours.items():
        values = [one.source.maps.read(entries[key]) for one, entries in ((first, ours), (other, theirs))]
        is_same = entry.dtype == values[1].dtype and np.array_equal(bits(values[0]), bits(values[1]))
        for one in (first, other):
            one.source.maps.release()
        if not is_same:
            raise CheckpointError(
                f"{other.folder}: {key[1]} of {key[0]} is frozen, but differs from that of {first.folder}; "
                f"give checkpoints with the same encoders"
            )


def tensors_to_mix(inputs: Sequence[SourceCheckpoint], scope: Scope) -> list[MixedTensor]:
    """List the tensors to be made, file by file.

    Args:
        inputs: checkpoints that are alike.
        scope: whether all tensors are mixed, or those of the language model only.

    Raises:
        CheckpointError: an input lacks a tensor, or has one of another shape or type.
    """
    first = inputs[0]
    kept = {
        (spec.file, spec.name)
        for spec in first.source.specs
        if scope != "all" and spec.rule.weights[0] in VISION_WEIGHTS
    }
    matches = [_Matches(first, other) for other in inputs[1:]]
    entries = {
        key: (entry, *(match.counterpart(key, entry) for match in matches))
        for key, entry in first.source.entries.items()
    }
    entries |= {key: entries[key][:1] for key in kept}
    members = format_named(first.format).members(first)
    return [MixedTensor(each.file, each.name, entries.get(each.key, (each.entry,))) for each in members]


class _Matches:
    """Finds the tensors of the first input in another one: by file and name, or by a name that is in one file only."""

    def __init__(self, first: SourceCheckpoint, other: SourceCheckpoint) -> None:
        self._first, self._other = first.folder, other.folder
        self._entries = other.source.entries
        files_of_name = [Counter(name for _, name in one.source.entries) for one in (first, other)]
        is_whole = all(max(count.values()) == 1 for count in files_of_name)
        self._files = {name: file for file, name in self._entries} if is_whole else {}
        for file, name in sorted(self._entries):
            if (file, name) not in first.source.entries and name not in (files_of_name[0] if is_whole else ()):
                raise _missing(self._first, self._other, file, name)

    def counterpart(self, key: tuple[str, str], entry: Entry) -> Entry:
        """Return the tensor of the other input that belongs to one of the first.

        Args:
            key: file and name of the tensor in the first input.
            entry: the tensor there.

        Raises:
            CheckpointError: there is none, or it has another shape or type.
        """
        file, name = key
        other = self._entries.get((self._files.get(name, file), name))
        if other is None:
            raise _missing(self._other, self._first, file, name)
        mine, theirs = ((list(one.shape), one.dtype) for one in (entry, other))
        for kind, my_value, their_value in zip(("shape", "type"), mine, theirs, strict=True):
            if my_value != their_value:
                raise CheckpointError(
                    f"{self._other}: {name} has {kind} {their_value}, that of {self._first} has {my_value}; "
                    f"give checkpoints of the same model"
                )
        return other


def _missing(lacks: Path, has: Path, file: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{lacks}: holds no {name} in {file}, {has} does; give checkpoints of the same model, divided alike"
    )
