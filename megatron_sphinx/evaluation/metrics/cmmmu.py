"""CMMMU: letters, a judgement, or words and numbers, found in a Chinese answer by the rules of its scorer.

Samples have `type` of the benchmark's file in their records. Where the scorer draws an answer by chance, because it
finds none or as much for as against, the answer is wrong here. It takes `不对` for `对`, which it looks for first and
finds inside; so does the protocol of the authors here, while such an answer denies by the others.

Source: eval/eval_script.py of CMMMU (arXiv:2401.11944).
"""

import re
from collections.abc import Sequence

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import accuracy, each, truths_of
from megatron_sphinx.evaluation.metrics.mmmu import ENDS, Value, is_among, key_parts
from megatron_sphinx.evaluation.metrics.options import choice_letters
from megatron_sphinx.evaluation.samples import Answered, Protocol, Verdict

_CHOICE, _BLANK = "选择", "填空"  # types; the third one is a judgement
_FILLED_BEHIND = ("是", "为", "所以", "等于", "方案", "选择", "正确答案", "因此", "最后", "答案", "结果")
_JUDGED_BEHIND = ("是", "为", "所以", "判断", "陈述", "说法", "表达", "答案", "结果")
_AFFIRMS = ("正确", "对", "准确", "肯定")
_DENIES = ("不对", "错", "不正确", "不准确", "不合适", "否定")
_ASKS = ("对错", "是否", "否正确", "或者", "正确性", "对不")
_DENIED = re.compile("不(?:正确|对|准确)")
_NUMBERS = (
    re.compile(r"-?\d{1,3}(?:\uff0c\d{3})+"),  # with the Chinese comma
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+)(?![eE][+-]?\d+)(?!\uff0c\d)"),
)
_MOST_MORE = 20  # characters that a text may have more than the right answer
_MOST_LETTERS_MORE = 2  # Latin letters likewise


def read_letters(text: str, choices: Sequence[str]) -> str | None:
    """Return the letters of the choices that an answer means, in their order; None where it means none.

    They are those that it has most often: letters in parentheses, else letters anywhere, else texts of the choices.
    """
    for mark in ENDS:
        text = text.strip(mark)
    letters = choice_letters(choices)
    forms = ({letter: f"({letter})" for letter in letters}, {letter: letter for letter in letters}, letters)
    for form in forms:
        counts = {letter: text.count(sought) for letter, sought in form.items()}
        if most := max(counts.values(), default=0):
            return "".join(letter for letter, count in counts.items() if count == most)
    return None


def _parts(text: str, marks: Sequence[str], of_last: Sequence[str] = ()) -> list[str]:
    """Return what stands in the sentences of an answer behind marks; all of it where nothing does."""
    text = text.strip("。").strip()
    return key_parts(re.split("。|\n", text), marks, of_last) or [text]


def read_judgement(text: str, *, as_authors: bool = False) -> str | None:
    """Return 对 or 错, of which an answer has more; None where it has neither, or as much of both.

    Args:
        text: the answer.
        as_authors: whether `不对` affirms, as it does to the authors' scorer.
    """
    parts = {part for part in _parts(text, _JUDGED_BEHIND) if not any(word in part for word in _ASKS)}
    balance = 0
    for part in parts:
        said = part if as_authors else _DENIED.sub("", part)
        if any(word in said for word in _AFFIRMS):
            balance += 1
        elif any(word in part for word in _DENIES):
            balance -= 1
    if not balance:
        return None
    return "对" if balance > 0 else "错"


def settle_value(text: str, truth: str) -> list[Value]:
    """Return the number that a text is, with two decimals, or the text; nothing where that is much the longer one.

    Args:
        text: a part of an answer, or the right answer itself.
        truth: the right answer.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        is_long = len(text) > len(truth) + _MOST_MORE or _latin(text) > _latin(truth) + _MOST_LETTERS_MORE
        return [] if is_long else [text]


def _latin(text: str) -> int:
    return sum(letter.isascii() and letter.isalpha() for letter in text)


def read_values(text: str, truth: str) -> list[Value]:
    """Return the words and numbers that an answer may mean, in the form of the right one."""
    parts = _parts(text, _FILLED_BEHIND, ("=",))
    found = parts + [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    return [value for one in found for value in settle_value(one, truth)]


def _judge(answered: Answered, protocol: Protocol) -> Verdict:
    truth, text = truths_of(answered)[0], answered.text
    kind = answered.sample.record["type"]
    if kind != _BLANK:
        if kind == _CHOICE:
            read = read_letters(text, answered.sample.choices)
        else:
            read = read_judgement(text, as_authors=protocol is Protocol.OFFICIAL)
        return Verdict(float(read == truth), read)
    values = read_values(text, truth) if text.strip() else []
    right = settle_value(truth, truth)
    hits = [value for value in values if is_among(value, right)]
    return Verdict(float(bool(hits)), str((hits or values)[0]) if values else None)


CMMMU = Metric("CMMMU", each(_judge), accuracy)
