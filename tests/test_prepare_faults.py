"""Mistakes with the tools that prepare data, and their ends: one line each, and the numbers of every tool add up."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import draw
from test_samples import sample, tar

from megatron_sphinx.data.index import IndexFolder
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.json_files import read_items, read_items_or_object
from megatron_sphinx.prepare.workers import Report, target_folder

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
DEEP = b"[" * 100_000


@pytest.fixture
def place(tiny, tmp_path) -> Path:
    (tmp_path / "0.tar").write_bytes(tar(sample("0", 1) | sample("1", 2) | {"2.txt": b"x"}))
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": TURNS}] * 2 + [{}]))
    draw(1)[0].save(tmp_path / "a.png")
    entry = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 9, 8]}
    width, height = draw(1)[0].size
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": width, "height": height}],
        "categories": [{"id": 1.0, "name": "dog"}],
        "annotations": [entry, entry | {"image_id": 2}, entry | {"image_id": True}, 5],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (tmp_path / "file").write_text("")
    return tmp_path


def commands(tiny, place: Path, target: Path) -> dict[str, list]:
    model = ["--tokenizer", tiny.folder / "tokenizer.model"]
    return {
        "pairs": ["prepare_pairs.py", place / "0.tar", target, *model],
        "conversations": ["prepare_conversations.py", place / "d.json", target, *model],
        "marks": ["prepare_som.py", "mark", place / "coco.json", place, target],
        "tasks": ["build_conversations.py", "detect", place / "coco.json", target / "x.jsonl"],
    }


LAST = {
    "pairs": "input 3 = 2 pairs + 1 in quarantine.jsonl",
    "conversations": "input 3 = 2 conversations + 1 in quarantine.jsonl",
    "marks": "input 1 images with 4 objects = 1 marked with 1 + 0 with the other 3 in quarantine.jsonl",
    "tasks": "input 4 = 1 annotations + 3 in x.quarantine.jsonl",
}


@pytest.mark.parametrize("tool", LAST)
def test_the_last_line_of_a_tool_says_that_nothing_was_lost(tiny, place, run_tool, tool):
    status, out, _ = run_tool(*commands(tiny, place, place / "out")[tool])
    assert (status, out.splitlines()[-1]) == (0, LAST[tool])
    name = LAST[tool].rpartition(" ")[2]
    lines = (place / "out" / name).read_text().splitlines()
    assert len(lines) == int(re.findall(r"(\d+) in \S+$", LAST[tool])[0])
    assert not list((place / "out").glob(".lock*"))


def test_numbers_that_do_not_add_up_are_never_printed():
    with pytest.raises(RuntimeError, match=r"the numbers of pairs do not add up: 3 came in, 1 \+ 0 \+ 1 came out"):
        Report(inputs=3, taken=1, rejected={"x": 1}).balance("pairs")


@pytest.mark.parametrize("tool", LAST)
def test_a_target_that_is_a_file_is_one_line(tiny, place, run_tool, tool):
    status, _, error = run_tool(*commands(tiny, place, place / "file")[tool])
    assert (status, error.count("\n")) == (2, 1)
    assert re.search(r"file(/x.jsonl)?: cannot be written \((File exists|Not a directory).*\); .*another TARGET", error)


@pytest.mark.parametrize("tool", ["pairs", "conversations", "marks"])
def test_two_at_once_are_one_line(tiny, place, run_tool, tool):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n" + (
        "from pathlib import Path; from megatron_sphinx.prepare.workers import target_folder\n"
        f"with target_folder(Path({str(place / 'out')!r})):\n    print('has it', flush=True); sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "has it\n"
        status, _, error = run_tool(*commands(tiny, place, place / "out")[tool])
        assert (status, error.count("\n")) == (2, 1)
        assert error.endswith("out: another process writes it; wait for that, or give another TARGET\n")
        other.kill()  # a killed process has it no more
        other.wait()
    assert run_tool(*commands(tiny, place, place / "out")[tool])[0] == 0


@pytest.mark.parametrize(
    ("tool", "option", "message"),
    [
        (
            "pairs",
            ["--held-out", "1.5"],
            r"held_out=1\.5: must be 0 or more and below 1; give 0\.001",
        ),
        ("pairs", ["--held-out=-1"], r"held_out=-1: must be 0 or more and below 1"),
        ("conversations", ["--held-out", "nan"], r"held_out=nan: must be 0 or more and below 1"),
        ("pairs", ["--workers", "0"], r"workers=0: must be 1 or more; leave --workers out to take every core"),
        ("conversations", ["--workers", "-3"], r"workers=-3: must be 1 or more"),
        ("marks", ["--workers", "0"], r"workers=0: must be 1 or more"),
        ("conversations", ["--samples-per-shard", "0"], r"samples_per_shard=0: must be 1 or more; give some hundreds"),
        ("tasks", ["--turns", "0"], r"turns=0: must be 1 or more; leave --turns out"),
    ],
)
def test_numbers_out_of_range_are_one_line(tiny, place, run_tool, tool, option, message):
    status, _, error = run_tool(*commands(tiny, place, place / "out")[tool], *option)
    assert (status, error.count("\n")) == (2, 1)
    assert re.search(message, error)
    assert not (place / "out").exists()


def test_ctrl_c_is_one_line_and_what_is_done_is_kept(tiny, tmp_path):
    content = tar({name: data for number in range(300) for name, data in sample(str(number), number % 250).items()})
    for number in range(200):
        (tmp_path / f"{number}.tar").write_bytes(content)
    out, model = tmp_path / "out", tiny.folder / "tokenizer.model"
    command = [sys.executable, "-m", "megatron_sphinx", "prepare", "pairs", tmp_path, out, "--tokenizer", model]
    command += ["--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list((out / ".parts").glob("*.npz")):
        assert process.poll() is None
        time.sleep(0.01)
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert time.monotonic() - begin < 5
    lines = [line for line in re.split(r"[\r\n]+", error) if line and "shard/s" not in line]
    assert lines[-1] == "megatron-sphinx prepare pairs: stopped by Ctrl-C; run the same command again"
    assert "Traceback" not in error
    assert list((out / ".parts").glob("*.npz"))
    assert not (out / "index.json").exists()


def test_pairs_and_conversations_taken_for_each_other_have_an_error_of_their_own(tiny, dialogs):
    for folder, key, kind in ((tiny.folder / "pairs", "conversations", "pairs"), (dialogs, "pairs", "conversations")):
        with pytest.raises(DataError) as caught:
            IndexFolder(folder, key)
        assert str(caught.value) == f"data.{key}={folder}: is an index of {kind}; give it as data.{kind}"


LIST = b'[{"a": 1}, ' + DEEP + b"]" * 100_000 + b', {"b": "]}"}, {"c": ' + b"[" * 2000 + b"]" * 2000 + b"}]"
FILES = {
    "a list": (b'[1, {"a": 2}]', ["item 1", "item 2"], 0),
    "lines": (b'{"a": 1}\n\n{"a": 2}\r\n{\n[]', ["line 1", "line 3", "line 4", "line 5"], 1),
    "a mark of bytes": (b"\xef\xbb\xbf[1]", ["item 1"], 0),
    "a deep item of a list": (LIST, ["item 1", "item 2", "item 3", "item 4"], 2),
    "a deep line": (b'{"a": 1}\n' + DEEP + b'\n{"b": 2}\n', ["line 1", "line 2", "line 3"], 1),
    "half UTF-8": (b'{"a": 1}\n{"a": "\xff"}\n', ["line 1", "line 2"], 1),
    "a lone carriage return": (b'{"a":\r1}\n{"b": 2}', ["line 1", "line 2"], 0),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_item_costs_itself(tmp_path, kind):
    content, places, bad = FILES[kind]
    (tmp_path / "x.json").write_bytes(content)
    for size in (1, 2, 1000):
        items = [item for group in read_items(tmp_path / "x.json", size) for item in group.read()]
        assert [item.place for item in items] == places
        assert sum(bool(item.fault) for item in items) == bad


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08", r"x\.json: is compressed; unpack it \(gunzip\)"),
        ('[{"a": 1}]'.encode("utf-16"), r"x\.json: is UTF-16; save it as UTF-8"),
        (b"hello", r"x\.json: not JSON: Expecting value.*; give a "),
        (b'[{"a": 1}, {"a"', r"x\.json: not JSON: .*; give a list of objects, or \.jsonl"),
        (DEEP, r"x\.json: not JSON: it is nested too deep"),
    ],
)
def test_files_that_hold_no_items_are_one_line(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    for read in (lambda path: read_items(path, 9), read_items_or_object):
        with pytest.raises(DataError, match=message):
            read(tmp_path / "x.json")


def test_ids_match_where_they_are_equal_and_nowhere_else(tmp_path, run_tool):
    """Equal numbers are one id; truth values, NaN, missing and doubled ids are left out, never another picture's."""
    images = [{"id": key, "file_name": f"{number}.jpg", "width": 100.0, "height": 50} for number, key in enumerate(
        [1.0, 2, "3", True, float("nan"), None, 7, 7, 2.0**60, 1.5, [8]])]  # fmt: skip
    ids = [1, 2.0, "3", 3, True, float("nan"), None, 7.0, 2**60, 2.0**60, 1.5, [8], {"a": 1}]
    content = {"images": images, "annotations": [{"image_id": key, "caption": f"{key}"} for key in ids]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    status, out, _ = run_tool("build_conversations.py", "caption", tmp_path / "c.json", tmp_path / "x.jsonl")
    made = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    said = [(one["image"], one["conversations"][1]["value"]) for one in made]
    assert said == [("0.jpg", "1"), ("1.jpg", "2.0"), ("2.jpg", "3")]
    assert (status, out.splitlines()[1:]) == (0, [
        "  left out: 1 (image id of several images)", "  left out: 6 (images without id)",
        "  left out: 9 (unknown image id)", "input 19 = 3 annotations + 16 in x.quarantine.jsonl",
    ])  # fmt: skip


def test_a_folder_that_another_caller_of_this_process_has_is_entered(tmp_path):
    with target_folder(tmp_path / "a"), target_folder(tmp_path / "a"):
        assert (tmp_path / "a" / ".lock").exists()
    assert not (tmp_path / "a").exists()  # nothing came of it
