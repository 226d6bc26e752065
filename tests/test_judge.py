"""Judges: what they are asked, what nonsense costs, kills, failing servers, and the commands around all of this."""

import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from answers_double import Double
from evaluation_double import reply, run, write

from megatron_sphinx.__main__ import main
from megatron_sphinx.errors import DataError, SphinxError
from megatron_sphinx.evaluation import judge as judging
from megatron_sphinx.evaluation.benchmarks.registry import named, names
from megatron_sphinx.evaluation.judge import judge, judgings_in
from megatron_sphinx.evaluation.report import write_report
from megatron_sphinx.evaluation.results import read_results
from megatron_sphinx.serving import model as models
from megatron_sphinx.serving.client import Server, ServerError

SKILLS = ("rec", "ocr", "rec,ocr")


class Judge(BaseHTTPRequestHandler):
    """Answers as `reply` of its server says, by the question and the temperature."""

    def log_message(self, *_):
        """Keep quiet."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.keys.append(self.headers["Authorization"])
        status, text = self.server.reply(asked["messages"][-1]["content"], asked["temperature"])
        choices = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]
        body = {"id": "c", "object": "chat.completion", "created": 0, "model": "j", "choices": choices}
        if status == 204:
            status, body = 200, {**body, "choices": []}
        content = json.dumps(body if status == 200 else {"error": {"message": text}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def judged_by(answer) -> Iterator[tuple[str, ThreadingHTTPServer]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.reply, server.asked, server.keys = answer, [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def mm_vet(data: Path, count: int = 6) -> dict[str, dict]:
    write(data, count, 1, name="mm_vet")
    (data / "mm_vet" / "rows.json").unlink()
    (data / "mm_vet" / "images").mkdir()
    rows = {}
    for number in range(count):
        (data / "mm_vet" / f"{number}.png").rename(data / "mm_vet" / "images" / f"{number}.png")
        rows[f"v1_{number}"] = {
            "imagename": f"{number}.png", "question": f"What | is\n{number}?", "answer": f"{number} <AND> x",
            "imagesource": "", "capability": SKILLS[number % 3].split(","),
        }  # fmt: skip
    (data / "mm_vet" / "mm-vet.json").write_text(json.dumps(rows))
    return rows


@pytest.fixture
def answered(tmp_path):
    """The data, and a folder with a model's answers to MM-Vet."""
    data, folder = tmp_path / "data", tmp_path / "out"
    mm_vet(data)
    run(data, folder, Double(reply), of=named("mm_vet"))
    return data, folder


def test_a_judge_is_asked_as_mm_vet_does_and_kept(answered, capsys, monkeypatch):
    data, folder = answered
    monkeypatch.setenv("JUDGE_KEY", "secret")

    def answer(content, temperature):
        number = content.rstrip(" |").split("\n")[-1].split("?")[0].split()[-1]
        if number == "3":
            return 200, "I cannot say"
        return 200, "hm" if number == "4" and temperature < 0.9 else f"0.{number} of 1"

    with judged_by(answer) as (url, server):
        words = ["judge", str(folder), "--data", str(data), "--endpoint", url, "--judge-model", "gpt/4",
                 "--key-env", "JUDGE_KEY"]  # fmt: skip
        assert main(words) == 0
        assert set(server.keys) == {"Bearer secret"}
        tries = Counter(tuple(sorted({one["temperature"] for one in server.asked if f"{n}?" in
                                      one["messages"][-1]["content"].split("\n")[-1]})) for n in range(6))  # fmt: skip
        assert tries == {(0.0,): 4, (0.0, 0.5, 1.0, 1.5, 2.0): 1, (0.0, 0.5, 1.0): 1}
        first = next(one["messages"][-1]["content"] for one in server.asked)
        assert first.split("\n")[-1].startswith("What | is ")
        assert first.endswith(" | ")
        count = len(server.asked)
        assert main(words) == 0
        assert len(server.asked) == count, "what is judged is not asked again"
    out = capsys.readouterr().out
    assert "mm_vet: 6 judged by gpt/4; 1 of 6 were not understood: v1_3" in out
    entry = json.loads((folder / "report.json").read_text())["benchmarks"][0]
    assert (entry["judge"], entry["scored"], entry["asked"], entry["not_understood"]) == ("gpt/4", 5, 6, ["v1_3"])
    assert entry["figures"]["total"]["value"] == pytest.approx(100 * (0.0 + 0.1 + 0.2 + 0.4 + 0.5) / 5)
    assert entry["figures"]["rec,ocr"]["value"] == pytest.approx(100 * (0.2 + 0.5) / 2)
    assert "1 were judged by words that were not understood: v1_3." in (folder / "report.md").read_text()


def test_a_judge_that_fails_is_gone_on_with(answered):
    data, folder = answered
    results = read_results(folder, named("mm_vet"), data)
    asked = []

    def fails(messages, _):
        asked.append(messages[-1]["content"])
        if len(asked) == 4:
            raise ServerError("the judge went home; call it back")
        return "0.5"

    with pytest.raises(SphinxError, match="the judge went home"):
        judge(results, folder / "mm_vet", fails, "j", threads=1)
    made = judge(results, folder / "mm_vet", fails, "j", threads=1)
    assert (len(made.judged), made.not_understood) == (6, ())
    assert str(made) == "6 judged by j"
    assert len(asked) == 7, "no answer is judged twice"
    assert judgings_in(folder / "mm_vet", results) == [made]


def test_several_judges_stand_beside_each_other(answered):
    data, folder = answered
    results = read_results(folder, named("mm_vet"), data)
    assert write_report(folder, data, {"mm_vet": named("mm_vet")}).lines() == ["MM-Vet: waits for a judge"]
    for model, score in {"a/b": "1.0", "a_b": "0.5"}.items():
        judge(results, folder / "mm_vet", lambda *_, score=score: score, model)
    lines = write_report(folder, data, {"mm_vet": named("mm_vet")}).lines()
    assert sorted(line.split(" (")[0] for line in lines) == [
        "MM-Vet, judged by a/b: total 100.00", "MM-Vet, judged by a_b: total 50.00"
    ]  # fmt: skip


def test_judgements_of_other_answers_and_damaged_ones_are_refused(answered):
    data, folder = answered
    results = read_results(folder, named("mm_vet"), data)
    judge(results, folder / "mm_vet", lambda *_: "1", "j")
    path = folder / "mm_vet" / judging.FOLDER / "j.jsonl"
    with pytest.raises(DataError, match=r"was begun with asked=.*remove j.jsonl and what is beside it"):
        judge(replace(results, answered=results.answered[1:]), path.parents[1], lambda *_: "1", "j")
    lines = path.read_bytes()
    path.write_bytes(lines[:-10])
    with pytest.raises(DataError, match=r"j.jsonl: cannot be read \(.*remove it, and judge again"):
        judgings_in(folder / "mm_vet", results)
    path.write_bytes(lines.split(b"\n")[0])
    with pytest.raises(DataError, match=r"j.jsonl: is of other answers; remove it, and judge again"):
        judgings_in(folder / "mm_vet", results)
    path.with_name("j.jsonl.settings.json").write_text("{}")
    with pytest.raises(DataError, match=r"j.jsonl: what made it cannot be read; remove it, and judge again"):
        judgings_in(folder / "mm_vet", results)
    run(data, folder, Double(reply), of=named("mm_vet"))


def test_llava_bench_is_judged_by_the_official_rule(tmp_path):
    data, rng = tmp_path / "data", random.Random(2)
    write(data, 4, 1, name="llava_bench")
    home = data / "llava_bench"
    (home / "images").mkdir()
    kinds = ["conv", "detail", "complex", "conv"]
    scores = [(rng.randint(5, 10), rng.randint(1, 10)) for _ in kinds]
    files: dict[str, list[dict]] = {"questions": [], "context": [], "answers_gpt4": []}
    for n, kind in enumerate(kinds):
        (home / f"{n}.png").rename(home / "images" / f"{n}.png")
        files["questions"].append({"image": f"{n}.png", "text": f"why {n}", "category": kind, "question_id": n})
        files["context"].append({"id": f"{n}", "image": f"{n}.png", "caption": f"caption {n}"})
        files["answers_gpt4"].append({"question_id": n, "text": f"reference {n}"})
    for name, rows in files.items():
        (home / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rule = {f"llava_bench_{kind}": {"role": "Helper", "prompt": f"Rule of {kind}"} for kind in kinds}
    (home / "rule.json").write_text(json.dumps(rule))
    run(data, tmp_path / "out", Double(lambda messages, _: f"to {messages[-1].text}"), of=named("llava_bench"))
    results = read_results(tmp_path / "out", named("llava_bench"), data)

    def answer(messages, temperature):
        text = messages[-1]["content"]
        n = int(text.split("caption ")[1][0])
        assert text == (
            f"[Context]\ncaption {n}\n\n[Question]\nwhy {n}\n\n[Helper 1]\nreference {n}\n\n[End of Helper 1]\n\n"
            f"[Helper 2]\nto why {n}\n\n[End of Helper 2]\n\n[System]\nRule of {kinds[n]}\n\n"
        )
        assert temperature == pytest.approx(0.2)
        return "{} {}\nBecause.".format(*scores[n])

    judge(results, tmp_path / "out" / "llava_bench", answer, "j")
    write_report(tmp_path / "out", data, {"llava_bench": named("llava_bench")})
    entry = json.loads((tmp_path / "out" / "report.json").read_text())["benchmarks"][0]
    relative = 100 * sum(ours for _, ours in scores) / sum(theirs for theirs, _ in scores)
    assert entry["figures"]["relative score"]["value"] == pytest.approx(relative)


@pytest.mark.parametrize(
    ("status", "message"), [(401, "no such key"), (503, "busy"), (204, "sent no answer of j; see whether it speaks")]
)
def test_a_server_that_refuses_is_told_in_a_line(status, message):
    with judged_by(lambda *_: (status, message)) as (url, server):
        with pytest.raises(ServerError, match=message):
            Server(url).ask("j", [{"role": "user", "content": "?"}], {"temperature": 0}, retries=1)
        assert len(server.asked) == (2 if status == 503 else 1)


def test_what_the_commands_refuse(answered, checkpoint, capsys, monkeypatch):
    data, folder = answered
    given = ["--data", str(data), "--endpoint", "http://127.0.0.1:1/v1", "--judge-model", "j"]
    evaluate = ["evaluate", "--data", str(data), "--output", str(folder)]
    for words, message in [
        (["judge", str(data), *given], "holds no evaluation; give the --output of evaluate"),
        (["judge", str(folder), *given[2:], "--data", "/nowhere"], "--data=/nowhere: no such folder; give the --data"),
        (["judge", str(folder), *given, "--key-env", "NO_SUCH"], "--key-env=NO_SUCH: the environment has no such"),
        (["judge", str(folder), *given, "--threads", "0"], "--threads=0"),
        (["judge", str(folder), *given[:2], "--judge-model", "j", "--endpoint", "x"], "--endpoint=x: is no address"),
        (["evaluate", "pope", "--data", "/nowhere"], "--data=/nowhere: no such folder; give the one that holds"),
        (["evaluate", "pope", "--data", str(data)], "--output: is not given; name the folder"),
        ([*evaluate, "pope"], "--model: is not given; name a checkpoint"),
        ([*evaluate, "pope", "--model", "/nowhere"], "/nowhere: no such folder; give the folder of a checkpoint"),
        ([*evaluate, "--model", checkpoint], "NAME: no benchmark is given; give some, or all; see evaluate --list"),
        ([*evaluate, "popo", "--model", checkpoint], "popo: is no benchmark; did you mean pope?"),
        ([*evaluate, "pope", "--model", checkpoint, "--limit", "0"], "--limit=0"),
        ([*evaluate, "mm_vet", "--model", checkpoint, "--top-p", "2"], "sampling.top_p=2"),
        ([*evaluate, "pope", "--model", checkpoint], "pope lacks coco_pope_random.json"),
        ([*evaluate, "--report-only", "--paper", "sphinx-k"], "--paper=sphinx-k: unknown; did you mean sphinx-"),
        ([*evaluate, "--report-only", "--paper", "?"], "--paper=?: unknown; known: sphinx, sphinx-1k"),
    ]:  # fmt: skip
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert message in error, words
        assert error.count("\n") == 1
    empty = data / "empty"
    empty.mkdir()
    assert main(["evaluate", "all", "--data", str(empty), "--output", "o", "--model", checkpoint]) == 2
    assert "holds all files of no benchmark; see evaluate --list" in capsys.readouterr().err


def test_without_the_library_of_the_protocol_one_line_says_what_to_install(answered, capsys, monkeypatch):
    data, folder = answered
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "megatron_sphinx.serving.client")
    words = ["judge", str(folder), "--data", str(data), "--endpoint", "http://127.0.0.1:1/v1", "--judge-model", "j"]
    assert main(words) == 2
    assert "openai is not installed; pip install 'megatron-sphinx[evaluation]'" in capsys.readouterr().err


def test_a_folder_without_judged_answers_is_refused(tmp_path, capsys):
    write(tmp_path / "data")
    run(tmp_path / "data", tmp_path / "out", Double(reply))
    words = ["judge", str(tmp_path / "out"), "--data", str(tmp_path / "data"), "--endpoint", "http://127.0.0.1:1/v1"]
    assert main([*words, "--judge-model", "j"]) == 2
    assert "has whole answers of no judged benchmark; evaluate mm_vet or llava_bench first" in capsys.readouterr().err
    with pytest.raises(DataError, match="pope: is not judged by a model; judged are llava_bench, mm_vet"):
        judging.judge_prompt_of(type("R", (), {"benchmark": named("pope")})())


def test_evaluate_answers_and_reports(checkpoint, tmp_path, capsys, monkeypatch):
    mm_vet(tmp_path / "data")
    double = Double(reply)
    monkeypatch.setattr(models, "load", lambda path, **options: double)
    words = ["evaluate", "all", "--data", str(tmp_path / "data"), "--model", checkpoint, "--output",
             str(tmp_path / "out"), "--paper", "sphinx-2k", "--protocol", "accessory", "--seed", "7"]  # fmt: skip
    assert main(words) == 0
    assert [(one.temperature, one.seed) for one in double.sampled] == [(0.1, 7 + number) for number in range(6)]
    out = capsys.readouterr().out
    assert "mm_vet: 6 answers, 0 that could not be asked, in " in out
    assert "MM-Vet: waits for a judge" in out
    assert main(["evaluate", "--list", "--data", str(tmp_path / "data")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(names())
    assert [line.split()[0] for line in lines if line.endswith(": is there")] == ["mm_vet"]
    assert any("coco_pope_random.json" in line and "github.com/AoiDragon/POPE" in line for line in lines)
