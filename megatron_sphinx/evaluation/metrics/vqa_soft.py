"""VQA's soft accuracy: how many of ten people gave the answer, after both are brought into one form.

Source: vqaEval.py of GT-Vision-Lab/VQA, the EvalAI form of pythia's and LLaVA's m4c_evaluator.py, and the copy
accessory/eval_mm/utils/vqa_eval.py of LLaMA2-Accessory.
"""

import re
from collections.abc import Sequence

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import accuracy, each, truths_of
from megatron_sphinx.evaluation.samples import Answered, Protocol, Verdict

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_JOINED_DIGITS = re.compile(r"\d,\d")
# The scorer's `(?!<=\d)(\.)(?!\d)` means a look behind and is a look ahead that never fails: decimals keep their point
# only for the digit that follows. Its flag re.UNICODE, 32, goes in as the count.
_PERIOD, _MOST_PERIODS = re.compile(r"\.(?!\d)"), 32
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Return the scorer's table: a contraction by what is left of it where one apostrophe is forgotten."""
    table = {
        word[:place] + word[place + 1 :]: word
        for word in _CONTRACTED.split()
        for place, character in enumerate(word)
        if character == "'"
    }
    return table | {"somebody'd": "somebodyd"}  # the scorer has this one the wrong way round


CONTRACTIONS = _contractions()


def strip_punctuation(text: str) -> str:
    """Take out punctuation as vqaEval does.

    A mark is deleted everywhere where it stands next to a space anywhere in the text, or where the text has a comma
    between digits; else it becomes a space. Of the periods that no digit follows the first 32 are deleted.
    """
    stripped, is_joined = text, _JOINED_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        is_loose = is_joined or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if is_loose else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS)


def settle_words(text: str) -> str:
    """Write words as vqaEval does: in lower case, numbers to ten as digits, no articles, contractions in full."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def flatten_spaces(text: str) -> str:
    """Return a text with spaces for newlines and tabs, and none around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def evalai_form(text: str) -> str:
    """Return an answer in the form that EvalAI's servers compare."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return settle_words(strip_punctuation(flatten_spaces(text)))


def soft_score(answer: str, truths: Sequence[str]) -> float:
    """Return how right an answer is beside those of people, all in one form, from 0 to 1.

    It is the mean, over leaving out each person, of a third of how many of the others gave this answer, at most 1: of
    ten people, 0, 0.3, 0.6, 0.9 and 1 for 0, 1, 2, 3, and 4 or more.
    """
    matches = [truth == answer for truth in truths]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def _verdict(answered: Answered, form: str, truths: Sequence[str]) -> Verdict:
    return Verdict(soft_score(form, truths), form if answered.text.strip() else None)


def _judge_accessory(answered: Answered) -> Verdict:
    """Judge as Accessory's copy: the answer is always settled, and people's answers lose nothing but punctuation."""
    truths = truths_of(answered)
    if len(set(truths)) > 1:
        truths = tuple(map(strip_punctuation, truths))
    return _verdict(answered, settle_words(strip_punctuation(flatten_spaces(answered.text))), truths)


def _judge(answered: Answered, protocol: Protocol) -> Verdict:
    """Judge as vqaEval: where all people agree, texts are compared as they are."""
    if protocol is Protocol.ACCESSORY:
        return _judge_accessory(answered)
    truths, form = [flatten_spaces(truth) for truth in truths_of(answered)], flatten_spaces(answered.text)
    if len(set(truths)) > 1:
        truths = [settle_words(strip_punctuation(truth)) for truth in truths]
        form = settle_words(strip_punctuation(form))
    return _verdict(answered, form, truths)


def _judge_evalai(answered: Answered, protocol: Protocol) -> Verdict:
    """Judge as EvalAI's servers; Accessory has one copy of vqaEval for all benchmarks."""
    if protocol is Protocol.ACCESSORY:
        return _judge_accessory(answered)
    return _verdict(answered, evalai_form(answered.text), [evalai_form(truth) for truth in truths_of(answered)])


VQA_SOFT = Metric("VQA soft accuracy", each(_judge), accuracy)
VQA_SOFT_EVALAI = Metric("VQA soft accuracy (EvalAI)", each(_judge_evalai), accuracy)
