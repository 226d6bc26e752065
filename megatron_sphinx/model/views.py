"""Which views of a picture a model sees. Arithmetic on sizes, so that a plan knows them without the pixels."""

from dataclasses import dataclass
from functools import lru_cache

from megatron_sphinx.model.architecture import PARTS, VisionConfig


@dataclass(frozen=True)
class View:
    """A part of the padded square that a picture is put in.

    Attributes:
        column, row: which part it is, counted from the top left.
        parts: how many parts each side of the square is cut in; 1 for the whole square.
    """

    column: int
    row: int
    parts: int


GLOBAL = View(0, 0, 1)


def views_of(parts: int) -> tuple[View, ...]:
    """List the views of a square whose sides are cut in so many parts: the whole, then its parts row by row.

    Source: encode_image of the released accessory/model/LLM/llama_ens5.py and llama_ens10.py.
    """
    locals_ = [View(column, row, parts) for row in range(parts) for column in range(parts)]
    return (GLOBAL, *(locals_ if parts > 1 else []))


def place(width: int, height: int, padding: str) -> tuple[int, int]:
    """Find left and top of a picture in the square that it is padded to, in pixels.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        padding: where it sits in the square: centre or corner.

    Source: PadToSquare of the released accessory/data/transform.py (centre).
    """
    side = max(width, height)
    return ((side - width) // 2, (side - height) // 2) if padding == "centre" else (0, 0)


def is_shown(view: View, width: int, height: int, padding: str) -> bool:
    """Whether a view holds any pixel of a picture of this size. Whole numbers only, so it is exact."""
    side = max(width, height)
    spans = zip(place(width, height, padding), (width, height), (view.column, view.row), strict=True)
    return all(begin * view.parts < (part + 1) * side and (begin + size) * view.parts > part * side
               for begin, size, part in spans)  # fmt: skip


def encoded_views(width: int, height: int, vision: VisionConfig) -> tuple[int, ...]:
    """List the numbers of a picture's views that are encoded; the global one, 0, is always among them.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        vision: the views, the padding, and whether views of padding are skipped.

    Source: SPHINX-X, arXiv:2402.05935, section 3.1: a fully padded sub-image is a learnable skip token.
    """
    if not vision.has_skip_token:
        return _ALL[vision.views]
    return _encoded_views(width, height, vision.parts, vision.padding)


_ALL = {views: tuple(range(views)) for views in PARTS}


@lru_cache(maxsize=4096)
def _encoded_views(width: int, height: int, parts: int, padding: str) -> tuple[int, ...]:
    """List the numbers of the views that hold a pixel of the picture, remembered for the next one of this size."""
    views = views_of(parts)
    return tuple(number for number, view in enumerate(views) if is_shown(view, width, height, padding))


def image_positions(encoded: int, vision: VisionConfig) -> int:
    """Count the positions of an image in the sequence: the blocks of its encoded views, and one for each skipped one.

    Args:
        encoded: how many of its views are encoded.
        vision: the views, and the tokens of each.
    """
    return encoded * vision.tokens_per_view + vision.views - encoded
