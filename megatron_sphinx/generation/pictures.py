"""Pictures that are asked about: what their files hold, and the pixels of their views, as in training."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from megatron_sphinx.data import images
from megatron_sphinx.data.canvas import Canvas
from megatron_sphinx.errors import DataError
from megatron_sphinx.generation.requests import Picture
from megatron_sphinx.model.architecture import VisionConfig
from megatron_sphinx.model.views import encoded_views, image_positions, views_of

MOST_BYTES = 2**26  # of the file of a picture that is asked about


def picture_of(content: bytes, vision: VisionConfig) -> Picture:
    """Look at the content of a picture's file; it is decoded once, to know that it can be.

    Where `vision.resize` is accessory its size is that of the stored picture, which the model sees, as in training.

    Raises:
        DataError: it is too large, no picture, or one that does not decode or has too many pixels.
    """
    if len(content) > MOST_BYTES:
        raise DataError(f"picture of {len(content)} bytes: at most {MOST_BYTES} are taken; make it smaller")
    shape = images.shape_of(content)
    images.decode(content)
    width, height = shape.width, shape.height
    if not _is_upright(vision) and shape.orientation in images.SIDEWAYS:
        width, height = height, width
    encoded = encoded_views(width, height, vision)
    return Picture(
        key=hashlib.sha256(content).hexdigest(),
        content=content,
        width=width,
        height=height,
        encoded=encoded,
        positions=image_positions(len(encoded), vision),
        orientation=1 if _is_upright(vision) else shape.orientation,
    )


def views_of_picture(picture: Picture, vision: VisionConfig) -> dict[int, Tensor]:
    """Return the pixels of a picture's encoded views, bit for bit what training reads of the same file.

    Returns:
        For each input side of the experts, pixels from 0 to 255, [views, 3, side, side].

    Raises:
        DataError: the picture does not decode.
    """
    canvas = Canvas(images.decode(picture.content, is_upright=_is_upright(vision)), vision)
    views = [views_of(vision.parts)[number] for number in picture.encoded]
    return {side: torch.from_numpy(np.stack([canvas.cut(view, side) for view in views])) for side in vision.sides}


def _is_upright(vision: VisionConfig) -> bool:
    """Say whether pictures are turned as their orientation says before the model sees them."""
    return vision.resize != "accessory"
