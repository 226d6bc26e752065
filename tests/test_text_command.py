"""The command that prepares text: what it prints last, and mistakes of its user, each told in one line."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from test_text_readers import lines, texts

COMMAND = [sys.executable, "-m", "megatron_sphinx", "prepare", "text"]


@pytest.fixture
def command(tiny, tmp_path, run_tool):
    """The command over a file with good and bad documents."""
    content = b'{"content": 3}\nnot json\n{"content": ""}\n'
    (tmp_path / "t.jsonl").write_bytes(lines(texts(50)) + content)

    def run(*options: object, target: str = "out") -> tuple[int, str, str]:
        words = [tmp_path / "t.jsonl", tmp_path / target, "--tokenizer", tiny.folder / "tokenizer.model", *options]
        return run_tool("prepare_text.py", *words)

    return run


def test_the_last_line_says_that_nothing_is_lost(command):
    status, out, _ = command()
    assert (status, out.splitlines()[-1]) == (0, "input 53 = 50 documents + 3 in quarantine.jsonl")
    status, out, _ = command("--held-out", "0.3")
    found = re.fullmatch(
        r"input 53 = (\d+) documents \+ (\d+) held out \+ 3 in quarantine\.jsonl", out.splitlines()[-1]
    )
    assert (status, int(found[1]) + int(found[2])) == (0, 50)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--workers", "0"], "workers=0: must be 1 or more; leave --workers out to take every core"),
        (["--workers", "-2"], "workers=-2: must be 1 or more; leave --workers out to take every core"),
        (["--held-out", "1.5"], "held_out=1.5: must be 0 or more and below 1; give 0.001 for one of a thousand"),
        (["--held-out=-1"], "held_out=-1: must be 0 or more and below 1; give 0.001 for one of a thousand"),
        (["--held-out", "nan"], "held_out=nan: must be 0 or more and below 1; give 0.001 for one of a thousand"),
        (
            ["--most-characters", "0"],
            "--most-characters=0: must be at least 1; a document is held in memory while it is tokenised",
        ),
        (
            ["--encoding", "no"],
            "--encoding=no: is no encoding of text that is known; give one such as latin-1 or cp1252",
        ),
        (["--key", "body"], "t.jsonl: has no key 'body', but ['content']; give --key"),
    ],
)
def test_a_wrong_option_is_one_line(command, options, why):
    status, out, error = command(*options)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert error.endswith(f"{why}\n")


def test_a_target_that_cannot_be_written_is_one_line(command, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    for target, why in {
        "file": "file: cannot be written (File exists: .*file); mend that, or give another TARGET",
        "file/x": "file/x: cannot be written (Not a directory: .*file/x); mend that, or give another TARGET",
        "x" * 300: "x: cannot be written (File name too long: .*x); mend that, or give another TARGET",
        "dangling": "dangling: cannot be written (File exists: .*dangling); mend that, or give another TARGET",
        "/proc/x": "x: cannot be written (No such file or directory: .*x); mend that, or give another TARGET",
    }.items():
        status, _, error = command(target=target)
        assert (status, error.count("\n")) == (2, 1)
        assert re.search(re.escape(why).replace(r"\.\*", ".*") + "\n$", error), error


def start(tiny, tmp_path, target: str = "out") -> subprocess.Popen:
    """The command over much text, in a session of its own; it works already when this returns."""
    (tmp_path / "t.jsonl").write_bytes(lines(texts(200_000)))
    words = [*COMMAND, tmp_path / "t.jsonl", tmp_path / target, "--tokenizer", tiny.folder / "tokenizer.model"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not list((tmp_path / target).glob(".*.partial*")):
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("to_all", [True, False])
def test_ctrl_c_ends_the_command_in_one_line(tiny, tmp_path, to_all):
    process = start(tiny, tmp_path)
    begun = time.monotonic()
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert time.monotonic() - begun < 5
    assert process.returncode == 75
    told = [line for line in error.splitlines() if line and "part/s" not in line and "%|" not in line]
    assert told == ["megatron-sphinx prepare text: stopped by Ctrl-C; run the same command again"]
    assert not (tmp_path / "out" / "index.json").exists()


def test_two_at_once_do_not_write_one_folder(tiny, tmp_path, command):
    process = start(tiny, tmp_path)
    try:
        status, _, error = command()
        assert (status, error.count("\n")) == (2, 1)
        assert "out: another process writes it; wait for that, or give another TARGET" in error
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    (tmp_path / "t.jsonl").write_bytes(lines(texts(5)))
    assert command()[0] == 0  # the lock of one that was killed is no hindrance
