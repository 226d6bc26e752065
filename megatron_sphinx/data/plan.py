"""The plan of a step: which samples, in which rows, on which replica. Computed from sizes, never from the data itself.

The samples and rows of step k are a function of the configuration, the seed and k. The number of replicas decides only
which of them computes which row.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain

from megatron_sphinx.data.config import DataConfig
from megatron_sphinx.data.packing import Packer, Row, Segment, positions
from megatron_sphinx.data.shuffle import key_of
from megatron_sphinx.data.streams import Mixture, SampleSource, SampleStream, TextSource, TextStream


@dataclass(frozen=True)
class StepPlan:
    """The composition of one optimizer step: which samples and text, in which rows, on which replica.

    Attributes:
        step: counted from 0.
        rows: the segments of each row; the same for every layout.
        micro_batches: [micro-batch][replica] the rows that a replica computes; it may have none.
        captions_cut: captions and conversations that lost their end to fit a row.
        fill: share of the rows' capacity that is used; nothing is computed for the rest.
        imbalance: cost of the costliest replica over the mean of all.
        padding_share: share of the computed positions that belong to no segment.
    """

    step: int
    rows: tuple[Row, ...]
    micro_batches: tuple[tuple[tuple[Row, ...], ...], ...]
    captions_cut: int
    fill: float
    imbalance: float
    padding_share: float

    @cached_property
    def samples(self) -> list[int]:
        """Numbers of the step's samples, in ascending order."""
        return sorted(segment.item for row in self.rows for segment in row if segment.is_sample)

    @cached_property
    def text(self) -> list[tuple[int, int, int]]:
        """Text of the step as (document, first token, tokens), in ascending order."""
        segments = (segment for row in self.rows for segment in row if not segment.is_sample)
        return sorted((segment.item, segment.start, segment.tokens) for segment in segments)

    def targets(self, *, of_samples: bool) -> int:
        """Return how many positions of the step have a target: in samples, or else in text."""
        return sum(segment.targets for row in self.rows for segment in row if segment.is_sample is of_samples)

    @cached_property
    def positions(self) -> int:
        """Positions that all rows take: tokens of text, and whatever belongs to samples."""
        return positions(self.rows)

    @cached_property
    def digest(self) -> str:
        """Identifies what the step is made of: equal exactly where samples and text are."""
        return hashlib.sha256(repr((self.samples, self.text)).encode()).hexdigest()[:16]


class Planner:
    """Plans any step of a run by itself: what a step holds follows from no step before it.

    Args:
        config: the streams and their shares.
        samples: sizes of the samples; None where the run takes none.
        text: where the documents begin and end; None where the run takes no text.
        tokens_of_views: gives for an image's width and height the positions that it takes, and the numbers of its views
            that are encoded.
        cost: gives the FLOPs of a row for the lengths of what attention stays inside and the number of its targets;
            rows and replicas are balanced by it.
        replicas: how many data-parallel replicas there are.
        seed: of the run; the order of both streams follows from it.
        multiple: the positions of a replica's micro-batch are padded to a multiple of this.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        samples: SampleSource | None,
        text: TextSource | None,
        tokens_of_views: Callable[[int, int], tuple[int, tuple[int, ...]]],
        cost: Callable[[Sequence[int], int], float],
        replicas: int,
        seed: int,
        multiple: int = 1,
    ) -> None:
        self.config, self.replicas, self.multiple = config, replicas, multiple
        self._samples, self._tokens_of_views = samples, lru_cache(maxsize=4096)(tokens_of_views)
        self._cost = lru_cache(maxsize=65536)(cost)
        self._packer = Packer(
            config.sequence_length,
            self._cost_of_segment if config.isolate_documents else lambda length, _: float(length),
        )
        if samples is not None:
            weights = [source.weight for source in config.samples]
            name = "conversations_per_step" if config.conversations_per_step else "pairs_per_step"
            self._sample_mixture = Mixture(samples.bounds, weights, config.samples_per_step, name)
            self._sample_streams = [
                SampleStream(samples, span, key_of(seed, "pairs", source))
                for source, span in enumerate(self._sample_mixture.spans)
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
        samples, cut = self._plan_samples(step)
        rows = self._packer.rows([*samples, *self._plan_text(step)], self.config.row_multiple)
        replicas = self._deal(rows)
        size = self.config.rows_at_once
        count = -(-max(map(len, replicas)) // size)
        micro_batches = tuple(tuple(dealt[n * size : (n + 1) * size] for dealt in replicas) for n in range(count))
        costs = [sum(map(self.cost, dealt)) for dealt in replicas]
        used = [positions(dealt) for micro_batch in micro_batches for dealt in micro_batch]
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

    def _plan_samples(self, step: int) -> tuple[list[Segment], int]:
        """Return the step's samples, and how many of them were cut to fit a row."""
        if self._samples is None:
            return [], 0
        taken = (
            self._sample_streams[source].take(start, count) for source, start, count in self._sample_mixture.takes(step)
        )
        segments, cut = [], 0
        for sample, width, height, tokens, targets in chain.from_iterable(taken):
            view_tokens, views = self._tokens_of_views(width, height) if width else (0, ())
            room = self.config.sequence_length - view_tokens - 2  # BOS and EOS
            if tokens > room:
                tokens, targets = self._samples.cut(sample, room)
                cut += 1
            segments.append(Segment(True, sample, 0, 2 + view_tokens + tokens, tokens, targets, views))
        return segments, cut

    def _plan_text(self, step: int) -> Iterator[Segment]:
        """Yield the step's text, which may be in longer segments than a row has room for."""
        if self._text_streams:
            for source, start, count in self._text_mixture.takes(step):
                yield from self._text_streams[source].segments(start, count)

    def cost(self, row: Row) -> float:
        """Return the FLOPs of training on a row."""
        return self._cost(self.lengths(row), sum(segment.targets for segment in row))

    def _cost_of_segment(self, length: int, targets: int) -> float:
        return self._cost((length,), targets)

    def _deal(self, rows: Sequence[Row]) -> list[tuple[Row, ...]]:
        """Deal rows to replicas: the costliest first, each to the cheapest replica that has room."""
        size = self.config.rows_at_once
        limit = -(-len(rows) // (self.replicas * size)) * size
        dealt: list[list[Row]] = [[] for _ in range(self.replicas)]
        cheapest = [(0.0, replica) for replica in range(self.replicas)]
        costs = list(map(self.cost, rows))
        for number in sorted(range(len(rows)), key=lambda number: -costs[number]):
            cost, replica = heapq.heappop(cheapest)
            dealt[replica].append(rows[number])
            if len(dealt[replica]) < limit:
                heapq.heappush(cheapest, (cost + costs[number], replica))
        return [tuple(replica_rows) for replica_rows in dealt]

    def lengths(self, row: Row) -> tuple[int, ...]:
        """Return the lengths of what attention stays inside: of each segment, or of the whole row."""
        lengths = tuple(segment.length for segment in row)
        return lengths if self.config.isolate_documents else (sum(lengths),)


def numbered_rounds(planner: Planner, start: int, stop: int) -> Iterator[tuple[int, int, tuple[tuple[Row, ...], ...]]]:
    """Yield the micro-batches of all replicas for steps `start` to `stop`, each behind its step and number in that."""
    for step in range(start, stop):
        for number, micro_batch in enumerate(planner.step(step).micro_batches):
            yield step, number, micro_batch


def rounds(planner: Planner, start: int, stop: int) -> Iterator[tuple[tuple[Row, ...], ...]]:
    """Yield the micro-batches of steps `start` to `stop`, one behind the other: for each replica its rows."""
    for _, _, micro_batch in numbered_rounds(planner, start, stop):
        yield micro_batch
