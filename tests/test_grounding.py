"""Boxes and points of an answer: found in every form that SPHINX writes, in the picture's pixels, drawn on a copy."""

import random
import time

import pytest
from PIL import Image, ImageColor

from megatron_sphinx.errors import DataError
from megatron_sphinx.generation.grounding import COLOURS, draw_groundings, ground
from megatron_sphinx.prepare.boxes import format_box, format_point, parse_brackets


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("<p>A cat</p>[0.1,0.2,0.3,0.4] sits on <p>a mat</p> [0,0,1,1].", ["A cat", "a mat"]),
        ("Here are dogs[0.1,0.2,0.3,0.4;0.5,0.6,0.7,0.8] and a cat [0.2,0.2,0.3,0.3].", ["Here are dogs", "a cat"]),
        ("Sure. The box is: two cows[0,0,1,1]; Birds [0,0,1,1]", ["two cows", "Birds"]),
        ("nose[0.42,0.15], left eye [0.4,0.1], and right ankle[0.5,0.9].", ["nose", "left eye", "right ankle"]),
        ("[0.37,0.32,0.90,0.58]", [""]),
        ("a 3.5 m mast[0.1,0.1,0.2,0.2]\nOr sand[0,0,1,1] or sea[0,0,1,1]", ["a 3.5 m mast", "sand", "sea"]),
        ("x [1] see [2](url) dog[0,0,1,1]", ["dog"]),
        ("<p>one</p> is here, two[0,0,1,1]", ["two"]),
    ],
)  # fmt: skip
def test_a_bracket_knows_its_words(text, phrases):
    found = parse_brackets(text)
    assert [text[one.phrase_begin : one.phrase_end] for one in found] == phrases
    assert all(text[one.begin] == "[" and text[one.end - 1] == "]" for one in found)


@pytest.mark.parametrize("padding", ["centre", "corner"])
def test_places_come_back_to_the_pixels_that_they_were_written_from(padding):
    rng = random.Random(padding)
    for _ in range(300):
        width, height = rng.randint(40, 3000), rng.randint(40, 3000)
        xs, ys = (sorted(rng.uniform(0, size) for _ in range(2)) for size in (width, height))
        if xs[1] - xs[0] < 1 or ys[1] - ys[0] < 1:
            continue
        box = (xs[0], ys[0], xs[1], ys[1])
        flat = f"{format_box(box, width, height, padding)[:-1]}, {format_box(box, width, height, padding)[1:]}"
        text = f"two things {flat} and {format_point(box[:2], width, height, padding)}"
        things, point = ground(text, width, height, padding)
        tolerance = 0.005 * max(width, height) + 1e-6
        assert things.boxes[0] == things.boxes[1] == pytest.approx(box, abs=tolerance)
        assert point.points == (pytest.approx(box[:2], abs=tolerance),)
        assert (len(things.boxes), things.points, point.boxes) == (2, (), ())
        assert not things.faults
        assert not point.faults


def test_wrong_places_are_told_and_not_drawn():
    text = f"a[0.5,0.5,1.2,0.6;0.1,0.3,0.2,0.6] b[0.6,0.5,0.4,0.6] c[{'9' * 400},0] d[0.1,0.05] "
    text += "e[0.5,0.5] f[0.2,0.8,0.4,0.9]"
    found = ground(text, 100, 50, "centre")
    assert [one.faults for one in found] == [
        ("[0.5,0.5,1.2,0.6]: outside of 0 to 1",),
        ("[0.6,0.5,0.4,0.6]: reversed: left > right, or top > bottom",),
        ("[inf,0]: not finite",),
        ("[0.1,0.05]: in the padding, outside the picture",),
        (),
        ("[0.2,0.8,0.4,0.9]: in the padding, outside the picture",),
    ]
    assert [one.colour for one in found] == [COLOURS[0], None, None, None, COLOURS[1], None]
    assert found[0].boxes == ((10, pytest.approx(5), 20, pytest.approx(35)),)
    with pytest.raises(DataError, match="padding=left: must be centre or corner"):
        ground("[0.5,0.5]", 9, 9, "left")


def test_more_brackets_than_colours_begin_anew():
    found = ground("x[0.5,0.5]" * (len(COLOURS) + 1), 10, 10, "corner")
    assert [one.colour for one in found] == [*COLOURS, COLOURS[0]]


@pytest.mark.parametrize(("padding", "top"), [("centre", 50), ("corner", 0)])
def test_boxes_and_points_are_drawn_on_a_copy(padding, top):
    picture = Image.new("L", (200, 100), "black")
    y = (top + 20) / 200  # a fraction of the square
    found = ground(f"a[0.1,{y},0.4,{y + 0.3}] b[0.8,{y}] c[0.1,{y},0.4,{y + 0.3}]", 200, 100, padding)
    drawn = draw_groundings(picture, found)
    red, blue = (ImageColor.getrgb(colour) for colour in COLOURS[:2])
    for place, colour in {
        (20, 20): red, (80, 80): red, (20, 50): red, (50, 50): (0, 0, 0), (15, 20): (0, 0, 0), (160, 20): blue,
    }.items():  # fmt: skip
        assert drawn.getpixel(place) == colour, place
    assert picture.getextrema() == (0, 0)


def test_a_long_answer_of_brackets_takes_no_time():
    start = time.process_time()
    parts = ("[", "[0,", "<p>", "[0,0]", "<p>a</p>[0,0,1,1]", "a. ", "and ")
    for text in ("[" + " " * 200_000 + "x]", *(part * 50_000 + "[0,0]" for part in parts)):
        parse_brackets(text)
    assert time.process_time() - start < 3
