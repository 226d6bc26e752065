"""Boxes and points of an answer as entries of JSON, in pixels of its picture, and back to what can be drawn.

An entry is `{"box": [left, top, right, bottom], "phrase": "a cup", "begin": 5, "end": 22}`, or has `point`, x and y, in
place of `box`; `begin` and `end` are the characters of its bracket in the answer.
"""

from collections.abc import Sequence
from typing import Any

from megatron_sphinx.generation.grounding import COLOURS, Grounding
from megatron_sphinx.prepare.boxes import Box, is_finite

_DECIMALS = 2  # of a pixel


def entries_of(text: str, groundings: Sequence[Grounding]) -> list[dict[str, Any]]:
    """Return the boxes and points of an answer as entries, in their order; places with faults have none.

    Args:
        text: the answer.
        groundings: what was found in it.
    """
    entries = []
    for found in groundings:
        about = {"phrase": text[found.phrase_begin : found.phrase_end], "begin": found.begin, "end": found.end}
        entries += [{"box": [round(side, _DECIMALS) for side in box], **about} for box in found.boxes]
        entries += [{"point": [round(side, _DECIMALS) for side in point], **about} for point in found.points]
    return entries


def groundings_of(entries: object) -> list[Grounding]:
    """Return what can be drawn of entries that came over a network; what is no entry is passed over.

    Args:
        entries: of an answer; those without `begin` and `end` are as if they had one bracket, of no characters.
    """
    boxes: dict[tuple[int, int], list[Box]] = {}
    points: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        span = _span(entry.get("begin"), entry.get("end"))
        if numbers := _numbers(entry.get("box"), 4):
            boxes.setdefault(span, []).append((numbers[0], numbers[1], numbers[2], numbers[3]))
        elif numbers := _numbers(entry.get("point"), 2):
            points.setdefault(span, []).append((numbers[0], numbers[1]))
    spans = sorted(boxes.keys() | points.keys())
    return [
        Grounding(
            begin, end, begin, begin, COLOURS[number % len(COLOURS)],
            tuple(boxes.get((begin, end), ())), tuple(points.get((begin, end), ())), (),
        )
        for number, (begin, end) in enumerate(spans)
    ]  # fmt: skip


def _span(begin: object, end: object) -> tuple[int, int]:
    """Return where a bracket begins and ends; 0 for both where that is not known."""
    return (begin, end) if isinstance(begin, int) and isinstance(end, int) and 0 <= begin < end else (0, 0)


def _numbers(value: object, count: int) -> list[float]:
    """Return a list of so many numbers, of which a box has an area; none where it is no such list."""
    if not isinstance(value, list) or len(value) != count or not all(map(is_finite, value)):
        return []
    return value if count == 2 or (value[0] <= value[2] and value[1] <= value[3]) else []
