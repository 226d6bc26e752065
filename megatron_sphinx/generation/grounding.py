"""Boxes and points of an answer in pixels of the picture that was asked about, drawn on a copy of it.

Source of the frame: accessory/demos/multi_turn_mm_box.py of LLaMA2-Accessory, which pads at the centre.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from megatron_sphinx.data.images import SIDEWAYS
from megatron_sphinx.generation.requests import Picture
from megatron_sphinx.prepare.boxes import Box, Place, parse_brackets, place_in_pixels, to_pixels

COLOURS = ("#d7191c", "#1f5fd0", "#1a8a3a", "#8e24aa", "#c75b00", "#00838f", "#c2187c", "#6d4c41")
_ROUNDING = 0.005  # of the square: what two decimals leave open


@dataclass(frozen=True)
class Grounding:
    """Where in the picture the words of an answer are.

    Attributes:
        begin: where their bracket is in the answer, in characters.
        end: behind it.
        phrase_begin: where the words begin; they may be none.
        phrase_end: behind them.
        colour: what the places are drawn in, `#rrggbb`; None where there is nothing to draw.
        boxes: left, top, right, bottom of each, in pixels of the picture.
        points: x and y of each, in pixels of the picture.
        faults: what is wrong with each of the other places, which are not drawn.
    """

    begin: int
    end: int
    phrase_begin: int
    phrase_end: int
    colour: str | None
    boxes: tuple[Box, ...]
    points: tuple[tuple[float, float], ...]
    faults: tuple[str, ...]


def ground(text: str, width: int, height: int, padding: str) -> list[Grounding]:
    """Find the boxes and points that an answer names, and the colour of each bracket; colours come in turn.

    Args:
        text: of the answer.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        padding: where the picture is in its square, `centre` or `corner`.

    Raises:
        DataError: the padding is unknown.
    """
    groundings: list[Grounding] = []
    coloured = 0
    for bracket in parse_brackets(text):
        boxes, points, faults = [], [], []
        for place in bracket.places:
            if fault := _fault(place, width, height, padding):
                faults.append(f"{_written(place)}: {fault}")
            elif len(place) == 4:
                boxes.append(to_pixels(place, width, height, padding))
            else:  # a point is a box without size
                points.append(to_pixels((*place, *place), width, height, padding)[:2])
        colour = COLOURS[coloured % len(COLOURS)] if boxes or points else None
        coloured += colour is not None
        spans = (bracket.begin, bracket.end, bracket.phrase_begin, bracket.phrase_end)
        groundings.append(Grounding(*spans, colour, tuple(boxes), tuple(points), tuple(faults)))
    return groundings


def ground_upright(text: str, picture: Picture, padding: str) -> list[Grounding]:
    """Find the boxes and points that an answer names, in pixels of the upright picture; see `ground`."""
    found = ground(text, picture.width, picture.height, padding)
    return [
        replace(
            one,
            boxes=tuple(_upright(box, picture) for box in one.boxes),
            points=tuple(_upright((*point, *point), picture)[:2] for point in one.points),
        )
        for one in found
    ]


def upright_size(picture: Picture) -> tuple[int, int]:
    """Return width and height of the upright picture, in pixels."""
    is_turned = picture.orientation in SIDEWAYS
    return (picture.height, picture.width) if is_turned else (picture.width, picture.height)


def _upright(box: Box, picture: Picture) -> Box:
    """Turn a box in what the model sees as the picture has to be turned to be upright."""
    left, top, right, bottom = box
    width, height = upright_size(picture)
    if picture.orientation in SIDEWAYS:
        left, top, right, bottom = top, left, bottom, right
    if picture.orientation in (2, 3, 6, 7):
        left, right = width - right, width - left
    if picture.orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def draw_groundings(image: Image.Image, groundings: Sequence[Grounding]) -> Image.Image:
    """Return a copy of a picture in RGB with the outlines of boxes and with discs at points, the first ones on top.

    Args:
        image: the picture, upright.
        groundings: what to draw.
    """
    drawn = image.convert("RGB") if image.mode != "RGB" else image.copy()
    draw = ImageDraw.Draw(drawn)
    side = max(image.size)
    line, radius = max(2, side // 250), max(4, side // 120)
    for grounding in reversed(groundings):
        for box in grounding.boxes:
            draw.rectangle([round(number) for number in box], outline=grounding.colour, width=line)
        for x, y in grounding.points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), grounding.colour, "white")
    return drawn


def _fault(place: Place, width: int, height: int, padding: str) -> str | None:
    """Say why a place cannot be drawn; None where it can."""
    if not all(map(math.isfinite, place)):
        return "not finite"
    if not all(0 <= number <= 1 for number in place):
        return "outside of 0 to 1"
    if len(place) == 4 and (place[0] > place[2] or place[1] > place[3]):
        return "reversed: left > right, or top > bottom"
    pixels, margin = place_in_pixels(place, width, height, padding), _ROUNDING * max(width, height)
    xs, ys = pixels[::2], pixels[1::2]
    if max(xs) < -margin or min(xs) > width + margin or max(ys) < -margin or min(ys) > height + margin:
        return "in the padding, outside the picture"
    return None


def _written(place: Place) -> str:
    """Write the numbers of a place as a message shows them."""
    return f"[{','.join(f'{number:g}' for number in place)}]"
