"""Relaxed accuracy of charts' questions: numbers may be five percent off.

Source: metrics.py of pix2struct (arXiv:2203.10244, section 5.1); accessory/eval_mm/utils/metric.py of LLaMA2-Accessory.
"""

from collections.abc import Sequence

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import each, parts, percent, truths_of
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Verdict

_MOST_CHANGE = 0.05


def _number(text: str) -> float | None:
    """Return the number that a text is, percentages as fractions; None where it is none."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def is_relaxed_match(target: str, answer: str) -> bool:
    """Say whether an answer is within five percent of a target; what are no numbers must be equal but for case.

    A target of zero is compared as text, too.
    """
    number, goal = _number(answer), _number(target)
    if number is not None and goal:
        return abs(number - goal) / abs(goal) <= _MOST_CHANGE
    return answer.lower() == target.lower()


def _judge(answered: Answered, protocol: Protocol) -> Verdict:
    """Judge an answer; Accessory hands answer and target over in each other's place: five percent of the answer."""
    text = answered.text
    if protocol is Protocol.ACCESSORY:
        text = text.strip()
        is_right = any(is_relaxed_match(text, truth) for truth in truths_of(answered))
    else:
        is_right = any(is_relaxed_match(truth, text) for truth in truths_of(answered))
    return Verdict(float(is_right), text.strip() or None)


def _figures(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the mean over the parts of the category `split`, human and augmented, and each."""
    each_part = {part: percent(one.verdict.value for one in ones) for part, ones in parts(judged, "split").items()}
    if not each_part:
        return {"relaxed accuracy": percent(one.verdict.value for one in judged)}
    return {"relaxed accuracy": sum(each_part.values()) / len(each_part), **dict(sorted(each_part.items()))}


RELAXED_ACCURACY = Metric("relaxed accuracy", each(_judge), _figures)
