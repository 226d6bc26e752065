"""Rows: pieces of a step laid side by side, as few rows as there can be, of equal cost."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

_LEAST_PIECE = 64  # tokens; a long document is not cut into smaller pieces
_SLACKS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)  # of a row's cost over the mean: what is tried


@dataclass(frozen=True, slots=True)
class Segment:
    """A pair, or a part of a text document: what attention stays inside.

    Attributes:
        is_sample: a pair (or another sample of the first stream), or text.
        item: number of the pair or the document.
        start: first token of a text document in it.
        length: positions it takes.
        tokens: tokens of a caption or a conversation that are kept; tokens of text.
        targets: positions with a target.
        views: numbers of the views of a pair that are encoded.
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
    """Positions that the pieces of some rows take."""
    return sum(piece.length for row in rows for piece in row)


class Packer:
    """Fills rows with pieces: whole ones, and text longer than a row, which is cut where a row is full.

    Args:
        size: positions of a row.
        cost: of one piece of so many positions and targets.
    """

    def __init__(self, size: int, cost: Callable[[int, int], float]) -> None:
        self.size, self.cost, self.least = size, cost, min(_LEAST_PIECE, size)

    def rows(self, pieces: Sequence[Segment], multiple: int) -> tuple[Row, ...]:
        """As few rows as there can be, rounded up to a multiple, of as equal cost as there can be.

        Source of the search for the least bound on a row's cost: MULTIFIT (Coffman, Garey, Johnson 1978).
        """
        whole = sorted((piece for piece in pieces if piece.length <= self.size), key=lambda piece: -piece.length)
        long = [piece for piece in pieces if piece.length > self.size]
        fewest = -(-sum(piece.length for piece in pieces) // self.size)
        found = self._fill(whole, long, fewest, None) or []
        rounded = -(-len(found) // multiple) * multiple
        costs = [self.cost(piece.length, piece.targets) for row in found for piece in row]
        mean = sum(costs) / rounded
        low, high = 0, len(_SLACKS)
        while low < high:
            middle = (low + high) // 2
            even = self._fill(whole, long, rounded, mean * (1 + _SLACKS[middle]))
            if even is None:
                low = middle + 1
            else:
                found, high = even, middle
        return tuple(row for row in found if row)

    def _fill(
        self, whole: Sequence[Segment], long: Sequence[Segment], rows: int, bound: float | None
    ) -> list[Row] | None:
        """Best fit by decreasing length, then the long pieces into what is left.

        Without a bound on the cost of a row there are as many rows as it takes; with one, None where they do not do.
        """
        filling = _Filling(self.size, rows, bound, self.cost(1, 0))
        for piece in whole:
            cost = self.cost(piece.length, piece.targets)
            if (row := filling.best(piece.length, cost)) is None:
                return None
            filling.put(piece, cost, row)
        rest = list(reversed(long))
        while rest:
            if (row := filling.widest()) is None:
                return None
            piece = rest.pop()
            taken = self._most(min(filling.left[row], piece.length), filling.limit - filling.spent[row])
            if taken < min(self.least, piece.length):
                rest.append(piece)  # and the row takes no more
                continue
            head, tail = _cut(piece, taken)
            filling.put(head, self.cost(taken, head.targets), row)
            if tail is not None:
                rest.append(tail)
        return [tuple(row) for row in filling.filled]

    def _most(self, length: int, limit: float) -> int:
        """The most positions, up to `length`, that one piece of text may have to cost no more than `limit`."""
        if self.cost(length, length) <= limit:
            return length
        return bisect_right(range(length), limit, key=lambda taken: self.cost(taken, taken)) - 1


class _Filling:
    """Rows that are being filled.

    Attributes:
        filled: their pieces.
        left: positions that they have left.
        spent: their cost so far.
        limit: of that; what costs more has a row alone.
    """

    def __init__(self, size: int, rows: int, bound: float | None, cost_of_one: float) -> None:
        self.size, self.bound, self.cost_of_one = size, bound, cost_of_one
        self.limit = float("inf") if bound is None else bound
        self.filled: list[list[Segment]] = []
        self.left: list[int] = []
        self.spent: list[float] = []
        self._room: list[tuple[float, int]] = []  # (no more positions than these fit, row), ascending
        for _ in range(rows):
            self._add()

    def _add(self) -> None:
        self._room.append((self.size, len(self.filled)))
        self.filled.append([])
        self.left.append(self.size)
        self.spent.append(0.0)

    def best(self, length: int, cost: float) -> int | None:
        """Take out the fullest row that this fits; None where there is none and their number is bound."""
        place = bisect_left(self._room, (length, 0))
        while place < len(self._room) and 0 < self.spent[self._room[place][1]] > self.limit - cost:
            place += 1
        if place == len(self._room):
            if self.bound is not None:
                return None
            self._add()
        return self._room.pop(place)[1]

    def widest(self) -> int | None:
        """Take out the emptiest row."""
        if not self._room:
            if self.bound is not None:
                return None
            self._add()
        return self._room.pop()[1]

    def put(self, piece: Segment, cost: float, row: int) -> None:
        """Put a piece into a row that has been taken out, and put that back."""
        self.filled[row].append(piece)
        self.left[row] -= piece.length
        self.spent[row] += cost
        most = min(self.left[row], (self.limit - self.spent[row]) / self.cost_of_one)
        if most >= 1:
            insort(self._room, (most, row))


def _cut(piece: Segment, tokens: int) -> tuple[Segment, Segment | None]:
    """The first tokens of a piece of text, and what is left of it."""
    if tokens == piece.tokens:
        return piece, None
    rest = piece.tokens - tokens
    head = replace(piece, length=tokens, tokens=tokens, targets=tokens)
    return head, replace(piece, start=piece.start + tokens, length=rest, tokens=rest, targets=piece.targets - tokens)
