"""What a page shows of its texts: a PDF also holds text that is white, covered, clipped or never drawn.

Where the image of a page stays as it is when all texts are taken out of the page, no text is seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_CONTRAST = 24  # of 255, in one of the colours: less is not seen
_MARGIN = 0.1  # of a letter's height: what is nearer to its upper or lower end may be of the next line
_MOST_HIDDEN = 0.25  # of the letters of a word
_LEAST_PIXELS = 4.0  # size of letters that can be read
_DRAWN = 16 | 32 | 64  # filled, stroked, clips what follows: flags of MuPDF's letters


@dataclass(frozen=True)
class Letter:
    """A letter of a page.

    Attributes:
        text: what it is.
        box: left, top, right, bottom in the page's own unit.
        is_shown: whether the image of the page shows it; of a space it says nothing.
    """

    text: str
    box: tuple[float, float, float, float]
    is_shown: bool


class Ink:
    """The pixels of a page's image that are of its texts.

    Args:
        pymupdf: the module.
        page: of a document that is not saved again: its texts are taken out.
        scaled: what makes pixels of the page's unit.

    Attributes:
        image: of the page, with its texts.
    """

    def __init__(self, pymupdf: Any, page: Any, scaled: Any) -> None:
        self.image = _image_of(page, scaled)
        page.add_redact_annot(page.rect * page.derotation_matrix, fill=False, cross_out=False)
        page.apply_redactions(
            images=pymupdf.PDF_REDACT_IMAGE_NONE,
            graphics=pymupdf.PDF_REDACT_LINE_ART_NONE,
            text=pymupdf.PDF_REDACT_TEXT_REMOVE,
        )
        with_text, without = (np.asarray(image, np.int16) for image in (self.image, _image_of(page, scaled)))
        self._is_text: NDArray[np.bool_] = np.abs(with_text - without).max(2) > _CONTRAST

    def letters(self, span: dict[str, Any], to_pixels: Any, pymupdf: Any) -> Iterator[Letter]:
        """Yield the letters of a span of MuPDF's rawdict.

        Args:
            span: of a line.
            to_pixels: what makes pixels of places on the page as the span has them.
            pymupdf: the module.
        """
        is_drawn = bool(span["char_flags"] & _DRAWN) and span.get("alpha", 255) > 0
        for letter in span["chars"]:
            box = pymupdf.Rect(letter["bbox"])
            yield Letter(letter["c"], tuple(box), is_drawn and self._has_text(box * to_pixels))

    def _has_text(self, box: Any) -> bool:
        """Say whether a part of the image, in pixels, has something of a text."""
        margin = _MARGIN * (box.y1 - box.y0), _MARGIN * (box.x1 - box.x0)
        top, bottom = max(int(box.y0 + margin[0]), 0), int(np.ceil(box.y1 - margin[0]))
        left, right = max(int(box.x0 + margin[1]), 0), int(np.ceil(box.x1 - margin[1]))
        return bool(self._is_text[top:bottom, left:right].any())


def _image_of(page: Any, scaled: Any) -> Image.Image:
    pixels = page.get_pixmap(matrix=scaled, alpha=False)
    return Image.frombytes("RGB", (pixels.width, pixels.height), pixels.samples)


def shown(letters: Sequence[Letter], pixels: float) -> list[Letter]:
    """Return what of a line can be read: the letters of words that are shown, and spaces.

    Args:
        letters: of the line.
        pixels: size of the letters in the image.
    """
    if pixels < _LEAST_PIXELS:
        return []
    kept: list[Letter] = []
    for is_space, group in groupby(letters, lambda letter: letter.text.isspace()):
        word = list(group)
        hidden = sum(not letter.is_shown for letter in word)
        if is_space or hidden <= _MOST_HIDDEN * len(word):
            kept += word
    return kept
