"""Which views of a picture a model looks at. Arithmetic on sizes, so that a plan knows them without the pixels."""

from dataclasses import dataclass
from functools import lru_cache

from megatron_sphinx.model.architecture import PARTS, VisionConfig


@dataclass(frozen=True)
class View:
    """A part of the padded square: one of `parts` along each side, counted from the top left."""

    column: int
    row: int
    parts: int


GLOBAL = View(0, 0, 1)


def views_of(parts: int) -> tuple[View, ...]:
    """All views of a square that is cut in so many parts along each side: the whole, then its parts row by row.

    Source: encode_image of the released accessory/model/LLM/llama_ens5.py and llama_ens10.py.
    """
    locals_ = [View(column, row, parts) for row in range(parts) for column in range(parts)]
    return (GLOBAL, *(locals_ if parts > 1 else []))


def place(width: int, height: int, padding: str) -> tuple[int, int]:
    """Left and top of a picture in the square that it is padded to.

    Source: PadToSquare of the released accessory/data/transform.py (centre).
    """
    side = max(width, height)
    return ((side - width) // 2, (side - height) // 2) if padding == "centre" else (0, 0)


def is_shown(view: View, width: int, height: int, padding: str) -> bool:
    """Whether a view holds any pixel of a picture of this size. Whole numbers only, so it is exact."""
    side = max(width, height)
    spans = zip(place(width, height, padding), (width, height), (view.column, view.row), strict=True)
    return all(at * view.parts < (part + 1) * side and (at + size) * view.parts > part * side
               for at, size, part in spans)  # fmt: skip


def encoded_views(width: int, height: int, vision: VisionConfig) -> tuple[int, ...]:
    """Numbers of the views of a picture that are encoded; the global one, 0, is always among them.

    Source: SPHINX-X, arXiv:2402.05935, section 3.1: a fully padded sub-image is a learnable skip token.
    """
    if not vision.has_skip_token:
        return _ALL[vision.views]
    return _encoded_views(width, height, vision.parts, vision.padding)


_ALL = {views: tuple(range(views)) for views in PARTS}


@lru_cache(maxsize=4096)
def _encoded_views(width: int, height: int, parts: int, padding: str) -> tuple[int, ...]:
    views = views_of(parts)
    return tuple(number for number, view in enumerate(views) if is_shown(view, width, height, padding))


def image_positions(encoded: int, vision: VisionConfig) -> int:
    """Positions that an image takes in the sequence: the blocks of its encoded views, one for each skipped one."""
    return encoded * vision.tokens_per_view + vision.views - encoded
