"""Letters of options: read from answers by the rules of VLMEvalKit, of LLaVA's ScienceQA scorer and of Accessory.

A sample's right answer is the letter, its choices are the texts of the options. What cannot be read is wrong; where
others ask a judge or draw an option by chance, nothing is done.

Source: vlmeval/utils/matching_util.py of VLMEvalKit; llava/eval/eval_science_qa.py of LLaVA;
accessory/eval_mm/evaluate.py of LLaMA2-Accessory.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.exact_match import accessory_form
from megatron_sphinx.evaluation.metrics.figures import accuracy, each, group_percent, own_group, parts, truths_of
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Verdict

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_SCIENCE_ANSWER = re.compile(r"The answer is ([A-Z]).")
_FIVE_LETTERS = "ABCDE"
SCIENCE_PREFIX = {Protocol.PAPER: " The answer is", Protocol.ACCESSORY: " The answer is", Protocol.OFFICIAL: ""}
_BEHIND_PREFIX = re.compile(r"\(?([A-Z])\)?(?:[.,:;)\n]|$|(?<!A) )")


def choice_letters(choices: Sequence[str]) -> dict[str, str]:
    """Return the options by their letters, from A."""
    return dict(zip(ascii_uppercase, choices, strict=False))


def letter_by_word(text: str, letters: Mapping[str, str]) -> str | None:
    """Return the letter of an option that stands in a text as a word of its own.

    It has to be the only one of the options' letters and among the last four words, or to follow `answer is`. A refusal
    to answer, or Z, is no option and yet an answer: `Z` is returned.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return "Z"
    words = text.translate(_MARKS).split()
    found = [letter for letter in letters if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - _LAST_WORDS:
        return found[0]
    if not found and "Z" in words:
        return "Z"
    answer = _ANSWER_IS.search(text)
    return answer[1].upper() if answer and answer[1].upper() in letters else None


def letter_by_text(text: str, letters: Mapping[str, str]) -> str | None:
    """Return the letter of the only option whose text stands in an answer that is not much longer than the options."""
    text = text.lower()
    if len(text) > 2 * sum(map(len, letters.values())):
        return None
    found = [letter for letter, choice in letters.items() if choice.lower() in text]
    return found[0] if len(found) == 1 else None


def read_letter(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter that an answer means by VLMEvalKit's rules; None where it means none of the options."""
    letters = choice_letters(choices)
    letter = None
    if "Failed to obtain answer via API" not in text:
        letter = letter_by_word(text, letters)
    letter = letter or letter_by_text(text, letters)
    return letter if letter in letters else None


def read_science_letter(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter that an answer to ScienceQA means by LLaVA's rules.

    They are: the answer is the letter, or begins `X. `, or has `The answer is X.` exactly once.
    """
    letter = text if text in tuple(_FIVE_LETTERS) else None
    if letter is None and text[:1] and text[0] in _FIVE_LETTERS and text[1:3] == ". ":
        letter = text[0]
    elif letter is None and len(found := _SCIENCE_ANSWER.findall(text)) == 1:
        letter = found[0]
    return letter if letter is not None and letter in _FIVE_LETTERS[: len(choices)] else None


def read_letter_behind_prefix(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter that an answer to ScienceQA means that was made to begin with `The answer is`.

    What LLaVA's rules read in the answer alone counts first. Then the answer goes on from what it begins with: a letter
    that the next sign or the end ends is that of `The answer is X.`; before a space A may be the article.
    """
    text = text.strip()
    behind = _BEHIND_PREFIX.match(text)
    letter = read_science_letter(text, choices) or (behind[1] if behind else None)
    return letter if letter is not None and letter in _FIVE_LETTERS[: len(choices)] else None


def read_pair_letter(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter that an answer to MMVP means: its options are called (a) and (b), so small letters count."""
    bare = text.strip().removesuffix(".")
    if bare.lower() in {form for letter in "ab" for form in (letter, f"({letter})")}:
        return bare.strip("()").upper()
    bracketed = {found.upper() for found in re.findall(r"\(([ab])\)", text)}
    return bracketed.pop() if len(bracketed) == 1 else read_letter(text, choices)


def _judge_accessory(answered: Answered) -> Verdict:
    """Judge as Accessory: what stands before the first period has to be a letter from A to E.

    Where it is none Accessory draws a letter by chance; here the answer is wrong.
    """
    truth = truths_of(answered)[0]
    letter = answered.text.split(".")[0]
    if truth in tuple(_FIVE_LETTERS):
        return Verdict(float(letter == truth), letter if letter in tuple(_FIVE_LETTERS) else None)
    form = accessory_form(answered.text)
    return Verdict(float(form == accessory_form(truth)), form or None)


def _judged_by(read: Callable[[str, Sequence[str]], str | None]) -> Callable[[Answered, Protocol], Verdict]:
    """Return the judge that reads letters by a rule, and by Accessory's where its protocol is followed."""

    def judge(answered: Answered, protocol: Protocol) -> Verdict:
        if protocol is Protocol.ACCESSORY:
            return _judge_accessory(answered)
        letter = read(answered.text, answered.sample.choices)
        return Verdict(float(letter in truths_of(answered)), letter)

    return judge


def _judge_science(answered: Answered, protocol: Protocol) -> Verdict:
    """Judge a letter of ScienceQA; where the protocol has the answer begin with words, these are part of it."""
    read = read_letter_behind_prefix if SCIENCE_PREFIX[protocol] else read_science_letter
    return _judged_by(read)(answered, protocol)


def _circular(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the share of questions that are right in all rotations of their options, and of single rotations."""
    return {"circular accuracy": group_percent(judged, own_group), **accuracy(judged)}


def _pairs(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the share of pairs of pictures with both answers right, and of single answers."""
    return {"pair accuracy": group_percent(judged, own_group), **accuracy(judged)}


# Video-Bench's groups of data sets, and how much each counts in its group; Step3_compute_scores.py of its authors.
_VIDEO_GROUPS = (
    {"ActivityNet": 1, "MSVD": 1, "MSRVTT": 1, "TGIF": 1, "Youcook2": 1, "Ucfcrime": 1, "MOT": 0.5},
    {"TVQA": 1, "MV": 1, "NBA": 1},
    {"Driving-exam": 0.5, "Driving-decision-making": 1, "SQA3D": 1},
)


def _video_parts(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the mean of the data sets' accuracies, as SPHINX-X has it, the authors' weighted score, and each of them.

    The weighted score is the mean of three groups; what has no answers is left out of its group.
    """
    found = {part: accuracy(ones)["accuracy"] for part, ones in parts(judged, "part").items()}
    groups = [[(weight, found[part]) for part, weight in group.items() if part in found] for group in _VIDEO_GROUPS]
    means = [
        sum(weight * value for weight, value in group) / sum(weight for weight, _ in group) for group in groups if group
    ]
    mean = sum(found.values()) / len(found) if found else math.nan
    return {"mean accuracy": mean, "weighted score": sum(means) / len(means) if means else math.nan, **found}


OPTION_LETTER = Metric("option letter", each(_judged_by(read_letter)), accuracy)
SCIENCE_LETTER = Metric("option letter (ScienceQA)", each(_judge_science), accuracy)
CIRCULAR = Metric("circular evaluation", each(_judged_by(read_letter)), _circular)
VIDEO_PARTS = Metric("option letter by data set", each(_judged_by(read_letter)), _video_parts)
PAIRS = Metric("pairs", each(_judged_by(read_pair_letter)), _pairs)
