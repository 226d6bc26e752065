"""Scenes of one or two shapes, each with its box and with sentences that are true of it alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")  # those of easy-VQA
SIDE = 112  # pixels of a picture, and of the visual expert
CELL = 28  # pixels: a patch of the picture, in whole numbers of which shapes lie
MOST = 2  # cells of a side of a shape
_ATTEMPTS = 100  # at a place for one more shape

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Thing:
    """A shape in a scene.

    Attributes:
        shape: one of SHAPES.
        colour: one of COLOURS.
        box: left, top, right, bottom in pixels; the shape touches all four sides, and ends before the last two.
    """

    shape: str
    colour: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """Shapes whose boxes do not meet.

    Attributes:
        things: the shapes.
    """

    things: tuple[Thing, ...]

    def picture(self) -> Image.Image:
        """Draw the scene on white: RGB, SIDE x SIDE pixels."""
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        draw = ImageDraw.Draw(picture)
        for thing in self.things:
            left, top, right, bottom = thing.box
            last = (left, top, right - 1, bottom - 1)
            if thing.shape == "circle":
                draw.ellipse(last, fill=thing.colour)
            elif thing.shape == "rectangle":
                draw.rectangle(last, fill=thing.colour)
            else:
                draw.polygon([((left + right - 1) // 2, top), last[2:], (left, bottom - 1)], fill=thing.colour)
        return picture

    def sentences(self, thing: Thing) -> list[str]:
        """Return the sentences that are true of one shape alone: by its looks, and by its side among its likes."""
        said = []
        for words, likes in (
            (f"{thing.colour} {thing.shape}", self._likes(thing, "colour", "shape")),
            (thing.shape, self._likes(thing, "shape")),
            (f"{thing.colour} shape", self._likes(thing, "colour")),
        ):
            if len(likes) == 1:
                said.append(f"the {words}")
            elif len(likes) == 2:
                other = next(like for like in likes if like is not thing)
                said += [f"the {words} on the {side}" for side in _sides(thing.box, other.box)]
        return said

    def _likes(self, thing: Thing, *names: str) -> list[Thing]:
        """Return the shapes that have some attributes in common with one, which is among them."""
        return [each for each in self.things if all(getattr(each, name) == getattr(thing, name) for name in names)]


def _sides(box: Box, other: Box) -> list[str]:
    """Say on which side of another box a box lies; nothing where they stand above one another."""
    return ["left"] * (box[2] <= other[0]) + ["right"] * (box[0] >= other[2])


def scenes(seed: int, count: int, least: int = 1) -> Iterator[Scene]:
    """Draw scenes at random; each shape in them has a sentence of its own.

    Args:
        seed: of the random numbers.
        count: how many scenes.
        least: shapes of a scene; it has that many or two.
    """
    rng = np.random.default_rng(seed)
    while count:
        scene = _drawn(rng, least)
        if all(scene.sentences(thing) for thing in scene.things):
            count -= 1
            yield scene


def _drawn(rng: np.random.Generator, least: int) -> Scene:
    """Draw a scene of `least` to two shapes."""
    things: list[Thing] = []
    wanted = int(rng.integers(least, 3))
    while len(things) < wanted:
        things = []
        for _ in range(_ATTEMPTS):
            thing = _thing(rng)
            if not any(_meet(thing.box, other.box) for other in things):
                things.append(thing)
            if len(things) == wanted:
                break
    return Scene(tuple(things))


def _thing(rng: np.random.Generator) -> Thing:
    """Draw a shape in any cells of a picture; a circle is as wide as high."""
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(COLOURS))
    width, height = (CELL * int(side) for side in rng.integers(1, MOST + 1, 2))
    if shape == "circle":
        height = width
    left, top = (CELL * int(rng.integers(0, (SIDE - side) // CELL + 1)) for side in (width, height))
    return Thing(shape, colour, (left, top, left + width, top + height))


def _meet(one: Box, other: Box) -> bool:
    """Say whether two boxes have a part in common."""
    return all(one[axis] < other[axis + 2] and other[axis] < one[axis + 2] for axis in (0, 1))
