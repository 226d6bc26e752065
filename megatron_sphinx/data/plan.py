"""The plan of a step: which samples, in which rows, on which replica. Computed from sizes, never from the data itself.

The samples and rows of step k are a function of the configuration, the seed and k. The number of replicas decides only
which of them computes which row.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.errors import ConfigError

Lengths = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The two streams and what a step takes of each.

    Attributes:
        pairs: folder of an index of image-text pairs (tools/prepare_pairs.py).
        text: prefix of a token file (tools/prepare_text.py, or Megatron's own).
        tokenizer: the sentencepiece model that both were made with.
        pairs_per_step: image-text pairs in every optimizer step.
        text_tokens_per_step: text tokens in every optimizer step.
        sequence_length: most positions of a row; longer documents are cut, longer captions lose their end.
        micro_batch_rows: most rows that a replica computes at once.
        max_bad_share: the run stops when more than this share of its pairs could not be read.
        isolate_documents: whether attention stays inside each document and pair.
        workers: threads that decode images on a rank.

    Source: SPHINX, arXiv:2311.07575, section 4.1: 640 pairs and 65,536 text tokens a step.
    """

    pairs: str | None = None
    text: str | None = None
    tokenizer: str
    pairs_per_step: int = 640
    text_tokens_per_step: int = 65536
    sequence_length: int = 2048
    micro_batch_rows: int = 1
    max_bad_share: float = 0.05
    isolate_documents: bool = True
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("sequence_length", "micro_batch_rows", "workers"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"data.{name}={value}: must be at least 1")
        for amount, source in (("pairs_per_step", "pairs"), ("text_tokens_per_step", "text")):
            if (value := getattr(self, amount)) < 0:
                raise ConfigError(f"data.{amount}={value}: must be at least 0")
            if value and getattr(self, source) is None:
                raise ConfigError(f"data.{source}: not given, but data.{amount}={value}; give it, or set that to 0")
        if self.pairs_per_step + self.text_tokens_per_step == 0:
            raise ConfigError("data.pairs_per_step=0: data.text_tokens_per_step is 0 too; a step needs one of them")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"data.max_bad_share={self.max_bad_share}: must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class Piece:
    """A pair, or a part of a text document: what attention stays inside.

    Attributes:
        is_pair: a pair, or text.
        item: number of the pair or the document.
        start: first token of a text document in it.
        length: positions it takes.
        tokens: caption tokens of a pair that are kept; tokens of text.
        targets: positions with a target.
        views: views of a pair.
    """

    is_pair: bool
    item: int
    start: int
    length: int
    tokens: int
    targets: int
    views: int


Row = tuple[Piece, ...]


@dataclass(frozen=True)
class StepPlan:
    """The composition of one step.

    Attributes:
        step: counted from 0.
        rows: pieces that lie in one row; the same for every layout.
        micro_batches: [micro-batch][replica] the rows it computes; a replica may have none.
        captions_cut: captions that lost their end to fit.
    """

    step: int
    rows: tuple[Row, ...]
    micro_batches: tuple[tuple[tuple[Row, ...], ...], ...]
    captions_cut: int

    @cached_property
    def pairs(self) -> list[int]:
        """Ids of the step's pairs, in ascending order."""
        return sorted(piece.item for row in self.rows for piece in row if piece.is_pair)

    @cached_property
    def text(self) -> list[tuple[int, int, int]]:
        """(document, first token, tokens) of the step's text."""
        return [(p.item, p.start, p.tokens) for row in self.rows for p in row if not p.is_pair]

    def targets(self, *, of_pairs: bool) -> int:
        """Positions of the step with a target, in one of the streams."""
        return sum(piece.targets for row in self.rows for piece in row if piece.is_pair is of_pairs)

    @cached_property
    def positions(self) -> int:
        """Positions of all rows: tokens of text, and what pairs take."""
        return sum(piece.length for row in self.rows for piece in row)

    @cached_property
    def digest(self) -> str:
        """Identifies the samples of the step: equal exactly where they are."""
        return hashlib.sha256(repr((self.pairs, self.text)).encode()).hexdigest()[:16]


class Shuffled:
    """An endless stream of item numbers: every epoch all of them once, in an order drawn from the seed."""

    def __init__(self, items: int, seed: int, name: str) -> None:
        self.items = items
        self._order = lru_cache(maxsize=2)(self._draw)
        self._key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        return np.random.Generator(np.random.PCG64([self._key, epoch])).permutation(self.items)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The order of one epoch."""
        return self._order(epoch)

    def take(self, start: int, count: int) -> list[int]:
        """Items `start` to `start + count` of the stream."""
        return [int(self.epoch(n // self.items)[n % self.items]) for n in range(start, start + count)]


class TextStream:
    """An endless stream of text tokens: documents in shuffled order, one behind the other."""

    def __init__(self, lengths: Lengths, seed: int) -> None:
        self.lengths = lengths
        self.tokens = int(lengths.sum(dtype=np.int64))
        self._documents = Shuffled(len(lengths), seed, "text")
        self._ends = lru_cache(maxsize=2)(self._cumulate)

    def _cumulate(self, epoch: int) -> NDArray[np.int64]:
        return np.cumsum(self.lengths[self._documents.epoch(epoch)], dtype=np.int64)

    def pieces(self, start: int, count: int) -> Iterator[Piece]:
        """Tokens `start` to `start + count` of the stream, document by document.

        The last token of a piece predicts the document's next token, which may stand in the next piece; only a
        document's own last token predicts nothing.
        """
        while count:
            epoch, here = divmod(start, self.tokens)
            ends = self._ends(epoch)
            place = int(np.searchsorted(ends, here, side="right"))
            document = int(self._documents.epoch(epoch)[place])
            length = int(self.lengths[document])
            first = here - (int(ends[place]) - length)
            taken = min(count, length - first)
            yield Piece(False, document, first, taken, taken, taken - (first + taken == length), 0)
            start, count = start + taken, count - taken


def pack(pieces: Sequence[Piece], size: int) -> list[Row]:
    """Fill rows of at most `size` positions with whole pieces, first fit by decreasing length."""
    rows: list[list[Piece]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -piece.length):
        row = next((i for i, left in enumerate(room) if left >= piece.length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(size)
        rows[row].append(piece)
        room[row] -= piece.length
    return [tuple(row) for row in rows]


class Planner:
    """Plans any step.

    Args:
        config: the streams and their shares.
        caption_lengths: tokens of each pair's caption; None without pairs.
        text_lengths: tokens of each text document; None without text.
        tokens_of_views: positions that the views of a pair take, and how many views there are.
        cost: FLOPs of a row, from the lengths of its pieces; what replicas are balanced by.
        replicas: data-parallel replicas.
        seed: the run's.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        caption_lengths: Lengths | None,
        text_lengths: Lengths | None,
        tokens_of_views: Callable[[int], tuple[int, int]],
        cost: Callable[[Sequence[int]], float],
        replicas: int,
        seed: int,
    ) -> None:
        self.config, self.replicas = config, replicas
        self._caption_lengths, self._tokens_of_views, self._cost = caption_lengths, tokens_of_views, cost
        self._pairs = None if caption_lengths is None else Shuffled(len(caption_lengths), seed, "pairs")
        self._text = None if text_lengths is None else TextStream(text_lengths, seed)
        self.step = lru_cache(maxsize=4)(self._plan)

    def _plan(self, step: int) -> StepPlan:
        pairs, cut = self._plan_pairs(step)
        rows = tuple(pack(pairs, self.config.sequence_length) + self._plan_text(step))
        return StepPlan(step, rows, self._deal(rows), cut)

    def _plan_pairs(self, step: int) -> tuple[list[Piece], int]:
        """The step's pairs, and how many captions were cut to fit a row."""
        if self._pairs is None or self._caption_lengths is None:
            return [], 0
        pieces, cut, count = [], 0, self.config.pairs_per_step
        for pair in self._pairs.take(step * count, count):
            view_tokens, views = self._tokens_of_views(pair)
            wanted = int(self._caption_lengths[pair])
            kept = min(wanted, self.config.sequence_length - view_tokens - 2)  # BOS and EOS
            cut += kept < wanted
            pieces.append(Piece(True, pair, 0, 2 + view_tokens + kept, kept, kept + 1, views))
        return pieces, cut

    def _plan_text(self, step: int) -> list[Row]:
        """The step's text tokens in full rows, the last one as long as what is left."""
        if self._text is None:
            return []
        first, total, size = (
            step * self.config.text_tokens_per_step,
            self.config.text_tokens_per_step,
            self.config.sequence_length,
        )
        return [tuple(self._text.pieces(first + at, min(size, total - at))) for at in range(0, total, size)]

    def _deal(self, rows: Sequence[Row]) -> tuple[tuple[tuple[Row, ...], ...], ...]:
        """Give the rows to micro-batches of replicas: the costliest first, each to the cheapest that has room."""
        most = self.config.micro_batch_rows
        count = -(-len(rows) // (self.replicas * most))
        slots: list[list[Row]] = [[] for _ in range(count * self.replicas)]
        cheapest = [(0.0, slot) for slot in range(len(slots))]
        costs = [self._cost(self.lengths(row)) for row in rows]
        for number in sorted(range(len(rows)), key=lambda number: -costs[number]):
            cost, slot = heapq.heappop(cheapest)
            slots[slot].append(rows[number])
            if len(slots[slot]) < most:
                heapq.heappush(cheapest, (cost + costs[number], slot))
        return tuple(tuple(tuple(slots[m * self.replicas + d]) for d in range(self.replicas)) for m in range(count))

    def lengths(self, row: Row) -> list[int]:
        """Lengths of what attention stays inside: each piece, or the whole row."""
        lengths = [piece.length for piece in row]
        return lengths if self.config.isolate_documents else [sum(lengths)]
