"""From boxes to masks, as SPHINX hands its boxes to the Segment Anything Model.

Source: SPHINX, arXiv:2311.07575, section 3.3.1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_sphinx.prepare.boxes import Box

Mask: TypeAlias = npt.NDArray[np.bool_]
Pixels: TypeAlias = npt.NDArray[np.uint8]

_MARGIN = 0.5  # of a box's sides, on each side of it: the background that is looked at
_MOST_SIDE = 512  # of what is looked at, in pixels; larger ones are made smaller
_LEAST_SIDE = 3  # with fewer pixels there is no background around an object


class Segmenter(Protocol):
    """Whatever separates an object in a box from its background.

    Attributes:
        name: what results call it.
    """

    name: str

    def masks(self, picture: Image.Image, boxes: Sequence[Box]) -> list[Mask]:
        """Return a mask for each box, [height, width] of the picture, true on the object.

        Args:
            picture: in RGB.
            boxes: left, top, right, bottom, in pixels of the picture and inside of it.
        """


def separated(picture: Image.Image, boxes: Sequence[Box], separate: Callable[[Pixels, Mask], Mask]) -> list[Mask]:
    """Return masks of objects, each found in the surroundings of its box; where nothing is found, the whole box.

    Args:
        picture: in RGB.
        boxes: left, top, right, bottom, in pixels of the picture and inside of it.
        separate: given pixels [height, width, 3], and a mask of where the object may be, which leaves some background
            out, says where the object is.

    Returns:
        Masks [height, width] of the picture.
    """
    return [_separated(picture, box, separate) for box in boxes]


def _separated(picture: Image.Image, box: Box, separate: Callable[[Pixels, Mask], Mask]) -> Mask:
    whole = np.zeros((picture.height, picture.width), bool)
    left, top, right, bottom = _outward(box, (0.0, 0.0), picture.size)
    whole[top:bottom, left:right] = True
    window = _outward(box, (_MARGIN * (right - left), _MARGIN * (bottom - top)), picture.size)
    shown = picture.crop(window)
    shown.thumbnail((_MOST_SIDE, _MOST_SIDE))
    if min(shown.size) < _LEAST_SIDE:
        return whole
    candidates = np.asarray(Image.fromarray(whole).crop(window).resize(shown.size, Image.Resampling.NEAREST)).copy()
    if candidates.all():  # the box is the whole picture, whose edge is taken for background
        candidates[[0, -1]] = candidates[:, [0, -1]] = False
    object_ = separate(np.asarray(shown), candidates) & candidates
    if not object_.any():
        return whole
    size = (window[2] - window[0], window[3] - window[1])
    mask = np.zeros_like(whole)
    mask[window[1] : window[3], window[0] : window[2]] = Image.fromarray(object_).resize(size, Image.Resampling.NEAREST)
    return mask & whole


def _outward(box: Box, margin: tuple[float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the pixels that a box touches with a margin around it, as far as the picture has them."""
    return (
        max(math.floor(box[0] - margin[0]), 0),
        max(math.floor(box[1] - margin[1]), 0),
        min(math.ceil(box[2] + margin[0]), size[0]),
        min(math.ceil(box[3] + margin[1]), size[1]),
    )
