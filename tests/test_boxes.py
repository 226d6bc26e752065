"""Boxes and points as text: what is written, what is read again, and what is refused."""

import random
import re

import pytest

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.boxes import (
    clip_box,
    format_box,
    format_boxes,
    format_point,
    from_coco,
    parse_boxes,
    to_pixels,
)


@pytest.mark.parametrize("padding", ["centre", "corner"])
@pytest.mark.parametrize("seed", range(20))
def test_boxes_come_back_to_half_a_hundredth_of_the_square(seed, padding):
    rng = random.Random(seed)
    for _ in range(100):
        side, ratio = rng.randint(20, 4000), 20 ** rng.uniform(-1, 1)
        width, height = (side, max(round(side / ratio), 1)) if ratio > 1 else (max(round(side * ratio), 1), side)
        boxes = []
        for _ in range(rng.randint(1, 4)):  # some reach beyond the picture
            xs = sorted(rng.uniform(-0.2, 1.2) * width for _ in range(2))
            ys = sorted(rng.uniform(-0.2, 1.2) * height for _ in range(2))
            if xs[0] < width and xs[1] > 0 and ys[0] < height and ys[1] > 0:
                boxes.append((xs[0], ys[0], xs[1], ys[1]))
        if not boxes:
            continue
        text = format_boxes(boxes, width, height, padding)
        assert re.fullmatch(r"\[[01]\.\d\d(?:[,;][01]\.\d\d)*\]", text)
        assert text == "[" + ";".join(format_box(box, width, height, padding)[1:-1] for box in boxes) + "]"
        found = [to_pixels(box, width, height, padding) for box in parse_boxes(text)]
        for box, wanted in zip(found, boxes, strict=True):
            assert box == pytest.approx(clip_box(wanted, width, height), abs=0.005 * side + 1e-6)
            assert 0 <= box[0] <= box[2] <= width
            assert 0 <= box[1] <= box[3] <= height


@pytest.mark.parametrize(
    ("size", "padding", "box", "point"),
    [
        ((100, 50), "centre", "[0.10,0.45,0.50,0.75]", "[0.10,0.45]"),
        ((100, 50), "corner", "[0.10,0.20,0.50,0.50]", "[0.10,0.20]"),
        ((50, 100), "centre", "[0.35,0.20,0.75,0.60]", "[0.35,0.20]"),
        ((51, 100), "centre", "[0.34,0.20,0.74,0.60]", "[0.34,0.20]"),  # 24 pixels, as the pixels are padded
        ((100, 100), "centre", "[0.10,0.20,0.50,0.60]", "[0.10,0.20]"),
    ],
)
def test_boxes_are_in_the_frame_of_the_square(size, padding, box, point):
    assert format_box((10, 20, 50, 60), *size, padding) == box
    assert format_point((10, 20), *size, padding) == point


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("", []),
        ("no [box], [] or [0.1,0.2]", []),
        ("nose[0.42,0.15] and [0.1,0.2,0.3]", []),
        ("[0.1,0.2,0.3,0.4,0.5] [a,b,c,d] [nan,0,1,1] [0.1;0.2;0.3;0.4] [1.2.3,0,1,1] [-,0,1,1] [1]", []),
        ("[0.1,0.2,0.3,0.4;0.5,0.6,0.7]", []),
        ("[0.1,0.2,0.3,0.4", []),
        ("[0.1,0.2,0.3,0.4;0.5,0.6]", [(0.1, 0.2, 0.3, 0.4)]),  # a box and a point
        ("[0.1,0.2,0.3,0.4;]", [(0.1, 0.2, 0.3, 0.4)]),
        (
            "two sneakers [0.26,0.73,0.29,0.76,0.29,0.74,0.31,0.76]",
            [(0.26, 0.73, 0.29, 0.76), (0.29, 0.74, 0.31, 0.76)],
        ),
        ("layer[0.37, 0.2, 0.43, 0.27].", [(0.37, 0.2, 0.43, 0.27)]),
        ("[0 0 1 1] [0, 0 ,1,.5 ; 0,0,1,1]", [(0, 0, 1, 1), (0, 0, 1, 0.5), (0, 0, 1, 1)]),
        ("[0.1,0.2,0.3,0.4]", [(0.1, 0.2, 0.3, 0.4)]),
        ("dogs[0.76,0.50,0.84,0.57;0.49,0.55,0.57,0.62].", [(0.76, 0.5, 0.84, 0.57), (0.49, 0.55, 0.57, 0.62)]),
        ("[[ 0, .5,\n1.0, 1. ]] then [-1,0,+2,3]", [(0, 0.5, 1, 1), (-1, 0, 2, 3)]),
        ("<p>a cat</p> [0.1,0.2,0.3,0.4] [x] [0.5,0.6,0.7,0.8]", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)]),
    ],
)
def test_boxes_are_read_in_every_form(text, boxes):
    assert parse_boxes(text) == boxes


def test_what_a_model_wrote_is_cut_to_the_picture():
    assert to_pixels((-1, 0, 2, 3), 100, 50, "centre") == (0, 0, 100, 50)
    assert to_pixels(parse_boxes(f"[0,0,{'9' * 300},1]")[0], 100, 50, "corner") == (0, 0, 100, 50)
    assert format_point((-5, 60), 100, 50, "centre") == "[0.00,0.75]"
    assert from_coco([1, 2, 3, 4]) == (1, 2, 4, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: format_box((5, 5, 5, 9), 10, 10, "centre"), r"empty box: \(5, 5, 5, 9\) has no area; give left < ri"),
        (lambda: format_box((5, 9, 6, 5), 10, 10, "centre"), r"empty box: "),
        (lambda: format_box((10, 0, 20, 9), 10, 10, "centre"), r"box outside the picture: .* is not in 10 x 10 pix"),
        (lambda: format_box((0, 0, float("nan"), 9), 10, 10, "centre"), r"not a box: .* is not 4 finite numbers; give"),
        (lambda: format_box((0, 0, float("inf"), 9), 10, 10, "centre"), r"not a box: "),
        (lambda: format_box((0, 0, 9), 10, 10, "centre"), r"not a box: "),
        (lambda: format_box(None, 10, 10, "centre"), r"not a box: None"),
        (lambda: from_coco(["1", 2, 3, 4]), r"not a box: "),
        (lambda: to_pixels((0, 0, float("nan"), 9), 10, 10, "centre"), r"not a box: "),
        (lambda: format_point((0, float("nan")), 10, 10, "centre"), r"not a point: .* is not 2 finite numbers"),
        (lambda: format_boxes([], 10, 10, "centre"), r"no boxes: there is nothing to write; give one or more"),
        (lambda: format_box((0, 0, 1, 1), 10, 10, "left"), r"padding=left: must be centre or corner; take what"),
    ],
)
def test_what_is_no_box_is_refused(make, message):
    with pytest.raises(DataError, match=f"^{message}"):
        make()
