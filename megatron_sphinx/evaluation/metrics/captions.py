"""CIDEr-D of captions: words in common with people's captions, rare ones counting more.

Source: pycocoevalcap's cider_scorer.py (arXiv:1411.5726).
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import islice

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import percent, truths_of
from megatron_sphinx.evaluation.metrics.penn_treebank import tokenize
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Verdict

_LONGEST = 4
_SPREAD = 6.0
Gram = tuple[str, ...]


class _Vector:
    """The n-grams of a caption with their weights, by n, and how long each part and the caption are."""

    def __init__(self, words: Sequence[str], seen: Counter[Gram], log_pictures: float) -> None:
        grams = _count_grams(words)
        self.weights: list[dict[Gram, float]] = [{} for _ in range(_LONGEST)]
        for gram, times in grams.items():
            self.weights[len(gram) - 1][gram] = times * (log_pictures - math.log(max(1, seen[gram])))
        self.norms = [math.sqrt(sum(weight**2 for weight in part.values())) for part in self.weights]
        self.bigrams = max(len(words) - 1, 0)

    def similarity(self, other: "_Vector") -> float:
        """Return how alike a caption is to one of people, the mean over n; its weights are cut to the other's."""
        total = 0.0
        for mine, right, length, other_length in zip(self.weights, other.weights, self.norms, other.norms, strict=True):
            common = sum(min(weight, right[gram]) * right[gram] for gram, weight in mine.items() if gram in right)
            total += common / (length * other_length) if length and other_length else common
        return total / _LONGEST * math.exp(-((self.bigrams - other.bigrams) ** 2) / (2 * _SPREAD**2))


def _count_grams(words: Sequence[str]) -> Counter[Gram]:
    """Count the runs of one to four words."""
    return Counter(
        tuple(words[begin : begin + n]) for n in range(1, _LONGEST + 1) for begin in range(len(words) - n + 1)
    )


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return CIDEr-D of each caption, from 0 to 10.

    Args:
        captions: one of each picture.
        references: people's captions of each picture; how rare words are is counted in them.
    """
    every = iter(tokenize([text for texts in references for text in texts]))
    truths = [list(islice(every, len(texts))) for texts in references]
    seen = Counter(gram for texts in truths for gram in {gram for words in texts for gram in _count_grams(words)})
    log_pictures = math.log(max(len(truths), 1))
    scores = []
    for caption, texts in zip(tokenize(captions), truths, strict=True):
        vector = _Vector(caption, seen, log_pictures)
        alike = [vector.similarity(_Vector(words, seen, log_pictures)) for words in texts]
        scores.append(10 * sum(alike) / len(alike))
    return scores


def _judge(answers: Sequence[Answered], _protocol: Protocol) -> list[Verdict]:
    scores = cider([answered.text for answered in answers], [truths_of(answered) for answered in answers])
    return [Verdict(score, answered.text.strip() or None) for score, answered in zip(scores, answers, strict=True)]


def _figures(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the mean of CIDEr as tables have it, a hundred times what the scorer prints."""
    return {"CIDEr": percent(one.verdict.value for one in judged)}


CIDER = Metric("CIDEr", _judge, _figures)
