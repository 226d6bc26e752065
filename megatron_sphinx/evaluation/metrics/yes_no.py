"""Questions answered by yes or no: POPE, MME and HallusionBench.

Source: evaluate.py of AoiDragon/POPE; calculation.py of MME's eval_tool; evaluation.py and utils.py of HallusionBench
(arXiv:2310.14566) and vlmeval/dataset/utils/yorn.py of VLMEvalKit.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import accuracy, each, group_percent, parts, percent, truths_of
from megatron_sphinx.evaluation.metrics.vqa_soft import strip_punctuation
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Verdict

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
_UNCERTAIN = "uncertain"  # what an answer that leaves the question open is read as
_LEFT_OPEN = re.compile(
    r"\b(?:uncertain|unsure|unclear|unknown|unanswerable|undetermined|not (?:sure|certain|clear|known)|"
    r"(?:do not|don.?t) know|"
    r"(?:impossible to|unable to|could not|can ?not|can.?t) (?:be )?(?:tell|say|answer|determined?))\b",
    re.IGNORECASE,
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_pope(text: str) -> str:
    """Return yes or no as POPE reads an answer: the first sentence means no where it has the word No, not or no."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def read_mme(text: str) -> str | None:
    """Return yes or no as MME reads an answer: yes, else no, within the first four characters; None for neither."""
    text = text.lower()
    beginning = text if text in ("yes", "no") else text[:4]
    return next((word for word in ("yes", "no") if word in beginning), None)


def read_hallusion(text: str) -> str | None:
    """Return yes or no as VLMEvalKit reads an answer: the one of both words that it has.

    An answer with neither, which says that it does not know, is `uncertain`, where the benchmark's judge finds it
    unclear; any other with neither or both is None.
    """
    found = {"yes", "no"} & set(strip_punctuation(text.lower()).split())
    if not found and _LEFT_OPEN.search(text):
        return _UNCERTAIN
    return found.pop() if len(found) == 1 else None


def _judged_by(read: Callable[[str], str | None]) -> Callable[[Answered, Protocol], Verdict]:
    """Return the judge that reads yes or no by a rule, which all protocols share."""

    def judge(answered: Answered, _protocol: Protocol) -> Verdict:
        word = read(answered.text)
        return Verdict(float(word == truths_of(answered)[0].strip().lower()), word)

    return judge


def _pope_of(judged: Sequence[Judged]) -> dict[str, float]:
    """Return F1 and the like of one part, in percent, yes being what is looked for; 0 where nothing is to divide by."""
    said = [one.verdict.parsed == "yes" for one in judged]
    true = [one.answered.sample.answers[0].strip().lower() == "yes" for one in judged]
    both = sum(mine and right for mine, right in zip(said, true, strict=True))
    precision, recall = both / (sum(said) or 1), both / (sum(true) or 1)
    return {
        **accuracy(judged),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "F1": 200 * precision * recall / ((precision + recall) or 1),
        "yes ratio": percent(said),
    }


def _pope(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the figures of each part of the category `split`, and before them their means."""
    by_split = {split: _pope_of(ones) for split, ones in sorted(parts(judged, "split").items())}
    if not by_split:
        return _pope_of(judged)
    names = ("accuracy", "precision", "recall", "F1", "yes ratio")
    means = {name: sum(figures[name] for figures in by_split.values()) / len(by_split) for name in names}
    return means | {f"{name} {split}": figures[name] for split, figures in by_split.items() for name in names}


def _mme_picture(one: Judged) -> str:
    """Return what the two questions about a picture have in common."""
    return one.answered.sample.group or one.answered.sample.picture_id


def _mme(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the sums over the ten tasks of perception and the four of cognition, and each task of the category `task`.

    A task has accuracy and accuracy+ in percent, added: at most 200. In accuracy+ both questions about a picture are
    right.
    """
    tasks = {
        task: percent(one.verdict.value for one in ones) + group_percent(ones, _mme_picture)
        for task, ones in parts(judged, "task").items()
    }
    sums = {
        "perception": sum(tasks.get(task, 0.0) for task in PERCEPTION),
        "cognition": sum(tasks.get(task, 0.0) for task in COGNITION),
    }
    return sums | {task: tasks[task] for task in (*PERCEPTION, *COGNITION) if task in tasks}


def _has_no_figure(record: Mapping[str, object]) -> bool:
    """Say whether a question of HallusionBench is asked without its figure, which would be a supplement to it."""
    return str(record["category"]) == "VS" and str(record["figure_id"]) == "0"


def _judge_hallusion(answered: Answered, _protocol: Protocol) -> Verdict:
    """Judge a word; without a figure, who does not know is right, too."""
    word = read_hallusion(answered.text)
    is_open = word == _UNCERTAIN and _has_no_figure(answered.sample.record)
    return Verdict(float(is_open or word == truths_of(answered)[0].strip().lower()), word)


def _hallusion(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the accuracy by question, figure and answer, and by question over easy and over hard figures.

    A question counts where it is right for all its figures, a figure where all questions about it are right; questions
    without a figure are of none. Figure 0 is the easy one, the others are hard. Samples have category, subcategory,
    set_id, figure_id and question_id of the benchmark's file in their records.
    """

    def key(field: str) -> Callable[[Judged], object]:
        names = ("category", "subcategory", "set_id", field)
        return lambda one: tuple(str(one.answered.sample.record[name]) for name in names)

    def is_hard(one: Judged) -> bool:
        return str(one.answered.sample.record["figure_id"]) != "0"

    shown = [one for one in judged if not _has_no_figure(one.answered.sample.record)]
    return {
        "aAcc": percent(one.verdict.value for one in judged),
        "qAcc": group_percent(judged, key("question_id")),
        "fAcc": group_percent(shown, key("figure_id")),
        "easy": group_percent([one for one in judged if not is_hard(one)], key("question_id")),
        "hard": group_percent([one for one in judged if is_hard(one)], key("question_id")),
    }


POPE = Metric("POPE", each(_judged_by(read_pope)), _pope)
MME = Metric("MME", each(_judged_by(read_mme)), _mme)
HALLUSION_BENCH = Metric("HallusionBench", each(_judge_hallusion), _hallusion)
