"""The random walker and biharmonic inpainting by scikit-image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from megatron_sphinx.cascades.segmentation import Mask, Pixels, separated
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.prepare.boxes import Box

_SEED = 0.2  # of the sides of the box: half the sides of the ellipse in its middle that is taken for the object
_BACKGROUND, _OBJECT = 1, 2  # labels; 0 is not known


class RandomWalker:
    """Separates an object by walks from each pixel: which does one meet first, the middle of the box or its outside?

    What is in the middle of the box has to be the object: a ring is not found.

    Raises:
        ConfigError: scikit-image is not installed.

    Source: Grady: Random walks for image segmentation, 2006.
    """

    name = "random walker (scikit-image)"

    def __init__(self) -> None:
        try:
            from skimage.segmentation import random_walker
        except ImportError as error:
            raise _missing() from error
        self._walk = random_walker

    def masks(self, picture: Image.Image, boxes: Sequence[Box]) -> list[Mask]:
        """Return a mask for each box; see Segmenter."""
        return separated(picture, boxes, self._separate)

    def _separate(self, pixels: Pixels, candidates: Mask) -> Mask:
        rows, columns = np.nonzero(candidates)
        y, x = np.ogrid[: candidates.shape[0], : candidates.shape[1]]
        across = (x - columns.mean()) / max(_SEED * np.ptp(columns), 1)
        down = (y - rows.mean()) / max(_SEED * np.ptp(rows), 1)
        labels = np.where(candidates, 0, _BACKGROUND)
        labels[(across**2 + down**2 <= 1) & candidates] = _OBJECT
        if labels.all() or not np.ptp(pixels):  # few pixels, all in the middle of the box; or all of one colour
            return candidates
        # solved directly, for iterations do not end on noise
        is_object: Mask = self._walk(pixels, labels, mode="bf", channel_axis=-1) == _OBJECT
        return is_object


class Biharmonic:
    """Fills a hole as smoothly as its edge allows; of a large hole it takes minutes.

    Raises:
        ConfigError: scikit-image is not installed.

    Source: Damelin and Hoang: On surface completion and image inpainting by biharmonic functions, 2018.
    """

    name = "biharmonic functions (scikit-image)"

    def __init__(self) -> None:
        try:
            from skimage.restoration import inpaint_biharmonic
        except ImportError as error:
            raise _missing() from error
        self._inpaint = inpaint_biharmonic

    def fill(self, picture: Image.Image, mask: Mask) -> Image.Image:
        """Return the picture with its hole filled; see Inpainter."""
        filled = self._inpaint(np.asarray(picture), mask, split_into_regions=True, channel_axis=-1)
        return Image.fromarray((np.clip(filled, 0, 1) * 255 + 0.5).astype(np.uint8))


def _missing() -> ConfigError:
    return ConfigError("scikit-image is not installed; pip install 'megatron-sphinx[cascades]'")
