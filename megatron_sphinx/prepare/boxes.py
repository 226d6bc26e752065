"""Boxes and points as text, in fractions of the square that a picture is padded to.

A box is left, top, right, bottom. We write it `[0.10,0.25,0.60,0.75]`, several `[0.10,0.25,0.60,0.75;0.00,…]`, a point
`[0.42,0.15]`. What models write is read more freely: see `parse_brackets`.

Source: SPHINX, arXiv:2311.07575, Table 1, figures 1, 9 and 12; accessory/eval_mm/evaluate.py and
accessory/demos/multi_turn_mm_box.py of LLaMA2-Accessory.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from megatron_sphinx.errors import DataError
from megatron_sphinx.model.views import place

Box = tuple[float, float, float, float]
Place = tuple[float, ...]  # four numbers are a box, two a point

_BRACKET = re.compile(r"\[([-+0-9.,;\s]*)\]")
_NAMED = re.compile(r"<p>([^<>]*)</p>\s*\Z")
_BORDER = re.compile(r"[.,;:!?\n\])>](?=\s|\Z)|[\]\n]")  # what ends the phrase before; not the point in 3.5
_LINK = re.compile(r"(?:and|or)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Bracket:
    """Places that a text names in one pair of brackets.

    Attributes:
        begin: where the bracket is in the text, in characters.
        end: behind it.
        phrase_begin: where the words in front of it begin that it belongs to; they may be none.
        phrase_end: behind them.
        places: boxes and points in their order, in fractions of the square; they may be any numbers, also infinite.
    """

    begin: int
    end: int
    phrase_begin: int
    phrase_end: int
    places: tuple[Place, ...]


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
    """Return the boxes in a text, in their order and in fractions of the square; points and other brackets are ignored.

    What a model wrote may be any numbers: `to_pixels` cuts them to the picture.
    """
    places = [place for bracket in parse_brackets(text) for place in bracket.places]
    return [(place[0], place[1], place[2], place[3]) for place in places if len(place) == 4]


def parse_brackets(text: str) -> list[Bracket]:
    """Return the brackets of a text that hold boxes or points, in their order.

    Places are separated by `;`, numbers by commas or spaces, and they need no decimals. Of the numbers between two `;`
    each four are a box; two alone are a point. A bracket that holds anything else is none of ours.

    The phrase of a bracket is what stands in `<p>` in front of it, or else the words behind the bracket or the
    punctuation before, without the `and` of a list.
    """
    brackets, behind = [], 0
    for found in _BRACKET.finditer(text):
        if places := _places(found[1]):
            phrase = _phrase(text, behind, found.start())
            brackets.append(Bracket(found.start(), found.end(), *phrase, places))
            behind = found.end()
    return brackets


def _places(inside: str) -> tuple[Place, ...]:
    """Return the boxes and points of what stands in a bracket; none where anything in it is neither."""
    places: list[Place] = []
    for part in inside.split(";"):
        try:
            numbers = [float(number) for number in part.replace(",", " ").split()]
        except ValueError:  # `1.2.3`, or a sign alone
            return ()
        if len(numbers) % 4 and len(numbers) != 2:
            return ()
        step = min(len(numbers), 4)
        places += [tuple(numbers[first : first + step]) for first in range(0, len(numbers), step or 1)]
    return tuple(places)


def _phrase(text: str, behind: int, bracket: int) -> tuple[int, int]:
    """Return where the phrase of a bracket begins and ends.

    Args:
        text: that holds it.
        behind: end of the bracket before.
        bracket: where the bracket begins.
    """
    if named := _NAMED.search(text, max(behind, text.rfind("<p>", behind, bracket)), bracket):
        return named.span(1)
    end = behind + len(text[behind:bracket].rstrip())
    begin = max((border.end() for border in _BORDER.finditer(text, behind, end)), default=behind)
    begin = end - len(text[begin:end].lstrip())
    link = _LINK.match(text, begin, end)
    return (link.end() if link else begin), end


def to_pixels(box: Sequence[float], width: int, height: int, padding: str) -> Box:
    """Turn a box from fractions of the square into pixels, cut to the picture; the reverse of `format_box`.

    Raises:
        DataError: the box is not four finite numbers, or the padding is unknown.
    """
    left, top, right, bottom = place_in_pixels(_numbers(box, 4, "box"), width, height, padding)
    return _clamp(left, width), _clamp(top, height), _clamp(right, width), _clamp(bottom, height)


def place_in_pixels(place: Sequence[float], width: int, height: int, padding: str) -> Place:
    """Turn the numbers of a place, x and y in turn, from fractions of the square into pixels of the picture.

    What is in the padding, or outside the square, has pixels outside the picture.

    Raises:
        DataError: the padding is unknown.
    """
    side, offset = max(width, height), _offset(width, height, padding)
    return tuple(number * side - offset[index % 2] for index, number in enumerate(place))


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
