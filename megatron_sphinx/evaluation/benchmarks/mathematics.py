"""Benchmarks of mathematics in pictures."""

import re
from functools import partial
from string import ascii_uppercase

from megatron_sphinx.evaluation.benchmark import Benchmark, OfficialFile
from megatron_sphinx.evaluation.metrics.mathverse import MATH_VERSE
from megatron_sphinx.evaluation.metrics.mathvista import MATH_VISTA
from megatron_sphinx.evaluation.readers.layout import Layout, one, read_layout
from megatron_sphinx.evaluation.readers.rows import Row
from megatron_sphinx.evaluation.samples import Protocol

_OPTION = re.compile(r"^[^\S\n]*([A-Z])[^\S\n]*[:.][^\S\n]*(.*)$", re.MULTILINE)
_LETTERS = "ABCD"  # of options that are in the picture alone


def _of_vista(row: Row) -> tuple[str, ...]:
    """Return MathVista's options, which are null where the answer is free."""
    return row.texts("choices") if row.has("choices") else ()


def _of_verse(row: Row) -> tuple[str, ...]:
    """Return MathVerse's options, which are lines of the text for the judge, with letters from A in their order.

    An option without a text is its letter; where there are no two lines, the options are the letters A to D.
    """
    if row.filled("question_type") != "multi-choice":
        return ()
    choices: list[str] = []
    for letter, text in _OPTION.findall(row.text("question_for_eval").rpartition("Choices:")[2]):
        if letter == ascii_uppercase[len(choices) % len(ascii_uppercase)]:
            choices.append(text.strip() or letter)
    return tuple(choices) if len(choices) > 1 else tuple(_LETTERS)


MATHVISTA = Benchmark(
    name="mathvista",
    title="MathVista (testmini)",
    files=tuple(
        OfficialFile(path, "github.com/lupantech/MathVista")
        for path in ("testmini.json or data/testmini.json", "images")
    ),
    read=partial(
        read_layout,
        layout=Layout(
            parts={"": "testmini.json or data/testmini.json"},
            picture="{image}",
            fields={"query": "query"},
            answers=one("answer"),
            choices=_of_vista,
            categories={
                "task": lambda row: row.inner("metadata").text("task", ""),
                "context": lambda row: row.inner("metadata").text("context", ""),
            },
            record=("question_type", "answer_type", "precision", "unit"),
        ),
    ),
    prompts={Protocol.PAPER: "{query}"},
    max_new_tokens=64,
    metric=MATH_VISTA,
    table="mathvista",
)
MATHVERSE = Benchmark(
    name="mathverse",
    title="MathVerse (testmini, by rules)",
    files=tuple(
        OfficialFile(path, "huggingface.co/datasets/AI4Math/MathVerse") for path in ("testmini.json", "images")
    ),
    read=partial(
        read_layout,
        layout=Layout(
            parts={"": "testmini.json"},
            id="{sample_index}",
            picture="{image}",
            folders=("images",),
            fields={"query": "query_wo"},
            answers=one("answer"),
            choices=_of_verse,
            categories={
                "version": "problem_version",
                "subject": lambda row: row.inner("metadata").text("subject", ""),
            },
            record=("problem_index", "question_type"),
        ),
    ),
    prompts={Protocol.PAPER: "{query}"},
    max_new_tokens=64,
    metric=MATH_VERSE,
)

BENCHMARKS = (MATHVISTA, MATHVERSE)
