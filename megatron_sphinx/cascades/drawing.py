"""Pictures of regions: numbered, under coloured masks, set off from the rest; frames side by side."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageEnhance, ImageOps

from megatron_sphinx.cascades.regions import Region
from megatron_sphinx.cascades.segmentation import Mask
from megatron_sphinx.generation.grounding import COLOURS
from megatron_sphinx.prepare.drawing import Mark, draw_marks, place_of

_OPACITY = 0.5  # of masks, as in the released demo
_DARKNESS = 0.35  # what is left of the light beside what is set off


def draw_regions(picture: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """Return a copy of a picture with the boxes of regions, each with its number.

    Args:
        picture: in RGB.
        regions: what to draw.
    """
    marks = [
        Mark(region.number, region.phrase, region.box, (), place_of(region.box, (), picture.size))
        for region in regions
    ]  # fmt: skip
    return draw_marks(picture, marks)


def draw_masks(picture: Image.Image, masks: Sequence[Mask]) -> Image.Image:
    """Return a copy of a picture with masks over it, half transparent and each in a colour of its own.

    Args:
        picture: in RGB.
        masks: [height, width] of the picture.

    Source: accessory/demos/multi_turn_mm_box.py of LLaMA2-Accessory.
    """
    drawn = np.asarray(picture).astype(np.float32)
    for number, mask in enumerate(masks):
        colour = np.array(ImageColor.getrgb(COLOURS[number % len(COLOURS)]), np.float32)
        drawn[mask] = (1 - _OPACITY) * drawn[mask] + _OPACITY * colour
    return Image.fromarray((drawn + 0.5).astype(np.uint8))


def highlight(picture: Image.Image, masks: Sequence[Mask]) -> Image.Image:
    """Return a copy of a picture whose pixels outside of all masks are dark and without colour.

    Args:
        picture: in RGB.
        masks: [height, width] of the picture.
    """
    dark = ImageEnhance.Brightness(ImageOps.grayscale(picture).convert("RGB")).enhance(_DARKNESS)
    return Image.composite(picture, dark, Image.fromarray(np.logical_or.reduce(masks)))


def side_by_side(frames: Sequence[Image.Image]) -> Image.Image:
    """Return one picture of frames in rows, in reading order, in the columns that make it nearest to a square.

    Args:
        frames: one or more in RGB; those of another size than the first are scaled into it.
    """
    width, height = frames[0].size
    counts = range(len(frames), 0, -1)
    columns = min(counts, key=lambda count: _excess(count * width, _rows(frames, count) * height))
    sheet = Image.new("RGB", (columns * width, _rows(frames, columns) * height))
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        sheet.paste(ImageOps.pad(frame, (width, height)), (column * width, row * height))
    return sheet


def _rows(frames: Sequence[Image.Image], columns: int) -> int:
    return math.ceil(len(frames) / columns)


def _excess(width: int, height: int) -> float:
    """Say how far two sides are from those of a square."""
    return max(width, height) / min(width, height)
