"""Make conversations about pages from PDFs: each page an image, and the texts on it with their boxes.

Source: the OCR data of SPHINX-X, arXiv:2402.05935, section 3.2. PyMuPDF gives the pages and the texts; here texts are
checked for what cannot be read, and what a PDF splits is merged:

* Pieces of one line, such as single words, are one where the gap is under one and a half times their size.
* Lines of a block are one text where each is below the one before and of about its size; a block is what MuPDF takes
  for a paragraph, so a text never goes on in another column. The cells of a table's column may become one text.
* A line that ends in a hyphen goes on without a space; the hyphen goes away where a letter is before it and a small
  letter behind it. So "well-" and "known" become "wellknown": without a dictionary nobody knows.
* Lines that are not horizontal stay by themselves.
"""

import hashlib
import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import hypot
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_sphinx.data.files import remove_partial, renamed, state_of
from megatron_sphinx.data.shuffle import key_of
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.paths import files_in
from megatron_sphinx.prepare.boxes import Box, clip_box, format_box
from megatron_sphinx.prepare.tasks import PROMPTS, Conversation, conversation
from megatron_sphinx.prepare.workers import Report, in_parallel, write_json

READ_PAGE = "Read the texts of this page in order."
READ_REGION = "Read the text in the region {box}."
FIND_TEXT = 'Where is the text "{text}"? Give its bounding box.'

SOFT_HYPHEN = "\u00ad"
_HYPHENS = ("-", "\u2010", SOFT_HYPHEN)
_NOT_TEXT = {
    "Cc": "control character",
    "Cn": "unassigned character",
    "Co": "private-use character",
    "Cs": "lone surrogate",
}
_GLYPH_NUMBER = re.compile(r"\(cid:\d+\)")  # what some programs write for a character they do not know
_MOST_GAP = 1.5  # between pieces of one line, in their size
_MOST_GROWTH = 1.2  # of the letters from one line of a text to the next, or back
_SLACK = 0.003  # of boxes, in the page's longest side: fonts are higher than their lines may be


@dataclass(frozen=True)
class Text:
    """A text on a page.

    Attributes:
        text: what it says.
        box: left, top, right and bottom, in pixels of the page's image.
    """

    text: str
    box: Box


@dataclass(frozen=True)
class Page:
    """A page of a document.

    Attributes:
        number: counted from 1.
        image: of the whole page.
        texts: in reading order.
    """

    number: int
    image: Image.Image
    texts: Sequence[Text]


@dataclass(frozen=True)
class Line:
    """A line of a text, or a piece of one.

    Attributes:
        text: what it says.
        box: left, top, right and bottom, in any unit.
        size: of its letters, in that unit.
        is_level: whether it is horizontal.
    """

    text: str
    box: Box
    size: float
    is_level: bool = True


@dataclass(frozen=True)
class Settings:
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
    """A text as it can be learnt: in NFC, single spaces, no soft hyphens.

    Raises:
        DataError: it holds a character that stands for none.
    """
    if mark := _GLYPH_NUMBER.search(text):
        raise DataError(f"glyph without a character: {mark[0]}")
    for character in text:
        if character == "\ufffd":
            raise DataError("replacement character: U+FFFD")
        kind = _NOT_TEXT.get(unicodedata.category(character))
        if kind and character not in "\t\n\r":
            raise DataError(f"{kind}: U+{ord(character):04X}")
    return " ".join(unicodedata.normalize("NFC", text).replace(SOFT_HYPHEN, "").split())


def join_lines(lines: Sequence[str]) -> str:
    """The text of several lines, hyphens at their ends as the module says."""
    text = lines[0].strip()
    for line in map(str.strip, lines[1:]):
        if text.endswith(_HYPHENS):
            is_split = len(text) > 1 and text[-2].isalpha() and line[:1].islower()
            text = (text[:-1] if is_split else text) + line
        else:
            text = f"{text} {line}"
    return text


def merge_lines(lines: Sequence[Line]) -> list[Line]:
    """The texts of a block, merged as the module says; in the order of their first lines.

    Args:
        lines: of one block, pieces of one line from left to right.
    """
    whole: list[Line] = []
    for line in lines:
        if whole and _is_beside(whole[-1], line):
            whole[-1] = _union([whole[-1], line], f"{whole[-1].text} {line.text}")
        else:
            whole.append(line)
    texts: list[list[Line]] = []
    for line in whole:
        above = next((text for text in texts if _is_below(text[-1], line)), None)
        if above is None:
            texts.append([line])
        else:
            above.append(line)
    return [_union(text, join_lines([line.text for line in text])) for text in texts]


def _union(lines: Sequence[Line], text: str) -> Line:
    left, top, right, bottom = zip(*(line.box for line in lines), strict=True)
    return Line(text, (min(left), min(top), max(right), max(bottom)), lines[0].size, lines[0].is_level)


def _rise(first: Line, second: Line) -> float:
    """How much lower the middle of the second is, in the height of the lower of them."""
    heights = [line.box[3] - line.box[1] for line in (first, second)]
    return (sum(second.box[1::2]) - sum(first.box[1::2])) / 2 / max(min(heights), 1e-6)


def _is_beside(first: Line, second: Line) -> bool:
    """Whether the second is the next piece of the same line."""
    gap = (second.box[0] - first.box[2]) / max(first.size, second.size)
    return first.is_level and second.is_level and abs(_rise(first, second)) < 0.5 and -0.5 < gap < _MOST_GAP


def _is_below(first: Line, second: Line) -> bool:
    """Whether the second is the next line of the same text."""
    sizes = max(first.size, second.size) / max(min(first.size, second.size), 1e-6)
    overlap = min(first.box[2], second.box[2]) - max(first.box[0], second.box[0])
    is_near = overlap > 0 and sizes <= _MOST_GROWTH and _rise(first, second) >= 0.5
    return first.is_level and second.is_level and is_near


def reading_order(boxes: Sequence[Box], slack: float) -> list[int]:
    """In which order boxes are read: bands of the page downwards, in each its columns from left to right.

    Bands have a gap between them that goes through the whole page. Two are one where that leaves the number of columns
    as it is, as paragraphs of two columns may end side by side.

    Args:
        boxes: in any order.
        slack: how far boxes may reach into each other where there is a gap all the same.

    Source: the XY-cut of G. Nagy and S. Seth, "Hierarchical representation of optically scanned documents", 1984.
    """
    return _order(boxes, range(len(boxes)), slack)


def _order(boxes: Sequence[Box], places: Sequence[int], slack: float) -> list[int]:
    def columns(band: Sequence[int]) -> int:
        return len(_divide(boxes, band, 0, slack))

    bands: list[list[int]] = []
    for band in _divide(boxes, places, 1, slack):
        if bands and 1 < columns(bands[-1] + band) <= max(columns(bands[-1]), columns(band)):
            bands[-1] += band
        else:
            bands.append(band)
    parts = bands if len(bands) > 1 else _divide(boxes, places, 0, slack)
    if len(parts) == 1:
        return sorted(places, key=lambda place: (boxes[place][1], boxes[place][0]))
    return [place for part in parts for place in _order(boxes, part, slack)]


def _divide(boxes: Sequence[Box], places: Sequence[int], axis: int, slack: float) -> list[list[int]]:
    """Boxes divided where there are gaps from left to right (axis 0) or downwards (1)."""
    parts: list[list[int]] = []
    reached = 0.0
    for place in sorted(places, key=lambda place: boxes[place][axis]):
        if parts and boxes[place][axis] < reached - slack:
            parts[-1].append(place)
        else:
            parts.append([place])
        reached = max(reached, boxes[place][axis + 2])
    return parts


def read_pages(path: Path, settings: Settings, leave_out: Callable[[int | None, str], None]) -> Iterator[Page]:
    """The pages of a PDF that can be used, in their order.

    Args:
        path: of the PDF.
        settings: how pages are rendered and checked.
        leave_out: told number and reason for each page that is left out; no number where all of them are.

    Raises:
        ConfigError: PyMuPDF is not installed.
    """
    pymupdf = _pymupdf()
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
            except Exception as error:  # as above
                leave_out(number, f"broken: {error}")
    return None


def _pymupdf() -> Any:
    """PyMuPDF, silent.

    Raises:
        ConfigError: it is not installed.
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


def _read_page(pymupdf: Any, page: Any, number: int, settings: Settings) -> Page:
    """A page with its texts.

    Raises:
        DataError: why it is left out.
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
    return Page(number, image, [texts[place] for place in order])


def _texts(pymupdf: Any, page: Any, scaled: Any) -> tuple[list[Text], list[str]]:
    """The texts on a page, and the reasons why others are refused."""
    width, height = page.rect.width * scaled.a, page.rect.height * scaled.d
    to_pixels = page.rotation_matrix * scaled  # places of texts are those before the page is rotated
    texts, refused = [], []
    for block in page.get_text("dict", flags=pymupdf.TEXT_PRESERVE_WHITESPACE)["blocks"]:
        for line in merge_lines(_lines(pymupdf, block, to_pixels)):
            try:
                box = clip_box(line.box, width, height)
            except DataError:  # not on the page
                continue
            try:
                texts.append(Text(clean(line.text), box))
            except DataError as error:
                refused.append(str(error))
    return [text for text in texts if text.text], refused


def _lines(pymupdf: Any, block: dict[str, Any], to_pixels: Any) -> list[Line]:
    """The lines of a block that say something."""
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
            lines.append(Line(text, tuple(box * to_pixels), size, right > 100 * abs(down)))
    return lines


def dialog(image: str, page: Page, settings: Settings) -> Conversation:
    """A conversation about a page.

    It has 1 to `most_turns` questions; how many and which follows from the image's path. Their kinds are, each once
    before one comes again: all texts with boxes, all texts in order, the text in a region, the box of a text. A region
    or a text is asked for only where no other on the page reads the same.

    Args:
        image: path of the page's image, as the conversation has it.
        page: with its texts.
        settings: how pages become conversations.
    """
    boxes = [format_box(text.box, *page.image.size, settings.padding) for text in page.texts]
    pairs = [(text.text, box) for text, box in zip(page.texts, boxes, strict=True)]
    texts_like, boxes_like = Counter(text for text, _ in pairs), Counter(boxes)
    single = [(text, box) for text, box in pairs if texts_like[text] == boxes_like[box] == 1]
    kinds = [
        [(PROMPTS["ocr"], " ".join(text + box for text, box in pairs))],
        [(READ_PAGE, "\n".join(text for text, _ in pairs))],
        [(READ_REGION.format(box=box), text) for text, box in single],
        [(FIND_TEXT.format(text=text), box) for text, box in single],
    ]
    if single and sum(len(text) for text, _ in pairs) > settings.most_characters:
        kinds = kinds[2:]
    ranked = [
        (place, key_of(image, number), turn)
        for number, kind in enumerate(kinds)
        for place, turn in enumerate(sorted(kind, key=lambda turn: key_of(image, *turn)))
    ]
    turns = 1 + key_of(image, "turns") % settings.most_turns
    return conversation(image, [turn for _, _, turn in sorted(ranked)[:turns]])


def find_documents(sources: Sequence[Path], *, follow_links: bool = False) -> dict[str, Path]:
    """PDFs by their names: of one in a folder its path there, of a file its own, without the ending.

    Args:
        sources: PDFs, and folders that hold some.
        follow_links: whether links in these folders may lead out of them.

    Raises:
        DataError: a source is missing, there is no PDF, two have the same name, or one has a name that no folder can
            have; or a link leads out of a folder, and links are not followed.
    """
    found: dict[str, Path] = {}
    for source in sources:
        if not source.exists():
            raise DataError(f"{source}: no such file or folder; check its path")
        for path in files_in(source, ("pdf",), follow_links=follow_links) if source.is_dir() else [source]:
            name = path.relative_to(source if source.is_dir() else source.parent).with_suffix("").as_posix()
            if {".", ".."} & set(name.split("/")):  # of ..pdf and ...pdf
                raise DataError(f"{path}: its images would lie in a folder {name!r}; rename it")
            if name in found:
                raise DataError(f"{path}: has the name of {found[name]}; rename it, or give the folder of both")
            found[name] = path
    if not found:
        raise DataError(f"{', '.join(map(str, sources[:3]))}: no PDF in there; give files, or folders that hold some")
    return found


def write_documents(
    documents: dict[str, Path], target: Path, settings: Settings, *, workers: int = 1, show: bool = False
) -> Report:
    """Write the images of pages and a conversation about each.

    `target` gets `images/<document>/<page>.png`, `conversations.jsonl`, and `quarantine.jsonl` with document, page and
    reason of what is left out. What is done is kept in `.parts` until all is: killed, this goes on where it was.

    Args:
        documents: PDFs by their names.
        target: folder.
        settings: how they become conversations.
        workers: processes at a time.
        show: whether to show progress.

    Returns:
        How many pages were taken, and how many not, by reason.

    Raises:
        ConfigError: PyMuPDF is not installed.
        DataError: a document is missing, or no page is left.
    """
    _pymupdf()
    parts = target / ".parts"
    parts.mkdir(parents=True, exist_ok=True)
    (target / "conversations.jsonl").unlink(missing_ok=True)
    for used in (target, parts):
        remove_partial(used)
    work = partial(_write_document, target=target, settings=settings)
    done = list(in_parallel(work, list(documents.items()), workers=workers, what="document", show=show))
    report = Report()
    with renamed(target / "conversations.jsonl") as whole, whole.open("w") as conversations:
        with renamed(target / "quarantine.jsonl") as left_out, left_out.open("w") as quarantine:
            for part in done:
                about = json.loads(part.read_text())
                conversations.writelines(json.dumps(line) + "\n" for line in about["conversations"])
                quarantine.writelines(json.dumps(line) + "\n" for line in about["quarantine"])
                report.taken += len(about["conversations"])
                report.reject(about["quarantine"])
        if not report.taken:
            raise DataError(f"{target}: no page can be used{report.why()}; see quarantine.jsonl")
    shutil.rmtree(parts)
    return report


def _write_document(document: tuple[str, Path], *, target: Path, settings: Settings) -> Path:
    """Write the images of a document and a file with its conversations, if that is not there yet."""
    name, path = document
    try:
        state = state_of(str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its path") from error
    mark = hashlib.sha256(repr((name, state, settings)).encode()).hexdigest()
    part = target / ".parts" / f"{mark[:24]}.json"
    if part.is_file():
        return part
    folder = target / "images" / name
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("*.png"):
        earlier.unlink()
    conversations: list[Conversation] = []
    quarantine: list[dict[str, Any]] = []

    def leave_out(page: int | None, reason: str) -> None:
        quarantine.append({"document": str(path), "page": page, "reason": reason})

    for page in read_pages(path, settings, leave_out):
        image = folder / f"{page.number:05d}.png"
        page.image.save(image)
        conversations.append(dialog(str(image.relative_to(target)), page, settings))
    write_json(part, {"conversations": conversations, "quarantine": quarantine})
    return part
