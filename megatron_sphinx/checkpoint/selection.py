"""Fewer visual experts than a checkpoint has: what begins a SPHINX-X with the weights of a SPHINX."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_sphinx.checkpoint.formats.accessory import RELEASED
from megatron_sphinx.checkpoint.formats.base import Opened
from megatron_sphinx.checkpoint.stream import Chunk, Entry
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import VISUAL_EXPERTS

_PROJECTION = "visual_proj.0.weight"


def select(opened: Opened, kept: Sequence[str]) -> Opened:
    """A checkpoint of all released experts as one of some of them: the columns of the projection that read these.

    Args:
        opened: the checkpoint.
        kept: names of RELEASED.

    Raises:
        CheckpointError: an expert is unknown, or the checkpoint's projection does not read the released ones.
    """
    if unknown := [name for name in kept if name not in RELEASED]:
        raise CheckpointError(f"--experts: {unknown[0]}: unknown; known: {', '.join(RELEASED)}")
    ranges, at = {}, 0
    for name in RELEASED:
        width = VISUAL_EXPERTS[name].channels if VISUAL_EXPERTS[name].grid else 0
        ranges[name] = (at, at := at + width)
    if opened.model.channels != at:
        raise CheckpointError(
            f"--experts: {opened.folder} projects {opened.model.channels} channels; "
            f"can be chosen from the {at} of {', '.join(RELEASED)}"
        )
    spans = [span for name, span in ranges.items() if name in kept]
    queries = opened.model.queries if "blip2_qformer" in kept else 0
    model = replace(opened.model, channels=sum(stop - start for start, stop in spans), queries=queries)
    if not model.channels:
        raise CheckpointError("--experts: needs at least one expert beside a Q-Former")
    items = [
        replace(item, sizes=model.sizes) for item in opened.source.stored if model.weights.issuperset(item.rule.weights)
    ]
    entries = {(item.file, item.name): opened.source.entries[item.file, item.name] for item in items}
    for item in items:
        if item.rule.weights == (_PROJECTION,):
            entries[item.file, item.name] = _columns(entries[item.file, item.name], spans)
    encoders = {name: found for name, found in opened.encoders.items() if name in {RELEASED[one] for one in kept}}
    return replace(opened, model=model, source=replace(opened.source, stored=items, entries=entries), encoders=encoders)


def _columns(entry: Entry, spans: Sequence[tuple[int, int]]) -> Entry:
    """Columns of a matrix, side by side."""
    added = _columns(entry.added, spans) if entry.added is not None else None
    width = sum(stop - start for start, stop in spans)
    return replace(entry, shape=(entry.shape[0], width), chunks=tuple(_chunks(entry, spans)), added=added)


def _chunks(entry: Entry, spans: Sequence[tuple[int, int]]) -> Iterator[Chunk]:
    at = 0
    for start, stop in spans:
        for chunk in entry.chunks:
            begin = chunk.offset[1]
            first, last = max(start, begin), min(stop, begin + chunk.shape[1])
            if first < last:
                place = chunk.start + (first - begin) * chunk.stride[1] * entry.dtype.itemsize
                offset, shape = (chunk.offset[0], at + first - start), (chunk.shape[0], last - first)
                yield replace(chunk, start=place, offset=offset, shape=shape)
        at += stop - start
