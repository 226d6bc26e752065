"""F1 of fields of documents, as DeepForm and Kleister Charity have it: each question asks for one field.

The right answers of a sample are ways to write the one value of the field; none, or `None`, stands for a field that the
document does not have. The answer `None` says that it is not there, and counts neither as found nor as missed.

Source: due_evaluator of the DUE benchmark and UReader's benchmarks_eval.py (arXiv:2310.05126).
"""

from collections.abc import Sequence

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import each
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Verdict

ABSENT = "None"


def _is_there(answered: Answered) -> bool:
    """Say whether the document has the field."""
    return bool(set(answered.sample.answers) - {ABSENT})


def _judge(answered: Answered, _protocol: Protocol) -> Verdict:
    """Judge a field by equality in capital letters."""
    text = answered.text.strip().replace("\n", "")
    if text == ABSENT:
        return Verdict(float(not _is_there(answered)), ABSENT)
    is_right = _is_there(answered) and text.upper() in {truth.upper() for truth in answered.sample.answers}
    return Verdict(float(is_right), text or None)


def _figures(judged: Sequence[Judged]) -> dict[str, float]:
    """Return F1, precision and recall over all fields, in percent; 0 where nothing is said or there."""
    said = [one for one in judged if one.verdict.parsed != ABSENT]
    there = [one for one in judged if _is_there(one.answered)]
    hits = sum(one.verdict.value for one in said)
    precision, recall = hits / (len(said) or 1), hits / (len(there) or 1)
    return {
        "F1": 200 * precision * recall / ((precision + recall) or 1),
        "precision": 100 * precision,
        "recall": 100 * recall,
    }


FIELD_F1 = Metric("F1 of fields", each(_judge), _figures)
