"""Boxes and points as text, in fractions of the square that a picture is padded to.

A box is left, top, right, bottom. In text it is `[0.10,0.25,0.60,0.75]`, several are `[0.10,0.25,0.60,0.75;0.00,…]`, a
point is `[0.42,0.15]`.

Source: SPHINX, arXiv:2311.07575, Table 1; accessory/eval_mm/evaluate.py and accessory/demos/multi_turn_mm_box.py of
LLaMA2-Accessory.
"""

import re
import sys
from collections.abc import Sequence
from typing import TypeGuard

from megatron_sphinx.errors import DataError
from megatron_sphinx.model.views import place

Box = tuple[float, float, float, float]

_NUMBER = r"\s*[-+]?(?:\d+(?:\.\d*)?|\.\d+)\s*"
_BOX = ",".join([_NUMBER] * 4)
_BRACKET = re.compile(rf"\[({_BOX}(?:;{_BOX})*)\]")


def format_box(box: Sequence[float], width: int, height: int, padding: str) -> str:
    """Write a box as text, `[x1,y1,x2,y2]`.

    Args:
        box: in pixels; what is outside the picture is cut off.
        width: of the picture.
        height: of the picture.
        padding: where the picture is in its square, `centre` or `corner`.

    Raises:
        DataError: nothing of the box is in the picture (`clip_box` refuses it), or the padding is unknown.
    """
    return format_boxes([box], width, height, padding)


def format_boxes(boxes: Sequence[Sequence[float]], width: int, height: int, padding: str) -> str:
    """Write several boxes as text, in one bracket: `[x1,y1,x2,y2;x1,y1,x2,y2]`.

    Raises:
        DataError: `format_box` would refuse one of them, or there are none.
    """
    if not boxes:
        raise DataError("no boxes: there is nothing to write; give one or more")
    parts = []
    for box in boxes:
        x1, y1, x2, y2 = clip_box(box, width, height)
        parts.append(f"{_place(x1, y1, width, height, padding)},{_place(x2, y2, width, height, padding)}")
    return f"[{';'.join(parts)}]"


def format_point(point: Sequence[float], width: int, height: int, padding: str) -> str:
    """Write a point as text, `[x,y]`; one outside the picture is moved to its edge.

    Raises:
        DataError: the point is not two finite numbers, or the padding is unknown.
    """
    x, y = _numbers(point, 2, "point")
    return f"[{_place(_clamp(x, width), _clamp(y, height), width, height, padding)}]"


def parse_boxes(text: str) -> list[Box]:
    """Return the boxes in a text, in their order and in fractions of the square; other brackets are ignored.

    What a model wrote may be any numbers: `to_pixels` cuts them to the picture.
    """
    boxes = []
    for bracket in _BRACKET.finditer(text):
        for part in bracket[1].split(";"):
            x1, y1, x2, y2 = map(float, part.split(","))
            boxes.append((x1, y1, x2, y2))
    return boxes


def to_pixels(box: Sequence[float], width: int, height: int, padding: str) -> Box:
    """Turn a box from fractions of the square into pixels, cut to the picture; the reverse of `format_box`.

    Raises:
        DataError: the box is not four finite numbers, or the padding is unknown.
    """
    x1, y1, x2, y2 = _numbers(box, 4, "box")
    side, (left, top) = max(width, height), _offset(width, height, padding)
    return (
        _clamp(x1 * side - left, width),
        _clamp(y1 * side - top, height),
        _clamp(x2 * side - left, width),
        _clamp(y2 * side - top, height),
    )


def clip_box(box: Sequence[float], width: int, height: int) -> Box:
    """Return the part of a box that is in the picture, all in pixels.

    Raises:
        DataError: the box is not four finite numbers, has no area, or is outside the picture.
    """
    x1, y1, x2, y2 = _numbers(box, 4, "box")
    if x1 >= x2 or y1 >= y2:
        raise DataError(f"empty box: {box} has no area; give left < right and top < bottom")
    clipped = (_clamp(x1, width), _clamp(y1, height), _clamp(x2, width), _clamp(y2, height))
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise DataError(f"box outside the picture: {box} is not in {width} x {height} pixels; check both")
    return clipped


def from_coco(box: Sequence[float]) -> Box:
    """Turn a box of a COCO file, which is left, top, width, height, into left, top, right, bottom.

    Raises:
        DataError: the box is not four finite numbers.
    """
    left, top, width, height = _numbers(box, 4, "box")
    return left, top, left + width, top + height


def _offset(width: int, height: int, padding: str) -> tuple[int, int]:
    """Return where the left top corner of a picture is in its square, in pixels."""
    if padding not in ("centre", "corner"):
        raise DataError(f"padding={padding}: must be centre or corner; take what the model is trained with")
    return place(width, height, padding)


def _place(x: float, y: float, width: int, height: int, padding: str) -> str:
    """Write a place in the picture in fractions of the square, with two decimals."""
    side, (left, top) = max(width, height), _offset(width, height, padding)
    return f"{(x + left) / side:.2f},{(y + top) / side:.2f}"


def _clamp(coordinate: float, size: float) -> float:
    return min(max(coordinate, 0.0), size)


def is_finite(value: object) -> TypeGuard[float]:
    """Say whether something is a number that a coordinate can be: no truth value, and not beyond what floats hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # which NaN is not


def _numbers(values: Sequence[float], count: int, name: str) -> Sequence[float]:
    """Return the numbers unchanged; raise DataError where they are not `count` finite ones.

    Args:
        values: what should be numbers.
        count: how many they should be.
        name: what they make, for the error: a box or a point.
    """
    is_list = isinstance(values, list | tuple) and len(values) == count
    if not is_list or not all(is_finite(value) for value in values):
        raise DataError(
            f"not a {name}: {str(values)[:80]} is not {count} finite numbers; give them in pixels, or leave it out"
        )
    return values
