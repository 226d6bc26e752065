"""MMMU: a letter, or words and numbers, found in an answer by the rules of its scorer.

A sample with choices has the letter as its right answer; one without has words or numbers, one or several. Where the
scorer draws an option by chance because an answer has none, the answer is wrong here.

Source: eval/eval_utils.py of MMMU (arXiv:2311.16502).
"""

import re
from collections.abc import Callable, Iterable, Sequence

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import JudgeOne, accuracy, each, truths_of
from megatron_sphinx.evaluation.metrics.options import choice_letters
from megatron_sphinx.evaluation.samples import Answered, Protocol, Verdict

ENDS = ",.!?;:'"
MANY_WORDS = 5  # of an answer that is no longer read by the texts of the choices
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
Value = float | str


def letter_that_stands(text: str, letters: Iterable[str]) -> str | None:
    """Return the letter that stands in an answer by itself; None where none does.

    Letters in parentheses come first, then letters before a space, then before a period. Of several the last is meant.
    """
    for mark in ENDS:
        text = text.strip(mark)
    text = f" {text} "
    for found_as, placed_as in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [letter for letter in letters if found_as.format(letter) in text]:
            places = [text.rfind(placed_as.format(letter)) for letter in found]
            return found[places.index(max(places))]
    return None


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that an answer means; None where it means none.

    A letter that stands by itself comes first, and in an answer of more than five words the texts of the choices. Of
    several the one that stands last is meant.
    """
    letters = choice_letters(choices)
    if letter := letter_that_stands(text, letters):
        return letter
    for mark in ENDS:
        text = text.strip(mark)
    if len(text.split()) <= MANY_WORDS:
        return None
    text = f" {text} ".lower()
    places = [text.rfind(choice.lower()) for choice in letters.values()]
    return list(letters)[places.index(max(places))] if max(places, default=-1) >= 0 else None


def settle_value(text: str) -> list[Value]:
    """Return the number that a text is, with two decimals, or the text in lower case.

    A single letter is returned with a space before it and behind it: it has to be a word of its own.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def key_parts(lines: Sequence[str], marks: Sequence[str], of_last: Sequence[str] = ()) -> list[str]:
    """Return the shortest text that stands behind a mark, of each line that has one with more than an end behind it.

    Args:
        lines: of an answer.
        marks: words such as `answer`; the last place of each counts.
        of_last: what is a mark in the last line alone.
    """
    found = []
    for place, line in enumerate(lines):
        known = (*marks, *of_last) if place == len(lines) - 1 else marks
        shortest = ""
        for end in (line.split(mark)[-1].strip() for mark in known if mark in line):
            shortest = end if not shortest or len(end) < len(shortest) else shortest  # an empty one is replaced
        if shortest and shortest not in tuple(ENDS):
            found.append(shortest)
    return found


def read_values(text: str) -> list[Value]:
    """Return the words and numbers that an answer may mean: what stands behind words such as `answer`, and its numbers.

    The scorer looks for ends of sentences before a capital letter in text that it has put in lower case before: only
    newlines part an answer.
    """
    text = text.strip().strip(".").lower()
    keys = key_parts(text.split("\n"), _KEYS, ("=",)) or [text]
    found = keys + [number for key in keys for pattern in _NUMBERS for number in pattern.findall(key)]
    return [value for one in found for value in settle_value(one)]


def is_among(said: Value, right: Sequence[Value]) -> bool:
    """Say whether a value is a right one: a number that is equal, words that hold the right ones."""
    if isinstance(said, str):
        return any(isinstance(value, str) and value in said for value in right)
    return said in right


def judge_by(read: Callable[[str, Sequence[str]], str | None]) -> JudgeOne:
    """Return the judge that reads letters by a rule, and words and numbers by those of MMMU, in all protocols."""

    def judge(answered: Answered, _protocol: Protocol) -> Verdict:
        truths = truths_of(answered)
        if answered.sample.choices:
            letter = read(answered.text, answered.sample.choices)
            return Verdict(float(letter in truths), letter)
        if not answered.text.strip():
            return Verdict(0.0, None)
        values, right = read_values(answered.text), [value for truth in truths for value in settle_value(truth)]
        hits = [value for value in values if is_among(value, right)]
        return Verdict(float(bool(hits)), str((hits or values)[0]))

    return judge


MMMU = Metric("MMMU", each(judge_by(read_choice)), accuracy)
