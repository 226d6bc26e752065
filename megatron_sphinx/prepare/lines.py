"""The lines of a page put together again: what a PDF splits is merged to texts, and texts come in reading order.

* Pieces of one line, such as single words, are one where the gap is under one and a half times their size.
* Lines of a block are one text where each is below the one before and of about its size; a block is what MuPDF takes
  for a paragraph, so a text never goes on in another column. The cells of a table's column may become one text.
* A line that ends in a hyphen goes on without a space; the hyphen goes away where a letter is before it and a small
  letter behind it. So "well-" and "known" become "wellknown": without a dictionary nobody knows.
* Lines that are not horizontal stay by themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sphinx.prepare.boxes import Box

SOFT_HYPHEN = "\u00ad"
_HYPHENS = ("-", "\u2010", SOFT_HYPHEN)
_MOST_GAP = 1.5  # between pieces of one line, in their size
_MOST_GROWTH = 1.2  # of the letters from one line of a text to the next, or back


@dataclass(frozen=True)
class TextLine:
    """A line of a text, or a piece of one.

    Attributes:
        text: what the line says.
        box: left, top, right and bottom, in any unit.
        size: of its letters, in that unit.
        is_level: whether it is horizontal.
    """

    text: str
    box: Box
    size: float
    is_level: bool = True


def join_lines(lines: Sequence[str]) -> str:
    """Return several lines as one text; the head of this module says what becomes of hyphens at their ends."""
    text = lines[0].strip()
    for line in map(str.strip, lines[1:]):
        if text.endswith(_HYPHENS):
            is_split = len(text) > 1 and text[-2].isalpha() and line[:1].islower()
            text = (text[:-1] if is_split else text) + line
        else:
            text = f"{text} {line}"
    return text


def merge_lines(lines: Sequence[TextLine]) -> list[TextLine]:
    """Merge the lines of a block to its texts; the head of this module has the rules.

    Args:
        lines: of one block, pieces of one line from left to right.

    Returns:
        The texts, in the order of their first lines.
    """
    whole: list[TextLine] = []
    for line in lines:
        if whole and _is_beside(whole[-1], line):
            whole[-1] = _union([whole[-1], line], f"{whole[-1].text} {line.text}")
        else:
            whole.append(line)
    texts: list[list[TextLine]] = []
    for line in whole:
        above = next((text for text in texts if _is_below(text[-1], line)), None)
        if above is None:
            texts.append([line])
        else:
            above.append(line)
    return [_union(text, join_lines([line.text for line in text])) for text in texts]


def _union(lines: Sequence[TextLine], text: str) -> TextLine:
    """Return a line that says `text` in the box around several lines; its size is that of the first."""
    left, top, right, bottom = zip(*(line.box for line in lines), strict=True)
    return TextLine(text, (min(left), min(top), max(right), max(bottom)), lines[0].size, lines[0].is_level)


def _rise(first: TextLine, second: TextLine) -> float:
    """Return how much lower the middle of the second line is, in the height of the lower of the two lines."""
    heights = [line.box[3] - line.box[1] for line in (first, second)]
    return (sum(second.box[1::2]) - sum(first.box[1::2])) / 2 / max(min(heights), 1e-6)


def _is_beside(first: TextLine, second: TextLine) -> bool:
    """Say whether the second is the next piece of the same line."""
    gap = (second.box[0] - first.box[2]) / max(first.size, second.size)
    return first.is_level and second.is_level and abs(_rise(first, second)) < 0.5 and -0.5 < gap < _MOST_GAP


def _is_below(first: TextLine, second: TextLine) -> bool:
    """Say whether the second is the next line of the same text."""
    sizes = max(first.size, second.size) / max(min(first.size, second.size), 1e-6)
    overlap = min(first.box[2], second.box[2]) - max(first.box[0], second.box[0])
    is_near = overlap > 0 and sizes <= _MOST_GROWTH and _rise(first, second) >= 0.5
    return first.is_level and second.is_level and is_near


def reading_order(boxes: Sequence[Box], slack: float) -> list[int]:
    """Return the order in which boxes are read: bands of the page downwards, in each its columns from left to right.

    Bands have a gap between them that goes through the whole page. Two are one where that leaves the number of columns
    as it is, as paragraphs of two columns may end side by side.

    Args:
        boxes: in any order.
        slack: how far boxes may reach into each other where there is a gap all the same.

    Returns:
        Indices into `boxes`.

    Source: the XY-cut of G. Nagy and S. Seth, "Hierarchical representation of optically scanned documents", 1984.
    """
    return _order(boxes, range(len(boxes)), slack)


def _order(boxes: Sequence[Box], indices: Sequence[int], slack: float) -> list[int]:
    """Return some of the boxes in the order in which they are read, by their indices."""

    def columns(band: Sequence[int]) -> int:
        return len(_divide(boxes, band, 0, slack))

    bands: list[list[int]] = []
    for band in _divide(boxes, indices, 1, slack):
        if bands and 1 < columns(bands[-1] + band) <= max(columns(bands[-1]), columns(band)):
            bands[-1] += band
        else:
            bands.append(band)
    groups = bands if len(bands) > 1 else _divide(boxes, indices, 0, slack)
    if len(groups) == 1:
        return sorted(indices, key=lambda index: (boxes[index][1], boxes[index][0]))
    return [index for group in groups for index in _order(boxes, group, slack)]


def _divide(boxes: Sequence[Box], indices: Sequence[int], axis: int, slack: float) -> list[list[int]]:
    """Divide boxes where there are gaps, looking from left to right (axis 0) or downwards (1)."""
    groups: list[list[int]] = []
    end = 0.0
    for index in sorted(indices, key=lambda index: boxes[index][axis]):
        if groups and boxes[index][axis] < end - slack:
            groups[-1].append(index)
        else:
            groups.append([index])
        end = max(end, boxes[index][axis + 2])
    return groups
