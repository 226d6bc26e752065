"""Conversations about pages of PDFs, and about images with marks: what is made, and what bad input gets."""

import json
import re
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import draw, kill
from matplotlib import pyplot, rc_context
from PIL import Image

from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.prepare import marks as som
from megatron_sphinx.prepare.boxes import parse_boxes, to_pixels
from megatron_sphinx.prepare.documents import (
    FIND_TEXT,
    READ_PAGE,
    Line,
    Page,
    Settings,
    Text,
    clean,
    dialog,
    find_documents,
    join_lines,
    merge_lines,
    read_pages,
    reading_order,
    write_documents,
)
from megatron_sphinx.prepare.marks import (
    COLOURS,
    Mark,
    describe,
    draw_marks,
    mentioned,
    merge_answers,
    place_of,
    write_marks,
)
from megatron_sphinx.prepare.tasks import PROMPTS

TOOLS = Path(__file__).parents[1] / "tools"
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


def pages_of(path: Path, **settings: object) -> tuple[list[Page], list[tuple[int | None, str]]]:
    left_out = []
    found = list(read_pages(path, Settings(**settings), lambda *why: left_out.append(why)))
    return found, left_out


def assert_all_ink_is_in_boxes(page: Page) -> None:
    """And each box has some: the boxes are where the texts are drawn."""
    ink = np.asarray(page.image).min(2) < 128
    for text in page.texts:
        left, top, right, bottom = (round(side) for side in text.box)
        assert ink[top:bottom, left:right].any(), text
    for text in page.texts:
        left, top, right, bottom = text.box
        ink[int(top) : int(bottom) + 1, max(int(left) - 1, 0) : int(right) + 2] = False
    assert not ink.any()


# texts


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
    def line(text: str, left: float, top: float, right: float, size: float = 10.0, is_level: bool = True) -> Line:
        return Line(text, (left, top, right, top + size), size, is_level)

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


# pages


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
    assert ([page.number for page in found], left_out) == ([1, 3], [(2, "no text: perhaps it is a scan")])
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


# dialogs


def test_dialogs_have_every_task_and_follow_from_names():
    image = Image.new("RGB", (200, 100))
    texts = [
        Text(name, (10.0, 20.0 * place, 110.0, 20.0 * place + 10)) for place, name in enumerate(["one", "two", "on"])
    ]
    again = [Text("twice", (150.0, 0.0, 190.0, 10.0)), Text("twice", (150.0, 50.0, 190.0, 60.0))]
    page = Page(1, image, [*texts, *again])
    seen: dict[str, set] = {}
    lengths = set()
    for number in range(200):
        line = dialog(f"images/d{number}.png", page, Settings())
        assert line == dialog(f"images/d{number}.png", page, Settings())
        assert line["image"] == f"images/d{number}.png"
        assert [turn["from"] for turn in line["conversations"]] == ["human", "gpt"] * (len(line["conversations"]) // 2)
        lengths.add(len(line["conversations"]) // 2)
        values = [turn["value"] for turn in line["conversations"]]
        for question, answer in zip(values[::2], values[1::2], strict=True):
            seen.setdefault(question, set()).add(answer)
    assert lengths == {1, 2, 3, 4}
    assert len(seen) == 2 + 2 * 3  # not those for the text that is there twice
    assert seen.pop(READ_PAGE) == {"one\ntwo\non\ntwice\ntwice"}
    (found,) = seen.pop(PROMPTS["ocr"])
    boxes = [to_pixels(box, 200, 100, "centre") for box in parse_boxes(found)]
    assert np.array(boxes) == pytest.approx(np.array([text.box for text in page.texts]))
    assert found.startswith("one[0.05,0.25,0.55,0.30] two[")
    assert seen[FIND_TEXT.format(text="two")] == {"[0.05,0.35,0.55,0.40]"}
    assert seen["Read the text in the region [0.05,0.35,0.55,0.40]."] == {"two"}
    corner = [dialog(f"{number}", page, Settings(padding="corner")) for number in range(20)]
    assert "[0.05,0.10,0.55,0.15]" in json.dumps(corner)
    asked = json.dumps([dialog(f"{number}", page, Settings(most_characters=17)) for number in range(50)])
    assert "region" in asked
    assert READ_PAGE not in asked
    assert READ_PAGE in json.dumps([dialog(f"{number}", page, Settings(most_characters=18)) for number in range(50)])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_tool_end_to_end(pymupdf, tmp_path, run_tool):
    for name in ("a", "b/a", "c"):
        write_pdf(pymupdf, tmp_path / "in" / f"{name}.pdf", columns(), columns(2))
    write_pdf(pymupdf, tmp_path / "in" / "scan.PDF", [])
    (tmp_path / "in" / "b" / "text.pdf").write_text("no PDF at all")
    status, out, _ = run_tool("prepare_ocr.py", tmp_path / "in", tmp_path / "out", "--pixels", "300", "--workers", "2")
    assert status == 0
    assert out.splitlines() == [
        f"{tmp_path / 'out'}: 6 pages of 5 documents", "  left out: 1 (broken)", "  left out: 1 (no text)"
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"images", "conversations.jsonl", "quarantine.jsonl"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "conversations.jsonl").open()]
    assert [line["image"] for line in lines] == [
        f"images/{name}/0000{n}.png" for name in ("a", "b/a", "c") for n in (1, 2)
    ]
    assert all(Image.open(tmp_path / "out" / line["image"]).size == (300, 225) for line in lines)
    left_out = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").open()]
    assert [(line["document"], line["page"]) for line in left_out] == [
        (str(tmp_path / "in" / "b" / "text.pdf"), None), (str(tmp_path / "in" / "scan.PDF"), 1)
    ]  # fmt: skip
    before = tree(tmp_path / "out")
    files = sorted((tmp_path / "in").glob("*.pdf"))
    status, out, _ = run_tool("prepare_ocr.py", *files, tmp_path / "out", "--most-pages", "1", "--workers", "1")
    assert out == f"{tmp_path / 'out'}: 2 pages of 2 documents\n"
    assert not (tmp_path / "out" / "images" / "a" / "00002.png").exists()  # of the call before
    assert (tmp_path / "out" / "images" / "b" / "a" / "00001.png").read_bytes() == before["images/b/a/00001.png"]
    command = ["prepare_ocr.py", tmp_path / "in", tmp_path / "one", "--pixels", "300", "--workers", "1"]
    run_tool(*command)
    assert tree(tmp_path / "one") == before


def test_the_tool_that_is_killed_goes_on_where_it_was(pymupdf, tmp_path, start_ranks):
    for number in range(30):
        write_pdf(pymupdf, tmp_path / "in" / f"{number:02d}.pdf", *[columns(number)] * 4)

    def start(target: str):
        def run() -> int:
            sys.argv = ["prepare_ocr.py", *map(str, (tmp_path / "in", tmp_path / target)), "--pixels", "500"]
            return runpy.run_path(str(TOOLS / "prepare_ocr.py"))["main"]()

        return start_ranks(1, run)

    kept: dict[Path, int] = {}
    for wanted in (3, 9, 18):
        (pid,) = start("out").pids
        while len(found := list((tmp_path / "out" / ".parts").glob("*.json"))) < wanted:
            time.sleep(0.005)
        kill(pid)
        assert len(found) < 30
        assert not (tmp_path / "out" / "conversations.jsonl").exists()
        assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
        kept |= {path: path.stat().st_mtime_ns for path in found}
    done = {json.loads(path.read_text())["conversations"][0]["image"] for path in kept}
    times = {image: (tmp_path / "out" / image).stat().st_mtime_ns for image in done}
    for target in ("out", "whole"):
        assert start(target).wait() == [0]
    assert all((tmp_path / "out" / image).stat().st_mtime_ns == at for image, at in times.items())
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_documents_that_cannot_be_read_say_why(pymupdf, tmp_path, run_tool):
    status, _, error = run_tool("prepare_ocr.py", tmp_path / "nowhere", tmp_path / "out")
    assert (status, error) == (2, f"prepare_ocr.py: {tmp_path / 'nowhere'}: no such file or folder; check its path\n")
    with pytest.raises(DataError, match=r": no PDF in there; give files, or folders that hold some"):
        find_documents([tmp_path])
    first, second = (write_pdf(pymupdf, tmp_path / name / "x.pdf", []) for name in "ab")
    with pytest.raises(DataError, match=rf"{second}: has the name of {first}; rename it, or give the folder of both"):
        find_documents([first, second])
    assert list(find_documents([tmp_path])) == ["a/x", "b/x"]
    with pytest.raises(DataError, match=r"no page can be used; 1 left out \(no text\); see quarantine.jsonl"):
        write_documents({"x": first}, tmp_path / "out", Settings())
    with pytest.raises(DataError, match=r"y.pdf: cannot be read \(No such file or directory\); check its path"):
        write_documents({"y": tmp_path / "y.pdf"}, tmp_path / "out", Settings())
    with pytest.raises(DataError, match=r"most_turns=0: is too few; give 1 or more"):
        Settings(most_turns=0)


def test_without_pymupdf_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pymupdf", None)
    with pytest.raises(ConfigError, match=r"which is not installed; pip install 'megatron-sphinx\[ocr\]'"):
        write_documents({"x": tmp_path / "x.pdf"}, tmp_path, Settings())


# marks


def test_a_mark_is_on_its_object():
    half = [[(0.0, 0.0), (90.0, 0.0), (90.0, 10.0), (10.0, 10.0), (10.0, 90.0), (0.0, 90.0)]]  # hollow like an L
    x, y = place_of((0, 0, 91, 91), half, (100, 100))
    assert min(x, y) <= 10 < max(x, y) < 60
    assert place_of((10, 20, 30, 60), [], (100, 100)) == (20, 40)
    marks = [Mark(n, "x", (10.0, 10.0, 90.0, 90.0), [], (11.0 * n, 50.0)) for n in range(1, som.MOST_MARKS + 1)]
    assert len({(mark.colour, mark.shape) for mark in marks}) == som.MOST_MARKS
    image = Image.new("RGB", (300, 200), "white")
    for mark in marks:
        drawn = np.asarray(draw_marks(image, [mark]))
        x, y = (int(place) for place in mark.place)
        near = drawn[y - 10 : y + 11, max(x - 10, 0) : x + 11]
        assert (near == COLOURS[mark.colour]).all(2).sum() > 60
        assert (drawn[10, 20:80] == COLOURS[mark.colour]).all()
        assert (drawn[100:] == 255).all()
    assert np.asarray(image).min() == 255


def test_marks_are_told_in_words():
    marks = [
        Mark(1, "dog", (0.0, 0.0, 50.0, 100.0), [], (25.0, 50.0)),
        Mark(10, "red cup", (100.0, 50.0, 200.0, 100.0), [], (150.0, 75.0)),
    ]
    assert describe(marks).splitlines() == [
        som.INTRODUCTION, "Mark 1: a red circle on the dog.", "Mark 10: a green square on the red cup."
    ]  # fmt: skip
    centre, corner = (describe(marks, (200, 100), padding) for padding in ("centre", "corner"))
    assert "Mark 1: a red circle at [0.12,0.50] on the dog [0.00,0.25,0.25,0.75]." in centre
    assert "Mark 10: a green square at [0.75,0.38] on the red cup [0.50,0.25,1.00,0.50]." in corner
    assert mentioned("Mark 1 is left of mark #12; marks 3, 4 and 5 of 8 remark 9 times. MARKS 6 & 7.") == {
        1,
        12,
        3,
        4,
        5,
        6,
        7,
    }


@pytest.fixture
def annotated(tmp_path) -> dict:
    """Three images, one of them damaged, and what COCO would say of the objects on them."""
    (tmp_path / "pictures").mkdir()
    for number in (0, 1):
        draw(number)[0].resize((120, 80)).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "pictures" / "2.png").write_bytes(b"broken")

    def entry(key: int, image: int, category: int, box: list, **more: object) -> dict:
        return {"id": key, "image_id": image, "category_id": category, "bbox": box, **more}

    return {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(4)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}],
        "annotations": [
            entry(1, 0, 7, [10, 10, 40, 40], segmentation=[[10, 10, 50, 10, 50, 50, 10, 50]]),
            entry(2, 0, 8, [60, 10, 40, 60]),
            entry(3, 0, 8, [0, 0, 5, 5]),
            entry(4, 1, 7, [0, 0, 50, 50], segmentation={"counts": [1], "size": [1, 1]}, iscrowd=1),
            entry(5, 1, 7, [0, 0, 0, 50]),
            entry(6, 1, 9, [0, 0, 50, 50]),
            entry(7, 1, 7, [0, 0, 50, 50], segmentation=[[1, 2, 3]]),
            entry(8, 1, 7, [0, 0, 50, 50], segmentation=[[1, 2, 3, 4]]),
            entry(9, 5, 7, [0, 0, 50, 50]),
        ],
    }


def test_marks_end_to_end(annotated, tmp_path, run_tool):
    (tmp_path / "coco.json").write_text(json.dumps(annotated))
    target = tmp_path / "out"
    command = ["prepare_som.py", "mark", tmp_path / "coco.json", tmp_path / "pictures", target, "--most-marks", "2"]
    status, out, _ = run_tool(*command)
    assert (status, out.splitlines()[0]) == (0, f"{target}: 1 images marked")
    reasons = {
        line["reason"]: (line["image"], line["object"])
        for line in map(json.loads, (target / "quarantine.jsonl").open())
    }
    assert reasons.pop("RLE mask: only boxes and polygons are drawn") == ("1.png", 4)
    assert reasons.pop("unknown category: 9") == ("1.png", 6)
    assert reasons.pop("not a polygon: 2 points, or one that is not finite") == ("1.png", 8)
    assert reasons.pop("too many objects: 1 smaller ones have no mark") == ("0.png", None)
    assert reasons.pop("unknown image: 5") == (None, 9)
    assert reasons.pop("no object to mark") == ("1.png", None)
    assert reasons.pop("cannot be read: No such file or directory") == ("3.png", None)
    rest = sorted(reason.split(":")[0] for reason in reasons)
    assert rest == ["empty box", "not a polygon", "not an image"]
    (prompt,) = map(json.loads, (target / "prompts.jsonl").open())
    assert (prompt["id"], prompt["image"], prompt["marked"], prompt["marks"]) == ("0", "0.png", "images/000000.png", 2)
    raw, marked = (
        np.asarray(Image.open(path)) for path in (tmp_path / "pictures" / "0.png", target / prompt["marked"])
    )
    assert tuple(marked[10, 45]) == COLOURS["red"]
    assert tuple(marked[70, 62]) == COLOURS["green"]
    assert (marked[:, 105:] == raw[:, 105:]).all()
    assert "Mark 2: a green circle on the cat.\n" in prompt["prompt"]
    assert "Mark 2: a green circle at [0.67,0.50] on the cat [0.50,0.25,0.83,0.75]." in prompt["description"]

    texts = [(0, " "), ("0", "Mark 3 and mark 1."), (0, "Mark 2 sits. "), ("0", "Mark 1."), (4, "Mark 1.")]
    answers = [*({"id": key, "answer": text} for key, text in texts), {"id": 0}]
    (tmp_path / "answers.jsonl").write_text("\n".join([*map(json.dumps, answers), "{", ""]))
    merge = ["prepare_som.py", "merge", target / "prompts.jsonl", tmp_path / "answers.jsonl", tmp_path / "som.jsonl"]
    status, out, _ = run_tool(*merge)
    assert status == 0
    assert out.splitlines() == [
        f"{tmp_path / 'som.jsonl'}: 1 conversations", "  left out: 1 (empty answer)", "  left out: 2 (no answer)",
        "  left out: 1 (second answer)", "  left out: 1 (unknown id)", "  left out: 1 (unknown mark)",
    ]  # fmt: skip
    (line,) = map(json.loads, (tmp_path / "som.jsonl").open())
    question, answer = line["conversations"]
    assert line["image"] == "0.png"
    assert question == {"from": "human", "value": f"{prompt['description']}\n{prompt['question']}"}
    assert answer == {"from": "gpt", "value": "Mark 2 sits."}


def test_annotations_and_answers_that_cannot_be_read_say_why(annotated, tmp_path):
    coco, target = tmp_path / "coco.json", tmp_path / "out"
    for content, why in (
        ("{", r"not as COCO's instances are \(JSONDecodeError .*\); give images, annotations, categories"),
        ("[]", r"not as COCO's instances are \(TypeError "),
        ('{"images": [], "categories": []}', r"not as COCO's instances are \(KeyError 'annotations'\)"),
        (
            json.dumps(annotated | {"annotations": []}),
            r"no object can be marked; .*1 left out \(not an image\); see .*quarantine",
        ),
    ):
        coco.write_text(content)
        with pytest.raises(DataError, match=why):
            write_marks(coco, tmp_path / "pictures", target)
    with pytest.raises(DataError, match=r"nowhere: cannot be read \(No such file or directory\); check its path"):
        write_marks(tmp_path / "nowhere", tmp_path, target)
    with pytest.raises(DataError, match=r"most_marks=25: not so many can be told apart; give 1 to 24"):
        write_marks(coco, tmp_path, target, most_marks=25)
    with pytest.raises(DataError, match=r"nowhere: cannot be read \(No such file or directory\); check its path"):
        merge_answers(tmp_path / "nowhere", tmp_path / "nowhere", target)
    with pytest.raises(
        DataError, match=r"coco.json: not all lines are prompts; make it by megatron-sphinx prepare som mark"
    ):
        merge_answers(coco, coco, target)
    prompt = {"id": "0", "image": "0.png", "marks": 1, "description": "d", "question": "q"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt))
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(
        DataError, match=r"no answer can be used; 1 left out \(missing answer\); give those to .*prompts.jsonl"
    ):
        merge_answers(tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", target)
