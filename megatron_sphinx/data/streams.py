"""Endless seeded streams of samples and of text, and how much each source gives them.

What a stream holds is known by sizes alone; the data itself is not read.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data.packing import Segment
from megatron_sphinx.data.shuffle import Numbers, Shuffle, Window
from megatron_sphinx.errors import ConfigError

SAMPLE_BLOCK, SAMPLE_WINDOW = 1024, 64  # samples come from 64 blocks of up to 1,024 neighbours at a time
TEXT_BLOCK, TEXT_WINDOW = 2**20, 16  # text comes from 16 blocks of up to 1,048,576 tokens


class _Columns:
    """A table held as a dataclass of arrays, one a column, all of the same length."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __getitem__(self, rows: Numbers) -> Self:
        return type(self)(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @classmethod
    def joined(cls, tables: Sequence[Self]) -> Self:
        """Return one table with the rows of several, in their order."""
        return cls(*(np.concatenate([getattr(table, name) for table in tables]) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class SampleSizes(_Columns):
    """What planning knows of some samples; every column holds integers [samples].

    Attributes:
        width: pixels of the image; 0 where there is none.
        height: pixels of the image; 0 where there is none.
        tokens: of the caption or the conversation.
        targets: positions with a target.
    """

    width: NDArray[Any]
    height: NDArray[Any]
    tokens: NDArray[Any]
    targets: NDArray[Any]


class SampleSource(Protocol):
    """What planning asks about the samples of all sources, which are numbered one source behind the other."""

    @property
    def bounds(self) -> Sequence[int]:
        """Number of the first sample of each source, and how many samples there are in all."""

    def sizes(self, first: int, last: int) -> SampleSizes:
        """Return the sizes of samples `first` to `last`, the last not among them."""

    def cut(self, sample: int, most_tokens: int) -> tuple[int, int]:
        """Return how many tokens are kept of a sample that has more than fit, and its positions with a target then."""


@dataclass(frozen=True)
class TextSpans(_Columns):
    """Neighbouring tokens of text documents, a span for each document or part of one; all columns are [spans].

    Attributes:
        document: number of the document.
        start: first token of the span in its document.
        length: tokens of the span.
        is_end: whether the document ends with the span.
    """

    document: Numbers
    start: Numbers
    length: Numbers
    is_end: NDArray[np.bool_]

    def cut(self, most: int) -> "TextSpans":
        """Return these tokens in spans of at most `most` tokens, those of a span one behind the other."""
        parts = -(-self.length // most)
        whole = self[np.repeat(np.arange(len(parts)), parts)]
        place = np.arange(len(whole.length)) - np.repeat(np.cumsum(parts) - parts, parts)  # of a part in its span
        skipped = place * most
        is_last = place + 1 == np.repeat(parts, parts)
        length = np.minimum(whole.length - skipped, most)
        return TextSpans(whole.document, whole.start + skipped, length, whole.is_end & is_last)


class TextSource(Protocol):
    """What planning asks about the text of all sources; tokens and documents count on from one source to the next."""

    @property
    def bounds(self) -> Sequence[int]:
        """Number of the first token of each source, and how many tokens there are in all."""

    def spans(self, first: int, last: int) -> TextSpans:
        """Return what tokens `first` to `last`, the last not among them, are in documents; no span is empty."""


class Mixture:
    """How many samples or tokens each source gives a stream in any step.

    After any number of steps each source but the heaviest has given its share of all, rounded down to a whole sample
    or token; the heaviest gives what is left.

    Args:
        bounds: where each source begins among all samples or tokens, and how many there are in all.
        weights: of the sources; None where each gives what it has: then all of them are taken for one source.
        amount: what all give together in a step.
        key: what the amount is called in the configuration, for errors.

    Attributes:
        spans: (begin, end) of each source among all samples or tokens.

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
        """Return what each source has given in all after so many steps."""
        total = steps * self.amount
        amounts = [int(total * share) for share in self._shares]
        amounts[self._heaviest] += total - sum(amounts)
        return amounts

    def takes(self, step: int) -> Iterator[tuple[int, int, int]]:
        """Yield (source, start in that source's own order, count) for each source that a step takes anything of."""
        for source, (before, after) in enumerate(zip(self.given(step), self.given(step + 1), strict=True)):
            if after > before:
                yield source, before, after - before


class _Stream(ABC):
    """One source in shuffled order; what a window of the shuffle holds is read block by block, and kept."""

    def __init__(self, first: int, shuffle: Shuffle) -> None:
        self._first, self._shuffle = first, shuffle
        self._open = lru_cache(maxsize=2)(self._read)

    @abstractmethod
    def _read(self, epoch: int, number: int) -> Any:
        """Read what a window of an epoch holds."""

    def _blocks(self, window: Window) -> list[tuple[int, int]]:
        """Return begin and end of each block of a window, counted among the items of all sources."""
        begins = window.begins + self._first
        return list(zip(begins.tolist(), (begins + window.sizes).tolist(), strict=True))


class SampleStream(_Stream):
    """An endless stream of the samples of one source.

    Args:
        samples: of all sources.
        span: (begin, end) of this source among them.
        key: what the order follows from.
    """

    def __init__(self, samples: SampleSource, span: tuple[int, int], key: int) -> None:
        self._samples = samples
        super().__init__(span[0], Shuffle(span[1] - span[0], block=SAMPLE_BLOCK, window=SAMPLE_WINDOW, key=key))

    def _read(self, epoch: int, number: int) -> tuple[Window, SampleSizes]:
        """Return a window, and the sizes of its samples in the order of its blocks."""
        window = self._shuffle.open(epoch, number)
        return window, SampleSizes.joined([self._samples.sizes(begin, end) for begin, end in self._blocks(window)])

    def take(self, start: int, count: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield (sample, width, height, tokens, targets) for samples `start` to `start + count` of the stream."""
        for epoch, number, first, taken in self._shuffle.spans(start, count):
            window, window_sizes = self._open(epoch, number)
            drawn = window.draw(np.arange(first, first + taken, dtype=np.int64))
            sizes = window_sizes[drawn]
            samples = window.item(drawn) + self._first
            columns = (samples, sizes.width, sizes.height, sizes.tokens, sizes.targets)
            yield from zip(*(column.tolist() for column in columns), strict=True)


class TextStream(_Stream):
    """An endless stream of the text tokens of one source, by documents that are cut into parts.

    The parts of a document lie as far from each other in a window as they can, so that a run of tokens, such as a
    step's, comes from all over the window. A document is also divided where a block of the shuffle ends.

    Args:
        text: of all sources.
        span: (begin, end) of this source among all tokens.
        key: what the order follows from.
        part: the most tokens of a part; None for whole documents, one behind the other.
    """

    def __init__(self, text: TextSource, span: tuple[int, int], key: int, part: int | None) -> None:
        self._text, self._part = text, part
        super().__init__(span[0], Shuffle(span[1] - span[0], block=TEXT_BLOCK, window=TEXT_WINDOW, key=key))

    def _read(self, epoch: int, number: int) -> tuple[TextSpans, Numbers]:
        """Return the spans of a window in shuffled order, and where each ends in the window."""
        window = self._shuffle.open(epoch, number)
        spans = TextSpans.joined([self._text.spans(begin, end) for begin, end in self._blocks(window)])
        if self._part is None:
            spans = spans[window.order(len(spans.document))]
        else:
            spans = spans.cut(self._part)
            spans = spans[window.spread(spans.document)]
        return spans, np.cumsum(spans.length)

    def segments(self, start: int, count: int) -> Iterator[Segment]:
        """Yield tokens `start` to `start + count` of the stream, a segment for each document.

        The last token of a segment predicts the document's next token, which may stand in another segment; only a
        document's own last token predicts nothing.
        """
        for epoch, number, first, taken in self._shuffle.spans(start, count):
            spans, ends = self._open(epoch, number)
            last = first + taken
            begins_in, ends_in = int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "left"))
            for span in range(begins_in, ends_in + 1):
                length, end = int(spans.length[span]), int(ends[span])
                skipped = max(first - (end - length), 0)
                begin, stop = int(spans.start[span]) + skipped, int(spans.start[span]) + length - max(end - last, 0)
                tokens, is_end = stop - begin, bool(spans.is_end[span]) and end <= last
                yield Segment(False, int(spans.document[span]), begin, tokens, tokens, tokens - is_end)
