"""From the tensors of one checkpoint to those of another: each source element is used once, each target element set.

That is proven on the boxes before anything is written; the first tensor for which it does not hold is named.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from threading import Lock

import torch
from torch import Tensor

from megatron_sphinx.checkpoint.keymap import Box, Stored, inside, meeting
from megatron_sphinx.checkpoint.stream import Entry, Maps
from megatron_sphinx.errors import CheckpointError

_KEPT = 2  # tensors put together from several chunks that are kept until they have been used


@dataclass
class Source:
    """The tensors to read.

    Attributes:
        title: how messages call it.
        stored: what each is.
        entries: where each is, by file and name.
        maps: reads them.
    """

    title: str
    stored: Sequence[Stored]
    entries: dict[tuple[str, str], Entry]
    maps: Maps = field(default_factory=Maps)

    def check(self) -> None:
        """Compare what is there with what the rules say.

        Raises:
            CheckpointError: a tensor is missing, misshaped, or of no rule; it is named.
        """
        wanted = {(item.file, item.name): item for item in self.stored}
        for place, item in wanted.items():
            if place not in self.entries:
                raise CheckpointError(f"{self.title}: {item.file} holds no {item.name}; give a whole checkpoint")
            if (shape := self.entries[place].shape) != item.shape:
                raise CheckpointError(
                    f"{self.title}: {item.name} in {item.file} has shape {list(shape)}, "
                    f"its configuration says {list(item.shape)}; give files that belong together"
                )
        files = {name: file for file, name in wanted}
        for file, name in self.entries:
            if (file, name) not in wanted and name in files:
                raise CheckpointError(f"{self.title}: {name} is in {files[name]} and in {file}; remove one of them")
            if (file, name) not in wanted:
                raise CheckpointError(f"{self.title}: {file} holds {name}, which no rule of its format knows")


@dataclass(frozen=True, eq=False)
class _Part:
    """What of one weight a source tensor holds."""

    weight: str
    box: Box
    item: Stored


class Conversion:
    """Makes target tensors of source tensors.

    Args:
        source: what is read; `check` has passed.
        target: all tensors to be made.

    Attributes:
        copies: source tensors that another rank's file holds as well, with the one that is used.

    Raises:
        CheckpointError: an element of the source is not used once, or one of the target is not set once.
    """

    def __init__(self, source: Source, target: Iterable[Stored]) -> None:
        self._source = source
        self._parts: dict[str, list[_Part]] = {}
        self._assembled: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._lock = Lock()
        self.copies: list[tuple[Stored, Stored]] = []
        self._index()
        self._prove(target)

    def _index(self) -> None:
        """Note which source tensor holds what; of equal boxes the first one counts."""
        first: dict[tuple[str, tuple[tuple[int, int], ...]], Stored] = {}
        for item in self._source.stored:
            for weight, box, _ in item.parts(torch.empty(item.shape, device="meta")):
                known = first.setdefault((weight, tuple(box.values())), item)
                if known is item:
                    self._parts.setdefault(self._key(weight, box), []).append(_Part(weight, box, item))
                else:
                    self.copies.append((item, known))

    @staticmethod
    def _key(weight: str, box: Box) -> str:
        """Where to look for what meets a box: its weight, and its layer if it lies in one."""
        start, stop = box.get("l", (0, 0))
        return f"{weight} {start}" if stop - start == 1 else weight

    def _meeting(self, weight: str, box: Box) -> Iterator[tuple[Box, "_Part"]]:
        """The parts of the source that meet a box of a weight, and where they do."""
        start, stop = box.get("l", (0, 0))
        for key in [weight, *(f"{weight} {layer}" for layer in range(start, stop))]:
            for part in self._parts.get(key, []):
                if (found := meeting(box, part.box)) is not None:
                    yield found, part

    def _prove(self, target: Iterable[Stored]) -> None:
        used: dict[int, int] = {}
        made: set[tuple[str, tuple[tuple[int, int], ...]]] = set()
        for item in target:
            for weight, box, _ in item.parts(torch.empty(item.shape, device="meta")):
                is_copy = (weight, tuple(box.values())) in made
                made.add((weight, tuple(box.values())))
                missing = _count(box)
                for found, part in self._meeting(weight, box):
                    missing -= _count(found)
                    used[id(part)] = used.get(id(part), 0) + (0 if is_copy else _count(found))
                if missing:
                    what = "twice" if missing < 0 else "nowhere"
                    raise CheckpointError(f"{self._source.title}: holds what {item.name} needs {what} ({weight})")
        for part in (part for parts in self._parts.values() for part in parts):
            if (count := used.get(id(part), 0)) != _count(part.box):
                raise CheckpointError(
                    f"{self._source.title}: {count:,} of the {_count(part.box):,} elements of {part.weight} in "
                    f"{part.item.name} would be used; the formats do not fit each other"
                )

    def make(self, item: Stored, dtype: torch.dtype | None = None) -> Tensor:
        """A target tensor, or a piece of one; rows of padding are zero. Threads may call this side by side.

        Args:
            item: what it is.
            dtype: of its elements; the first source tensor's unless given.
        """
        out = torch.empty(item.shape, dtype=dtype or self.dtype_of(item))
        self.fill(item, out)
        return out

    def fill(self, item: Stored, out: Tensor) -> None:
        """Write a target tensor, or a part of one, into `out`; rows of padding are zero."""
        if "v" in item.box:
            out.zero_()
        for weight, box, view in item.parts(out):
            for found, part in self._meeting(weight, box):
                inside(view, box, found).copy_(inside(self._values(part), part.box, found))

    def dtype_of(self, item: Stored) -> torch.dtype:
        """The type of what a target tensor is made of."""
        weight, box, _ = next(item.parts(torch.empty(item.shape, device="meta")))
        _, part = next(self._meeting(weight, box))
        return self._source.entries[part.item.file, part.item.name].dtype

    def _values(self, part: "_Part") -> Tensor:
        parts = part.item.parts(self._read(part.item))
        return next(values for weight, _, values in parts if weight == part.weight)

    def _read(self, item: Stored) -> Tensor:
        place = (item.file, item.name)
        entry = self._source.entries[place]
        if entry.is_view:
            return self._source.maps.read(entry)
        with self._lock:
            if place not in self._assembled:
                while len(self._assembled) >= _KEPT:
                    self._assembled.popitem(last=False)
                self._assembled[place] = self._source.maps.read(entry)
            self._assembled.move_to_end(place)
            return self._assembled[place]

    def release(self) -> None:
        """Give back the memory of what this thread has read."""
        self._source.maps.release()

    def differing_copies(self) -> Iterator[tuple[Stored, float]]:
        """Copies in other ranks' files that differ from the one that is used, with the most they differ by."""
        for item, known in self.copies:
            one, other = (self._source.maps.read(self._source.entries[i.file, i.name]) for i in (item, known))
            if not torch.equal(one, other):
                yield item, float((one.double() - other.double()).abs().max())
            self.release()


def _count(box: Box) -> int:
    return prod(stop - start for start, stop in box.values())
