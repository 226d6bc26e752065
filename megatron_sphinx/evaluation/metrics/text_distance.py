"""ANLS of documents' questions, and the edit distance that it is made of.

Source: evaluate.py of DocVQA (arXiv:1907.00490), infographicsvqa_eval.py of Qwen-VL.
"""

from collections.abc import Sequence

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import each, percent, truths_of
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Verdict

_LEAST = 0.5


def edit_distance(left: str, right: str) -> int:
    """Return how many characters have to be put in, taken out or changed to make one text the other."""
    row = list(range(len(left) + 1))
    for line, character in enumerate(right, 1):
        corner, row[0] = row[0], line
        for place, other in enumerate(left, 1):
            changed = corner + (character != other)
            corner, row[place] = row[place], min(changed, row[place] + 1, row[place - 1] + 1)
    return row[-1]


def anls(answer: str, truths: tuple[str, ...]) -> float:
    """Return the normalised similarity of an answer with the nearest truth, 0 where it is less than a half.

    Texts are compared in lower case with single spaces, and yet the distance is divided by the length of the longer
    text as it was written: the scorer's habit.
    """
    form = _spaced(answer)
    distances = []
    for truth in truths:
        length = max(len(answer.upper()), len(truth.upper()))  # a few letters change it
        other = _spaced(truth)
        is_far = abs(len(form) - len(other)) > _LEAST * length  # so that the distance need not be known
        distances.append(1.0 if is_far else edit_distance(form, other) / length if length else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= _LEAST else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _judge(answered: Answered, _protocol: Protocol) -> Verdict:
    return Verdict(anls(answered.text, truths_of(answered)), answered.text.strip() or None)


def _figures(judged: Sequence[Judged]) -> dict[str, float]:
    return {"ANLS": percent(one.verdict.value for one in judged)}


ANLS = Metric("ANLS", each(_judge), _figures)
