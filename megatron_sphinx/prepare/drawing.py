"""Numbered marks on the objects of an image, drawn and in words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_sphinx.prepare.boxes import Box, format_box, format_point

COLOURS = {
    "red": (220, 20, 40), "green": (20, 140, 40), "blue": (20, 60, 220), "yellow": (255, 225, 25),
    "purple": (130, 20, 160), "cyan": (70, 220, 240), "pink": (250, 150, 200), "brown": (130, 80, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "diamond")
MOST_MARKS = len(COLOURS) * len(SHAPES)  # more would look the same

INTRODUCTION = "There are numbered marks on objects in the image:"

Polygon = list[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A mark on an object.

    Attributes:
        number: counted from 1.
        name: of the object.
        box: of the object; left, top, right, bottom in pixels.
        polygons: its outline; none where only the box is known.
        place: x and y of the mark's centre, in pixels.
    """

    number: int
    name: str
    box: Box
    polygons: Sequence[Polygon]
    place: tuple[float, float]

    @property
    def colour(self) -> str:
        """Name of the mark's colour, which follows from its number."""
        return list(COLOURS)[(self.number - 1) % len(COLOURS)]

    @property
    def shape(self) -> str:
        """Name of the mark's shape, which follows from its number."""
        return SHAPES[(self.number - 1) // len(COLOURS) % len(SHAPES)]


def place_of(box: Box, polygons: Sequence[Polygon], size: tuple[int, int]) -> tuple[float, float]:
    """Return where an object's mark stands: the pixel of its mask nearest to the mask's centre, else the box's centre.

    Args:
        box: of the object, in pixels.
        polygons: its outline, if that is known.
        size: width and height of the image.
    """
    mask = Image.new("1", size)
    for polygon in polygons:
        ImageDraw.Draw(mask).polygon(polygon, fill=1)
    pixels = np.argwhere(np.asarray(mask))[:, ::-1]
    if not len(pixels):
        return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    x, y = pixels[((pixels - pixels.mean(0)) ** 2).sum(1).argmin()]
    return float(x), float(y)


def draw_marks(image: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """Return a copy of an image with the outlines of objects and the marks on them, the first marks on top."""
    marked = image.copy()
    draw = ImageDraw.Draw(marked)
    side = max(image.size)
    radius, width = max(10, side // 45), max(2, side // 250)
    font = ImageFont.load_default(1.2 * radius)
    for mark in marks:
        outline = [[*polygon, polygon[0]] for polygon in mark.polygons]
        left, top, right, bottom = mark.box
        for line in outline or [[(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]]:
            draw.line(line, COLOURS[mark.colour], width, joint="curve")
    for mark in reversed(marks):
        x, y = mark.place
        colour = COLOURS[mark.colour]
        ink = "black" if sum(colour) > 400 else "white"
        bounds = (x - radius, y - radius, x + radius, y + radius)
        if mark.shape == "circle":
            draw.ellipse(bounds, colour, ink, width)
        elif mark.shape == "square":
            draw.rectangle(bounds, colour, ink, width)
        else:
            reach = 1.4 * radius
            draw.polygon([(x - reach, y), (x, y - reach), (x + reach, y), (x, y + reach)], colour, ink, width)
        draw.text((x, y), str(mark.number), ink, font, anchor="mm")
    return marked


def describe(marks: Sequence[Mark], size: tuple[int, int] | None = None, padding: str = "centre") -> str:
    """Tell of marks in words, a line for each; with places and boxes where the size of the image is given.

    Args:
        marks: in the order of their numbers.
        size: width and height of the image.
        padding: where the image is in its square, `centre` or `corner`; places are fractions of the square.
    """
    lines = [INTRODUCTION]
    for mark in marks:
        place = f" at {format_point(mark.place, *size, padding)}" if size else ""
        box = f" {format_box(mark.box, *size, padding)}" if size else ""
        lines.append(f"Mark {mark.number}: a {mark.colour} {mark.shape}{place} on the {mark.name}{box}.")
    return "\n".join(lines)
