"""Questions with options in layouts of their own: ScienceQA, IconQA, AI2D, SEED, MMMU, CMMMU, tables with pictures."""

import ast
import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.prompts import CMMMU_OPTIONS, CMMMU_TASKS, LETTER, LETTER_SLIP, SHORT
from megatron_sphinx.evaluation.readers.layout import cells, letter_in, option_lines, place_in
from megatron_sphinx.evaluation.readers.rows import Row, checked, first_there, located, object_of, rows_of
from megatron_sphinx.evaluation.samples import Sample

_PLACE_OF_A_PICTURE = re.compile(r"<image \d+>|<img=\"[^\"]*\">")
_LONGEST_REFERENCE = 64  # signs in the column of pictures: what is not longer names the row that has the picture
_ROTATED = 1_000_000  # what a rotation of a question has more in its index


def _problems(folder: Path, split: str) -> Iterator[Row]:
    """Yield the problems of a split, in the order of the file of splits, which ScienceQA and IconQA have alike."""
    names = object_of(folder / "pid_splits.json").texts(split)
    problems = {row.key: row for row in rows_of(folder / "problems.json")}
    for name in names:
        if name not in problems:
            raise DataError(
                f"{folder / 'problems.json'}: lacks {name}, which pid_splits.json has in {split}; give both as they are"
            )
        yield problems[name]


@checked
def read_science_qa(folder: Path, split: str, *, with_picture_only: bool) -> Iterator[Sample]:
    """Yield the samples of ScienceQA.

    Args:
        folder: that of the benchmark.
        split: train, val or test.
        with_picture_only: whether the questions without a picture are another benchmark's.

    Raises:
        DataError: a file is missing, or has another layout.
    """
    pictures = first_there(folder, (split, f"images/{split}"))
    for row in _problems(folder, split):
        has_picture = row.has("image")
        if with_picture_only and not has_picture:
            continue
        choices = row.texts("choices")
        yield Sample(
            id=row.key,
            picture=row.path("{key}/{image}", pictures) if has_picture else None,
            picture_id=row.key if has_picture else f"no picture of {row.key}",
            fields={
                "question": row.filled("question"), "hint": row.text("hint", ""), "options": option_lines(choices),
            },
            answers=(place_in("answer")(row, choices),),
            choices=choices,
            categories={name: row.text(name, "") for name in ("subject", "topic", "category", "grade")},
        )  # fmt: skip


@checked
def read_icon_qa(folder: Path, split: str, kind: str) -> Iterator[Sample]:
    """Yield the samples of one kind of questions of IconQA.

    Args:
        folder: that of the benchmark.
        split: train, val or test.
        kind: choose_txt or fill_in_blank; the options of choose_img are pictures, which no prompt can hold.

    Raises:
        DataError: a file is missing, or has another layout.
    """
    root = first_there(folder, ("iconqa_data", "."))
    for row in _problems(root, split):
        if row.filled("ques_type") != kind:
            continue
        choices = row.texts("choices") if kind == "choose_txt" else ()
        yield Sample(
            id=row.key,
            picture=row.path(f"iconqa/{split}/{kind}/{{key}}/image.png", root),
            picture_id=row.key,
            fields={"question": row.filled("question"), "options": option_lines(choices)},
            answers=(place_in("answer")(row, choices) if choices else row.text("answer"),),
            choices=choices,
            categories={"grade": row.text("grade", "")},
        )


@checked
def read_ai2d(folder: Path) -> Iterator[Sample]:
    """Yield the samples of AI2D's test pictures: a file of questions for each, all with options.

    Raises:
        DataError: a file is missing, or has another layout.
    """
    root = first_there(folder, ("ai2d", "."))
    listed = located(folder, "ai2d_test_ids.csv or ai2d/ai2d_test_ids.csv")
    try:
        names = listed.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listed}: cannot be read ({error}); give the file as its authors distribute it") from error
    for name in names:
        content = object_of(root / "questions" / f"{name}.png.json")
        for question, value in content.inner("questions").content.items():
            row = content.within("questions", value)
            choices = row.texts("answerTexts")
            letter = place_in("correctAnswer")(row, choices)
            yield Sample(
                id=row.text("questionId"),
                picture=content.path("images/{imageName}", root),
                picture_id=content.text("imageName"),
                fields={"question": question, "choices": "\n".join(choices)},
                answers=(choices[ord(letter) - ord("A")],),
                choices=choices,
            )


@checked
def read_seed(folder: Path) -> Iterator[Sample]:
    """Yield the samples of SEED-Bench that are about a picture, not about a video.

    Raises:
        DataError: the file is missing, or has another layout.
    """
    source = folder / "SEED-Bench.json"
    kinds = {str(number): name for name, number in object_of(source).inner("question_type").content.items()}
    for row in rows_of(source, "questions"):
        medium = row.filled("data_type")
        if medium not in ("image", "video"):
            raise row.fault(f"no data_type: {medium} is neither image nor video")
        if medium == "video":
            continue
        choices = cells(("choice_a", "choice_b", "choice_c", "choice_d"))(row)
        kind = row.text("question_type_id")
        yield Sample(
            id=row.text("question_id"),
            picture=row.path("{data_id}", first_there(folder, ("SEED-Bench-image",))),
            picture_id=row.text("data_id"),
            fields={"question": row.filled("question"), "options": option_lines(choices)},
            answers=(letter_in("answer")(row, choices),),
            choices=choices,
            categories={"question type": kinds.get(kind, kind)},
        )


@checked
def read_table(folder: Path, name: str) -> Iterator[Sample]:
    """Yield the samples of a table of MMBench's layout, whose pictures are in it as base64.

    A row whose picture is empty is a sample all the same, with an empty picture, which cannot be asked about.

    Args:
        folder: that of the benchmark.
        name: the file, which may have several names with ` or ` between them.

    Raises:
        DataError: the file is missing, has another layout, or a picture is no base64.
    """
    pictures: dict[str, tuple[bytes, str]] = {}
    kept: dict[str, bytes] = {}
    letters = "ABCDEFGHIJ"
    for row in rows_of(located(folder, name)):
        index = row.integer("index")
        picture, digest = _picture(row, pictures)
        picture = kept.setdefault(digest, picture)
        digest = digest or f"no picture of {index}"
        pictures[str(index)] = (picture, digest)
        choices = cells([letter for letter in letters if letter in row.content])(row)
        letter = letter_in("answer")(row, choices)
        hint = row.text("hint", "")
        hint = "" if hint.strip().lower() in ("", "nan") else f"{hint}\n"
        yield Sample(
            id=str(index),
            picture=picture,
            picture_id=digest,
            fields={"question": row.filled("question"), "hint": hint, "options": option_lines(choices)},
            answers=(letter,) if letter else (),
            choices=choices,
            group=row.text("g_index") if row.has("g_index") else str(index % _ROTATED),
            categories={field: row.text(field) for field in ("category", "l2-category", "split") if row.has(field)},
            record={field: value for field, value in row.content.items() if field != "image"},
        )


def _picture(row: Row, others: dict[str, tuple[bytes, str]]) -> tuple[bytes, str]:
    """Return the picture of a row of a table, and its digest; an empty one, which cannot be asked about, has none."""
    text = row.text("image", "").strip()
    if text and len(text) <= _LONGEST_REFERENCE and text.isdecimal():
        if text not in others:
            raise row.fault(f"no image: it has that of the row with index {text}, which is not before it")
        return others[text]
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.fault(f"no image: it is no base64 ({error})") from error
    return content, _digest(content)


def _digest(picture: bytes) -> str:
    """Return what tells a picture from others; nothing for an empty one."""
    return hashlib.sha256(picture).hexdigest()[:32] if picture else ""


@checked
def read_mmmu(folder: Path, split: str) -> Iterator[Sample]:
    """Yield the samples of MMMU, a folder a subject; of several pictures the first is shown, and a category says so.

    Args:
        folder: that of the benchmark.
        split: dev, validation or test.

    Raises:
        DataError: files are missing, or have another layout.
    """
    for source in _parquets(folder, split):
        for row in rows_of(source):
            choices = _options(row)
            answer = row.text("answer")
            truths = (answer,) if choices else tuple(str(each) for each in _literal(row, answer, [answer]))
            sample = _exam(row, choices, () if answer == "?" else truths, source.parent.name, "question_type")
            yield _told(sample)


def _options(row: Row) -> tuple[str, ...]:
    found = _literal(row, row.text("options"), None)
    return tuple(str(option) for option in found)


def _literal(row: Row, text: str, default: list[str] | None) -> list[Any]:
    """Read a list that is written as Python does; a text that is none is the default, where there is one."""
    try:
        found = ast.literal_eval(text) if text.lstrip().startswith("[") else default
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = default
    if not isinstance(found, list):
        raise row.fault(f"no options: {text[:80]!r} is no list")
    return found


@checked
def read_cmmmu(folder: Path, split: str) -> Iterator[Sample]:
    """Yield the samples of CMMMU: choices, judgements that are right or wrong, and blanks.

    Args:
        folder: that of the benchmark.
        split: dev, val or test.

    Raises:
        DataError: files are missing, or have another layout.
    """
    for source in _parquets(folder, split):
        for row in rows_of(source):
            kind = row.filled("type")
            if kind not in CMMMU_TASKS:
                raise row.fault(f"no type: {kind} is none of {', '.join(CMMMU_TASKS)}")
            names = [f"option{number}" for number in range(1, 5)]
            choices = cells(names)(row) if kind == "选择" else ()
            answer = row.text("answer", "").strip()
            sample = _exam(row, choices, (answer,) if answer not in ("", "?") else (), source.parent.name, "type")
            lines = "".join(f"({letter}) {choice}\n" for letter, choice in zip("ABCD", choices, strict=False))
            told = {"task": CMMMU_TASKS[kind], "choices": CMMMU_OPTIONS.format(lines=lines) if choices else ""}
            yield replace(sample, fields={**sample.fields, **told})


def _parquets(folder: Path, split: str) -> list[Path]:
    found = sorted(folder.glob(f"*/{split}-*.parquet"))
    if not found:
        raise DataError(
            f"{folder}: no */{split}-*.parquet, a folder for each subject; give the files as their authors do"
        )
    return found


def _exam(row: Row, choices: tuple[str, ...], truths: tuple[str, ...], subject: str, kind: str) -> Sample:
    """Return the sample of a row with pictures in cells of their own: image_1, image_2 and so on.

    Where all are empty, the picture of the sample is, too, and cannot be asked about.
    """
    pictures = [row.content[name] for name in sorted(row.content) if re.fullmatch(r"image_\d+", name)]
    pictures = [picture for picture in pictures if picture is not None]
    content = _content(row, pictures[0]) if pictures else b""
    question = _PLACE_OF_A_PICTURE.sub("", row.filled("question")).strip() or row.filled("question")
    listed = f"Choices:\n{option_lines(choices)}" if choices else ""
    return Sample(
        id=row.filled("id"),
        picture=content,
        picture_id=_digest(content) or f"no picture of {row.filled('id')}",
        fields={"question": question, "choices": listed},
        answers=truths,
        choices=choices,
        categories={
            "subject": subject, "kind": row.filled(kind), "pictures": "several" if len(pictures) > 1 else "one",
        },
        record={kind: row.content[kind]},
    )  # fmt: skip


def _content(row: Row, picture: Any) -> bytes:
    """Return the content of a picture's cell; nothing for an empty one."""
    content = picture.get("bytes") if isinstance(picture, dict) else picture
    if content is not None and not isinstance(content, bytes):
        raise row.fault("no image_1: it holds no picture")
    return content or b""


def _told(sample: Sample) -> Sample:
    """Return a sample of MMMU that asks for an answer of some form."""
    told, slip = (LETTER, LETTER_SLIP) if sample.choices else (SHORT.lstrip("\n"),) * 2
    return replace(sample, fields={**sample.fields, "told": told, "told_by_accessory": slip})
