"""Answers in the forms that others take: files for the servers of benchmarks, and tables for VLMEvalKit."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_sphinx.data.files import renamed
from megatron_sphinx.evaluation.results import Results
from megatron_sphinx.evaluation.samples import Answered

_HEAD = ("index", "question", "answer", "prediction")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # which XML, and so xlsx, cannot hold
_MOST_CHARACTERS = 32_767  # of a cell of xlsx


def write_exports(results: Results, folder: Path) -> list[Path]:
    """Write what a benchmark's server takes, if it has one, and tables for VLMEvalKit.

    The tables are called `MODEL_BENCHMARK`, as VLMEvalKit calls what it continues from; the .xlsx is left out where
    openpyxl is not installed.

    Args:
        results: the answers.
        folder: of the benchmark.

    Returns:
        The files.
    """
    written = []
    if results.benchmark.submission is not None:
        for name, content in results.benchmark.submission(results.answered).items():
            written.append(_write(folder / "submission" / name, content.encode("utf-8", "surrogatepass")))
    stem = re.sub(r"[^\w.-]+", "_", f"{results.settings['model']['name']}_{results.benchmark.title}")
    written.append(_write(folder / "vlmevalkit" / f"{stem}.tsv", _tsv(results.answered)))
    if find_spec("openpyxl") is not None:
        written.append(_write(folder / "vlmevalkit" / f"{stem}.xlsx", _xlsx(results.answered)))
    return written


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed(path) as partial:
        partial.write_bytes(content)
    return path


def _rows(answered: Sequence[Answered]) -> Iterator[tuple[str, ...]]:
    """Yield the head and a row for each answer; of several right answers the first one."""
    yield _HEAD
    for one in answered:
        sample = one.sample
        question = sample.fields.get("question", " ".join(sample.fields.values()))
        yield sample.id, question, sample.answers[0] if sample.answers else "", one.text


def _tsv(answered: Sequence[Answered]) -> bytes:
    text = io.StringIO()
    csv.writer(text, dialect="excel-tab", lineterminator="\n").writerows(_rows(answered))
    return text.getvalue().encode("utf-8", "surrogatepass")


def _xlsx(answered: Sequence[Answered]) -> bytes:
    from openpyxl import Workbook

    book = Workbook(write_only=True)
    sheet: Any = book.create_sheet()
    for row in _rows(answered):
        sheet.append([_CONTROL.sub("", text)[:_MOST_CHARACTERS] for text in row])
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()
