"""Questions whose answers a model judges: LLaVA-Bench, with what its judge is told, and MM-Vet."""

from collections.abc import Iterator
from pathlib import Path

from megatron_sphinx.evaluation.readers.rows import checked, object_of, rows_of
from megatron_sphinx.evaluation.samples import Sample


@checked
def read_llava_bench(folder: Path) -> Iterator[Sample]:
    """Yield the samples of LLaVA-Bench (In-the-Wild), with the picture's caption, GPT-4's answer and the judge's rule.

    Raises:
        DataError: a file is missing, has another layout, or lacks what a question needs.
    """
    captions = {row.filled("image"): row.filled("caption") for row in rows_of(folder / "context.jsonl")}
    answers = {row.text("question_id"): row.filled("text") for row in rows_of(folder / "answers_gpt4.jsonl")}
    rules = object_of(folder / "rule.json")
    for row in rows_of(folder / "questions.jsonl"):
        name, image, category = row.text("question_id"), row.filled("image"), row.filled("category")
        if image not in captions:
            raise row.fault(f"image {image} is not in context.jsonl")
        if name not in answers:
            raise row.fault(f"question_id {name} is not in answers_gpt4.jsonl")
        rule = rules.inner(f"llava_bench_{category}" if rules.has(f"llava_bench_{category}") else category)
        yield Sample(
            id=name,
            picture=row.path("images/{image}", folder),
            picture_id=image,
            fields={"question": row.filled("text")},
            answers=(answers[name],),
            categories={"category": category},
            record={"caption": captions[image], "rule": dict(rule.content), "question": row.text("text")},
        )


@checked
def read_mm_vet(folder: Path) -> Iterator[Sample]:
    """Yield the samples of MM-Vet, whose right answer may be several with <AND> or <OR> between them.

    Raises:
        DataError: the file is missing, or has another layout.
    """
    for row in rows_of(folder / "mm-vet.json"):
        yield Sample(
            id=row.key,
            picture=row.path("images/{imagename}", folder),
            picture_id=row.filled("imagename"),
            fields={"question": row.filled("question")},
            answers=(row.filled("answer"),),
            categories={"capability": ",".join(row.texts("capability"))},
            record={"question": row.text("question")},
        )
