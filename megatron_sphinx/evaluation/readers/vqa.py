"""Questions about pictures with short answers, in layouts of their own: VQA's two files, TextVQA, OCR-VQA, UReader."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from megatron_sphinx.errors import DataError, shortened
from megatron_sphinx.evaluation.prompts import OCR_TOKENS
from megatron_sphinx.evaluation.readers.layout import Layout, answers_of_ten
from megatron_sphinx.evaluation.readers.rows import Row, checked, first_there, located, rows_of
from megatron_sphinx.evaluation.samples import Sample

_TEN = answers_of_ten("answers")


@dataclass(frozen=True, kw_only=True)
class TwoFiles:
    """VQA's layout: questions in one file, and answers, where they are published, in another.

    Attributes:
        questions: the file of questions.
        annotations: the file of answers; empty where only the server has them.
        picture: the name of a picture, with the field `image_id` in braces.
        folders: where pictures may be.
    """

    questions: str
    annotations: str
    picture: str
    folders: tuple[str, ...]

    def sample(self, question: Row, annotation: Row | None, pictures: Path) -> Sample:
        """Return the sample of a question and its answers."""
        divisions = ("answer_type", "question_type")
        return Sample(
            id=question.text("question_id"),
            picture=question.path(self.picture, pictures),
            picture_id=question.text("image_id"),
            fields={"question": question.filled("question")},
            answers=_TEN(annotation) if annotation else (),
            categories={name: annotation.text(name) for name in divisions if annotation.has(name)}
            if annotation
            else {},
            record={"question_id": question.content["question_id"]},
        )


@checked
def read_two_files(folder: Path, layout: TwoFiles) -> Iterator[Sample]:
    """Yield the samples of VQA's layout, in the order of its answers.

    Args:
        folder: that of the benchmark.
        layout: of its files.

    Raises:
        DataError: a file is missing, has another layout, or the two do not belong together.
    """
    pictures = first_there(folder, layout.folders)
    questions = rows_of(located(folder, layout.questions), "questions")
    if not layout.annotations:
        yield from (layout.sample(question, None, pictures) for question in questions)
        return
    waiting: dict[str, Row] = {}
    for question in questions:
        name = question.text("question_id")
        if name in waiting:
            raise question.fault(f"the question_id {name} is there twice")
        waiting[name] = question
    for annotation in rows_of(located(folder, layout.annotations), "annotations"):
        name = annotation.text("question_id")
        if name not in waiting:
            raise annotation.fault(f"question_id {name} is none of {layout.questions}, or is there twice")
        yield layout.sample(waiting.pop(name), annotation, pictures)
    if waiting:
        some = shortened(", ".join(waiting), 80)
        raise DataError(
            f"{folder / layout.annotations}: lacks answers of {len(waiting)} questions ({some}); "
            "give the file as its authors distribute it"
        )


@checked
def read_text_vqa(folder: Path, layout: Layout, tokens: str) -> Iterator[Sample]:
    """Yield the samples of TextVQA, with what an OCR program has read where its file is there.

    Args:
        folder: that of the benchmark.
        layout: of the file of questions.
        tokens: the file of OCR tokens, which need not be there.

    Raises:
        DataError: a file is missing, has another layout, or lacks a picture of the questions.
    """
    read: dict[str, str] | None = None
    source = located(folder, tokens)
    if source.exists():
        read = {row.text("image_id"): ", ".join(row.texts("ocr_tokens")) for row in rows_of(source, "data")}
    pictures = first_there(folder, layout.folders)
    for part, name in layout.parts.items():
        for row in rows_of(located(folder, name), layout.rows):
            sample = layout.sample(row, part, pictures)
            image = row.text("image_id")
            if read is not None and image not in read:
                raise row.fault(f"image_id {image} is not in {source.name}")
            found = (read or {}).get(image, "")
            reference = OCR_TOKENS.format(tokens=found) if found else ""
            given = "not given" if read is None else "given"
            yield replace(sample, fields={**sample.fields, "reference": reference}, categories={"OCR tokens": given})


_SPLITS_OF_OCR_VQA = {1: "train", 2: "val", 3: "test"}


@checked
def read_ocr_vqa(folder: Path, split: str) -> Iterator[Sample]:
    """Yield the samples of OCR-VQA: each book cover has several questions.

    Args:
        folder: that of the benchmark.
        split: train, val or test.

    Raises:
        DataError: the file is missing, or has another layout.
    """
    for cover in rows_of(folder / "dataset.json"):
        number = cover.integer("split")
        if number not in _SPLITS_OF_OCR_VQA:
            raise cover.fault(f"no split: {number} is none of 1, 2, 3")
        if _SPLITS_OF_OCR_VQA[number] != split:
            continue
        questions, answers = cover.texts("questions"), cover.texts("answers")
        if len(questions) != len(answers):
            raise cover.fault(f"{len(questions)} questions have {len(answers)} answers")
        suffix = PurePosixPath(cover.text("imageURL")).suffix or ".jpg"
        for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            yield Sample(
                id=f"{cover.key}-{place}",
                picture=cover.path(f"images/{{key}}{suffix}", folder),
                picture_id=cover.key,
                fields={"question": question},
                answers=(answer,),
                categories={"genre": cover.text("genre", "")},
            )


@checked
def read_ureader(folder: Path, name: str) -> Iterator[Sample]:
    """Yield the samples of a file of UReader: conversations of a picture, a question and its answer.

    Args:
        folder: that of UReader's files.
        name: of the data set, such as DeepForm.

    Raises:
        DataError: the file is missing, or has another layout.

    Source: mPLUG-DocOwl, UReader/pipeline/evaluation.py.
    """
    for row in rows_of(located(folder, f"ureader_json/test_{name}.jsonl or test_{name}.jsonl")):
        images = row.texts("image")
        turns = row.listed("conversations")
        if len(images) != 1:
            raise row.fault(f"image: {len(images)} pictures instead of one")
        if len(turns) != 3:
            raise row.fault(f"conversations: {len(turns)} parts instead of picture, question and answer")
        question, answer = (row.within("conversations", turn).text("value") for turn in turns[1:])
        if not question.strip():
            raise row.fault("conversations: the question is empty")
        picture = row.within("image", images[0]).path("{image}", first_there(folder, ("ureader_images", ".")))
        yield Sample(
            id=str(row.number),
            picture=picture,
            picture_id=images[0],
            fields={"question": question},
            answers=(answer,),
        )
