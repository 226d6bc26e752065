"""What the web page does without a browser: its client, its transcript, and what its server says."""

import asyncio
import html
import json
import random
import socket
import sys

import pytest
from stub_server import END, stub_server

from megatron_sphinx.__main__ import main
from megatron_sphinx.generation.grounding import COLOURS, ground
from megatron_sphinx.serving.box_entries import entries_of, groundings_of
from megatron_sphinx.serving.client import Server, ServerError
from megatron_sphinx.serving.page import EXAMPLES, Page
from megatron_sphinx.serving.transcript import Turn, escaped, messages_of, shown


@pytest.fixture(scope="module")
def stub():
    with stub_server() as stub:
        yield stub


def last(stub, question="q", picture=None, turns=(), **sampling):
    """The last state of a chat when a question has been asked."""

    async def ask():
        page = Page(Server(stub.url, "k"), "tiny-sphinx")
        return [chat async for chat in page.ask(question, picture, list(turns), **sampling)][-1]

    return asyncio.run(ask())


def test_an_answer_comes_with_its_boxes_and_what_was_left_out(stub, tmp_path):
    entries = [{"box": [1, 2, 3, 4], "begin": 1, "end": 6}, {"point": [5, 6]}, {"box": [3, 2, 1, 4]}, {"box": "x"}, 7]
    stub.script, stub.dropped = ["a", "bcdef", {"delta": {"boxes": entries}, **END}], 2
    (tmp_path / "p.jpg").write_bytes(b"jpeg")
    before = [Turn("lost", is_failed=True), Turn("old", "answer"), Turn("stopped")]
    *_, turn = last(stub, "new", str(tmp_path / "p.jpg"), before, temperature=0.5, top_k=3, max_tokens=9)
    stub.dropped = 0
    assert turn.answer == "abcdef"
    assert turn.note == "the 2 oldest turns did not fit, and were left out"
    assert [(one.begin, one.end, one.boxes, one.points, one.colour) for one in turn.groundings] == [
        (0, 0, (), ((5, 6),), COLOURS[0]), (1, 6, ((1, 2, 3, 4),), (), COLOURS[1])
    ]  # fmt: skip
    sent = stub.asked[-1]
    assert (sent["temperature"], sent["top_k"], sent["max_tokens"], sent["stream"]) == (0.5, 3, 9, True)
    url = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,anBlZw=="}}
    assert sent["messages"] == [
        {"role": "user", "content": [url, {"type": "text", "text": "old"}]},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "new"},
    ]


def test_an_answer_that_was_cut_off_says_so(stub):
    stub.script = ["abc", {"finish_reason": "length"}]
    assert last(stub)[-1].note == "cut off at max tokens"
    stub.dropped = 1
    assert last(stub)[-1].note == "the 1 oldest turns did not fit, and were left out; cut off at max tokens"
    stub.dropped = 0


def test_errors_are_notes_and_what_came_before_them_stands(stub):
    stub.status, stub.error = 400, "too long: ask less"
    assert last(stub) == [Turn("q", note="too long: ask less", is_failed=True)]
    stub.status, stub.script = 200, ["half", {"error": {"message": "rank 1 is lost", "type": "server_error"}}]
    [turn] = last(stub)
    assert (turn.answer, turn.note, turn.is_failed) == ("half", "rank 1 is lost", True)
    [turn] = last(stub, picture="none.png")
    assert turn.note == "the picture cannot be read (No such file or directory); give it again"


def test_a_server_that_is_none_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerError, match="no server answers there; start one by megatron-sphinx serve MODEL"):
            Server(url).model()
        taken.listen()
        slow = Server(url)
        slow._options["timeout"] = 0.2
        with pytest.raises(ServerError, match="did not answer in time; ask again, or see what it is at"):
            slow.model()
    for url in ("127.0.0.1:8000", "ftp://x", "http://"):
        with pytest.raises(ServerError, match=r"is no address; give http://127\.0\.0\.1:8000"):
            Server(url)


def test_the_command_says_what_is_wrong(stub, monkeypatch, capsys):
    assert main(["demo", "--port", "70000"]) == 2
    assert "--port=70000: must be at most 65,535" in capsys.readouterr().err
    stub.models = ()
    assert main(["demo", "--server", f"{stub.url}/v1", "--port", "0"]) == 2
    assert "has no model; start it by megatron-sphinx serve MODEL" in capsys.readouterr().err
    stub.models = ("tiny-sphinx",)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--server", stub.url, "--port", "0"]) == 2
    assert "gradio is not installed; pip install 'megatron-sphinx[page]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(stub, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--server", stub.url, "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}: the page cannot listen there (Address already in use); give" in capsys.readouterr().err


def test_every_sign_is_shown_as_it_is(seed):
    rng = random.Random(seed)
    signs = "ab 1<>&\"'`*_[]()#!$\\\n|~-+.:;=é漢🙂"
    for _ in range(200):
        text = "".join(rng.choices(signs, k=rng.randrange(30)))
        written = escaped(text)
        assert html.unescape(written) == text
        assert not set(written) & set("<>\"'`*_[]()!$\\|~-+.:=")


def test_brackets_have_the_colours_of_their_boxes():
    answer = "<i>a[0.1,0.1,0.5,0.5], b[0.2,0.2]"
    turn = Turn("q_", answer, tuple(groundings_of(entries_of(answer, ground(answer, 100, 80, "centre")))))
    user, assistant = shown([turn])
    assert user == {"role": "user", "content": "q&#95;"}
    text = assistant["content"]
    assert text.startswith(f'&#60;i&#62;a<span style="color: {COLOURS[0]}">&#91;0&#46;1')
    assert text.count(f'<span style="color: {COLOURS[1]}">') == 1
    assert html.unescape(text.replace("</span>", "")).count("<span") == 2
    assert shown([Turn("q", note="<x>")])[1]["content"] == "<br><em>&#60;x&#62;</em>"
    assert shown([Turn("q")]) == [{"role": "user", "content": "q"}]


def test_entries_tell_pixels_and_words():
    text = "two cups[0.1,0.2,0.5,0.6,0,0.1,1,0.9] and an eye[0.5,0.5], wrong[0.9,0.1,0.2,0.3]"
    entries = json.loads(json.dumps(entries_of(text, ground(text, 200, 100, "corner"))))
    assert [(one.get("box"), one.get("point"), one["phrase"]) for one in entries] == [
        ([20, 40, 100, 100], None, "two cups"), ([0, 20, 200, 100], None, "two cups"), (None, [100, 100], "an eye")
    ]  # fmt: skip
    assert [text[one["begin"]] + text[one["end"] - 1] for one in entries] == ["[]"] * 3


def test_examples_are_questions_that_can_be_asked():
    assert len(set(EXAMPLES)) == len(EXAMPLES) >= 8
    assert messages_of([Turn(EXAMPLES[0])], None) == [{"role": "user", "content": EXAMPLES[0]}]
