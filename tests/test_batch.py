"""Files of questions: what becomes of every kind of row, order, errors, and a kill at any time."""

import base64
import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import answers_double
import pyarrow as pa
import pytest
from answers_double import Double, caption
from conftest import draw
from pyarrow import parquet

from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.manifest import MANIFEST
from megatron_sphinx.checkpoint.steps import name_of
from megatron_sphinx.errors import DataError, SphinxError
from megatron_sphinx.generation.requests import Sampling
from megatron_sphinx.serving import model
from megatron_sphinx.serving.answer_file import AnswerFile
from megatron_sphinx.serving.batch import answer_all
from megatron_sphinx.serving.questions import Asking
from megatron_sphinx.serving.rows import sources_of

GREEDY, BARE = Sampling(), Asking()


def ask(double, source, target, asking=BARE, sampling=GREEDY, model_path=Path("m"), **options):
    """Answer inputs, and read the lines of the target."""
    sources = sources_of([source] if isinstance(source, Path) else source)
    report = answer_all(double, model_path, sources, target, asking, sampling, **options)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert report.answered + report.errors == len(lines)
    assert report.errors == sum("error" in line for line in lines)
    return lines


def png(number: int) -> bytes:
    """The file of a drawn picture."""
    file = io.BytesIO()
    draw(number)[0].save(file, "png")
    return file.getvalue()


def size(number: int) -> str:
    return "{}x{}".format(*draw(number)[0].size)


@pytest.fixture
def pictures(tmp_path):
    """A folder of three pictures and a damaged one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    (folder / "1b.png").write_bytes(png(1)[:40])
    return folder


def jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_is_asked_one_prompt_in_the_order_of_its_names(pictures, tmp_path):
    lines = ask(Double(caption, 0.002), pictures, tmp_path / "out.jsonl", Asking("What"))
    assert [line["image"] for line in lines] == ["0.png", "1.png", "1b.png", "2.png"]
    assert lines[0] == {"image": "0.png", "answer": lines[0]["answer"], "finish": "stop", "prompt_tokens": 2,
                        "new_tokens": 8}  # fmt: skip
    assert [line["answer"] for line in lines if "answer" in line] == [
        f"What? {size(number)} yes yes yes yes" for number in range(3)
    ]
    assert "not an image" in lines[2]["error"]


def test_every_form_of_a_row_is_asked(pictures, tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png(2)).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    rows = [
        {"id": 7, "image": "0.png", "question": "a"},
        {"image": ["1.png"], "prompt": "b", "answer": "gold"},
        {"url": "2.png", "text": "c"},
        {"image_path": str(pictures / "0.png")},
        {"messages": [{"role": "system", "content": "s"},
                      {"role": "user", "content": [part, {"type": "text", "text": "d"}]}]},
        {"image": "1.png", "conversations": [
            {"from": "human", "value": "<image>\ne"}, {"from": "gpt", "value": "x"},
            {"from": "human", "value": "f"}, {"from": "gpt", "value": "to be generated"}]},
        {"image": url, "question": "g"},
        {"question": "no picture"},
    ]  # fmt: skip
    chats = []

    def answer(messages, picture):
        chats.append([(one.role, one.text) for one in messages])
        return f"{messages[-1].text} {picture.width}x{picture.height}" if picture else messages[-1].text

    lines = ask(Double(answer), jsonl(pictures / "rows.jsonl", rows), tmp_path / "out.jsonl", Asking("p"))
    sizes = [size(0), size(1), size(2), size(0), size(2), size(1), size(2)]
    expected = [f"{text} {one}" for text, one in zip("abcpdfg", sizes, strict=True)]
    assert [line["answer"] for line in lines] == [*expected, "no picture"]
    assert lines[0]["id"] == 7
    assert lines[1]["input.answer"] == "gold"
    assert chats[4] == [("system", "s"), ("user", "d")]
    assert chats[5] == [("user", "e"), ("assistant", "x"), ("user", "f")]
    assert len(lines[6]["image"]) < 100


def test_tables_and_tars_are_read(pictures, tmp_path):
    with (pictures / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["url", "question"], ["0.png", "a, \n b"], ["2.png", "c"]])
    images = [{"bytes": png(0), "path": None}, {"bytes": None, "path": "1.png"}]
    parquet.write_table(
        pa.table({"image": images, "question": ["d", "e"], "score": [1.5, float("nan")]}), pictures / "t.parquet"
    )
    with tarfile.open(pictures / "t.tar", "w") as tar:
        for name, content in {
            "k.png": png(1),
            "k.json": b'{"question": "f"}',
            "l.json": b"[",
            "m.0.jpg": png(2),
            "m.txt": b".",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    sources = [pictures / "rows.csv", pictures / "t.parquet", pictures / "t.tar"]
    lines = ask(Double(caption), sources, tmp_path / "out.jsonl", Asking("p"))
    answers = [line.get("answer", "").replace(" yes", "") for line in lines]
    assert answers == [
        f"a, \n b? {size(0)}",
        f"c? {size(2)}",
        f"d? {size(0)}",
        f"e? {size(1)}",
        f"f? {size(1)}",
        "",
        f"p? {size(2)}",
    ]
    assert [line["score"] for line in lines[2:4]] == [1.5, None]
    assert lines[4]["key"] == "k"
    assert "l.json: not a JSON object" in lines[5]["error"]


def test_a_torn_tar_gives_its_samples_and_an_error(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for number in range(2):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(png(number))
            tar.addfile(info, io.BytesIO(png(number)))
    content = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(content[: 1024 + len(png(0)) // 512 * 512 + 600])
    lines = ask(Double(caption), tmp_path / "t.tar", tmp_path / "out.jsonl", Asking("p"))
    assert lines[0]["answer"].startswith(f"p? {size(0)}")
    assert len(lines) == 2
    assert lines[1]["error"]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ("{", "not JSON"),
        ("[1]", "no row: must be a JSON object"),
        ({"image": "0.png"}, "no question: the row has none of question, prompt, text; give --prompt"),
        ({"question": 5}, "no question: 5 is no text; write it in quotes"),
        ({"messages": "hi"}, "no messages: hi is no list; give one of role and content"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no question: no message is from a user"),
        ({"messages": ["hi"]}, "no message: hi is no object"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "unknown role: tool; known: human"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "is neither text nor image_url"),
        ({"question": "q", "image": ["0.png", "1.png"]}, "several images: 2 are given"),
        ({"question": "q", "image": {"a": 1}}, "is neither a path nor a file's content"),
        (
            {"question": "q", "image": "none.png"},
            r"image: .*none.png cannot be read \(.*\); give its folder by --images",
        ),
        ({"question": "q", "image": "../x.png"}, "path out of the folder"),
        ({"question": "q", "image": "https://example.org/x.png"}, "is a URL; download it, or give --allow-urls"),
        ({"question": "q", "image": "data:image/png;base64,%%"}, "is not base64"),
        ({"question": "q", "image": "data:image/png;base64,é"}, "is not base64"),
        (f'{{"question": "q", "deep": {"[" * 600}{"]" * 600}}}', "^the row is nested too deep; make it flatter$"),
        ({"question": "q" * 900}, "too long: 900 [+] 512"),
    ],
)
def test_what_cannot_be_asked_has_a_line_that_says_why(row, error, pictures, tmp_path):
    source = pictures / "rows.jsonl"
    source.write_text(
        '{"question": "a"}\n' + (row if isinstance(row, str) else json.dumps(row)) + '\n{"question": "z"}\n'
    )
    first, bad, last = ask(Double(caption), source, tmp_path / "out.jsonl")
    assert re.search(error, bad["error"])
    assert (first["answer"].split()[0], last["answer"].split()[0]) == ("a?", "z?")


def test_prompts_stand_around_questions_and_urls_are_read_where_allowed(pictures, tmp_path):
    rows = [{"question": "<image>\nred", "image": f"file://{pictures}/0.png"}, {}, {"question": "b", "image": "memory://none"},
            {"messages": [{"role": "user", "content": "c"}]}]  # fmt: skip
    asking = Asking("Is {question} there?", "be short", has_urls=True)
    double = Double(lambda messages, _: " / ".join(f"{one.role} {one.text}" for one in messages))
    lines = ask(double, jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl", asking)
    assert lines[0]["answer"] == "system be short / user Is red there?"
    assert "no question: the row has none to put into --prompt, which has {question}" in lines[1]["error"]
    assert re.search(r"image: memory://none cannot be read \(.*\); check the URL", lines[2]["error"])
    assert lines[3]["answer"] == "system be short / user Is c there?"


def test_many_are_on_their_way_and_each_has_its_own_seed(tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", [{"question": f"{number}"} for number in range(40)])
    double = Double(caption, 0.002, dropped=3)
    lines = ask(double, rows, tmp_path / "out.jsonl", sampling=Sampling(seed=2**63 - 10, stop=("!",)), in_flight=5)
    assert [line["answer"].split("?")[0] for line in lines] == [f"{number}" for number in range(40)]
    assert double.most == 5
    assert len({sampling.seed for sampling in double.sampled}) == 40
    assert {sampling.stop for sampling in double.sampled} == {("!", "###")}
    assert lines[0]["dropped"] == 3


def test_a_killed_process_goes_on_to_the_same_file_and_asks_no_answered_question_again(tmp_path, seed):
    rng = random.Random(seed)
    rows = [{"question": f"q{number}" + "x" * rng.randrange(6)} for number in range(60)]
    rows[rng.randrange(60)] = {"image": "none.png", "question": "bad"}
    source = jsonl(tmp_path / "rows.jsonl", rows)
    whole = tmp_path / "whole.jsonl"
    answer_all(Double(caption), Path("m"), sources_of([source]), whole, Asking(), Sampling())
    target, log = tmp_path / "out.jsonl", tmp_path / "asked"
    log.touch()
    command = [sys.executable, answers_double.__file__, str(source), str(target), str(log)]
    kills, kept = 0, 0
    while not target.exists():
        child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
        goal = kept + rng.randrange(1, 40)
        while child.poll() is None and journal_lines(target) < goal:
            time.sleep(0.002)
        if kills < 2 and child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        assert child.wait(timeout=60) in (0, -signal.SIGKILL)
        kept = journal_lines(target)
        if not target.exists() and rng.random() < 0.5:  # the half of a line
            with (tmp_path / "out.jsonl.partial").open("ab") as file:
                file.write(b'59\t{"question": "q59')
    assert target.read_bytes() == whole.read_bytes()
    assert kills
    asked = log.read_text().split()
    assert set(asked) == {row["question"] for row in rows[:] if "image" not in row}
    assert len(asked) <= 59 + 4 * kills  # what was on its way when it was killed
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl", "out.jsonl.settings.json"]


def journal_lines(target: Path) -> int:
    journal = target.with_name(f"{target.name}.partial")
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def test_a_finished_file_is_left_alone_and_other_settings_are_refused_by_name(tmp_path, monkeypatch):
    source, target = (
        jsonl(tmp_path / "rows.jsonl", [{"question": "a"}, {"image": "none.png", "question": "b"}]),
        tmp_path / "o",
    )
    ask(Double(caption), source, target)
    double = Double(caption)
    ask(double, source, target)
    assert double.asked == []
    with pytest.raises(DataError, match=r"was begun with sampling.temperature=0.0, not 0.5; give another --output, or"):
        ask(double, source, target, sampling=Sampling(temperature=0.5))
    with pytest.raises(DataError, match=r"was begun with asking.prompt=, not p;"):
        ask(double, source, target, Asking("p"))
    monkeypatch.setattr(Double, "name", "other")
    with pytest.raises(DataError, match=r"was begun with model.name=double, not other;"):
        ask(double, source, target)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"was begun with model\.files="):
        ask(double, source, target, model_path=tmp_path)
    jsonl(source, [{"question": "c"}])
    with pytest.raises(DataError, match=r"was begun with input.*rows.jsonl="):
        ask(double, source, target)
    settings = tmp_path / "o.settings.json"
    settings.write_text("{")
    with pytest.raises(DataError, match=r"o.settings.json: cannot be read .* to begin anew"):
        ask(double, source, target)
    settings.unlink()
    with pytest.raises(DataError, match=r"o: is there, and o.settings.json is not, which says what made it"):
        ask(double, source, target)


def test_a_file_of_answers_has_one_writer_and_says_what_it_cannot_write(tmp_path):
    target = tmp_path / "o"
    with AnswerFile(target, {}) as file:
        with pytest.raises(DataError, match="another process writes it; wait for that"):
            AnswerFile(target, {})
        file.add(1, {"answer": "\ud800"})
        file.add(0, {"error": "e"})
        file.finish()
        assert (file.errors, file.is_whole) == (1, True)
    assert [json.loads(line) for line in target.read_text().splitlines()] == [{"error": "e"}, {"answer": "\ud800"}]
    target.write_text("{}\nx\n")
    with pytest.raises(DataError, match=r"line 2 is not a JSON object .* though it was finished; remove it"):
        AnswerFile(target, {})
    with pytest.raises(DataError, match=r"cannot be written \(File exists\)"):
        AnswerFile(target / "x", {})
    full = AnswerFile(tmp_path / "p", {})
    full._journal = open("/dev/full", "r+b")  # noqa: SIM115
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        full.add(0, {})


def test_what_ends_the_model_ends_the_run_and_keeps_what_is_done(tmp_path):
    source, target = jsonl(tmp_path / "rows.jsonl", [{"question": f"{n}"} for n in range(20)]), tmp_path / "o"

    class Lost(Double):
        def submit(self, prompt, sampling, listen):
            if len(self.asked) == 6:
                listen(SphinxError("rank 1 is lost"))
                return None
            return super().submit(prompt, sampling, listen)

    with pytest.raises(SphinxError, match="rank 1 is lost"):
        ask(Lost(caption, 0.001), source, target, in_flight=1)
    assert not target.exists()
    double = Double(caption)
    assert len(ask(double, source, target)) == 20
    assert double.asked == [f"{n}" for n in range(5, 20)]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("none", "none: no such file or folder; give .jsonl"),
        ("x.txt", "x.txt: of no known kind; give .jsonl"),
        ("empty", "empty: holds nothing to ask about; give .jsonl"),
        ("x.parquet", "x.parquet: is no parquet file"),
        ("x.csv", "x.csv: is no table .* save it as UTF-8"),
    ],
)
def test_an_input_that_is_none_is_refused(name, error, tmp_path):
    (tmp_path / "empty").mkdir()
    for file in ("x.txt", "x.parquet", "x.csv"):
        (tmp_path / file).write_bytes(b"\xff\xfe\x00 no")
    with pytest.raises(DataError, match=error):
        ask(Double(caption), tmp_path / name, tmp_path / "out.jsonl")


def test_inputs_in_another_order_are_other_ones(tmp_path):
    sources = [jsonl(tmp_path / f"{name}.jsonl", [{"question": name}]) for name in "ab"]
    assert [line["question"] for line in ask(Double(caption), sources, tmp_path / "o")] == ["a", "b"]
    with pytest.raises(DataError, match=r"was begun with input\.0: .*a\.jsonl="):
        ask(Double(caption), sources[::-1], tmp_path / "o")


def test_of_a_run_the_newest_checkpoint_counts(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [{"question": "a"}])
    first, second = (tmp_path / "run" / "checkpoints" / name_of(step) for step in (1, 2))
    for folder in (first, second):
        folder.mkdir(parents=True)
    (first / MANIFEST).write_text("{}")
    ask(Double(caption), source, tmp_path / "o", model_path=tmp_path / "run")
    (second / "weights").write_text("not complete yet")
    ask(Double(caption), source, tmp_path / "o", model_path=tmp_path / "run")
    (second / MANIFEST).write_text("{}")
    with pytest.raises(DataError, match=r"was begun with model\.(files|path)="):
        ask(Double(caption), source, tmp_path / "o", model_path=tmp_path / "run")


def test_a_folder_with_shards_is_those(tmp_path):
    for name in ("b.tar", "a.tar"):
        tarfile.open(tmp_path / name, "w").close()
    (tmp_path / "x.png").write_bytes(png(0))
    assert [source.path.name for source in sources_of([tmp_path])] == ["a.tar", "b.tar"]
    assert sources_of([tmp_path])[0].count() is None


def test_the_command_says_how_many_answers_and_errors_there_are(pictures, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "load", lambda path, **options: Double(caption))
    words = ["generate", checkpoint, "--input", str(pictures), "--output", str(tmp_path / "o"), "--prompt", "p"]
    assert main([*words, "--temperature", "0.5", "--stop", "x"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'o'}: 3 answers, 1 errors\n"
    assert main([*words, "--temperature", "0.5", "--stop", "x"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'o'}: 3 answers, 1 errors, 4 of them from before\n"
    assert main([*words, "--temperature=-1"]) == 2
    assert "sampling.temperature=-1.0: must be at least 0" in capsys.readouterr().err
    assert main([*words, "--in-flight=0"]) == 2
    assert "--in-flight=0: must be at least 1" in capsys.readouterr().err


def test_an_input_that_goes_away_is_named(tmp_path):
    for name in ("x.csv", "x.jsonl"):
        (tmp_path / name).write_text("question\n")
        [source] = sources_of([tmp_path / name])
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=rf"{name}: cannot be read \(.*No such file.*\); check"):
            list(source.rows())
