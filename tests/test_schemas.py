"""Our own JSON files: each is checked against what it must hold, and refused in one line where it does not."""

import json
import random
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutations import mutated

from megatron_sphinx.checkpoint.manifest import read_manifest
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.text import TextIndex
from megatron_sphinx.errors import SphinxError

DATA = Path(__file__).parent / "data"
STEP = DATA / "checkpoint_v0" / "checkpoints" / "step_00000002"
PLACES = {
    "pairs": (DATA / "prepared_v0" / "pairs", "index.json", lambda folder: SampleIndex([folder], "pairs")),
    "text": (DATA / "prepared_v0" / "text", "index.json", lambda folder: TextIndex([folder])),
    "checkpoint": (STEP, "checkpoint.json", read_manifest),
}
Open = Callable[[Path], Any]


@pytest.fixture(params=PLACES)
def place(request, tmp_path) -> tuple[Path, Open]:
    """A JSON file among the files that it describes, and what reads it."""
    folder, name, read = PLACES[request.param]
    shutil.copytree(folder, tmp_path / request.param)
    return tmp_path / request.param / name, read


def refusal(place: tuple[Path, Open], content: object) -> str:
    """What is said of a file of such a content, in one line and at once."""
    file, read = place
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    begin = time.monotonic()
    with pytest.raises(SphinxError) as raised:
        read(file.parent)
    said = str(raised.value)
    assert time.monotonic() - begin < 5
    assert not re.search(r"[\x00-\x1f]", said)
    assert str(file.parent) in said
    return said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"must hold an object with keys, not \[\]"),
        ("3", r"must hold an object with keys, not 3"),
        ("null", r"must hold an object with keys, not None"),
        ("{", r"not JSON: "),
        ("", r"not JSON: "),
        ("[" * 100_000, r"nested too deep"),
        ('{"format": 2}', r"was made by a newer version \(format 2; this one knows 1\); upgrade megatron-sphinx"),
        ('{"format": "x"}', r"format=x: must be a whole number"),
        ('{"a": 1, "a": 1}', r"the key a is given twice"),
        ("{}", r": not given; the file is not whole"),
    ],
    ids=["list", "number", "null", "cut", "empty", "deep", "newer", "format", "twice", "keys"],
)
def test_what_is_no_file_of_ours_is_told(place, content, message):
    assert re.search(message, refusal(place, content))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("pairs", {"shards": {}}, r"shards=\{\}: must be a list"),
        ("pairs", {"shards": [3]}, r"shards\.0=3: must be a section"),
        ("pairs", {"shards": [{"path": "x", "bytes": "many", "samples": 6}]}, r"shards\.0\.bytes=many: must be a"),
        ("pairs", {"shards": [{"path": "x", "bytes": 3, "samples": -32}]}, r"shards\.0\.samples=-32: must be at"),
        ("pairs", {"shards": [{"path": "x", "bytes": 3}]}, r"shards\.0\.samples: not given; the file is not whole"),
        ("pairs", {"tokenizer": {"vocabulary": 0, "sha256": "x"}}, r"tokenizer\.vocabulary=0: must be at least 1"),
        ("pairs", {"tokenizer": []}, r"tokenizer=\[\]: must be a section"),
        ("pairs", {"caption_type": 3}, r"caption_type=3: must be text"),
        ("pairs", {"of": "conversations"}, r"^data\.pairs=\S+: is an index of conversations; give it as data\.conv"),
        ("text", {"files": "000000"}, r"files=000000: must be a list"),
        ("text", {"files": [{"name": "000000", "documents": 1.5, "tokens": 3}]}, r"files\.0\.documents=1\.5: must be"),
        ("text", {"files": [{"name": "000000", "documents": 1, "tokens": 10**40}]}, r"files\.0\.tokens=1000+: must be"),
        ("text", {"files": [{"name": 7, "documents": 1, "tokens": 3}]}, r"files\.0\.name=7: must be text"),
        ("text", {"files": [{"name": "../x", "documents": 1, "tokens": 3}]}, r"'\.\./x' is no name of a file"),
        ("checkpoint", {"step": -5}, r"step=-5: must be at least 0; checkpoints are named by steps of eight digits"),
        ("checkpoint", {"step": 10**9}, r"step=1000000000: must be at most 99,999,999"),
        ("checkpoint", {"step": "2"}, r"step=2: must be a whole number"),
        ("checkpoint", {"step": True}, r"step=True: must be a whole number"),
        ("checkpoint", {"files": {}}, r"names no files, so that it is no checkpoint"),
        ("checkpoint", {"files": {".metadata": 3}}, r"files\.\.metadata=3: must be text"),
        ("checkpoint", {"files": []}, r"files=\[\]: must be a section"),
        ("checkpoint", {"identity": 3}, r"identity=3: must be a section"),
        ("checkpoint", {"bad_pairs": -1}, r"bad_pairs=-1: must be at least 0"),
        ("checkpoint", {"divergence": {"skipped": 0}}, r"divergence\.in_a_row: not given"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_named(kind, change, message, tmp_path):
    folder, name, read = PLACES[kind]
    shutil.copytree(folder, tmp_path / kind)
    file = tmp_path / kind / name
    content = json.loads(file.read_text())
    read(file.parent)
    assert re.search(message, refusal((file, read), content | change))


def test_keys_that_are_not_known_are_left_alone(place):
    file, read = place
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"format": 1, "remark": [1]}))
    read(file.parent)


def fuzz(place: tuple[Path, Open], count: int, seed: int) -> None:
    file, read = place
    content, rng = file.read_bytes(), random.Random(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        file.write_bytes(mutated(content, rng))
        begin, said = time.monotonic(), ""
        try:
            read(file.parent)
        except SphinxError as error:
            said = str(error)
        assert not re.search(r"[\x00-\x1f]", said)
        assert time.monotonic() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19, "KiB"


def test_mutated_files_are_read_or_refused(place, seed):
    fuzz(place, 60, seed)


@pytest.mark.fuzz
def test_many_mutated_files_are_read_or_refused(place, seed):
    fuzz(place, 2000, seed)
