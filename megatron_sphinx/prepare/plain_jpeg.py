"""The size of a JPEG with nothing unusual in it, in a fraction of the time that Pillow takes; others are Pillow's.

What is read here is what Pillow's JpegImagePlugin reads, and never more than that takes: no EXIF, no colour profile.
"""

from megatron_sphinx.data.images import MOST_PIXELS, Shape

_SCAN, _TABLES = 0xDA, 0xDB
_FRAMES = (0xC0, 0xC2)  # baseline, progressive
_LEAST = {0xE0: 16, 0xEE: 14, 0xFE: 2, 0xC4: 2, 0xDD: 2}  # of JFIF, Adobe, comment, Huffman tables, restarts: bytes
_TABLE_BYTES = 65  # one of precision, then 64 coefficients
_LEAST_SIDE = 2


def shape_of(content: bytes) -> Shape | None:
    """Return the size of a plain JPEG, which is upright; None where Pillow should say what it is.

    Args:
        content: of the file.
    """
    if content[:2] != b"\xff\xd8":
        return None
    at, shape, size = 2, None, len(content)
    while at + 4 <= size and content[at] == 0xFF:
        marker, length = content[at + 1], content[at + 2] << 8 | content[at + 3]
        end = at + 2 + length
        if length < _LEAST.get(marker, 2) or end > size:
            return None
        if marker == _SCAN:
            return shape
        if marker in _FRAMES:
            if shape is not None or (shape := _frame(content[at + 4 : end])) is None:
                return None
        elif marker == _TABLES:
            if (length - 2) % _TABLE_BYTES or max(content[at + 4 : end : _TABLE_BYTES], default=0) > 0x0F:
                return None
        elif marker not in _LEAST:
            return None
        at = end
    return None


def _frame(header: bytes) -> Shape | None:
    """Return the size that the header of a frame tells; None where it is not one of 8 bits, grey or in colour."""
    if len(header) < 6 or header[0] != 8 or header[5] not in (1, 3) or len(header) != 6 + 3 * header[5]:
        return None
    height, width = header[1] << 8 | header[2], header[3] << 8 | header[4]
    if min(width, height) < _LEAST_SIDE or max(width, height) ** 2 > MOST_PIXELS:
        return None
    return Shape(width, height)
