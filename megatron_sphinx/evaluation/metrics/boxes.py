"""Regions and points: a box must overlap the right one by half, a point must lie in it.

Answers have places in fractions of the square that the picture is padded to; truths are in pixels of the picture.

Source: accessory/eval_mm/evaluate.py of LLaMA2-Accessory; arXiv:2401.10935 for ScreenSpot.
"""

import re
from collections.abc import Sequence

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import accuracy, each
from megatron_sphinx.evaluation.samples import Answered, Protocol, Verdict
from megatron_sphinx.prepare.boxes import Box, parse_boxes, parse_brackets, place_in_pixels, to_pixels

_LEAST_OVERLAP = 0.5
_BRACKETS = re.compile(r"\[(.*?)\]")


def overlap(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the intersection of two boxes over their union; 0 where they have no area."""
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    common = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (left, right)]
    union = sum(areas) - common
    return common / union if union else 0.0


def accessory_box(text: str) -> Box | None:
    """Return the box that Accessory reads in an answer, in fractions; None where it reads none.

    Only the first pair of brackets counts, and it has to hold four numbers with commas between them. Without a pair it
    is what stands before the first closing bracket.
    """
    found = _BRACKETS.search(text)
    try:
        numbers = [float(number) for number in (found[1] if found else text.split("]")[0]).split(",")]
    except ValueError:
        return None
    return (numbers[0], numbers[1], numbers[2], numbers[3]) if len(numbers) == 4 else None


def _truth_of(answered: Answered) -> Box:
    """Return the right box of a sample.

    Raises:
        DataError: it has none, or the size of its picture is not known.
    """
    if answered.sample.box is None or answered.width <= 0 or answered.height <= 0:
        raise DataError(
            f"sample {answered.sample.id}: has no box, or no picture that it could be in; check the benchmark's files"
        )
    return answered.sample.box


def _accessory_overlap(box: Box, truth: Box, width: int, height: int) -> float:
    """Return the overlap in the frame of Accessory, the square with the picture in its centre, in single precision."""
    import numpy as np

    side = max(width, height)
    left, top = max(height - width, 0) // 2, max(width - height, 0) // 2
    # its numbers are 32-bit; a box on the border of half an overlap falls as it does there
    mine = np.array(box, np.float32) * np.float32(side)
    right = np.array([truth[0] + left, truth[1] + top, truth[2] + left, truth[3] + top], np.float32)
    sides = np.maximum(np.minimum(mine[2:], right[2:]) - np.maximum(mine[:2], right[:2]), np.float32(0))
    areas = [(one[2] - one[0]) * (one[3] - one[1]) for one in (mine, right)]
    common = sides[0] * sides[1]
    with np.errstate(all="ignore"):
        return float(common / (areas[0] + areas[1] - common))


def _judge_box(answered: Answered, protocol: Protocol) -> Verdict:
    """Judge the first box of an answer, in pixels of the picture; Accessory's protocol has the square's frame."""
    truth = _truth_of(answered)
    if protocol is Protocol.ACCESSORY:
        written = accessory_box(answered.text)
        reached = _accessory_overlap(written or (0.0,) * 4, truth, answered.width, answered.height)
        return Verdict(float(reached >= _LEAST_OVERLAP), _written(written))
    boxes = parse_boxes(answered.text)
    if not boxes:
        return Verdict(0.0, None)
    try:
        box = to_pixels(boxes[0], answered.width, answered.height, answered.padding)
    except DataError:  # numbers beyond what a coordinate can be
        return Verdict(0.0, None)
    return Verdict(float(overlap(box, truth) >= _LEAST_OVERLAP), _written(boxes[0]))


def _judge_point(answered: Answered, _protocol: Protocol) -> Verdict:
    """Judge the first point of an answer, or the middle of its first box: the right box and its edges are right."""
    left, top, right, bottom = _truth_of(answered)
    places = [place for bracket in parse_brackets(answered.text) for place in bracket.places]
    if not places:
        return Verdict(0.0, None)
    place = places[0]
    point = place if len(place) == 2 else ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
    x, y = place_in_pixels(point, answered.width, answered.height, answered.padding)
    return Verdict(float(left <= x <= right and top <= y <= bottom), _written(point))


def _written(place: Sequence[float] | None) -> str | None:
    """Write a place as verdicts show it."""
    return None if place is None else f"[{','.join(f'{number:g}' for number in place)}]"


BOX_ACCURACY = Metric("accuracy at IoU 0.5", each(_judge_box), accuracy)
POINT_ACCURACY = Metric("point in box", each(_judge_point), accuracy)
