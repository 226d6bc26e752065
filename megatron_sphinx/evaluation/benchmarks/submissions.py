"""Files that servers of benchmarks take: answers by the names that each of them has for its questions."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_sphinx.evaluation.samples import Answered

Submission = Callable[[Sequence[Answered]], Mapping[str, str]]


def json_list(file: str, id_name: str, answer_name: str, record: str = "") -> Submission:
    """Make what writes a list of objects with a name and an answer.

    Args:
        file: its name.
        id_name: what the server calls the name of a question or picture.
        answer_name: what it calls the answer.
        record: where the name is in records of samples, in the kind that the server knows; empty for the id.
    """

    def write(answered: Sequence[Answered]) -> Mapping[str, str]:
        rows = [
            {id_name: one.sample.record[record] if record else one.sample.id, answer_name: one.text.strip()}
            for one in answered
        ]
        return {file: _json(rows)}

    return write


def json_lines(file: str, id_name: str, answer_name: str) -> Submission:
    """Make what writes a line for each answer: an object with a name and the answer."""

    def write(answered: Sequence[Answered]) -> Mapping[str, str]:
        rows = (_json({id_name: one.sample.id, answer_name: one.text.strip()}) for one in answered)
        return {file: "".join(f"{row}\n" for row in rows)}

    return write


def json_object(file: str) -> Submission:
    """Make what writes one object with the answers by the names of questions."""
    return lambda answered: {file: _json({one.sample.id: one.text.strip() for one in answered})}


def table(file: str) -> Submission:
    """Make what writes a table of MMBench's layout without pictures, with the answers in the column `prediction`."""

    def write(answered: Sequence[Answered]) -> Mapping[str, str]:
        names = list(dict.fromkeys(name for one in answered for name in one.sample.record))
        rows = [[*names, "prediction"]]
        rows += [[*(str(one.sample.record.get(name, "")) for name in names), one.text.strip()] for one in answered]
        return {file: "".join("\t".join(map(_cell, row)) + "\n" for row in rows)}

    return write


def mme_results(answered: Sequence[Answered]) -> Mapping[str, str]:
    """Write a file for each task of MME, as its tool reads them: picture, question, truth and answer, tabs between."""
    lines: dict[str, list[str]] = {}
    for one in answered:
        record = one.sample.record
        cells = (record["image"], record["question"], record["answer"], " ".join(one.text.split()))
        lines.setdefault(one.sample.categories["task"], []).append("\t".join(cells) + "\n")
    return {f"{task}.txt": "".join(of_task) for task, of_task in lines.items()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    """Quote a cell of a table where it holds what parts cells or rows."""
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in '\t\n\r"') else text
