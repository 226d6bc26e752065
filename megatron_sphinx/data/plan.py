"""The plan of a step: which samples, in which rows, on which replica. Computed from sizes, never from the data itself.

The samples and rows of step k are a function of the configuration, the seed and k. The number of replicas decides only
which of them computes which row.
"""

import hashlib
import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data.packing import Packer, Row, Segment, positions
from megatron_sphinx.data.shuffle import Numbers, Shuffle, Window, key_of
from megatron_sphinx.errors import ConfigError

PAIR_BLOCK, PAIR_WINDOW = 1024, 64  # pairs come from 64 runs of up to 1,024 neighbours at a time
TEXT_BLOCK, TEXT_WINDOW = 2**20, 16  # text from 16 runs of up to 1,048,576 tokens


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One source of prepared data, and its share of its stream.

    Attributes:
        path: folder of prepared pairs, conversations or text; for text also the prefix of Megatron's .bin and .idx.
        weight: share of the stream's samples or tokens that this source gives, beside the weights of the others; above
            0. With null for all sources they are one, and each gives what it has.
    """

    path: str
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ConfigError(f"data: weight={self.weight} of {self.path}: must be more than 0")

    @classmethod
    def from_text(cls, path: str) -> "DataSource":
        """A source that is given by its path alone."""
        return cls(path=path)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The two streams, of samples and of text, and what a step takes of each.

    Attributes:
        pairs: folders of image-text pairs made by `megatron-sphinx prepare pairs`: one path, or a list of paths or of
            {path, weight}.
        conversations: folders of conversations made by `megatron-sphinx prepare conversations`, given as those of
            data.pairs are, and instead of them.
        text: folders of text made by `megatron-sphinx prepare text`, or prefixes of Megatron's .bin and .idx, given as
            the folders of data.pairs are.
        tokenizer: file of the sentencepiece model that all of the data was made with.
        pairs_per_step (pairs): image-text pairs in every optimizer step; 0 for a run without pairs.
        conversations_per_step (conversations): conversations in every optimizer step, with an image or without; 0 for
            a run without conversations.
        text_tokens_per_step (tokens): text tokens in every optimizer step; 0 for a run without text.
        sequence_length (positions): the most positions of a row; longer documents are cut in consecutive segments,
            longer captions lose their end, longer conversations their last turns.
        row_multiple (rows): number that the rows of a step are a multiple of. The rows are of equal cost, so any number
            of replicas that divides it has even work; 1 takes as few rows as there can be. Long documents are cut where
            a row has its share of the cost, so let it be small beside the number of rows.
        micro_batch_rows (rows): the most rows that a replica computes at once; at least 1.
        max_bad_share: share of the samples, from 0 to 1; the run stops when more than that could not be read.
        isolate_documents: whether attention stays inside each document and sample (true) or goes over the whole row.
        workers (threads): how many threads read and decode images on a rank; where shards are behind a URL, take
            several for each core.

    Source: SPHINX, arXiv:2311.07575, section 4.1: 640 pairs and 65,536 text tokens a step.
    """

    pairs: tuple[DataSource, ...] = ()
    conversations: tuple[DataSource, ...] = ()
    text: tuple[DataSource, ...] = ()
    tokenizer: str
    pairs_per_step: int = 640
    conversations_per_step: int = 0
    text_tokens_per_step: int = 65536
    sequence_length: int = 2048
    row_multiple: int = 8
    micro_batch_rows: int = 1
    max_bad_share: float = 0.05
    isolate_documents: bool = True
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("sequence_length", "row_multiple", "micro_batch_rows", "workers"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"data.{name}={value}: must be at least 1")
        for amount, name in _AMOUNTS.items():
            value, sources = getattr(self, amount), getattr(self, name)
            if value < 0:
                raise ConfigError(f"data.{amount}={value}: must be at least 0")
            if value and not sources:
                raise ConfigError(f"data.{name}: not given, but data.{amount}={value}; give it, or set that to 0")
            if len({source.weight is None for source in sources}) > 1:
                raise ConfigError(f"data.{name}: some of the sources have no weight; give one to all, or to none")
        if self.pairs_per_step and self.conversations_per_step:
            raise ConfigError(
                f"data.conversations_per_step={self.conversations_per_step}: data.pairs_per_step={self.pairs_per_step} "
                f"too; a run takes one of them: set the other to 0"
            )
        if not any(getattr(self, amount) for amount in _AMOUNTS):
            raise ConfigError(
                "data.pairs_per_step=0: data.conversations_per_step and data.text_tokens_per_step are 0 too; "
                "a step needs one of them"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"data.max_bad_share={self.max_bad_share}: must be between 0 and 1")

    @property
    def samples(self) -> tuple[DataSource, ...]:
        """Where pairs or conversations come from, whichever the run takes."""
        return self.conversations if self.conversations_per_step else self.pairs

    @property
    def samples_per_step(self) -> int:
        """Pairs or conversations in every optimizer step."""
        return self.conversations_per_step or self.pairs_per_step


_AMOUNTS = {"pairs_per_step": "pairs", "conversations_per_step": "conversations", "text_tokens_per_step": "text"}


class _Columns:
    """A dataclass of arrays of one length."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __getitem__(self, which: Numbers) -> Self:
        return type(self)(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """All parts, in their order."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class SampleSizes(_Columns):
    """Sizes of some pairs: of the image (0 without one), tokens, and positions with a target; integers [pairs]."""

    width: NDArray[Any]
    height: NDArray[Any]
    tokens: NDArray[Any]
    targets: NDArray[Any]


class SampleSource(Protocol):
    """What planning asks of the pairs of all sources, which are numbered one source behind the other."""

    @property
    def bounds(self) -> Sequence[int]:
        """First pair of each source, and how many there are."""

    def sizes(self, first: int, last: int) -> SampleSizes:
        """Sizes of neighbouring pairs."""

    def cut(self, pair: int, most: int) -> tuple[int, int]:
        """Tokens that are kept of a pair with more than `most`, and positions with a target then."""


@dataclass(frozen=True)
class Runs(_Columns):
    """Neighbouring tokens of documents: which document, its first token among them, how many, whether they end it."""

    document: Numbers
    start: Numbers
    length: Numbers
    is_end: NDArray[np.bool_]


class TextSource(Protocol):
    """What planning asks of the text of all sources; tokens and documents are numbered one source behind the other."""

    @property
    def bounds(self) -> Sequence[int]:
        """First token of each source, and how many there are."""

    def runs(self, first: int, last: int) -> Runs:
        """The documents, or parts of them, that tokens `first` to `last` are of; none is empty."""


@dataclass(frozen=True)
class StepPlan:
    """The composition of one step.

    Attributes:
        step: counted from 0.
        rows: pieces that lie in one row; the same for every layout.
        micro_batches: [micro-batch][replica] the rows it computes; a replica may have none.
        captions_cut: captions and conversations that lost their end to fit.
        fill: share of the rows' capacity that is used; nothing is computed for the rest.
        imbalance: cost of the costliest replica over the mean of all.
        padding_share: share of the computed positions that belong to no piece.
    """

    step: int
    rows: tuple[Row, ...]
    micro_batches: tuple[tuple[tuple[Row, ...], ...], ...]
    captions_cut: int
    fill: float
    imbalance: float
    padding_share: float

    @cached_property
    def pairs(self) -> list[int]:
        """Ids of the step's pairs, in ascending order."""
        return sorted(piece.item for row in self.rows for piece in row if piece.is_sample)

    @cached_property
    def text(self) -> list[tuple[int, int, int]]:
        """(document, first token, tokens) of the step's text, in ascending order."""
        return sorted((p.item, p.start, p.tokens) for row in self.rows for p in row if not p.is_sample)

    def targets(self, *, of_pairs: bool) -> int:
        """Positions of the step with a target, in one of the streams."""
        return sum(piece.targets for row in self.rows for piece in row if piece.is_sample is of_pairs)

    @cached_property
    def positions(self) -> int:
        """Positions of all rows: tokens of text, and what pairs take."""
        return positions(self.rows)

    @cached_property
    def digest(self) -> str:
        """Identifies the samples of the step: equal exactly where they are."""
        return hashlib.sha256(repr((self.pairs, self.text)).encode()).hexdigest()[:16]


class Mixture:
    """How much each source gives a stream.

    After any number of steps each source but the heaviest has given its share of all, rounded down to a whole pair or
    token; that one gives what is left.

    Args:
        bounds: where each source begins among all, and how many there are.
        weights: of the sources; None where each gives what it has: then they are one source.
        amount: what all give together in a step.
        key: what the stream is called in the configuration.

    Raises:
        ConfigError: too many sources for so small an amount.
    """

    def __init__(self, bounds: Sequence[int], weights: Sequence[float | None], amount: int, key: str) -> None:
        known = [Fraction(str(weight)) for weight in weights if weight is not None] or [Fraction(1)]
        self.spans = list(pairwise(bounds)) if len(known) > 1 else [(bounds[0], bounds[-1])]
        self.amount, self._shares = amount, [weight / sum(known) for weight in known]
        self._heaviest = max(range(len(known)), key=lambda source: self._shares[source])
        if 0 < amount < len(known) / self._shares[self._heaviest]:
            raise ConfigError(f"data.{key}={amount}: too few for {len(known)} weighted sources; take more, or fewer")

    def given(self, steps: int) -> list[int]:
        """What each source has given after so many steps."""
        total = steps * self.amount
        parts = [int(total * share) for share in self._shares]
        parts[self._heaviest] += total - sum(parts)
        return parts

    def parts(self, step: int) -> Iterator[tuple[int, int, int]]:
        """(source, where in its own order, how many) a step takes."""
        for source, (before, after) in enumerate(zip(self.given(step), self.given(step + 1), strict=True)):
            if after > before:
                yield source, before, after - before


class _Stream(ABC):
    """One source in shuffled order; what a window holds is read block by block, so in few long runs, and kept."""

    def __init__(self, first: int, shuffle: Shuffle) -> None:
        self._first, self._shuffle = first, shuffle
        self._open = lru_cache(maxsize=2)(self._read)

    @abstractmethod
    def _read(self, epoch: int, number: int) -> Any:
        """What a window holds."""

    def _blocks(self, window: Window) -> list[tuple[int, int]]:
        """Begin and end of a window's blocks among all items of all sources."""
        begins = window.begins + self._first
        return list(zip(begins.tolist(), (begins + window.sizes).tolist(), strict=True))


class SampleStream(_Stream):
    """An endless stream of the pairs of one source."""

    def __init__(self, pairs: SampleSource, span: tuple[int, int], key: int) -> None:
        self._pairs = pairs
        super().__init__(span[0], Shuffle(span[1] - span[0], block=PAIR_BLOCK, window=PAIR_WINDOW, key=key))

    def _read(self, epoch: int, number: int) -> tuple[Window, SampleSizes]:
        """A window, and the sizes of its pairs."""
        window = self._shuffle.open(epoch, number)
        return window, SampleSizes.joined([self._pairs.sizes(begin, end) for begin, end in self._blocks(window)])

    def take(self, start: int, count: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(pair, width, height, tokens, targets) of pairs `start` to `start + count` of the stream."""
        for epoch, number, first, taken in self._shuffle.spans(start, count):
            window, sizes = self._open(epoch, number)
            drawn = window.draw(np.arange(first, first + taken, dtype=np.int64))
            found = sizes[drawn]
            pairs = window.item(drawn) + self._first
            columns = (pairs, found.width, found.height, found.tokens, found.targets)
            yield from zip(*(column.tolist() for column in columns), strict=True)


class TextStream(_Stream):
    """An endless stream of the text tokens of one source, by whole documents.

    Only where a block of the shuffle ends is a document divided in two; its parts then come apart.
    """

    def __init__(self, text: TextSource, span: tuple[int, int], key: int) -> None:
        self._text = text
        super().__init__(span[0], Shuffle(span[1] - span[0], block=TEXT_BLOCK, window=TEXT_WINDOW, key=key))

    def _read(self, epoch: int, number: int) -> tuple[Runs, Numbers]:
        """The documents of a window in their order, and where each ends."""
        window = self._shuffle.open(epoch, number)
        runs = Runs.joined([self._text.runs(begin, end) for begin, end in self._blocks(window)])
        runs = runs[window.order(len(runs.document))]
        return runs, np.cumsum(runs.length)

    def pieces(self, start: int, count: int) -> Iterator[Segment]:
        """Tokens `start` to `start + count` of the stream, document by document.

        The last token of a piece predicts the document's next token, which may stand in another piece; only a
        document's own last token predicts nothing.
        """
        for epoch, number, first, taken in self._shuffle.spans(start, count):
            runs, ends = self._open(epoch, number)
            last = first + taken
            for at in range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "left")) + 1):
                length, end = int(runs.length[at]), int(ends[at])
                skipped = max(first - (end - length), 0)
                begin, stop = int(runs.start[at]) + skipped, int(runs.start[at]) + length - max(end - last, 0)
                tokens, is_end = stop - begin, bool(runs.is_end[at]) and end <= last
                yield Segment(False, int(runs.document[at]), begin, tokens, tokens, tokens - is_end)


class Planner:
    """Plans any step.

    Args:
        config: the streams and their shares.
        pairs: sizes of the pairs; None without pairs.
        text: the documents; None without text.
        tokens_of_views: of an image's width and height: positions that it takes, and its views that are encoded.
        cost: FLOPs of a row, from the lengths of what attention stays inside and its number of targets; what rows and
            replicas are balanced by.
        replicas: data-parallel replicas.
        seed: the run's.
        multiple: of what the positions of a replica's micro-batch must be; padding makes it so.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        pairs: SampleSource | None,
        text: TextSource | None,
        tokens_of_views: Callable[[int, int], tuple[int, tuple[int, ...]]],
        cost: Callable[[Sequence[int], int], float],
        replicas: int,
        seed: int,
        multiple: int = 1,
    ) -> None:
        self.config, self.replicas, self.multiple = config, replicas, multiple
        self._pairs, self._tokens_of_views = pairs, lru_cache(maxsize=4096)(tokens_of_views)
        self._cost = lru_cache(maxsize=65536)(cost)
        self._packer = Packer(
            config.sequence_length, self._cost_of_piece if config.isolate_documents else lambda length, _: float(length)
        )
        if pairs is not None:
            weights = [source.weight for source in config.samples]
            name = "conversations_per_step" if config.conversations_per_step else "pairs_per_step"
            self._pair_mixture = Mixture(pairs.bounds, weights, config.samples_per_step, name)
            self._pair_streams = [
                SampleStream(pairs, span, key_of(seed, "pairs", source))
                for source, span in enumerate(self._pair_mixture.spans)
            ]
        self._text_streams: list[TextStream] = []
        if text is not None:
            weights = [source.weight for source in config.text]
            self._text_mixture = Mixture(text.bounds, weights, config.text_tokens_per_step, "text_tokens_per_step")
            self._text_streams = [
                TextStream(text, span, key_of(seed, "text", source))
                for source, span in enumerate(self._text_mixture.spans)
            ]
        self.step = lru_cache(maxsize=4)(self._plan)

    def _plan(self, step: int) -> StepPlan:
        pairs, cut = self._plan_pairs(step)
        rows = self._packer.rows([*pairs, *self._plan_text(step)], self.config.row_multiple)
        replicas = self._deal(rows)
        most = self.config.micro_batch_rows
        count = -(-max(map(len, replicas)) // most)
        micro_batches = tuple(tuple(mine[n * most : (n + 1) * most] for mine in replicas) for n in range(count))
        costs = [sum(map(self.cost, mine)) for mine in replicas]
        used = [positions(mine) for micro in micro_batches for mine in micro]
        return StepPlan(
            step=step,
            rows=rows,
            micro_batches=micro_batches,
            captions_cut=cut,
            fill=positions(rows) / (len(rows) * self.config.sequence_length),
            imbalance=max(costs) * len(costs) / sum(costs),
            padding_share=(padding := sum(-n % self.multiple if n else self.multiple for n in used))
            / (padding + sum(used)),
        )

    def _plan_pairs(self, step: int) -> tuple[list[Segment], int]:
        """The step's pairs, and how many captions were cut to fit a row."""
        if self._pairs is None:
            return [], 0
        parts = (
            self._pair_streams[source].take(start, count) for source, start, count in self._pair_mixture.parts(step)
        )
        pieces, cut = [], 0
        for pair, width, height, tokens, targets in chain.from_iterable(parts):
            view_tokens, views = self._tokens_of_views(width, height) if width else (0, ())
            most = self.config.sequence_length - view_tokens - 2  # BOS and EOS
            if tokens > most:
                tokens, targets = self._pairs.cut(pair, most)
                cut += 1
            pieces.append(Segment(True, pair, 0, 2 + view_tokens + tokens, tokens, targets, views))
        return pieces, cut

    def _plan_text(self, step: int) -> Iterator[Segment]:
        """The step's text tokens."""
        if self._text_streams:
            for source, start, count in self._text_mixture.parts(step):
                yield from self._text_streams[source].pieces(start, count)

    def cost(self, row: Row) -> float:
        """FLOPs of a row."""
        return self._cost(self.lengths(row), sum(piece.targets for piece in row))

    def _cost_of_piece(self, length: int, targets: int) -> float:
        return self._cost((length,), targets)

    def _deal(self, rows: Sequence[Row]) -> list[tuple[Row, ...]]:
        """The rows of each replica: the costliest first, each to the cheapest replica that has room."""
        most = self.config.micro_batch_rows
        limit = -(-len(rows) // (self.replicas * most)) * most
        dealt: list[list[Row]] = [[] for _ in range(self.replicas)]
        cheapest = [(0.0, replica) for replica in range(self.replicas)]
        costs = list(map(self.cost, rows))
        for number in sorted(range(len(rows)), key=lambda number: -costs[number]):
            cost, replica = heapq.heappop(cheapest)
            dealt[replica].append(rows[number])
            if len(dealt[replica]) < limit:
                heapq.heappush(cheapest, (cost + costs[number], replica))
        return [tuple(mine) for mine in dealt]

    def lengths(self, row: Row) -> tuple[int, ...]:
        """Lengths of what attention stays inside: each piece, or the whole row."""
        lengths = tuple(piece.length for piece in row)
        return lengths if self.config.isolate_documents else (sum(lengths),)
