"""Boxes and points as text, in fractions of the square that a picture is padded to.

A box is left, top, right, bottom. In text it is `[0.10,0.25,0.60,0.75]`, several are `[0.10,0.25,0.60,0.75;0.00,…]`, a
point is `[0.42,0.15]`.

Source: SPHINX, arXiv:2311.07575, Table 1; accessory/eval_mm/evaluate.py and accessory/demos/multi_turn_mm_box.py of
LLaMA2-Accessory.
"""

import re
from collections.abc import Sequence
from math import isfinite

from megatron_sphinx.errors import DataError
from megatron_sphinx.model.views import place

Box = tuple[float, float, float, float]

_NUMBER = r"\s*[-+]?(?:\d+(?:\.\d*)?|\.\d+)\s*"
_BOX = ",".join([_NUMBER] * 4)
_BRACKET = re.compile(rf"\[({_BOX}(?:;{_BOX})*)\]")


def format_box(box: Sequence[float], width: int, height: int, padding: str) -> str:
    """A box as text: `[x1,y1,x2,y2]`.

    Args:
        box: in pixels; what is outside the picture is cut off.
        width: of the picture.
        height: of the picture.
        padding: where the picture is in its square, `centre` or `corner`.

    Raises:
        DataError: no box in the picture, see `clip_box`; or an unknown padding.
    """
    return format_boxes([box], width, height, padding)


def format_boxes(boxes: Sequence[Sequence[float]], width: int, height: int, padding: str) -> str:
    """Several boxes as text, in one bracket: `[x1,y1,x2,y2;x1,y1,x2,y2]`.

    Raises:
        DataError: as `format_box`, or there are none.
    """
    if not boxes:
        raise DataError("no boxes: there is nothing to write; give one or more")
    parts = []
    for box in boxes:
        x1, y1, x2, y2 = clip_box(box, width, height)
        parts.append(f"{_place(x1, y1, width, height, padding)},{_place(x2, y2, width, height, padding)}")
    return f"[{';'.join(parts)}]"


def format_point(point: Sequence[float], width: int, height: int, padding: str) -> str:
    """A point as text: `[x,y]`; one outside the picture is moved to its edge.

    Raises:
        DataError: the point is not two finite numbers; or an unknown padding.
    """
    x, y = _numbers(point, 2, "point")
    return f"[{_place(_between(x, width), _between(y, height), width, height, padding)}]"


def parse_boxes(text: str) -> list[Box]:
    """The boxes in a text, in fractions of the square, in their order; brackets that hold anything else are ignored.

    What a model wrote may be any numbers: `to_pixels` cuts them to the picture.
    """
    found = []
    for bracket in _BRACKET.finditer(text):
        for part in bracket[1].split(";"):
            x1, y1, x2, y2 = map(float, part.split(","))
            found.append((x1, y1, x2, y2))
    return found


def to_pixels(box: Sequence[float], width: int, height: int, padding: str) -> Box:
    """The pixels of a box that is in fractions of the square, cut to the picture; the reverse of `format_box`.

    Raises:
        DataError: the box is not four finite numbers; or an unknown padding.
    """
    x1, y1, x2, y2 = _numbers(box, 4, "box")
    side, (left, top) = max(width, height), _offset(width, height, padding)
    return (
        _between(x1 * side - left, width),
        _between(y1 * side - top, height),
        _between(x2 * side - left, width),
        _between(y2 * side - top, height),
    )


def clip_box(box: Sequence[float], width: int, height: int) -> Box:
    """The part of a box that is in the picture, all in pixels.

    Raises:
        DataError: the box is not four finite numbers, has no area, or is outside the picture.
    """
    x1, y1, x2, y2 = _numbers(box, 4, "box")
    if x1 >= x2 or y1 >= y2:
        raise DataError(f"empty box: {box} has no area; give left < right and top < bottom")
    clipped = (_between(x1, width), _between(y1, height), _between(x2, width), _between(y2, height))
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise DataError(f"box outside the picture: {box} is not in {width} x {height} pixels; check both")
    return clipped


def from_coco(box: Sequence[float]) -> Box:
    """A box of a COCO file, which is left, top, width, height.

    Raises:
        DataError: the box is not four finite numbers.
    """
    left, top, width, height = _numbers(box, 4, "box")
    return left, top, left + width, top + height


def _offset(width: int, height: int, padding: str) -> tuple[int, int]:
    """Where the left top corner of a picture is in its square, in pixels."""
    if padding not in ("centre", "corner"):
        raise DataError(f"padding={padding}: must be centre or corner; take what the model is trained with")
    return place(width, height, padding)


def _place(x: float, y: float, width: int, height: int, padding: str) -> str:
    """A place in the picture as it is written: two decimals, in fractions of the square."""
    side, (left, top) = max(width, height), _offset(width, height, padding)
    return f"{(x + left) / side:.2f},{(y + top) / side:.2f}"


def _between(place: float, size: float) -> float:
    return min(max(place, 0.0), size)


def _numbers(values: Sequence[float], count: int, what: str) -> Sequence[float]:
    """The same numbers, if they are so many and finite."""
    is_list = isinstance(values, list | tuple) and len(values) == count
    if not is_list or not all(isinstance(value, int | float) and isfinite(value) for value in values):
        raise DataError(f"not a {what}: {values} is not {count} finite numbers; give them in pixels, or leave it out")
    return values
