"""The chat in a terminal and through a pipe: turns, commands, Ctrl-C, boxes in a file."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from answers_double import Double
from PIL import Image

from megatron_sphinx.__main__ import main
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.generation.requests import Sampling
from megatron_sphinx.serving import model
from megatron_sphinx.serving.terminal import Chat, converse

ROOT = Path(__file__).parents[1]


def tell(messages, picture):
    """An answer that tells the whole chat."""
    size = f"{picture.width}x{picture.height} " if picture else ""
    return size + "|".join(f"{one.role[0]}:{one.text}" for one in messages)


def talk(chat, text, *questions):
    """Let a chat take what a pipe holds: its status, and the lines of its answers."""
    target = io.StringIO()
    status = converse(chat, questions, io.StringIO(text), target)
    return status, target.getvalue().split("\n")[:-1]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 20), "white").save(path)
    return path


def test_a_pipe_has_an_answer_a_line_and_turns_follow_each_other(picture):
    chat = Chat(Double(tell), Sampling(), "be kind")
    chat.look_at(picture)
    status, lines = talk(chat, "first\n\n  second \n")
    assert lines == ["40x20 s:be kind|u:first",
                     "40x20 s:be kind|u:first|a:40x20 s:be kind|u:first|u:second"]  # fmt: skip
    assert status == 0
    assert talk(Chat(Double(lambda *_: "a\n\nb \x1b[2Jc"), Sampling()), "", "/x", "y")[1] == ["a b [2Jc"] * 2


def test_commands_begin_anew_save_and_are_named_where_they_are_none(picture, tmp_path, capsys):
    chat = Chat(Double(tell), Sampling())
    target = tmp_path / "chat.json"
    wrong = f"/save {tmp_path}/none/x\n/picture none\n/jump\n/picture\n"
    text = f"a\n/picture {picture}\nb\n/save {target}\n/clear\nc\n{wrong}"
    status, lines = talk(chat, text)
    assert lines == ["u:a", "40x20 u:b", "40x20 u:c"]
    assert json.loads(target.read_text()) == {
        "model": "double",
        "messages": [{"role": "user", "text": "b"}, {"role": "assistant", "text": "40x20 u:b"}],
    }
    error = capsys.readouterr().err
    assert re.search(r"none/x: cannot be written \(No such file or directory\)", error)
    assert re.search(r"none: cannot be read \(.*\); give the path of a picture", error)
    assert error.count("is no command; there are:") == 2
    assert f"a new chat, about {picture}" in error
    assert status == 2


def test_what_does_not_fit_leaves_its_line_empty_and_the_chat_as_it_was(capsys):
    status, lines = talk(Chat(Double(tell), Sampling()), f"a\n{'x' * 999}\nb\n")
    assert lines == ["u:a", "", "u:a|a:u:a|u:b"]
    assert "too long" in capsys.readouterr().err
    assert status == 2


def test_turns_that_were_left_out_are_told(capsys):
    double = Double(tell, dropped=2)
    talk(Chat(double, Sampling(stop=("!",))), "", "a")
    assert capsys.readouterr().err == "the 2 oldest turns did not fit, and were left out\n"
    assert double.sampled[0].stop == ("!", "###")


def test_boxes_are_drawn_to_a_file_and_wrong_ones_are_told(picture, tmp_path, capsys):
    answer = "a cup[0.25,0.3,0.75,0.6], a dot[2.0,0.1]"
    chat = Chat(Double(lambda *_: answer), Sampling(), draw=tmp_path / "drawn.png")
    assert talk(chat, "", "no picture")[0] == 0
    chat.look_at(picture)
    talk(chat, "", "where?")
    drawn = Image.open(tmp_path / "drawn.png").convert("RGB")
    assert drawn.size == (40, 20)
    assert drawn.getpixel((10, 2)) != (255, 255, 255)  # 0.25 * 40, and 0.3 * 40 - 10
    assert drawn.getpixel((30, 14)) != (255, 255, 255)
    assert drawn.getpixel((20, 8)) == (255, 255, 255)
    assert "not drawn: [2,0.1]: outside of 0 to 1" in capsys.readouterr().err
    bad = Chat(Double(lambda *_: answer), Sampling(), draw=tmp_path / "drawn.nothing")
    bad.look_at(picture)
    assert talk(bad, "", "where?") == (2, [answer])
    assert re.search(r"--draw=.*drawn.nothing: cannot be written \(.*\); give another .png", capsys.readouterr().err)


def test_an_empty_answer_draws_no_boxes_of_the_one_before(picture, tmp_path):
    drawn = tmp_path / "drawn.png"
    chat = Chat(Double(lambda said, _: "" if said[-1].text == "b" else "x[0.2,0.3,0.7,0.6]"), Sampling(), draw=drawn)
    chat.look_at(picture)
    talk(chat, "", "a")
    drawn.unlink()
    talk(chat, "", "b")
    assert not drawn.exists()


def test_what_ends_the_model_ends_the_chat():
    class Lost(Double):
        def submit(self, prompt, sampling, listen):
            listen(SphinxError("rank 1 is lost"))

    with pytest.raises(SphinxError, match="rank 1 is lost"):
        talk(Chat(Lost(tell), Sampling()), "a\n")


def test_the_command_asks_given_questions(picture, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(model, "load", lambda path, **options: Double(tell))
    assert main(["chat", checkpoint, str(picture), "-m", "a", "-m", "b", "--system", "s"]) == 0
    assert capsys.readouterr().out == "40x20 s:s|u:a\n40x20 s:s|u:a|a:40x20 s:s|u:a|u:b\n"
    assert main(["chat", checkpoint, "none.png", "-m", "a"]) == 2
    assert "none.png: cannot be read" in capsys.readouterr().err


PROGRAM = """
import sys
from answers_double import Double
from megatron_sphinx.__main__ import main
from megatron_sphinx.serving import model
answer = lambda messages, _: "word " * (400 if messages[-1].text == "long" else 2)
model.load = lambda path, **options: Double(answer, 0.01)
sys.exit(main(["chat", sys.argv[1]]))
"""


def test_in_a_terminal_answers_stream_and_ctrl_c_ends_one_of_them(checkpoint):
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TERM": "dumb"}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, checkpoint], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown = bytearray()

    def read():
        while True:
            try:
                shown.extend(os.read(ours, 4096))
            except OSError:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def until(condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, shown.decode()
            time.sleep(0.01)

    until(lambda: shown.endswith(b"> "))
    assert b"/picture PATH" in shown
    os.write(ours, b"long\n")
    until(lambda: shown.count(b"word") > 5)
    child.send_signal(signal.SIGINT)
    until(lambda: shown.endswith(b"> "))
    stopped = shown.count(b"word")
    assert stopped < 400
    os.write(ours, b"short\n")
    until(lambda: shown.endswith(b"> ") and shown.count(b"word") == stopped + 2)
    os.write(ours, b"thrown away")
    until(lambda: shown.endswith(b"away"))
    child.send_signal(signal.SIGINT)
    until(lambda: shown.endswith(b"away\r\n> "))
    os.write(ours, b"\x04")
    assert child.wait(timeout=20) == 0, shown.decode()
    reader.join(5)
    os.close(ours)
