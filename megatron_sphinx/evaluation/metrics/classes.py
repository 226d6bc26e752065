"""Classes that answers name: recognition as text, as section 3.3.2 of SPHINX, arXiv:2311.07575, asks for it."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import each, percent, truths_of
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Verdict

_TOP = 5


def class_form(text: str) -> str:
    """Return a text as classes are compared: in lower case, with single spaces, without a period at its end."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


@lru_cache(maxsize=8)
def _finder(classes: tuple[str, ...]) -> re.Pattern[str]:
    """Return what finds the longest class at each place of an answer, as whole words."""
    names = sorted({class_form(name) for name in classes}, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)")


def named_class(answer: str, classes: tuple[str, ...]) -> str | None:
    """Return the class that an answer names: it is the answer, or the only one in it as whole words.

    Args:
        answer: the answer as it was generated.
        classes: what classes are called. A name that is part of a longer one, as `shirt` is of `T-shirt`, is not read
            there.

    Returns:
        The class in the form of `class_form`; None where the answer names none, or several.
    """
    found = set(_finder(classes).findall(class_form(answer)))
    return found.pop() if len(found) == 1 else None


def _judge(answered: Answered, _protocol: Protocol) -> Verdict:
    """Judge by the class that an answer names; all protocols do so."""
    parsed = named_class(answered.text, answered.sample.choices)
    truths = {class_form(truth) for truth in truths_of(answered)}
    return Verdict(float(parsed in truths), parsed)


def _figures(judged: Sequence[Judged]) -> Mapping[str, float]:
    """Return how often the right class was named, and, where more than five were ranked, is among the first five."""
    figures = {"top-1": percent(one.verdict.value for one in judged)}
    ranked = [one.answered for one in judged if len(one.answered.ranked) >= _TOP < len(one.answered.sample.choices)]
    if ranked:
        figures["top-5"] = percent(not set(one.ranked[:_TOP]).isdisjoint(one.sample.answers) for one in ranked)
    return figures


CLASS_MATCH = Metric("class match", each(_judge), _figures)
