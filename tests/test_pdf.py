"""Pages of PDFs: the texts on them, where they stand and in which order, and what cannot be read."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot, rc_context

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.lines import TextLine, join_lines, merge_lines, reading_order
from megatron_sphinx.prepare.pdf import DocumentPage, DocumentSettings, clean, read_pages

LEFT = ["The first column is inter-", "national and goes on", "for three lines."]
RIGHT = ["The second one is in", "the X-", "Ray room and ends here."]


@pytest.fixture
def pymupdf():
    return pytest.importorskip("pymupdf", reason="PyMuPDF is not installed: pip install 'megatron-sphinx[ocr]'")


def write_pdf(pymupdf, path: Path, *pages: list[tuple[float, float, str, float]]) -> Path:
    """A PDF of 400 x 300 points a page; texts by left end, baseline and size."""
    document = pymupdf.open()
    for texts in pages:
        page = document.new_page(width=400, height=300)
        for x, y, text, size in texts:
            page.insert_text((x, y), text, fontsize=size)
    path.parent.mkdir(parents=True, exist_ok=True)
    document.save(path)
    return path


def columns(number: int = 1) -> list[tuple[float, float, str, float]]:
    """A page with a title over two columns, drawn row by row, and its number below them."""
    rows = [(x, 80 + 14 * row, lines[row], 11) for row in range(3) for x, lines in ((40, LEFT), (220, RIGHT))]
    return [(200, 280, str(number), 9), (40, 40, "A title over both of them", 20), *rows]


def pages_of(path: Path, **settings: object) -> tuple[list[DocumentPage], list[tuple[int | None, str]]]:
    left_out = []
    found = list(read_pages(path, DocumentSettings(**settings), lambda *why: left_out.append(why)))
    return found, left_out


def assert_all_ink_is_in_boxes(page: DocumentPage) -> None:
    """And each box has some: the boxes are where the texts are drawn."""
    ink = np.asarray(page.image).min(2) < 128
    for text in page.texts:
        left, top, right, bottom = (round(side) for side in text.box)
        assert ink[top:bottom, left:right].any(), text
    for text in page.texts:
        left, top, right, bottom = text.box
        ink[int(top) : int(bottom) + 1, max(int(left) - 1, 0) : int(right) + 2] = False
    assert not ink.any()


def test_a_text_is_cleaned():
    assert clean(" cafe\u0301\tof\n the  co\u00adop \U0001f600 ") == "café of the coop \U0001f600"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\ufffdb", "replacement character: U+FFFD"),
        ("a\ue012b", "private-use character: U+E012"),
        ("a\U000f0001b", "private-use character: U+F0001"),
        ("a\u0378b", "unassigned character: U+0378"),
        ("a\uffffb", "unassigned character: U+FFFF"),
        ("a\x07b", "control character: U+0007"),
        ("a\x85b", "control character: U+0085"),
        ("a\ud800b", "lone surrogate: U+D800"),
        ("a(cid:12)b", "glyph without a character: (cid:12)"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(text, reason):
    with pytest.raises(DataError, match=f"^{re.escape(reason)}$"):
        clean(text)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["inter-", "national"], "international"),
        (["inter\u2010 ", " national"], "international"),
        (["inter\u00ad", "national"], "international"),
        (["pre-", "World War"], "pre-World War"),
        (["from 12-", "14"], "from 12-14"),
        (["a -", "b"], "a -b"),
        (["one", "two", "three"], "one two three"),
        (["-", "b"], "-b"),
    ],
)
def test_lines_are_joined(lines, text):
    assert join_lines(lines) == text


def test_what_a_pdf_splits_is_merged():
    def line(text: str, left: float, top: float, right: float, size: float = 10.0, is_level: bool = True) -> TextLine:
        return TextLine(text, (left, top, right, top + size), size, is_level)

    block = [
        line("Words", 0, 0, 30), line("of one", 34, 0, 60), line("line-", 70, 0, 95), line("far away", 120, 0, 160),
        line("up goes on", 0, 11, 50), line("and on", 120, 11, 160), line("Heading", 0, 22, 60, 14.0),
        line("turned", 0, 40, 9, is_level=False), line("again", 0, 50, 9, is_level=False),
    ]  # fmt: skip
    merged = {text.text: text.box for text in merge_lines(block)}
    assert merged == {
        "Words of one lineup goes on": (0, 0, 95, 21), "far away and on": (120, 0, 160, 21), "Heading": (0, 22, 60, 36),
        "turned": (0, 40, 9, 50), "again": (0, 50, 9, 60),
    }  # fmt: skip


def test_columns_are_read_one_after_the_other():
    title, number = (10, 0, 90, 10), (48, 95, 52, 99)
    left = [(0, 12, 45, 30), (0, 35, 45, 60), (0, 62, 44, 90)]  # gaps beside gaps, and one end lower than the other
    right = [(55, 12, 100, 30), (55, 35, 100, 58)]
    wanted = [title, *left, *right, number]
    for shift in range(len(wanted)):
        boxes = wanted[shift:] + wanted[:shift]
        assert [boxes[place] for place in reading_order(boxes, 0.5)] == wanted
    assert reading_order([(0, 9, 10, 20), (0, 0, 10, 10)], 2.0) == [1, 0]
    assert reading_order([], 0.0) == []


def test_texts_and_boxes_are_those_that_were_drawn(pymupdf, tmp_path):
    (page,), left_out = pages_of(write_pdf(pymupdf, tmp_path / "a.pdf", columns()), pixels=800)
    assert (page.number, page.image.size, left_out) == (1, (800, 600), [])
    drawn = {
        "A title over both of them": (40, 40, 20, 1),
        "The first column is international and goes on for three lines.": (40, 80, 11, 3),
        "The second one is in the X-Ray room and ends here.": (220, 80, 11, 3),
        "1": (200, 280, 9, 1),
    }
    assert [text.text for text in page.texts] == list(drawn)
    widths = [[columns()[1][2]], LEFT, RIGHT, ["1"]]
    for text, (x, baseline, size, count), lines in zip(page.texts, drawn.values(), widths, strict=True):
        left, top, right, bottom = (side / 2 for side in text.box)
        assert (left, right) == pytest.approx(
            (x, x + max(pymupdf.get_text_length(line, fontsize=size) for line in lines))
        )
        assert baseline - 1.2 * size < top < baseline - 0.7 * size
        assert 0 < bottom - (baseline + 14 * (count - 1)) < 0.5 * size
    assert_all_ink_is_in_boxes(page)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotated_and_cropped_pages_have_boxes_where_texts_are_seen(pymupdf, tmp_path, turn):
    document = pymupdf.open(write_pdf(pymupdf, tmp_path / "a.pdf", columns()))
    document[0].insert_text((45, 32), "outside of the page")
    document[0].set_cropbox(pymupdf.Rect(30, 50, 400, 300))
    document[0].set_rotation(turn)
    document.save(tmp_path / "b.pdf")
    (page,), _ = pages_of(tmp_path / "b.pdf", pixels=740)
    assert page.image.size == ((740, 500) if turn == 180 else (500, 740))
    assert sum("column" in text.text for text in page.texts) == 1
    assert not any("outside" in text.text for text in page.texts)
    assert_all_ink_is_in_boxes(page)


def test_pages_of_another_program_are_read(pymupdf, tmp_path):
    figure = pyplot.figure(figsize=(4, 3))
    figure.text(0.1, 0.8, "Wörter über\nzwei Zeilen")
    figure.text(0.5, 0.3, "schräg", rotation=45)
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(tmp_path / "a.pdf")
    (page,), _ = pages_of(tmp_path / "a.pdf", pixels=640)
    assert [text.text for text in page.texts] == ["Wörter über zwei Zeilen", "schräg"]
    assert_all_ink_is_in_boxes(page)


def test_documents_and_pages_that_cannot_be_used_say_why(pymupdf, tmp_path):
    whole = write_pdf(pymupdf, tmp_path / "a.pdf", columns(), [], columns(3), columns(4))
    found, left_out = pages_of(whole, most_pages=3)
    assert ([page.number for page in found], left_out) == (
        [1, 3], [(2, "no text: perhaps it is a scan"), (4, "behind page 3: raise --most-pages to take them", 1)]
    )  # fmt: skip
    password = {"encryption": pymupdf.PDF_ENCRYPT_AES_256, "user_pw": "x", "owner_pw": "y"}
    pymupdf.open(whole).save(tmp_path / "encrypted.pdf", **password)
    (tmp_path / "empty.pdf").touch()
    (tmp_path / "text.pdf").write_text("no PDF at all")
    (tmp_path / "cut.pdf").write_bytes(whole.read_bytes()[:300])
    reasons = {name: pages_of(tmp_path / f"{name}.pdf") for name in ("encrypted", "empty", "text", "cut")}
    assert reasons.pop("encrypted") == ([], [(None, "encrypted: it needs a password")])
    for found, left_out in reasons.values():
        assert (found, len(left_out), left_out[0][1][:8]) == ([], 1, "broken: ")
    document = pymupdf.open(whole)
    document.xref_set_key(document.page_xref(0), "MediaBox", "null")
    document.xref_set_key(document.page_xref(0), "Contents", "(no stream)")
    document.save(tmp_path / "page.pdf")
    found, left_out = pages_of(tmp_path / "page.pdf")
    assert [page.number for page in found] == [3, 4]
    assert [number for number, _ in left_out] == [1, 2]


def test_a_page_with_too_much_bad_unicode_is_left_out(pymupdf, tmp_path):
    figure = pyplot.figure(figsize=(4, 3))
    for place in range(4):
        figure.text(0.1, 0.9 - 0.2 * place, f"text {place}")
    figure.text(0.5, 0.1, "\ue000\ue001", fontname="STIXNonUnicode")
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(tmp_path / "a.pdf")
    (page,), left_out = pages_of(tmp_path / "a.pdf", most_refused=0.2)
    assert ([text.text for text in page.texts], left_out) == ([f"text {place}" for place in range(4)], [])
    found, left_out = pages_of(tmp_path / "a.pdf", most_refused=0.19)
    assert found == []
    assert left_out == [(1, "bad Unicode: 1 of 5 texts, the first: private-use character: U+E000")]
