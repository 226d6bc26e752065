"""Set-of-Mark data: the answers of an annotator model to the prompts of `marks.py`, joined to conversations."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import relative
from megatron_sphinx.prepare.json_files import Item, read_items
from megatron_sphinx.prepare.tasks import ConversationJson, conversation
from megatron_sphinx.prepare.texts import check_text
from megatron_sphinx.prepare.workers import Report, one_line, quarantine_beside, write_lines

_MENTIONED = re.compile(r"\bmark\s+#?(\d+)|\bmarks\s+(#?\d+(?:(?:[\s,&#-]|and|or|to)+\d+)*)", re.IGNORECASE)
_MOST_DIGITS = 9  # of a mark's number that are looked at
_MANY = 1000  # lines that are read at once

Entry = dict[str, Any]


def merge_answers(prompts: Path, answers: Path, target: Path) -> Report:
    """Join the answers of an annotator model to conversations about the images without marks.

    Args:
        prompts: the file that `write_marks` wrote.
        answers: JSON lines with id and answer, in any order; of several to one prompt the first good one is taken.
        target: file of conversations.

    Returns:
        How many answers are taken, and how many prompts and answers are not, by reason.

    Raises:
        DataError: a file cannot be read, or no answer can be used.
    """
    asked: dict[str, Entry] = {}
    for item in _read_lines(prompts):
        entry = item.content
        if not _is_prompt(entry):
            raise DataError(f"{prompts}: not all lines are prompts; make it by megatron-sphinx prepare som mark")
        asked[entry["id"]] = entry
    missing = set(asked)
    taken: dict[str, Entry] = {}
    report, quarantine = Report(), []
    for item in _read_lines(answers):
        entry = item.content if isinstance(item.content, dict) else None
        key = str((entry or {}).get("id"))
        report.inputs += 1
        try:
            taken[key] = _merge(asked.get(key), entry, key in taken)
        except DataError as error:
            quarantine.append({"answers": str(answers), "place": item.place, "reason": one_line(str(error))})
        missing.discard(key)
    report.inputs += len(missing)
    unanswered = {"prompts": str(prompts), "reason": "missing answer"}
    quarantine += [unanswered | {"id": key} for key in asked if key in missing]
    report.reject(quarantine)
    report.taken = len(taken)
    if not taken:
        raise DataError(f"{answers}: no answer can be used{report.why()}; give those to {prompts}, as id and answer")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_lines(target, [taken[key] for key in asked if key in taken])
        write_lines(quarantine_beside(target), quarantine)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); give another TARGET") from error
    return report


def _is_prompt(entry: object) -> bool:
    """Say whether a line is as `write_marks` writes it."""
    if not isinstance(entry, dict):
        return False
    texts = all(isinstance(entry.get(key), str) for key in ("id", "image", "description", "question"))
    return texts and isinstance(entry.get("marks"), int)


def mentioned(text: str) -> set[int]:
    """Return the numbers of the marks that a text speaks of: `mark 1`, `marks 1, 2 and 3`."""
    numbers = (number for groups in _MENTIONED.findall(text) for number in re.findall(r"\d+", " ".join(groups)))
    return {int(number[:_MOST_DIGITS]) for number in numbers}


def _merge(asked: Entry | None, entry: Entry | None, is_taken: bool) -> ConversationJson:
    """Return the conversation that a prompt and its answer make.

    Args:
        asked: the prompt; None where no prompt has the answer's id.
        entry: the line with the answer; None where it is no JSON object.
        is_taken: whether another answer to the prompt has been taken.

    Raises:
        DataError: the answer cannot be used.
    """
    if entry is None or not entry.keys() >= {"id", "answer"}:
        raise DataError("no answer: a line is no object with id and answer")
    if asked is None:
        raise DataError(f"unknown id: {entry['id']}")
    if is_taken:
        raise DataError(f"second answer: {entry['id']}")
    answer = entry["answer"].strip() if isinstance(entry["answer"], str) else ""
    check_text(answer, "answer")
    if not answer:
        raise DataError(f"empty answer: {entry['id']}")
    if unknown := mentioned(answer) - set(range(1, asked["marks"] + 1)):
        raise DataError(f"unknown mark: {min(unknown)} of {asked['marks']}")
    return conversation(relative(asked["image"]), [(f"{asked['description']}\n{asked['question']}", answer)])


def _read_lines(path: Path) -> Iterator[Item]:
    """Yield what the lines of a file hold, or the items of the list that it is; a line that is not JSON holds None."""
    for items in read_items(path, _MANY, are_lines=True):
        yield from items.read()
