"""The tools that prepare pairs and text: what they print, and how they go on after they were killed."""

import os
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import Ranks, draw, kill
from test_pairs import png, write_tar

from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.workers import in_parallel

TOOLS = Path(__file__).parents[1] / "tools"


def test_the_tools_end_to_end(tiny, tmp_path, run_tool):
    model = tiny.folder / "tokenizer.model"
    status, out, _ = run_tool("prepare_pairs.py", tiny.folder / "pictures", tmp_path / "pairs", "--tokenizer", model)
    assert status == 0
    assert re.fullmatch(
        r".*pairs: 60 pairs in 1 shards, \d+ caption tokens\ninput 60 = 60 pairs \+ 0 in quarantine\.jsonl\n", out
    )
    SampleIndex([tmp_path / "pairs"]).check(tiny.tokenizer)
    whole = ["prepare_pairs.py", tiny.folder / "shards", tmp_path / "pairs", "--tokenizer", model, "--held-out", "0.3"]
    status, out, _ = run_tool(*whole)
    assert re.fullmatch(
        r".*pairs: \d+ pairs in 3 shards, \d+ caption tokens, \d+ more held out\ninput 60 = .* held out \+ 0 .*\n", out
    )
    text = ["prepare_text.py", tiny.folder / "text.jsonl", tmp_path / "text", "--tokenizer", model]
    status, out, _ = run_tool(*text)
    assert (status, out.startswith(f"{tmp_path / 'text'}: 50 documents, ")) == (0, True)
    status, _, error = run_tool("prepare_text.py", tmp_path / "nowhere.jsonl", tmp_path / "t", "--tokenizer", model)
    assert (status, "nowhere.jsonl: cannot be read (No such file or directory)" in error) == (2, True)
    status, _, error = run_tool("prepare_pairs.py", tmp_path / "nowhere", tmp_path / "t", "--tokenizer", model)
    assert (status, error.endswith("nowhere: no such file or folder\n")) == (2, True)
    shard = write_tar(
        tmp_path / "bad.tar", {"0.png": b"broken", "0.txt": b"x", "1.png": png(draw(1)[0]), "1.txt": b"y"}
    )
    _, out, _ = run_tool("prepare_pairs.py", shard, tmp_path / "t", "--tokenizer", model)
    assert out.endswith("  left out: 1 (not an image)\ninput 2 = 1 pairs + 1 in quarantine.jsonl\n")


@pytest.mark.parametrize("tool", ["prepare_pairs.py", "prepare_text.py"])
def test_a_tool_that_is_killed_goes_on_where_it_was(tiny, tmp_path, start_ranks, tool):
    """Whenever it is killed, no half file has its final name, and the parts that were done are not done again."""
    shutil.copytree(tiny.folder / "shards", tmp_path / "shards")
    for number in range(40):
        shutil.copy(tmp_path / "shards" / "000000.tar", tmp_path / "shards" / f"{number + 100:06d}.tar")
        (tmp_path / "shards" / f"{number:02d}.jsonl").write_bytes((tiny.folder / "text.jsonl").read_bytes() * 8)
    inputs = sorted((tmp_path / "shards").glob("*.tar" if tool == "prepare_pairs.py" else "*.jsonl"))
    done = ".parts/*.npz" if tool == "prepare_pairs.py" else "*.json"
    model = ["--tokenizer", tiny.folder / "tokenizer.model", "--workers", "2"]

    def start(target: str) -> Ranks:
        def run() -> int:
            sys.argv = [tool, *map(str, (*inputs, tmp_path / target, *model))]
            return runpy.run_path(str(TOOLS / tool))["main"]()

        return start_ranks(1, run)

    kept: dict[Path, int] = {}
    for wanted in (3, 12, 25):
        (pid,) = start("out").pids
        while len(found := list((tmp_path / "out").glob(done))) < wanted:
            time.sleep(0.005)
        kill(pid)
        assert not (tmp_path / "out" / "index.json").exists()
        assert len(found) < len(inputs)
        assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
        kept |= {path: path.stat().st_mtime_ns for path in found}
    for target in ("out", "whole"):
        assert start(target).wait() == [0]
    if tool == "prepare_text.py":
        assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_worker_that_is_killed_is_one_line(tiny, tmp_path):
    def die(number: int) -> int:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(DataError, match=r"a worker was killed, .* run this again with fewer --workers"):
        list(in_parallel(die, range(8), workers=2, unit_name="part"))
    assert list(in_parallel(lambda number: number * 2, range(8), workers=3, unit_name="part")) == list(range(0, 16, 2))
