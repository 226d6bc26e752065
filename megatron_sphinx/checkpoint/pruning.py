"""Fewer MoE experts than a checkpoint has: the others are dropped, and the routers lose their rows."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_sphinx.checkpoint.formats.format import SourceCheckpoint
from megatron_sphinx.checkpoint.mapping.rules import TensorSpec
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.expert_choice import KeptExperts
from megatron_sphinx.tensors.entries import Entry

_LEAST = 2  # experts of a Mixtral, whose router chooses among them


def prune(checkpoint: SourceCheckpoint, kept: KeptExperts) -> SourceCheckpoint:
    """Turn a checkpoint of all MoE experts into one of some; it computes what the whole one does without the others.

    Args:
        checkpoint: what has all experts.
        kept: those that stay; each keeps its place among them.

    Raises:
        ConfigError: the checkpoint has no experts, fewer of them, or another number of layers.
        CheckpointError: layers keep different numbers of experts, which no format can hold, or a single one.
    """
    rows = kept.of_layers(checkpoint.model.language)
    counts = [len(row) for row in rows]
    if other := next((layer for layer, count in enumerate(counts) if count != counts[0]), None):
        raise CheckpointError(
            f"--keep-experts: layer 0 keeps {counts[0]}, layer {other} {counts[other]}; a checkpoint has as many in "
            f"each: keep as many, or answer with --keep-experts"
        )
    if counts[0] < _LEAST:
        raise CheckpointError(
            f"--keep-experts: keeps {counts[0]}; a Mixtral has at least {_LEAST}: keep more, or answer with "
            f"--keep-experts"
        )
    language = checkpoint.model.language
    shape = replace(language, experts=counts[0], experts_per_token=min(language.experts_per_token, counts[0]))
    model, source = replace(checkpoint.model, language=shape), checkpoint.source
    specs, entries = [], {}
    for spec in source.specs:
        entry = source.entries[spec.file, spec.name]
        if "expert" in spec.rule.numbered:
            own, number = rows[spec.box["layer"][0]], spec.box["expert"][0]
            if number not in own:
                continue
            place = own.index(number)
            spec = replace(spec, box=spec.box | {"expert": (place, place + 1)})
        elif "expert" in spec.rule.flat_axes:
            entry = _of_kept(spec, entry, rows)
        specs.append(replace(spec, sizes=model.sizes))
        entries[spec.file, spec.name] = entry
    return replace(checkpoint, model=model, source=replace(source, specs=specs, entries=entries))


def _of_kept(spec: TensorSpec, entry: Entry, rows: Sequence[Sequence[int]]) -> Entry:
    """Return what a tensor that experts are stacked in has of the kept ones.

    Args:
        spec: what the tensor is of the whole model.
        entry: where it lies.
        rows: for each layer the numbers of its kept experts.
    """
    dimension = next(number for number, axes in enumerate(spec.rule.dimensions) if "expert" in axes)
    height = spec.shape[dimension] // spec.sizes["expert"]  # rows of each expert, which is the outermost of its axes
    if "layer" in spec.box:
        return entry.of_spans(dimension, _spans(rows[spec.box["layer"][0]], height))
    layers = [
        entry.of_spans(0, [(layer, layer + 1)]).of_spans(dimension, _spans(row, height))
        for layer, row in enumerate(rows)
    ]
    chunks = [
        replace(chunk, offset=(layer, *chunk.offset[1:])) for layer, one in enumerate(layers) for chunk in one.chunks
    ]
    return replace(entry, shape=(len(rows), *layers[0].shape[1:]), chunks=tuple(chunks))


def _spans(experts: Sequence[int], height: int) -> list[tuple[int, int]]:
    """Return the first row and the one behind the last of each run of experts that lie side by side."""
    spans: list[tuple[int, int]] = []
    for expert in experts:
        start = expert * height
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, (expert + 1) * height))
    return spans
