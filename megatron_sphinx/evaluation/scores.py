"""Figures of judged answers, with 95 % bootstrap intervals by picture, and for each part of a benchmark."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.evaluation.results import copies
from megatron_sphinx.evaluation.samples import Judged

REPLICATES = 1000
_MOST_WORK = 5_000_000  # answers that figures are computed of, where they are no means
_LEAST_REPLICATES = 100
_TRIALS = 3  # draws by which a mean is told from other figures
_QUANTILES = (2.5, 97.5)

Figures = Callable[[Sequence[Judged]], Mapping[str, float]]


@dataclass(frozen=True)
class Figure:
    """A figure with its interval.

    Attributes:
        value: of all answers.
        low: 2.5 % of the draws are below.
        high: 2.5 % of the draws are above.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Part:
    """The answers of one category.

    Attributes:
        count: how many there are.
        value: their headline figure; None where it is of nothing.
        unparsed: how many could not be read.
    """

    count: int
    value: float | None
    unparsed: int


@dataclass(frozen=True)
class Scores:
    """What a benchmark came to.

    Attributes:
        figures: by name, the headline first.
        parts: by division and category.
        judged: how many answers these are of.
        unparsed: how many of them could not be read; they count as wrong.
        replicates: how many draws the intervals are of.
    """

    figures: Mapping[str, Figure]
    parts: Mapping[str, Mapping[str, Part]]
    judged: int
    unparsed: int
    replicates: int


def scores_of(judged: Sequence[Judged], figures: Figures, *, seed: int = 0) -> Scores:
    """Compute the figures of judged answers, with intervals, and those of their categories.

    Pictures are drawn with repetition, each with all its answers: answers about one picture are not independent. Those
    whose answers count together, such as the two of a pair, are drawn together.

    Args:
        judged: the answers.
        figures: computes figures by name, the headline first.
        seed: of the draws.
    """
    if not judged:
        return Scores({}, {}, 0, 0, 0)
    values = _known(figures(judged))
    drawn = _Drawing(judged, seed)
    factors = _factors(values, drawn, figures)
    is_all_means = len(factors) == len(values)
    replicates = REPLICATES if is_all_means else _bounded(len(judged))
    columns: dict[str, list[float]] = {name: [] for name in values}
    for counts in drawn.draws(replicates):
        mean = drawn.mean(counts)
        found = {} if is_all_means else figures(drawn.taken(counts))
        for name in values:
            value = factors[name] * mean if name in factors else found.get(name, nan)
            if isfinite(value):
                columns[name].append(value)
    intervals = {name: np.percentile(column or [values[name]], _QUANTILES) for name, column in columns.items()}
    return Scores(
        {name: Figure(value, float(intervals[name][0]), float(intervals[name][1])) for name, value in values.items()},
        _parts(judged, figures),
        len(judged),
        _unparsed(judged),
        replicates,
    )


def _known(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures that are numbers; one of no answers is none."""
    return {name: value for name, value in figures.items() if isfinite(value)}


def _bounded(count: int) -> int:
    """Return how many draws there are where figures have to be computed of so many answers for each."""
    return max(_LEAST_REPLICATES, min(REPLICATES, _MOST_WORK // count))


def _unparsed(judged: Sequence[Judged]) -> int:
    return sum(one.verdict.parsed is None for one in judged)


def _units(judged: Sequence[Judged]) -> list[list[Judged]]:
    """Return the answers that are drawn together: those about one picture, and about pictures that a group joins."""
    above: dict[str, str] = {}

    def root(key: str) -> str:
        while above.setdefault(key, key) != key:
            above[key] = key = above[above[key]]
        return key

    for one in judged:
        if one.answered.sample.group:
            above[root(f"group {one.answered.sample.group}")] = root(f"picture {one.answered.sample.picture_id}")
    units: dict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        units[root(f"picture {one.answered.sample.picture_id}")].append(one)
    return list(units.values())


class _Drawing:
    """Draws of pictures, with what their answers came to; pictures that a group joins are drawn as one.

    Args:
        judged: the answers.
        seed: of the draws.
    """

    def __init__(self, judged: Sequence[Judged], seed: int) -> None:
        self._pictures = _units(judged)
        self._sums = np.array([sum(one.verdict.value for one in those) for those in self._pictures])
        self._sizes = np.array([len(those) for those in self._pictures])
        self._copies: dict[tuple[int, int], list[Judged]] = {}
        self._seed = seed

    def draws(self, number: int) -> Iterator[NDArray[np.int64]]:
        """Yield so many draws, always the same: how often each picture is in it."""
        random, count = np.random.default_rng(self._seed), len(self._pictures)
        for _ in range(number):
            yield np.bincount(random.integers(0, count, count), minlength=count)

    def mean(self, counts: NDArray[np.int64]) -> float:
        """Return the mean value of the answers of a draw."""
        return float(counts @ self._sums / (counts @ self._sizes))

    def taken(self, counts: NDArray[np.int64]) -> list[Judged]:
        """Return the answers of a draw; a picture that is drawn again counts as another one."""
        taken: list[Judged] = []
        for picture in np.flatnonzero(counts):
            for copy in range(int(counts[picture])):
                taken += self._copy(int(picture), copy)
        return taken

    def _copy(self, picture: int, copy: int) -> list[Judged]:
        """Return the answers of a picture as another picture's."""
        those = self._pictures[picture]
        if not copy:
            return those
        if (picture, copy) not in self._copies:
            renamed = copies([one.answered for one in those], copy)
            self._copies[picture, copy] = [
                Judged(answered, one.verdict) for answered, one in zip(renamed, those, strict=True)
            ]
        return self._copies[picture, copy]


def _factors(values: Mapping[str, float], drawn: _Drawing, figures: Figures) -> dict[str, float]:
    """Return by how much the mean value is multiplied in those figures that are means; tried by draws."""
    trials = list(drawn.draws(_TRIALS))
    whole = drawn.mean(np.ones_like(trials[0]))
    if not whole:
        return {}
    factors = {name: value / whole for name, value in values.items()}
    for counts in trials:
        found, mean = figures(drawn.taken(counts)), drawn.mean(counts)
        factors = {
            name: factor
            for name, factor in factors.items()
            if name in found and abs(found[name] - factor * mean) <= 1e-9 * max(1.0, abs(found[name]))
        }
    return factors


def _parts(judged: Sequence[Judged], figures: Figures) -> dict[str, dict[str, Part]]:
    """Compute the headline of each category of each division."""
    members: dict[str, dict[str, list[Judged]]] = defaultdict(lambda: defaultdict(list))
    for one in judged:
        for division, category in one.answered.sample.categories.items():
            members[division][category].append(one)
    return {
        division: {name: Part(len(those), next(iter(_known(figures(those)).values()), None), _unparsed(those))
                   for name, those in sorted(categories.items())}
        for division, categories in members.items()
    }  # fmt: skip
