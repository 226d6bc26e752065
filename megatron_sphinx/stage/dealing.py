"""Who encodes what: the views of a micro-batch dealt to encoder ranks by cost. Arithmetic only."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Annotated

from megatron_sphinx.ranges import Range, check_ranges

_ENOUGH = 0.9  # of a batch; to wait for more micro-batches is not worth what is left


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """How far the encoder stage runs ahead.

    Attributes:
        lookahead (micro-batches): how far the encoders may be ahead of the language model; bounds the memory of both;
            at least 1.
    """

    lookahead: Annotated[int, Range(least=1, most=10_000, why="the language model waits for one")] = 4

    def __post_init__(self) -> None:
        check_ranges(self, "stage.")


def joined(counts: Sequence[int | float], size: int) -> int:
    """Say how many micro-batches an encoder encodes together, so that its batches, which are always full, waste little.

    Args:
        counts: views of each of the next micro-batches.
        size: views of a batch.

    Returns:
        The fewest, at least one, whose views take up 90 % of their batches; or else those that take up most.
    """
    best, most, total = 1, 0.0, 0.0
    for number, count in enumerate(counts, 1):
        total += count
        fill = total / (ceil(total / size) * size) if total else 1.0
        if fill > most + 1e-9:
            best, most = number, fill
        if most >= _ENOUGH:
            break
    return best


@dataclass(frozen=True)
class DealtViews:
    """Neighbouring views of one replica that one encoder takes.

    Attributes:
        encoder: number of the encoder.
        replica: number of the data replica that the features go to.
        first: the first of the views in the replica's micro-batch.
        count: how many there are.
    """

    encoder: int
    replica: int
    first: int
    count: int


def deal(costs: Sequence[Sequence[float]], encoders: int) -> list[DealtViews]:
    """Cut the views of all replicas, laid one behind the other, into neighbouring parts of equal cost.

    A view goes to the encoder in whose part its middle lies, so no encoder is more than one view from its fair share,
    and there are fewer than replicas + encoders messages.

    Args:
        costs: for each replica the cost of each of its views, in any unit.
        encoders: how many take part.

    Returns:
        What each encoder takes, in the order of replicas and views; no view is left out, and nothing is empty.
    """
    total = sum(map(sum, costs))
    shares: list[DealtViews] = []
    behind = 0.0
    for replica, views in enumerate(costs):
        for number, cost in enumerate(views):
            encoder = min(int((behind + cost / 2) / total * encoders), encoders - 1)
            behind += cost
            last = shares[-1] if shares else None
            if last is not None and (last.encoder, last.replica) == (encoder, replica):
                shares[-1] = DealtViews(encoder, replica, last.first, last.count + 1)
            else:
                shares.append(DealtViews(encoder, replica, number, 1))
    return shares
