"""Figures of answers that another model reviews: MM-Vet and LLaVA-Bench, and how its reviews are read.

Until an answer is reviewed its verdict is unread, and counts as wrong.

Source: mm-vet_evaluator.ipynb of MM-Vet (arXiv:2308.02490); summarize_gpt_review.py of LLaVA.
"""

import math
from collections.abc import Sequence

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import parts, percent
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Verdict

_MOST_POINTS = 10


def _unreviewed(answers: Sequence[Answered], _protocol: Protocol) -> list[Verdict]:
    return [Verdict(0.0, None) for _ in answers]


def read_mm_vet_review(review: str) -> Verdict:
    """Return the verdict of a review of MM-Vet: its first word is a number from 0 to 1, else it cannot be read."""
    word = review.split()[0] if review.split() else ""
    try:
        score = float(word)
    except ValueError:
        return Verdict(0.0, None)
    return Verdict(score, f"{score:g}") if 0 <= score <= 1 else Verdict(0.0, None)


def read_llava_review(review: str) -> Verdict:
    """Return the verdict of a review of LLaVA-Bench.

    Its first line has two scores, of GPT-4's answer and of ours, with a space or comma between them. The verdict is
    read as both, `8 6.5`, and its value is a tenth of the second.
    """
    try:
        theirs, ours = (float(number) for number in review.strip().split("\n")[0].replace(",", " ").split())
    except ValueError:
        return Verdict(0.0, None)
    if not (0 < theirs <= _MOST_POINTS and 0 <= ours <= _MOST_POINTS):
        return Verdict(0.0, None)
    return Verdict(ours / _MOST_POINTS, f"{theirs:g} {ours:g}")


def _mm_vet(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the mean score in percent, then that of each capability, then that of each combination of them.

    Samples have the category `capability`, with commas between the capabilities that a question needs.
    """
    combined = parts(judged, "capability")
    single: dict[str, list[float]] = {}
    for names, ones in combined.items():
        for name in names.split(","):
            single.setdefault(name, []).extend(one.verdict.value for one in ones)
    figures = {"total": percent(one.verdict.value for one in judged)}
    figures |= {name: percent(values) for name, values in sorted(single.items())}
    several = {names: ones for names, ones in sorted(combined.items()) if "," in names}
    return figures | {names: percent(one.verdict.value for one in ones) for names, ones in several.items()}


def _relative(judged: Sequence[Judged]) -> float:
    """Return the mean of our scores over the mean of GPT-4's, in percent; unread reviews are left out."""
    pairs = [one.verdict.parsed.split() for one in judged if one.verdict.parsed]
    theirs = math.fsum(float(pair[0]) for pair in pairs)
    return 100 * math.fsum(float(pair[1]) for pair in pairs) / theirs if theirs else math.nan


def _llava_bench(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the relative score of all answers, and of each part of the category `category`."""
    by_category = parts(judged, "category")
    return {"relative score": _relative(judged), **{name: _relative(ones) for name, ones in by_category.items()}}


MM_VET = Metric("MM-Vet", _unreviewed, _mm_vet)
LLAVA_BENCH = Metric("LLaVA-Bench", _unreviewed, _llava_bench)
