"""Boxes and points of an answer, in pixels of its picture: found, coloured, and drawn on a copy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from megatron_sphinx.data.images import decode
from megatron_sphinx.prepare.boxes import is_finite, parse_boxes, to_pixels

# Source: the names are those of accessory/demos/multi_turn_mm_box.py of LLaMA2-Accessory, in its order
COLOURS = {
    "red": (214, 20, 40), "blue": (20, 70, 230), "green": (10, 140, 40), "purple": (140, 30, 170),
    "orange": (235, 125, 0),
}  # fmt: skip
_RADIUS = 5  # of a point, in pixels


@dataclass(frozen=True)
class Region:
    """A box or a point of an answer.

    Attributes:
        place: left, top, right, bottom of a box, or x, y of a point, in pixels of the upright picture.
        begin: where its bracket begins in the answer, in characters; all regions of a bracket have one colour.
        end: behind the bracket.
    """

    place: tuple[float, ...]
    begin: int = 0
    end: int = 0


def regions_in(text: str, width: int, height: int, padding: str) -> list[Region]:
    """Return the boxes in an answer, each as if it had a bracket of its own.

    Args:
        text: the answer.
        width: of the upright picture, in pixels.
        height: of the upright picture, in pixels.
        padding: where the picture is in its square, `centre` or `corner`.
    """
    boxes = [to_pixels(box, width, height, padding) for box in parse_boxes(text)]
    return [Region(box, number, number + 1) for number, box in enumerate(boxes)]


def regions_of(entries: object) -> list[Region]:
    """Return the boxes and points that a server found in an answer; what is neither is passed over.

    Args:
        entries: `{"box": [left, top, right, bottom], "begin": 7, "end": 30}`, or `point` with x and y.
    """
    regions = []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and (place := _place(entry)):
            begin, end = (entry.get(key) for key in ("begin", "end"))
            is_known = isinstance(begin, int) and isinstance(end, int) and 0 <= begin < end
            regions.append(Region(place, begin if is_known else 0, end if is_known else 0))
    return regions


def _place(entry: dict[str, Any]) -> tuple[float, ...]:
    for key, count in (("box", 4), ("point", 2)):
        place = entry.get(key)
        if isinstance(place, list) and len(place) == count and all(map(is_finite, place)):
            return tuple(place)
    return ()


def brackets_of(regions: Iterable[Region]) -> list[tuple[int, int, str]]:
    """Return begin, end and colour of the brackets of an answer, in their order; colours come round."""
    spans = sorted({(region.begin, region.end) for region in regions})
    names = list(COLOURS)
    return [(begin, end, names[number % len(names)]) for number, (begin, end) in enumerate(spans)]


def draw_regions(content: bytes, regions: Sequence[Region]) -> Image.Image:
    """Return a copy of a picture with boxes and points in the colours of their brackets, the first ones on top.

    Args:
        content: of the picture's file.
        regions: those without an area are left out.

    Raises:
        DataError: the picture does not decode.
    """
    drawn = decode(content)
    pen, width = ImageDraw.Draw(drawn), max(2, max(drawn.size) // 300)
    colours = {(begin, end): COLOURS[name] for begin, end, name in brackets_of(regions)}
    for region in reversed(regions):
        colour = colours[region.begin, region.end]
        if len(region.place) == 2:
            x, y = region.place
            radius = max(_RADIUS, width)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)
        elif region.place[0] < region.place[2] and region.place[1] < region.place[3]:
            pen.rectangle(tuple(map(round, region.place)), outline=colour, width=width)
    return drawn
