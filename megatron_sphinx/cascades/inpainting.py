"""From masks to pictures without what was there, as SPHINX hands masks to LaMa.

Source: SPHINX, arXiv:2311.07575, section 3.3.1; Inpaint Anything, arXiv:2304.06790, section 3.
"""

from typing import Protocol

import numpy as np
from PIL import Image

from megatron_sphinx.cascades.segmentation import Mask
from megatron_sphinx.errors import DataError


class Inpainter(Protocol):
    """Whatever fills holes of a picture.

    Attributes:
        name: what results call it.
    """

    name: str

    def fill(self, picture: Image.Image, mask: Mask) -> Image.Image:
        """Return a picture of the given one's size, whose pixels under the mask are new.

        Args:
            picture: in RGB.
            mask: [height, width] of the picture, true on some but not all pixels.
        """


def inpaint(inpainter: Inpainter, picture: Image.Image, mask: Mask) -> Image.Image:
    """Return a copy of a picture in which what is under a mask is filled from around it; no other pixel changes.

    Args:
        inpainter: what fills.
        picture: in RGB.
        mask: [height, width] of the picture, true on what goes.

    Raises:
        DataError: there is nothing under the mask, or nothing beside it.
    """
    if not mask.any():
        raise DataError("mask: covers no pixel; give a region that is in the picture")
    if mask.all():
        raise DataError(f"mask: covers all of {picture.width} x {picture.height} pixels; give a smaller region")
    return Image.composite(inpainter.fill(picture, mask), picture, Image.fromarray(mask))


def grown(mask: Mask, pixels: int) -> Mask:
    """Return a mask with all within a square of `pixels` around each of its pixels.

    An object has to be cut out with a margin, for the pixels at its edge are of two colours.

    Source: the dilation of Inpaint Anything, whose default is a square of 15 pixels, so 7 around each.
    """
    for axis, side in enumerate(mask.shape):
        before = np.insert(np.cumsum(mask, axis), 0, 0, axis)  # how many pixels lie before each
        places = np.arange(side)
        first, last = np.maximum(places - pixels, 0), np.minimum(places + pixels + 1, side)
        mask = before.take(last, axis) > before.take(first, axis)
    return mask
