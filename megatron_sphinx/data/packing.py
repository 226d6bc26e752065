"""Rows: segments of a step laid side by side, as few rows as there can be, of equal cost."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

_LEAST_SEGMENT = 64  # tokens; a long document is not cut into smaller segments
_SLACKS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)  # of a row's cost over the mean: what is tried


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a sample or of a text document that stands in a row; attention stays inside it.

    Attributes:
        is_sample: whether it belongs to a sample (a pair or a conversation), or else to a text document.
        item: number of the sample or the document.
        start: first token of the segment in its text document; 0 for samples.
        length: positions that it takes in the row.
        tokens: tokens of a caption or a conversation that are kept; tokens of text.
        targets: positions with a target.
        views: numbers of the views of a sample that are encoded.
    """

    is_sample: bool
    item: int
    start: int
    length: int
    tokens: int
    targets: int
    views: tuple[int, ...] = ()


Row = tuple[Segment, ...]


def positions(rows: Sequence[Row]) -> int:
    """Return how many positions the segments of some rows take."""
    return sum(segment.length for row in rows for segment in row)


class Packer:
    """Fills rows with segments; text that is longer than a row is cut where a row is full.

    Args:
        size: positions of a row.
        cost: gives the cost of one segment for its positions and targets.
        cuts_parts: whether a part of a document is cut too where that fills a row, though it would fit one.
    """

    def __init__(self, size: int, cost: Callable[[int, int], float], *, cuts_parts: bool) -> None:
        self.size, self.cost, self.cuts_parts, self.least = size, cost, cuts_parts, min(_LEAST_SEGMENT, size)

    def rows(self, segments: Sequence[Segment], multiple: int) -> tuple[Row, ...]:
        """Pack segments into the fewest rows, rounded up to a multiple, and make their costs as equal as can be.

        Source of the search for the least bound on a row's cost: MULTIFIT (Coffman, Garey, Johnson 1978).
        """
        long = [each for each in segments if self._may_be_cut(each)]
        whole = sorted((each for each in segments if not self._may_be_cut(each)), key=lambda segment: -segment.length)
        fewest = -(-sum(segment.length for segment in segments) // self.size)
        rows = self._fill(whole, long, fewest, None) or []
        rounded = -(-len(rows) // multiple) * multiple
        costs = [self.cost(segment.length, segment.targets) for row in rows for segment in row]
        mean = sum(costs) / rounded
        low, high = 0, len(_SLACKS)
        while low < high:
            middle = (low + high) // 2
            even = self._fill(whole, long, rounded, mean * (1 + _SLACKS[middle]))
            if even is None:
                low = middle + 1
            else:
                rows, high = even, middle
        return tuple(row for row in rows if row)

    def _may_be_cut(self, segment: Segment) -> bool:
        """Tell whether a segment is text that has to be cut, or may be since it is a part of its document already."""
        if segment.is_sample or not self.cuts_parts:
            return segment.length > self.size
        is_part = segment.start > 0 or segment.targets == segment.tokens
        return is_part or segment.length >= self.size

    def _fill(
        self, whole: Sequence[Segment], long: Sequence[Segment], rows: int, bound: float | None
    ) -> list[Row] | None:
        """Fill rows with the whole segments by best fit, longest first, then with the long ones where room is left.

        Args:
            whole: segments that fit a row, longest first.
            long: segments of text that may be cut.
            rows: how many rows there are at first.
            bound: on the cost of a row; without one, rows are added as they are needed.

        Returns:
            The rows; None where there is a bound and so many rows are not enough.
        """
        filling = _Filling(self.size, rows, bound, self.cost(1, 0))
        for segment in whole:
            cost = self.cost(segment.length, segment.targets)
            if (row := filling.best(segment.length, cost)) is None:
                return None
            filling.put(segment, cost, row)
        rest = list(reversed(long))
        while rest:
            if (row := filling.widest()) is None:
                return None
            segment = rest.pop()
            taken = self._affordable(min(filling.left[row], segment.length), filling.limit - filling.spent[row])
            if taken < min(self.least, segment.length):
                rest.append(segment)  # the row is not put back, so it takes no more
                continue
            head, tail = _cut(segment, taken)
            filling.put(head, self.cost(taken, head.targets), row)
            if tail is not None:
                rest.append(tail)
        return [tuple(row) for row in filling.filled]

    def _affordable(self, length: int, limit: float) -> int:
        """Return the most positions, up to `length`, that a segment of text may have to cost no more than `limit`."""
        if self.cost(length, length) <= limit:
            return length
        return bisect_right(range(length), limit, key=lambda taken: self.cost(taken, taken)) - 1


class _Filling:
    """Rows while they are being filled.

    Attributes:
        filled: segments of each row.
        left: positions that are left in each row.
        spent: cost of each row so far.
        limit: on the cost of a row; a segment that costs more by itself has a row alone.
    """

    def __init__(self, size: int, rows: int, bound: float | None, cost_of_one: float) -> None:
        self.size, self.bound, self.cost_of_one = size, bound, cost_of_one
        self.limit = float("inf") if bound is None else bound
        self.filled: list[list[Segment]] = []
        self.left: list[int] = []
        self.spent: list[float] = []
        self._room: list[tuple[float, int]] = []  # (positions that fit at most, row), ascending, of rows not taken out
        for _ in range(rows):
            self._add()

    def _add(self) -> None:
        self._room.append((self.size, len(self.filled)))
        self.filled.append([])
        self.left.append(self.size)
        self.spent.append(0.0)

    def best(self, length: int, cost: float) -> int | None:
        """Take out the fullest row that a segment fits; None where there is none and no row may be added."""
        index = bisect_left(self._room, (length, 0))
        while index < len(self._room) and 0 < self.spent[self._room[index][1]] > self.limit - cost:
            index += 1
        if index == len(self._room):
            if self.bound is not None:
                return None
            self._add()
        return self._room.pop(index)[1]

    def widest(self) -> int | None:
        """Take out the emptiest row; None where there is none and no row may be added."""
        if not self._room:
            if self.bound is not None:
                return None
            self._add()
        return self._room.pop()[1]

    def put(self, segment: Segment, cost: float, row: int) -> None:
        """Put a segment into a row that has been taken out, and put the row back where it has room left."""
        self.filled[row].append(segment)
        self.left[row] -= segment.length
        self.spent[row] += cost
        room = min(self.left[row], (self.limit - self.spent[row]) / self.cost_of_one)
        if room >= 1:
            insort(self._room, (room, row))


def _cut(segment: Segment, tokens: int) -> tuple[Segment, Segment | None]:
    """Divide a segment of text into its first tokens and the rest; there is no rest where it has no more."""
    if tokens == segment.tokens:
        return segment, None
    rest, targets = segment.tokens - tokens, segment.targets - tokens
    head = replace(segment, length=tokens, tokens=tokens, targets=tokens)
    return head, replace(segment, start=segment.start + tokens, length=rest, tokens=rest, targets=targets)


def views_in(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return the views of a micro-batch as (sample, number of the view), in the order in which its MicroBatch has them.

    That order is ascending, so encoder ranks and language ranks agree on it without a message.
    """
    samples = sorted((segment.item, segment.views) for row in rows for segment in row if segment.is_sample)
    return [(sample, view) for sample, views in samples for view in views]
