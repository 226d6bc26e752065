"""MathVista: an answer is extracted without a language model, brought into the form of its type, and compared.

Samples have in their records question_type, answer_type and precision as in the benchmark's file, and choices where
there are some. The benchmark's own scorer asks a language model where an answer is a sentence; here the letter that
stands by itself or the last number of the sentence is taken.

Source: extract_answer.py and calculate_score.py of MathVista (arXiv:2310.02255).
"""

import re
from collections.abc import Sequence
from typing import Any

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import accuracy, each, truths_of
from megatron_sphinx.evaluation.metrics.options import choice_letters, letter_by_word
from megatron_sphinx.evaluation.metrics.text_distance import edit_distance
from megatron_sphinx.evaluation.samples import Answered, Protocol, Verdict

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_NUMBER = re.compile(r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
_LIST = re.compile(r"\[[^\[\]]*\]")
_LETTER = re.compile(r"\(([a-zA-Z])\)")


def extract(text: str, question_type: str, answer_type: str, choices: Sequence[str]) -> str:
    """Return the part of an answer that is the answer; all of it where no rule finds one, nothing where there is none.

    Args:
        text: of the answer.
        question_type: multi_choice or free_form.
        answer_type: integer, float, list or text.
        choices: of a question with choices.
    """
    is_choice = question_type == "multi_choice"
    if not text or (is_choice and text in choices):
        return text
    if (number := _whole_number(text, answer_type)) is not None:
        return number
    if quoted := _QUOTED.search(text):
        return quoted[1]
    if is_choice:
        return text if _LETTER.search(text) else letter_by_word(text, choice_letters(choices)) or text
    found = (_LIST if answer_type == "list" else _NUMBER).findall(text) if answer_type != "text" else []
    return found[-1].replace(",", "" if answer_type != "list" else ",") if found else text


def _whole_number(text: str, answer_type: str) -> str | None:
    """Return the number that all of a text is, as its type writes it; None where it is none."""
    kinds: dict[str, type[int] | type[float]] = {"integer": int, "float": float}
    try:
        return str(kinds[answer_type](text)) if answer_type in kinds else None
    except ValueError:
        return None


def settle(extraction: str, question_type: str, answer_type: str, choices: Sequence[str], precision: Any) -> str | None:
    """Return an extracted answer in the form that answers have; None where it cannot be brought into it.

    A letter becomes its choice, other text the choice that is nearest by edit distance. Numbers become whole, or are
    rounded to the precision.

    Args:
        extraction: what was extracted.
        question_type: multi_choice or free_form.
        answer_type: integer, float, list or text.
        choices: of a question with choices.
        precision: how many decimals a float has; None leaves none.
    """
    if question_type == "multi_choice":
        letter = _LETTER.search(extraction)
        written = letter[1].upper() if letter else extraction.strip()
        nearest = min(choices, key=lambda choice: edit_distance(written, choice), default=None)
        return choice_letters(choices).get(written, nearest)
    try:
        if answer_type == "integer":
            return str(int(float(extraction)))
        if answer_type == "float":
            return str(round(float(extraction), None if precision is None else int(precision)))
    except (ValueError, OverflowError):
        return None
    return extraction


def _judge(answered: Answered, _protocol: Protocol) -> Verdict:
    record, choices = answered.sample.record, answered.sample.choices
    question_type, answer_type = str(record["question_type"]), str(record["answer_type"])
    extraction = extract(answered.text, question_type, answer_type, choices)
    if not extraction.strip():
        return Verdict(0.0, None)
    settled = settle(extraction, question_type, answer_type, choices, record.get("precision"))
    is_right = settled is not None and settled.strip() == truths_of(answered)[0].strip()
    return Verdict(float(is_right), settled)


MATH_VISTA = Metric("MathVista", each(_judge), accuracy)
