"""Regions of a picture, found by asking for their boxes."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from megatron_sphinx.cascades.answerer import Answerer, Question
from megatron_sphinx.errors import DataError, shortened
from megatron_sphinx.generation.grounding import ground
from megatron_sphinx.prepare.boxes import Box
from megatron_sphinx.prepare.tasks import PROMPTS

_LEAST_SIDE = 1.0  # of a region, in pixels


@dataclass(frozen=True)
class Region:
    """A part of a picture that an answer names.

    Attributes:
        number: counted from 1, in the order of the answer.
        phrase: what the answer, or the question, calls it; it may be empty.
        box: left, top, right, bottom, in pixels of the picture and inside of it.
    """

    number: int
    phrase: str
    box: Box


@dataclass(frozen=True)
class Located:
    """What an answer says of where things are.

    Attributes:
        prompt: what was asked.
        answer: what was answered.
        regions: of the answer, one or more.
        faults: what is wrong with each box of the answer that is no region.
    """

    prompt: str
    answer: str
    regions: tuple[Region, ...]
    faults: tuple[str, ...]


def locate(answerer: Answerer, picture: Image.Image, expression: str) -> Located:
    """Ask for the region that a referring expression describes.

    Args:
        answerer: who is asked.
        picture: in RGB and upright.
        expression: such as `the red cup on the left`.

    Raises:
        DataError: the answer names no box that is in the picture.
    """
    return _located(answerer, picture, PROMPTS["locate"].format(phrase=expression), expression)


def detect(answerer: Answerer, picture: Image.Image, category: str = "") -> Located:
    """Ask for the regions of all objects of a category.

    Args:
        answerer: who is asked.
        picture: in RGB and upright.
        category: its name; empty for all objects of any name.

    Raises:
        DataError: the answer names no box that is in the picture.
    """
    prompt = PROMPTS["detect_category"].format(name=category) if category else PROMPTS["detect"]
    return _located(answerer, picture, prompt, category)


def _located(answerer: Answerer, picture: Image.Image, prompt: str, name: str) -> Located:
    """Ask, and find the regions of the answer; `name` is what a region without words of its own is called."""
    (answer,) = answerer.ask([Question(picture, prompt)])
    regions, faults = regions_of(answer, picture.size, answerer.padding, name)
    if not regions:
        why = f" ({'; '.join(faults)})" if faults else ""
        raise DataError(
            f"{answerer.name}: answers {shortened(answer)!r} to {shortened(prompt)!r}, which names no box in the "
            f"picture{why}; ask for something else"
        )
    return Located(prompt, answer, tuple(regions), tuple(faults))


def regions_of(
    answer: str, size: tuple[int, int], padding: str, name: str = ""
) -> tuple[Sequence[Region], Sequence[str]]:
    """Find the regions of an answer, each box cut to the picture, and what is wrong with its other boxes.

    Args:
        answer: a text with boxes in fractions of the square.
        size: width and height of the picture, in pixels.
        padding: where the picture is in its square, `centre` or `corner`.
        name: what a region is called that has no words in the answer.

    Raises:
        DataError: the padding is unknown.
    """
    regions: list[Region] = []
    faults: list[str] = []
    for found in ground(answer, *size, padding):
        faults += found.faults
        for box in found.boxes:
            if min(box[2] - box[0], box[3] - box[1]) < _LEAST_SIDE:
                faults.append(f"[{','.join(f'{side:g}' for side in box)}] in pixels: has no area")
                continue
            phrase = answer[found.phrase_begin : found.phrase_end] or name
            regions.append(Region(len(regions) + 1, phrase, box))
    return regions, faults
