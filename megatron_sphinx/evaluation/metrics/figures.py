"""Figures of verdicts that several metrics share: means in percent, groups that count together, parts by category.

All of them take answers drawn with repetition, too, as intervals need it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Verdict

JudgeOne = Callable[[Answered, Protocol], Verdict]


def each(judge: JudgeOne) -> Callable[[Sequence[Answered], Protocol], list[Verdict]]:
    """Return the judge of many answers that looks at each alone."""
    return lambda answers, protocol: [judge(answered, protocol) for answered in answers]


def truths_of(answered: Answered) -> tuple[str, ...]:
    """Return the right answers of a sample.

    Raises:
        DataError: there are none, as in the test part of benchmarks that a server judges.
    """
    if not answered.sample.answers:
        raise DataError(
            f"sample {answered.sample.id}: has no right answer to judge by; "
            "take a part of the benchmark with answers, or send the submission to its server"
        )
    return answered.sample.answers


def percent(values: Iterable[float]) -> float:
    """Return the mean of values from 0 to 1 in percent; not a number where there are none."""
    numbers = list(values)
    return 100 * math.fsum(numbers) / len(numbers) if numbers else math.nan


def accuracy(judged: Sequence[Judged]) -> Mapping[str, float]:
    """Return the mean of the verdicts, in percent, as `accuracy`."""
    return {"accuracy": percent(one.verdict.value for one in judged)}


def parts(judged: Sequence[Judged], division: str) -> dict[str, list[Judged]]:
    """Return the verdicts of each part of a division, in the order in which parts come first; others are left out."""
    found: dict[str, list[Judged]] = {}
    for one in judged:
        if part := one.answered.sample.categories.get(division):
            found.setdefault(part, []).append(one)
    return found


def groups(judged: Sequence[Judged], key: Callable[[Judged], object]) -> list[tuple[bool, float]]:
    """Return of each group whether all its answers are right, and how often the group was drawn.

    Args:
        judged: answers with verdicts; where they are drawn with repetition, a group may be there several times.
        key: what answers of one group have in common.
    """
    found: dict[object, list[Judged]] = {}
    for one in judged:
        found.setdefault(key(one), []).append(one)
    return [
        (
            all(one.verdict.value == 1 for one in members),
            len(members) / len({one.answered.sample.id for one in members}),
        )
        for members in found.values()
    ]


def group_percent(judged: Sequence[Judged], key: Callable[[Judged], object]) -> float:
    """Return the share of groups that are right throughout, in percent; not a number where there are none."""
    counted = groups(judged, key)
    drawn = math.fsum(times for _, times in counted)
    return 100 * math.fsum(times for is_right, times in counted if is_right) / drawn if counted else math.nan


def own_group(one: Judged) -> str:
    """Return the group of an answer; one without a group is its own."""
    sample = one.answered.sample
    return sample.group or f"sample {sample.id}"
