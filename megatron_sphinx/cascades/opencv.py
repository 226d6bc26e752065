"""GrabCut and Telea's inpainting by OpenCV."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from megatron_sphinx.cascades.segmentation import Mask, Pixels, separated
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.prepare.boxes import Box

_ITERATIONS = 5  # of GrabCut, which has settled by then
_RADIUS = 5.0  # of what a filled pixel is computed of, in pixels


class GrabCut:
    """Separates an object by colours: those of the box against those around it, with a graph cut between.

    Raises:
        ConfigError: OpenCV is not installed.

    Source: Rother, Kolmogorov, Blake: GrabCut, SIGGRAPH 2004.
    """

    name = "GrabCut (OpenCV)"

    def __init__(self) -> None:
        self._cv2 = _cv2()

    def masks(self, picture: Image.Image, boxes: Sequence[Box]) -> list[Mask]:
        """Return a mask for each box; see Segmenter."""
        return separated(picture, boxes, self._separate)

    def _separate(self, pixels: Pixels, candidates: Mask) -> Mask:
        cv2 = self._cv2
        cv2.setRNGSeed(0)  # it begins with random clusters of colours
        labels = np.where(candidates, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
        models = np.zeros((2, 1, 65))
        cv2.grabCut(_bgr(pixels), labels, None, models[0], models[1], _ITERATIONS, cv2.GC_INIT_WITH_MASK)
        found: Mask = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
        return found


class Telea:
    """Fills a hole from its edge inward, each pixel by those near it that are known.

    Raises:
        ConfigError: OpenCV is not installed.

    Source: Telea: An image inpainting technique based on the fast marching method, 2004.
    """

    name = "Telea's fast marching (OpenCV)"

    def __init__(self) -> None:
        self._cv2 = _cv2()

    def fill(self, picture: Image.Image, mask: Mask) -> Image.Image:
        """Return the picture with its hole filled; see Inpainter."""
        cv2 = self._cv2
        filled = cv2.inpaint(_bgr(np.asarray(picture)), mask.astype(np.uint8), _RADIUS, cv2.INPAINT_TELEA)
        return Image.fromarray(_bgr(filled))


def _bgr(pixels: Pixels) -> Pixels:
    """Exchange red and blue, for OpenCV has blue first."""
    return np.ascontiguousarray(pixels[..., ::-1])


def _cv2() -> Any:
    """Return the module of OpenCV, which computes in the thread that calls it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ConfigError("opencv is not installed; pip install 'megatron-sphinx[cascades]'") from error
    cv2.setNumThreads(1)  # no pool of threads, which a fork would be without
    return cv2
