"""What a page of a PDF does not show is not asked for: text that is white, covered, clipped, invisible or too small."""

import json

import pytest
from test_pdf import pages_of

from megatron_sphinx.prepare.documents import find_documents, write_documents
from megatron_sphinx.prepare.pdf import DocumentSettings


@pytest.fixture
def pymupdf():
    return pytest.importorskip("pymupdf", reason="PyMuPDF is not installed: pip install 'megatron-sphinx[ocr]'")


def white(pymupdf, page):
    page.insert_text((40, 250), "not to be seen", fontsize=16, color=(1, 1, 1))


def of_the_ground(pymupdf, page):
    page.draw_rect(pymupdf.Rect(30, 230, 280, 260), color=(0.8, 0.3, 0.1), fill=(0.8, 0.3, 0.1))
    page.insert_text((40, 250), "not to be seen", fontsize=16, color=(0.8, 0.3, 0.1))


def almost_white(pymupdf, page):
    page.insert_text((40, 250), "not to be seen", fontsize=16, color=(0.97, 0.97, 0.97))


def covered(pymupdf, page):
    page.insert_text((40, 250), "not to be seen", fontsize=16)
    page.draw_rect(pymupdf.Rect(30, 230, 280, 260), color=(0, 0, 0), fill=(0, 0, 0))


def covered_by_a_picture(pymupdf, page):
    page.insert_text((40, 250), "not to be seen", fontsize=16)
    grey = pymupdf.Pixmap(pymupdf.csRGB, pymupdf.IRect(0, 0, 9, 9), False)
    grey.clear_with(200)
    page.insert_image(pymupdf.Rect(30, 230, 280, 260), pixmap=grey, keep_proportion=False)


def covered_by_an_annotation(pymupdf, page):
    page.insert_text((40, 250), "not to be seen", fontsize=16)
    note = page.add_rect_annot(pymupdf.Rect(30, 230, 280, 260))
    note.set_colors(stroke=(0, 0, 0), fill=(0, 0, 0))
    note.update()


def never_drawn(pymupdf, page):
    page.insert_text((40, 250), "not to be seen", fontsize=16, render_mode=3)


def never_drawn_over_a_scan(pymupdf, page):
    scan = pymupdf.open()
    scan.new_page(width=300, height=40).insert_text((40, 20), "not to be seen", fontsize=16)
    page.insert_image(pymupdf.Rect(0, 230, 300, 270), pixmap=scan[0].get_pixmap(dpi=150))
    page.insert_text((40, 250), "not to be seen", fontsize=16, render_mode=3)


def transparent(pymupdf, page):
    page.insert_text((40, 250), "not to be seen", fontsize=16, fill_opacity=0, stroke_opacity=0)


def clipped(pymupdf, page):
    page.insert_text((40, 250), "not to be seen", fontsize=16)
    document = page.parent
    contents = document.xref_stream(page.get_contents()[-1])
    document.update_stream(page.get_contents()[-1], b"q 0 300 300 100 re W n " + contents + b" Q")


def of_a_layer(pymupdf, page):
    layer = page.parent.add_ocg("layer", on=False)
    page.insert_text((40, 250), "not to be seen", fontsize=16, oc=layer)


def outside(pymupdf, page):
    page.insert_text((40, 450), "not to be seen", fontsize=16)


def tiny(pymupdf, page):
    page.insert_text((40, 250), "not to be seen", fontsize=1)


HIDDEN = [white, of_the_ground, almost_white, covered, covered_by_a_picture, covered_by_an_annotation, never_drawn,
          never_drawn_over_a_scan, transparent, clipped, of_a_layer, outside, tiny]  # fmt: skip


@pytest.mark.parametrize("turn", [0, 90])
@pytest.mark.parametrize("hide", HIDDEN, ids=lambda hide: hide.__name__)
def test_text_that_a_page_does_not_show_is_not_asked_for(pymupdf, tmp_path, hide, turn):
    document = pymupdf.open()
    page = document.new_page(width=300, height=400)
    page.insert_text((40, 80), "Shown on the page", fontsize=16)
    hide(pymupdf, page)
    page.set_rotation(turn)
    document.save(tmp_path / "a.pdf")
    (page,), left_out = pages_of(tmp_path / "a.pdf", pixels=600)
    assert ([text.text for text in page.texts], left_out) == (["Shown on the page"], [])
    report = write_documents(find_documents([tmp_path]), tmp_path / "out", DocumentSettings())
    assert (report.inputs, report.taken, report.rejected) == (1, 1, {})
    for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines():  # where the text was noticed at all
        assert json.loads(line)["reason"].startswith(
            "kept: without 0 texts of bad Unicode and 1 lines that are not all"
        )


def test_text_that_a_page_shows_is_asked_for(pymupdf, tmp_path):
    """In grey, in white on black, over a picture, in a form, and in an annotation."""
    document = pymupdf.open()
    page = document.new_page(width=300, height=400)
    page.insert_text((40, 60), "grey. and, thin: il|", fontsize=8, color=(0.7, 0.7, 0.7))
    page.draw_rect(pymupdf.Rect(30, 80, 280, 120), fill=(0, 0, 0))
    page.insert_text((40, 105), "white on black", fontsize=16, color=(1, 1, 1))
    field = pymupdf.Widget()
    is_what = {"field_name": "n", "field_type": pymupdf.PDF_WIDGET_TYPE_TEXT, "text_fontsize": 14}
    for name, value in {**is_what, "rect": pymupdf.Rect(40, 200, 260, 230), "field_value": "filled in by hand"}.items():
        setattr(field, name, value)
    page.add_widget(field)
    page.add_freetext_annot(pymupdf.Rect(40, 300, 260, 330), "a remark", fontsize=14)
    document.save(tmp_path / "a.pdf")
    (page,), left_out = pages_of(tmp_path / "a.pdf", pixels=600)
    assert [text.text for text in page.texts] == [
        "grey. and, thin: il|", "white on black", "filled in by hand", "a remark"
    ]  # fmt: skip
    assert (page.hidden, left_out) == (0, [])


def test_of_a_line_the_words_that_are_shown_are_asked_for(pymupdf, tmp_path):
    document = pymupdf.open()
    page = document.new_page(width=300, height=100)
    page.insert_text((20, 50), "Paid to somebody today", fontsize=16)
    place = page.search_for("somebody")[0]
    page.draw_rect(place, fill=(0, 0, 0))
    document.save(tmp_path / "a.pdf")
    (page,), _ = pages_of(tmp_path / "a.pdf", pixels=600)
    assert [text.text for text in page.texts] == ["Paid to today"]
    assert page.hidden == 1


def test_a_page_of_which_nothing_is_shown_says_so(pymupdf, tmp_path):
    document = pymupdf.open()
    white(pymupdf, document.new_page(width=300, height=400))
    document.save(tmp_path / "a.pdf")
    why = "no text: 1 lines are in it, but its image does not show them, or too small to be read"
    assert pages_of(tmp_path / "a.pdf") == ([], [(1, why)])
