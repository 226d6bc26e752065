"""The pages of PDFs: each as an image, and the texts on it with their boxes. PyMuPDF reads them.

Texts are checked for what cannot be read: a font without a map to Unicode gives glyph numbers or private characters.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.prepare.boxes import Box, clip_box
from megatron_sphinx.prepare.lines import SOFT_HYPHEN, TextLine, merge_lines, reading_order

_NOT_TEXT = {
    "Cc": "control character",
    "Cn": "unassigned character",
    "Co": "private-use character",
    "Cs": "lone surrogate",
}
_GLYPH_NUMBER = re.compile(r"\(cid:\d+\)")  # what some programs write for a character they do not know
_SLACK = 0.003  # of boxes, in the page's longest side: fonts are higher than their lines may be


@dataclass(frozen=True)
class PageText:
    """A text on a page.

    Attributes:
        text: what it says.
        box: left, top, right and bottom, in pixels of the page's image.
    """

    text: str
    box: Box


@dataclass(frozen=True)
class DocumentPage:
    """A page of a document.

    Attributes:
        number: counted from 1.
        image: of the whole page.
        texts: in reading order.
    """

    number: int
    image: Image.Image
    texts: Sequence[PageText]


@dataclass(frozen=True)
class DocumentSettings:
    """How documents become conversations.

    Attributes:
        pixels: longest side of a page's image.
        padding: where a page is in its square, `centre` or `corner`; boxes are fractions of the square.
        most_pages: pages of a document, from its first; those behind them are not looked at.
        most_refused: share of a page's texts that may be refused by `clean`; else the page is left out.
        most_turns: questions of a dialog.
        most_characters: of a page whose texts are asked for all at once.
    """

    pixels: int = 1024
    padding: str = "centre"
    most_pages: int = 100
    most_refused: float = 0.1
    most_turns: int = 4
    most_characters: int = 4000

    def __post_init__(self) -> None:
        for name in ("pixels", "most_pages", "most_turns"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)}: is too few; give 1 or more")


def clean(text: str) -> str:
    """Return a text as it can be learnt: in NFC, with single spaces, without soft hyphens.

    Raises:
        DataError: the text holds a character that stands for none.
    """
    if glyph := _GLYPH_NUMBER.search(text):
        raise DataError(f"glyph without a character: {glyph[0]}")
    for character in text:
        if character == "\ufffd":
            raise DataError("replacement character: U+FFFD")
        kind = _NOT_TEXT.get(unicodedata.category(character))
        if kind and character not in "\t\n\r":
            raise DataError(f"{kind}: U+{ord(character):04X}")
    return " ".join(unicodedata.normalize("NFC", text).replace(SOFT_HYPHEN, "").split())


def read_pages(
    path: Path, settings: DocumentSettings, leave_out: Callable[[int | None, str], None]
) -> Iterator[DocumentPage]:
    """Yield the pages of a PDF that can be used, in their order.

    Args:
        path: of the PDF.
        settings: how pages are rendered and checked.
        leave_out: told number and reason for each page that is left out; no number where all of them are.

    Raises:
        ConfigError: PyMuPDF is not installed.
    """
    pymupdf = import_pymupdf()
    try:
        document = pymupdf.open(path, filetype="pdf")
        pages = document.page_count
    except Exception as error:  # PyMuPDF raises what it meets in damaged bytes
        return leave_out(None, f"broken: {error}")
    with document:
        if document.needs_pass:
            return leave_out(None, "encrypted: it needs a password")
        for number in range(1, 1 + min(pages, settings.most_pages)):
            try:
                yield _read_page(pymupdf, document[number - 1], number, settings)
            except DataError as error:
                leave_out(number, str(error))
            except Exception as error:  # PyMuPDF raises what it meets in damaged bytes
                leave_out(number, f"broken: {error}")
    return None


def import_pymupdf() -> Any:
    """Import PyMuPDF, and silence it: MuPDF prints every fault of a PDF, while we list what is left out.

    Raises:
        ConfigError: PyMuPDF is not installed.
    """
    try:
        import pymupdf
    except ImportError as error:
        raise ConfigError(
            "documents: PDFs are read by PyMuPDF, which is not installed; pip install 'megatron-sphinx[ocr]'"
        ) from error
    pymupdf.TOOLS.mupdf_display_errors(False)
    pymupdf.TOOLS.mupdf_display_warnings(False)
    return pymupdf


def _read_page(pymupdf: Any, page: Any, number: int, settings: DocumentSettings) -> DocumentPage:
    """Render a page, and read its texts.

    Raises:
        DataError: why the page is left out.
    """
    zoom = settings.pixels / max(page.rect.width, page.rect.height)
    scaled = pymupdf.Matrix(zoom, zoom)
    texts, refused = _texts(pymupdf, page, scaled)
    if refused and len(refused) > settings.most_refused * (len(texts) + len(refused)):
        raise DataError(f"bad Unicode: {len(refused)} of {len(texts) + len(refused)} texts, the first: {refused[0]}")
    if not texts:
        raise DataError("no text: perhaps it is a scan")
    pixels = page.get_pixmap(matrix=scaled, alpha=False)
    image = Image.frombytes("RGB", (pixels.width, pixels.height), pixels.samples)
    order = reading_order([text.box for text in texts], _SLACK * settings.pixels)
    return DocumentPage(number, image, [texts[index] for index in order])


def _texts(pymupdf: Any, page: Any, scaled: Any) -> tuple[list[PageText], list[str]]:
    """Return the texts on a page, and the reasons why others are refused."""
    width, height = page.rect.width * scaled.a, page.rect.height * scaled.d
    to_pixels = page.rotation_matrix * scaled  # PyMuPDF gives places of texts as before the page is rotated
    texts, refused = [], []
    for block in page.get_text("dict", flags=pymupdf.TEXT_PRESERVE_WHITESPACE)["blocks"]:
        for line in merge_lines(_lines(pymupdf, block, to_pixels)):
            try:
                box = clip_box(line.box, width, height)
            except DataError:  # not on the page
                continue
            try:
                texts.append(PageText(clean(line.text), box))
            except DataError as error:
                refused.append(str(error))
    return [text for text in texts if text.text], refused


def _lines(pymupdf: Any, block: dict[str, Any], to_pixels: Any) -> list[TextLine]:
    """Return the lines of a block that say something, in pixels."""
    lines = []
    for line in block.get("lines", ()):
        spans = [span for span in line["spans"] if span["text"].strip()]
        if spans:
            box = pymupdf.Rect(spans[0]["bbox"])
            for span in spans[1:]:
                box |= pymupdf.Rect(span["bbox"])
            x, y = line["dir"]
            right, down = x * to_pixels.a + y * to_pixels.c, x * to_pixels.b + y * to_pixels.d
            size = max(span["size"] for span in spans) * hypot(right, down)
            text = "".join(span["text"] for span in line["spans"]).strip()
            lines.append(TextLine(text, tuple(box * to_pixels), size, right > 100 * abs(down)))
    return lines
