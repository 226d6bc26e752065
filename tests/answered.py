"""Answers to samples, made in a line: for tests of scores."""

from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Sample


def answered(text, *answers, number=0, width=0, height=0, padding="centre", **fields):
    """An answer to a sample with right answers; the other fields are those of the sample."""
    given = {"id": str(number), "picture": None, "picture_id": str(number), "fields": {}} | fields
    return Answered(sample=Sample(answers=answers, **given), text=text, width=width, height=height, padding=padding)


def judge(metric, answers, protocol=Protocol.PAPER):
    """The answers with the verdicts of a metric."""
    return [Judged(one, verdict) for one, verdict in zip(answers, metric.judge(answers, protocol), strict=True)]


def verdict(metric, text, *answers, protocol=Protocol.PAPER, **fields):
    """The value of a single answer, and what it was read as."""
    found = judge(metric, [answered(text, *answers, **fields)], protocol)[0].verdict
    return found.value, found.parsed
