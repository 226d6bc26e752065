"""From a picture to the pixels of its views: padded to a square, resized, cut. Everything on the CPU."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from megatron_sphinx.model.architecture import CLIP_MEAN, VisionConfig
from megatron_sphinx.model.views import View, place

BACKGROUND = tuple(int(255 * channel) for channel in CLIP_MEAN)


def to_square(image: Image.Image, padding: str) -> Image.Image:
    """Return the image on a square of the mean colour, in its centre or its top left corner."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new("RGB", (side, side), BACKGROUND)
    square.paste(image, place(width, height, padding))
    return square


class Canvas:
    """A picture on its square, cut into views. Each size that the square is resized to is made once.

    Args:
        image: the picture.
        vision: how it is padded and resized.
    """

    def __init__(self, image: Image.Image, vision: VisionConfig) -> None:
        self._square, self._vision = to_square(image, vision.padding), vision
        self._resized: dict[int, Tensor] = {}
        self._nearest = {item.expert.pixels: item.expert.nearest_from for item in vision.experts}

    def cut(self, view: View, side: int) -> NDArray[np.uint8] | NDArray[np.float32]:
        """Return the pixels of a view, [3, side, side].

        Where `vision.resize` is antialiased they are uint8: torch resizes the whole square bicubic (which agrees with
        Pillow to 2 of 255, in half the time), then the view is cut. Where it is accessory they are float32 from 0 to
        255, and beyond where bicubic overshoots.

        Source of the latter: T_padded_resize of the released accessory/data/transform.py, then encode_image of
        accessory/model/LLM/llama_ens*.py; in fp32, where those resize in fp16.
        """
        is_released = self._vision.resize == "accessory"
        cut_side = (self._nearest[side] if is_released else 0) or side
        left, top = view.column * cut_side, view.row * cut_side
        whole = self._whole(cut_side * view.parts, is_released)
        pixels = whole[:, top : top + cut_side, left : left + cut_side]
        if cut_side != side:
            pixels = interpolate(pixels[None], (side, side), mode="nearest")[0]
        return pixels.numpy()

    def _whole(self, side: int, is_released: bool) -> Tensor:
        """Return the whole square resized to `side` pixels, [3, side, side]."""
        if side not in self._resized:
            size = self._vision.released_pixels
            square = self._square.resize((size, size), Image.Resampling.BICUBIC) if is_released else self._square
            pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
            pixels = pixels.float() if is_released else pixels
            if pixels.shape[-1] != side:
                pixels = interpolate(pixels, (side, side), mode="bicubic", antialias=not is_released)
            self._resized[side] = pixels[0]
        return self._resized[side]


def pixel_type(vision: VisionConfig) -> type[np.uint8] | type[np.float32]:
    """Return the type of a view's pixels, which follows from how they are resized."""
    return np.uint8 if vision.resize == "antialiased" else np.float32
