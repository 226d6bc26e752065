"""Exact match of short answers: with the answer, with the text of an option, and as WikiTableQuestions has it.

Source: accessory/eval_mm/utils/metric.py of LLaMA2-Accessory; eval.py of GQA; evaluator.py of WikiTableQuestions, which
the DUE benchmark follows.
"""

import math
import re
import unicodedata

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import accuracy, each, truths_of
from megatron_sphinx.evaluation.samples import Answered, Protocol, Verdict

_PLAIN_MARKS = (
    ("\u2018\u2019\u00b4`", "'"),
    ("\u201c\u201d", '"'),
    ("\u2010\u2011\u2012\u2013\u2014\u2212", "-"),
)
_PLAIN = str.maketrans({mark: plain for marks, plain in _PLAIN_MARKS for mark in marks})
_CITATIONS = re.compile(r"((?<!^)\[[^\]]*\]|\[\d+\]|[•♦†‡*#+])*$")
_DETAILS = re.compile(r"(?<!^)( \([^)]*\))*$")
_QUOTED = re.compile(r'^"([^"]*)"$')
_Date = tuple[int, int, int]


def accessory_form(text: str) -> str:
    """Return a text as Accessory compares it: without any period, also those of decimals, and in lower case."""
    return text.replace(".", "").strip().lower()


def _judge(answered: Answered, protocol: Protocol) -> Verdict:
    """Judge by equality; the official protocol drops the period at the end only, so that 3.5 is not 35."""
    if protocol is Protocol.OFFICIAL:
        form = answered.text.strip().removesuffix(".").lower()
        truths = [truth.strip().removesuffix(".").lower() for truth in truths_of(answered)]
    else:
        form, truths = accessory_form(answered.text), [accessory_form(truth) for truth in truths_of(answered)]
    return Verdict(float(form in truths), form or None)


def _judge_gqa(answered: Answered, protocol: Protocol) -> Verdict:
    """Judge as GQA: official is plain equality.

    Accessory's clean-up of sentences is computed behind the list that it scores, and has no effect: it is left out.
    """
    if protocol is Protocol.OFFICIAL:
        return Verdict(float(answered.text in truths_of(answered)), answered.text or None)
    return _judge(answered, protocol)


def _judge_option(answered: Answered, protocol: Protocol) -> Verdict:
    """Judge the text of an option: an answer that is none of the options is not read as one."""
    verdict = _judge(answered, protocol)
    options = {accessory_form(choice) for choice in answered.sample.choices}
    is_option = not options or accessory_form(answered.text) in options
    return verdict if verdict.value or is_option else Verdict(0.0, None)


def table_form(text: str) -> str:
    """Return a text as WikiTableQuestions compares it.

    Accents, citations and details in parentheses at the end, quotation marks around all of it and a period at the end
    go; quotes and dashes become plain.
    """
    decomposed = unicodedata.normalize("NFKD", text)
    text = "".join(letter for letter in decomposed if unicodedata.category(letter) != "Mn").translate(_PLAIN)
    before = None
    while before != text:
        before = text
        text = _QUOTED.sub(r"\1", _DETAILS.sub("", _CITATIONS.sub("", text.strip()).strip()).strip())
    return re.sub(r"\s+", " ", text.removesuffix(".")).lower().strip()


def _amount(text: str) -> float | None:
    """Return the number that a text is, None where it is none; a number within a millionth of a whole one is whole."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return round(number) if abs(number - round(number)) < 1e-6 else number


def _date(text: str) -> _Date | None:
    """Return year, month and day of a text such as 2004-xx-05, -1 for what is open; None where it is no date."""
    fields = text.lower().split("-")
    if fields[0] == "xxxx":
        fields[0] = "xx"
    try:
        year, month, day = (-1 if field == "xx" else int(field) for field in fields)
    except ValueError:
        return None
    is_date = (month == -1 or 1 <= month <= 12) and (day == -1 or 1 <= day <= 31)
    return (year, month, day) if is_date and (year, month, day) != (-1, -1, -1) else None


def _value(text: str) -> float | _Date | None:
    """Return the number or date that a text is; a date of a year alone is a number."""
    if (amount := _amount(text)) is not None:
        return amount
    date = _date(text)
    return date[0] if date and date[1] == date[2] == -1 else date


def match_table_value(answer: str, truth: str) -> bool:
    """Say whether an answer about a table is a right one: the same text, number or date."""
    if table_form(answer) == table_form(truth):
        return True
    mine, right = _value(answer), _value(truth)
    if isinstance(mine, int | float) and isinstance(right, int | float):
        return abs(mine - right) < 1e-6
    return mine is not None and mine == right


def _judge_table(answered: Answered, protocol: Protocol) -> Verdict:
    """Judge as WikiTableQuestions, where a question has one value; Accessory has no rule of its own for tables."""
    if protocol is Protocol.ACCESSORY:
        return _judge(answered, protocol)
    is_right = any(match_table_value(answered.text, truth) for truth in truths_of(answered))
    return Verdict(float(is_right), table_form(answered.text) or None)


EXACT_MATCH = Metric("exact match", each(_judge), accuracy)
GQA_MATCH = Metric("exact match (GQA)", each(_judge_gqa), accuracy)
OPTION_TEXT = Metric("exact match with an option", each(_judge_option), accuracy)
TABLE_MATCH = Metric("denotation accuracy", each(_judge_table), accuracy)
