"""What a benchmark asks, what a model answered, and how right that was: plain values that all of evaluation shares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_sphinx.generation.videos import MiddleFrame


class Protocol(StrEnum):
    """Whose rules an evaluation follows where they differ: in prompts, decoding, and how answers are read.

    Attributes:
        PAPER: what SPHINX and SPHINX-X write, and what they leave open as the benchmark's authors have it.
        OFFICIAL: what the authors of the benchmark do.
        ACCESSORY: what the released code of SPHINX does, its slips included.
    """

    PAPER = "paper"
    OFFICIAL = "official"
    ACCESSORY = "accessory"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A question of a benchmark.

    Attributes:
        id: what the benchmark calls it; no two of a benchmark have the same.
        picture: the picture's file, or the content of one, or the frame of a video; None for a question without a
            picture.
        picture_id: what samples about one picture have in common: bootstrap and prefix cache go by it.
        fields: what stands in the benchmark's prompt, by the names of its places: question, options, hint.
        answers: the right answers, one or several; empty where only a server or a judge knows.
        choices: the options of a question with options, in their order.
        box: the region that is looked for, as left, top, right, bottom in pixels of the upright picture.
        group: what samples that count together have in common, such as rotations of one question.
        categories: by names of a division, which part of it the sample is in, such as {"task": "existence"}.
        record: more of the official file that a metric or a submission needs.
    """

    id: str
    picture: Path | bytes | MiddleFrame | None
    picture_id: str
    fields: Mapping[str, str]
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    box: tuple[float, float, float, float] | None = None
    group: str = ""
    categories: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A sample and what a model answered.

    Attributes:
        sample: what was asked.
        text: the answer as it was generated, without what ended it.
        width: of the upright picture, in pixels; 0 without one.
        height: of the upright picture, in pixels; 0 without one.
        padding: where the picture lies in the square that boxes of the model are fractions of: centre or corner.
        ranked: the likeliest choices, the likeliest first, where choices were ranked; otherwise none.
    """

    sample: Sample
    text: str
    width: int = 0
    height: int = 0
    padding: str = "centre"
    ranked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """How right an answer is.

    Attributes:
        value: from 0, wrong, to 1; of CIDEr up to 10.
        parsed: what the answer was read as, such as a letter or a box; None where it could not be read: it is wrong,
            and its share is told.
    """

    value: float
    parsed: str | None


@dataclass(frozen=True)
class Judged:
    """An answer with its verdict.

    Attributes:
        answered: the sample and its answer.
        verdict: how right it is.
    """

    answered: Answered
    verdict: Verdict
