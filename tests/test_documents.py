"""Conversations about pages of PDFs: what is asked, and the tool."""

import json
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import kill
from PIL import Image
from test_pdf import columns, write_pdf

from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.prepare.boxes import parse_boxes, to_pixels
from megatron_sphinx.prepare.documents import FIND_TEXT, READ_PAGE, dialog, find_documents, part_name, write_documents
from megatron_sphinx.prepare.pdf import DocumentPage, DocumentSettings, PageText
from megatron_sphinx.prepare.tasks import PROMPTS

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def pymupdf():
    return pytest.importorskip("pymupdf", reason="PyMuPDF is not installed: pip install 'megatron-sphinx[ocr]'")


def test_dialogs_have_every_task_and_follow_from_names():
    image = Image.new("RGB", (200, 100))
    texts = [
        PageText(name, (10.0, 20.0 * place, 110.0, 20.0 * place + 10))
        for place, name in enumerate(["one", "two", "on"])
    ]
    again = [PageText("twice", (150.0, 0.0, 190.0, 10.0)), PageText("twice", (150.0, 50.0, 190.0, 60.0))]
    page = DocumentPage(1, image, [*texts, *again])
    seen: dict[str, set] = {}
    lengths = set()
    for number in range(200):
        line = dialog(f"images/d{number}.png", page, DocumentSettings())
        assert line == dialog(f"images/d{number}.png", page, DocumentSettings())
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
    corner = [dialog(f"{number}", page, DocumentSettings(padding="corner")) for number in range(20)]
    assert "[0.05,0.10,0.55,0.15]" in json.dumps(corner)
    asked = json.dumps([dialog(f"{number}", page, DocumentSettings(most_characters=17)) for number in range(50)])
    assert "region" in asked
    assert READ_PAGE not in asked
    assert READ_PAGE in json.dumps(
        [dialog(f"{number}", page, DocumentSettings(most_characters=18)) for number in range(50)]
    )


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
        f"{tmp_path / 'out'}: 6 pages of 5 documents", "  left out: 1 (broken)", "  left out: 1 (no text)",
        "input 8 = 6 pages + 2 in quarantine.jsonl",
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
    assert out.splitlines() == [
        f"{tmp_path / 'out'}: 2 pages of 2 documents", "  left out: 2 (behind page 1)",
        "input 4 = 2 pages + 2 in quarantine.jsonl",
    ]  # fmt: skip
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
    with pytest.raises(
        DataError, match=r"no page can be used; 1 left out \(no text\); the first: no text: .*; see quar"
    ):
        write_documents({"x": first}, tmp_path / "out", DocumentSettings())
    with pytest.raises(DataError, match=r"y.pdf: cannot be read \(No such file or directory\); check its path"):
        write_documents({"y": tmp_path / "y.pdf"}, tmp_path / "out", DocumentSettings())
    with pytest.raises(DataError, match=r"most_turns=0: is too few; give 1 or more"):
        DocumentSettings(most_turns=0)
    with pytest.raises(DataError, match=r"pixels=100000: is too many; give 8192 or fewer"):
        DocumentSettings(pixels=100_000)
    with pytest.raises(DataError, match=r"most_refused=nan: is no share; give 0 to 1"):
        DocumentSettings(most_refused=float("nan"))


def test_without_pymupdf_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pymupdf", None)
    with pytest.raises(ConfigError, match=r"which is not installed; pip install 'megatron-sphinx\[ocr\]'"):
        write_documents({"x": tmp_path / "x.pdf"}, tmp_path, DocumentSettings())


def test_parts_are_known_by_a_name_that_stays():
    """Else a command that is given again after it was killed would begin again."""
    assert part_name("a/b", (10, "123"), DocumentSettings()) == "c39c04e73ab550404ac4a10b"
