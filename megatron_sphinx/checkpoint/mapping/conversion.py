"""From the tensors of one checkpoint to those of another: each source element is used once, each target element set.

That is proven on the boxes before anything is written; the first tensor for which it does not hold is named.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np

from megatron_sphinx.checkpoint.mapping.axes import Box, intersect
from megatron_sphinx.checkpoint.mapping.rules import TensorSpec
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.settings.keys import shown
from megatron_sphinx.tensors.dtypes import Array, bits, convert, converted, is_floating, promoted
from megatron_sphinx.tensors.entries import Entry, MappedFiles
from megatron_sphinx.tensors.layout import Layout, places, runs

_LEAST_RUN = 2**15  # elements in a row that are worth being read by themselves
_ASSEMBLED = 2  # tensors put together from several chunks that are kept until they have been used


@dataclass
class TensorSource:
    """The tensors that a conversion reads.

    Attributes:
        title: how messages call it.
        specs: what each tensor is.
        entries: where each tensor lies, by file and name; a tensor that has two meanings lies there under two names.
        maps: the files that they are read from.
    """

    title: str
    specs: Sequence[TensorSpec]
    entries: dict[tuple[str, str], Entry]
    maps: MappedFiles = field(default_factory=MappedFiles)

    @property
    def stored(self) -> dict[tuple[str, str], Entry]:
        """The entries, each tensor once, under the first of its names."""
        first = {id(entry): key for key, entry in reversed(self.entries.items())}
        return {key: entry for key, entry in self.entries.items() if first[id(entry)] == key}

    def check(self) -> None:
        """Compare the tensors that are there with what the rules say.

        Raises:
            CheckpointError: a tensor is missing, misshaped, or of no rule; it is named.
        """
        for (file, name), entry in self.entries.items():
            if not is_floating(entry.dtype):
                raise CheckpointError(
                    f"{self.title}: {shown(name)} in {file} is of type {entry.dtype}; "
                    f"give a checkpoint that is not quantized"
                )
        expected = {(spec.file, spec.name): spec for spec in self.specs}
        for key, spec in expected.items():
            if key not in self.entries:
                raise CheckpointError(f"{self.title}: {spec.file} holds no {spec.name}; give a whole checkpoint")
            if (shape := self.entries[key].shape) != spec.shape:
                raise CheckpointError(
                    f"{self.title}: {spec.name} in {spec.file} has shape {list(shape)}, "
                    f"its configuration says {list(spec.shape)}; give files that belong together"
                )
        files = {name: file for file, name in expected}
        for file, name in self.entries:
            if (file, name) not in expected and name in files:
                raise CheckpointError(
                    f"{self.title}: {shown(name)} is in {files[name]} and in {file}; remove one of them"
                )
            if (file, name) not in expected:
                raise CheckpointError(f"{self.title}: {file} holds {shown(name)}, which no rule of its format knows")


@dataclass(frozen=True, eq=False)
class _Region:
    """What a source tensor holds of one weight."""

    weight: str
    box: Box
    spec: TensorSpec


@dataclass(frozen=True)
class Run:
    """Elements that lie in a row both in a file of the source and in a target tensor.

    Attributes:
        path: the file.
        start: where they begin in it, in bytes.
        dtype: their type.
        place: the first of them in the target tensor.
        count: how many they are.
    """

    path: Path
    start: int
    dtype: np.dtype
    place: int
    count: int


class Conversion:
    """Makes target tensors of source tensors.

    Args:
        source: what is read; its `check` has passed.
        targets: all tensors to be made.

    Attributes:
        copies: source tensors that another rank's file holds as well, with the one that is used.

    Raises:
        CheckpointError: an element of the source is not used once, or one of the target is not set once.
    """

    def __init__(self, source: TensorSource, targets: Iterable[TensorSpec]) -> None:
        self._source = source
        self._regions: dict[str, list[_Region]] = {}
        self._assembled: OrderedDict[tuple[str, str], Array] = OrderedDict()
        self._lock = Lock()
        self.copies: list[tuple[TensorSpec, TensorSpec]] = []
        self._index()
        self._prove(targets)

    def _index(self) -> None:
        """Note which source tensor holds what; of equal boxes the first one counts."""
        first: dict[tuple[str, tuple[tuple[int, int], ...]], TensorSpec] = {}
        for spec in self._source.specs:
            for weight, box, _ in spec.regions():
                known = first.setdefault((weight, tuple(box.values())), spec)
                if known is spec:
                    self._regions.setdefault(self._key(weight, box), []).append(_Region(weight, box, spec))
                else:
                    self.copies.append((spec, known))

    @staticmethod
    def _key(weight: str, box: Box) -> str:
        """Where to look for what overlaps a box: its weight, and its layer if it lies in one."""
        start, stop = box.get("layer", (0, 0))
        return f"{weight} {start}" if stop - start == 1 else weight

    def _overlapping(self, weight: str, box: Box) -> Iterator[tuple[Box, _Region]]:
        """The regions of the source that overlap a box of a weight, and where they do."""
        start, stop = box.get("layer", (0, 0))
        for key in [weight, *(f"{weight} {layer}" for layer in range(start, stop))]:
            for region in self._regions.get(key, []):
                if (overlap := intersect(box, region.box)) is not None:
                    yield overlap, region

    def _prove(self, targets: Iterable[TensorSpec]) -> None:
        used: dict[int, int] = {}
        made: set[tuple[str, tuple[tuple[int, int], ...]]] = set()
        for spec in targets:
            for weight, box, _ in spec.regions():
                is_copy = (weight, tuple(box.values())) in made
                made.add((weight, tuple(box.values())))
                missing = _elements(box)
                for overlap, region in self._overlapping(weight, box):
                    missing -= _elements(overlap)
                    used[id(region)] = used.get(id(region), 0) + (0 if is_copy else _elements(overlap))
                if missing:
                    times = "twice" if missing < 0 else "nowhere"
                    raise CheckpointError(f"{self._source.title}: holds what {spec.name} needs {times} ({weight})")
        for region in (region for regions in self._regions.values() for region in regions):
            if (count := used.get(id(region), 0)) != _elements(region.box):
                raise CheckpointError(
                    f"{self._source.title}: {count:,} of the {_elements(region.box):,} elements of {region.weight} in "
                    f"{region.spec.name} would be used; the formats do not fit each other"
                )

    def make(self, spec: TensorSpec, dtype: np.dtype | None = None) -> Array:
        """Make a target tensor, or a piece of one; rows of padding are zero. Threads may call this side by side.

        Args:
            spec: what it is.
            dtype: type of its elements; one that holds all that it is made of unless given.
        """
        out = np.empty(spec.shape, dtype or self.dtype_of(spec))
        self.fill(spec, out)
        return out

    def fill(self, spec: TensorSpec, out: Array) -> None:
        """Write a target tensor, or a piece of one, into `out`; rows of padding are zero."""
        if "vocabulary" in spec.box:
            bits(out)[...] = 0
        for weight, box, layout in spec.regions(Layout.of_array(out)):
            for overlap, region in self._overlapping(weight, box):
                convert(self._part(region, overlap), _crop(layout, box, overlap).view(out))

    def _part(self, region: _Region, overlap: Box) -> Array:
        """What a region of the source holds of a box."""
        entry = self._source.entries[region.spec.file, region.spec.name]
        if entry.is_view:
            (chunk,) = entry.chunks
            held = _crop(self._region_in(region, Layout(0, chunk.shape, chunk.stride)), region.box, overlap)
            return self._source.maps.part(chunk, entry.dtype, held)
        whole = self._assemble(region.spec)
        return _crop(self._region_in(region, Layout.of_array(whole)), region.box, overlap).view(whole)

    def runs_of(self, spec: TensorSpec) -> list[Run] | None:
        """List the runs that a target tensor is made of, in the order of their places; between them are zeros.

        Returns:
            The runs; None where they are so short that the tensor had better be made of pieces.
        """
        found: list[Run] = []
        for weight, box, layout in spec.regions():
            for overlap, region in self._overlapping(weight, box):
                entry = self._source.entries[region.spec.file, region.spec.name]
                if not entry.is_view:
                    return None
                (chunk,) = entry.chunks
                source = self._region_in(region, Layout(0, chunk.shape, chunk.stride))
                source, target = _crop(source, region.box, overlap), _crop(layout, box, overlap)
                number, count = runs(source, target)
                if number > 1 and count < _LEAST_RUN:
                    return None
                found += [
                    Run(chunk.path, chunk.start + first * entry.dtype.itemsize, entry.dtype, second, count)
                    for first, second in places(source, target)
                ]
        return sorted(found, key=lambda run: run.place)

    def dtype_of(self, spec: TensorSpec) -> np.dtype:
        """Return the type that holds all elements of what a target tensor is made of."""
        dtypes = {
            self._source.entries[region.spec.file, region.spec.name].dtype
            for weight, box, _ in spec.regions()
            for _, region in self._overlapping(weight, box)
        }
        return promoted(dtypes)

    @staticmethod
    def _region_in(region: _Region, layout: Layout) -> Layout:
        """How a region of a source tensor lies where the tensor has a layout."""
        return next(inner for weight, _, inner in region.spec.regions(layout) if weight == region.weight)

    def _assemble(self, spec: TensorSpec) -> Array:
        """A tensor in memory that does not lie in its file as one."""
        key = (spec.file, spec.name)
        with self._lock:
            if key not in self._assembled:
                while len(self._assembled) >= _ASSEMBLED:
                    self._assembled.popitem(last=False)
                self._assembled[key] = self._source.maps.read(self._source.entries[key])
            self._assembled.move_to_end(key)
            return self._assembled[key]

    def release(self, kept: int = 0) -> None:
        """Give back the memory of what this thread has read, but for so many bytes, or one tensor."""
        self._source.maps.release(kept)

    def differing_copies(self) -> Iterator[tuple[TensorSpec, float]]:
        """List copies in other ranks' files that differ from the one that is used, with the most they differ by."""
        for spec, used in self.copies:
            one, other = (self._source.maps.read(self._source.entries[item.file, item.name]) for item in (spec, used))
            if not np.array_equal(bits(one), bits(other)) or one.dtype != other.dtype:
                wide = np.dtype(np.float64)
                most = np.abs(converted(one, wide) - converted(other, wide)).max()
                if most != 0:  # or is not a number
                    yield spec, float(most)
            self.release()


def _crop(layout: Layout, box: Box, inner: Box) -> Layout:
    """Cut a box that lies inside another one out of the layout of that one."""
    for dimension, (axis, (start, stop)) in enumerate(inner.items()):
        layout = layout.narrowed(dimension, start - box[axis][0], stop - start)
    return layout


def _elements(box: Box) -> int:
    return prod(stop - start for start, stop in box.values())
