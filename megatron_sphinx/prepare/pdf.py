"""The pages of PDFs: each as an image, and the texts on it with their boxes. PyMuPDF reads them.

Texts are checked for what cannot be read: a font without a map to Unicode gives glyph numbers or private characters.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.prepare.boxes import Box, clip_box
from megatron_sphinx.prepare.lines import SOFT_HYPHEN, TextLine, merge_lines, reading_order
from megatron_sphinx.prepare.visible import Ink, shown

_NOT_TEXT = {
    "Cc": "control character",
    "Cn": "unassigned character",
    "Co": "private-use character",
    "Cs": "lone surrogate",
}
_GLYPH_NUMBER = re.compile(r"\(cid:\d+\)")  # what some programs write for a character they do not know
_MOST_PIXELS = 8192  # of a side: three images of a page are in memory
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
        texts: those that the image shows, in reading order.
        refused: how many texts more were refused by `clean`.
        hidden: how many lines the image does not show, or not all of.
    """

    number: int
    image: Image.Image
    texts: Sequence[PageText]
    refused: int = 0
    hidden: int = 0


@dataclass(frozen=True)
class DocumentSettings:
    """How documents become conversations.

    Attributes:
        pixels: longest side of a page's image.
        padding: where a page is in its square, `centre` or `corner`; boxes are fractions of the square.
        most_pages: pages of a document, from its first; those behind them are left out.
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
        if self.pixels > _MOST_PIXELS:
            raise DataError(f"pixels={self.pixels}: is too many; give {_MOST_PIXELS} or fewer")
        if not 0 <= self.most_refused <= 1:
            raise DataError(f"most_refused={self.most_refused:g}: is no share; give 0 to 1")


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


class LeaveOut(Protocol):
    """What is told of pages that are left out."""

    def __call__(self, page: int | None, reason: str, pages: int = 1) -> None:
        """Take note of a page; with no number, of all of them.

        Args:
            page: its number, or that of the first of several.
            reason: why.
            pages: how many there are, as far as it is known.
        """


def read_pages(path: Path, settings: DocumentSettings, leave_out: LeaveOut) -> Iterator[DocumentPage]:
    """Yield the pages of a PDF that can be used, in their order.

    Args:
        path: of the PDF.
        settings: how pages are rendered and checked.
        leave_out: told of each page that is left out.

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
        if not pages:
            return leave_out(None, "no page: it has none")
        with suppress(
            Exception
        ):  # PyMuPDF raises what it meets in damaged bytes; what a form says is then not asked for
            document.bake()  # what annotations and forms show becomes a part of the pages, as other texts are
        for number in range(1, 1 + min(pages, settings.most_pages)):
            try:
                page = _read_page(pymupdf, document[number - 1], number, settings)
            except DataError as error:
                leave_out(number, str(error))
            except Exception as error:  # PyMuPDF raises what it meets in damaged bytes
                leave_out(number, f"broken: {error}")
            else:
                yield page
        if pages > settings.most_pages:
            reason = f"behind page {settings.most_pages}: raise --most-pages to take them"
            leave_out(settings.most_pages + 1, reason, pages - settings.most_pages)
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
    to_pixels = page.rotation_matrix * scaled  # PyMuPDF gives places of texts as before the page is rotated
    blocks = page.get_text("rawdict", flags=pymupdf.TEXT_PRESERVE_WHITESPACE)["blocks"]
    ink = Ink(pymupdf, page, scaled)
    lines = [_lines(pymupdf, block, to_pixels, ink) for block in blocks]
    hidden = sum(count for _, count in lines)
    texts, refused = _texts([line for line, _ in lines], page.rect * scaled)
    if refused and len(refused) > settings.most_refused * (len(texts) + len(refused)):
        raise DataError(f"bad Unicode: {len(refused)} of {len(texts) + len(refused)} texts, the first: {refused[0]}")
    if not texts and hidden:
        raise DataError(f"no text: {hidden} lines are in it, but its image does not show them, or too small to be read")
    if not texts:
        raise DataError("no text: perhaps it is a scan")
    order = reading_order([text.box for text in texts], _SLACK * settings.pixels)
    return DocumentPage(number, ink.image, [texts[index] for index in order], len(refused), hidden)


def _texts(blocks: Sequence[Sequence[TextLine]], page: Any) -> tuple[list[PageText], list[str]]:
    """Return the texts on a page, whose rectangle is given in pixels, and the reasons why others are refused."""
    texts, refused = [], []
    for line in (line for block in blocks for line in merge_lines(block)):
        try:
            box = clip_box(line.box, page.width, page.height)
        except DataError:  # not on the page
            continue
        try:
            texts.append(PageText(clean(line.text), box))
        except DataError as error:
            refused.append(str(error))
    return [text for text in texts if text.text], refused


def _lines(pymupdf: Any, block: dict[str, Any], to_pixels: Any, ink: Ink) -> tuple[list[TextLine], int]:
    """Return the lines of a block that say something, in pixels, and of how many more the page shows not all."""
    lines, hidden = [], 0
    for line in block.get("lines", ()):
        spans = [span for span in line["spans"] if any(letter["c"].strip() for letter in span["chars"])]
        if spans:
            x, y = line["dir"]
            right, down = x * to_pixels.a + y * to_pixels.c, x * to_pixels.b + y * to_pixels.d
            size = max(span["size"] for span in spans) * hypot(right, down)
            letters = [letter for span in line["spans"] for letter in ink.letters(span, to_pixels, pymupdf)]
            seen = shown(letters, size)
            hidden += len(seen) < len(letters)
            text = "".join(letter.text for letter in seen).strip()
            if text:
                boxes = [pymupdf.Rect(letter.box) for letter in seen if letter.text.strip()]
                if len(seen) == len(letters):
                    boxes = [pymupdf.Rect(span["bbox"]) for span in spans]
                box = boxes[0]
                for other in boxes[1:]:
                    box |= other
                lines.append(TextLine(text, tuple(box * to_pixels), size, right > 100 * abs(down)))
    return lines, hidden
