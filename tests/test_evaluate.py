"""Benchmarks answered into a folder: order, kills, other models, bad pictures, and the report of all this."""

import json
import os
import random
import re
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from answers_double import Double
from evaluation_double import METRIC, begin, benchmark, read, reply, run, write

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation import scores
from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.exports import write_exports
from megatron_sphinx.evaluation.metrics.options import PAIRS
from megatron_sphinx.evaluation.pages import Heading, Paragraph, Plot, Table, html, markdown
from megatron_sphinx.evaluation.questions import digest_of, samples_of, sampling_of_protocol
from megatron_sphinx.evaluation.report import write_report
from megatron_sphinx.evaluation.results import read_results
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Sample, Verdict
from megatron_sphinx.evaluation.scores import scores_of
from megatron_sphinx.generation.requests import Sampling

KNOWN = {"tiny": benchmark(), "other": benchmark("other")}


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "data")
    return tmp_path / "data"


def files_of(folder: Path) -> dict[str, bytes]:
    """What an evaluation leaves, but for how long its runs took, and for what tells the time inside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "runs.jsonl" and path.suffix != ".xlsx"
    }


def test_questions_about_a_picture_are_asked_behind_each_other(data, tmp_path):
    double = Double(reply)
    done = run(data, tmp_path / "out", double)
    assert (done.report.answered, done.report.errors) == (12, 0)
    numbers = [asked.split()[2] for asked in double.asked]
    assert sum(one != other for one, other in pairwise(numbers)) == 3
    assert {one.max_new_tokens for one in double.sampled} == {5}
    lines = [json.loads(line) for line in (tmp_path / "out" / "tiny" / "answers.jsonl").read_text().splitlines()]
    assert all(len(line["size"]) == 2 and line["question"].endswith("?") for line in lines)


def test_protocols_differ_in_prompt_prefix_and_sampling(data, tmp_path):
    of = benchmark(answer_prefix={Protocol.ACCESSORY: " The answer is"})
    double = Double(reply)
    sampling = sampling_of_protocol(Protocol.ACCESSORY)
    run(data, tmp_path / "out", double, of=of, protocol=Protocol.ACCESSORY, sampling=sampling)
    assert set(double.prefixes) == {" The answer is"}
    assert all(asked.endswith("!") for asked in double.asked)
    assert {(one.temperature, one.top_p) for one in double.sampled} == {(0.1, 0.75)}
    assert [one.seed for one in double.sampled] == list(range(1, 13))
    other = Double(reply)
    run(data, tmp_path / "official", other, of=of, protocol=Protocol.OFFICIAL)
    assert set(other.prefixes) == {""}
    assert all(asked.endswith("?") for asked in other.asked)
    assert sampling_of_protocol(Protocol.OFFICIAL) == sampling_of_protocol(Protocol.PAPER) == Sampling()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"double": "identity"}, "out: was begun with model.precision=fp32, not bf16; give another --output"),
        ({"protocol": Protocol.OFFICIAL}, "out: was begun with protocol=paper, not official; give another --output"),
        ({"sampling": Sampling(temperature=0.5)}, "was begun with sampling.temperature=0.0, not 0.5; give another"),
        ({"limit": 3}, "was begun with limit=None, not 3; give another --output"),
    ],
)
def test_answers_of_another_model_or_by_other_rules_are_left_alone(data, tmp_path, change, message):
    run(data, tmp_path / "out", Double(reply))
    before = files_of(tmp_path / "out")
    other = Double(reply)
    if change.pop("double", None):
        other.identity = {"template": "double", "precision": "bf16"}
    with pytest.raises(DataError, match=message):
        run(data, tmp_path / "out", other, of=benchmark("other"), **change)
    assert files_of(tmp_path / "out") == before
    assert not other.asked


def test_other_questions_under_the_same_name_are_refused(data, tmp_path):
    run(data, tmp_path / "out", Double(reply))
    rows = data / "tiny" / "rows.json"
    rows.write_text(rows.read_text().replace("Is it", "Is this"))
    with pytest.raises(DataError, match="was begun with digest="):
        run(data, tmp_path / "out", Double(reply))
    with pytest.raises(
        DataError, match=r"answers other questions than those in .*data; give the --data that was asked"
    ):
        read_results(tmp_path / "out", benchmark(), data)


def test_duplicate_ids_and_no_samples_are_said(data):
    rows = json.loads((data / "tiny" / "rows.json").read_text())
    (data / "tiny" / "rows.json").write_text(json.dumps([*rows, rows[3]]))
    with pytest.raises(DataError, match="tiny has the id q3 twice; get its files anew"):
        samples_of(benchmark(), data)
    assert len(samples_of(benchmark(), data, 5)) == 5
    (data / "tiny" / "rows.json").write_text("[]")
    with pytest.raises(DataError, match="tiny has no samples; get its files anew"):
        samples_of(benchmark(), data)


def test_a_kill_at_any_time_changes_nothing(data, tmp_path):
    run(data, tmp_path / "whole", Double(reply))
    log, output = tmp_path / "log", tmp_path / "killed"
    process = begin(data, output, log)
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < random.randint(5, 9):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    asked = len(log.read_text().splitlines())
    assert os.waitpid(begin(data, output, log), 0)[1] == 0
    assert len(log.read_text().splitlines()) - asked < 12
    for folder in (tmp_path / "whole", output):
        write_report(folder, data, KNOWN)
    assert files_of(output) == files_of(tmp_path / "whole")


def test_what_cannot_be_asked_is_listed_and_not_counted(data, tmp_path):
    (data / "tiny" / "1.png").unlink()
    (data / "tiny" / "2.png").write_bytes(b"no picture")
    done = run(data, tmp_path / "out", Double(reply))
    assert (done.report.answered, done.report.errors) == (6, 6)
    written = write_report(tmp_path / "out", data, KNOWN)
    entry = json.loads((tmp_path / "out" / "report.json").read_text())["benchmarks"][0]
    assert (entry["asked"], entry["answered"], entry["scored"]) == (12, 6, 6)
    assert sorted("not an image" in why for why in entry["faults"].values()) == [False] * 3 + [True] * 3
    assert sum("1.png cannot be read" in why and "; put it there" in why for why in entry["faults"].values()) == 3
    assert "6 of 12 questions" in written.lines()[0]
    assert "6 could not be asked: q" in (tmp_path / "out" / "report.md").read_text()


def test_what_counts_together_with_it_is_left_out_too(data, tmp_path):
    """Pictures 0 and 1 are a pair; of the half that is left nobody can say whether it is right."""

    def pairs(folder: Path):
        for sample in read(folder):
            yield replace(sample, group=f"pair {int(sample.picture_id[0]) // 2}")

    paired = benchmark(read=pairs)
    (data / "tiny" / "1.png").unlink()
    run(data, tmp_path / "out", Double(reply), of=paired)
    written = write_report(tmp_path / "out", data, {"tiny": paired})
    assert "6 of 12 questions" in written.lines()[0]
    entry = json.loads((tmp_path / "out" / "report.json").read_text())["benchmarks"][0]
    assert (entry["answered"], entry["scored"]) == (9, 6)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "3 could not be asked, and 3 that count together with them are left out; intervals" in page


def test_the_report_stands_beside_the_paper_and_names_what_is_unfinished(data, tmp_path):
    write(tmp_path / "data", name="other", seed=5)
    out = tmp_path / "out"
    of = benchmark(table="Tiny", figure="whole")
    run(data, out, Double(reply), of=of)
    run(data, out, Double(reply), of=benchmark("other"))
    (out / "other" / "answers.jsonl").rename(out / "other" / "answers.jsonl.partial")
    known = {"tiny": of, "other": benchmark("other")}
    written = write_report(out, data, known, ("sphinx-1k", {"Tiny": 40.0, "Tiny accuracy": 50.0}))
    assert "not finished; run evaluate with the same settings again" in written.left_out["other"]
    content = json.loads((out / "report.json").read_text())
    (entry,) = content["benchmarks"]
    rows = {row["id"]: row["answer"] for row in json.loads((data / "tiny" / "rows.json").read_text())}
    lines = [json.loads(line) for line in (out / "tiny" / "answers.jsonl").read_text().splitlines()]
    right = [line["answer"].split()[0] == rows[line["id"]] for line in lines]
    assert entry["figures"]["accuracy"]["value"] == pytest.approx(100 * sum(right) / 12)
    assert entry["unparsed"] == sum(line["answer"] == "perhaps" for line in lines)
    assert (entry["figure"], entry["paper"]) == ("whole", {"whole": 40.0, "accuracy": 50.0})
    assert set(entry["parts"]["split"]) == {"a", "b"}
    assert sum(part["count"] for part in entry["parts"]["split"].values()) == 12
    page, table = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "sphinx-1k in its paper" in page
    assert "other is left out: " in page
    assert page.count("data:image/png;base64,") == 2
    assert len(list(out.glob("report_tiny_*.png"))) == 1
    assert "| Tiny \\| one |" in table
    assert content["settings"]["model"]["name"] == "double"
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "the paper has 40.00" in written.lines()[0]
    assert written.lines()[1].startswith("other: left out: ")


def test_answers_are_no_longer_than_a_quarter_of_what_a_model_takes(data, tmp_path):
    double = Double(reply)
    run(data, tmp_path / "out", double, of=benchmark(max_new_tokens=1024))
    assert {one.max_new_tokens for one in double.sampled} == {double.positions // 4}


def test_a_limit_is_said(data, tmp_path):
    run(data, tmp_path / "out", Double(reply), limit=5)
    write_report(tmp_path / "out", data, KNOWN)
    assert "Only the first 5 questions of each benchmark were asked." in (tmp_path / "out" / "report.md").read_text()


def test_folders_without_answers_are_refused(data, tmp_path):
    with pytest.raises(DataError, match=r"evaluation.json: cannot be read \(No such file.*give a folder of evaluate"):
        write_report(tmp_path, data, KNOWN)
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(DataError, match="does not say which model answered; give a folder of evaluate"):
        write_report(tmp_path, data, KNOWN)
    (tmp_path / "evaluation.json").write_text('{"model": {}}')
    with pytest.raises(DataError, match="has no answers to any benchmark; run evaluate first"):
        write_report(tmp_path, data, KNOWN)
    with pytest.raises(DataError, match=r"answers.jsonl.settings.json: cannot be read .* give a folder of evaluate"):
        read_results(tmp_path, benchmark(), data)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: cannot be written"):
        run(data, tmp_path / "file", Double(reply))


def test_what_cannot_be_reported_is_said_beside_what_can(data, tmp_path):
    write(data, name="other", seed=5)
    for of in KNOWN.values():
        run(data, tmp_path / "out", Double(reply), of=of)
    (data / "tiny" / "rows.json").unlink()
    written = write_report(tmp_path / "out", data, KNOWN)
    assert [entry.results.benchmark.name for entry in written.entries] == ["other"]
    assert "tiny lacks rows.json (https://example.org/rows); get it and put it there" in written.lines()[1]
    (data / "other" / "rows.json").unlink()
    with pytest.raises(DataError, match=r"other lacks rows.json"):
        write_report(tmp_path / "out", data, KNOWN)


def test_answers_of_another_model_are_not_reported_under_this_one(data, tmp_path):
    """As where a folder of answers was copied beside those of another evaluation."""
    write(data, name="other", seed=5)
    for of in KNOWN.values():
        run(data, tmp_path / "out", Double(reply), of=of)
    path = tmp_path / "out" / "tiny" / "answers.jsonl.settings.json"
    made = json.loads(path.read_text())
    for change, message in [
        ({"model": {**made["model"], "name": "B"}}, r"tiny: its answers were made with model\.name=.?B.?, not "),
        ({"protocol": "accessory"}, r"tiny: its answers were made with protocol=.?accessory.?, not .?paper"),
        ({"by_ranking": True}, "its answers were made with by_ranking=True, not None; evaluate into another --output"),
    ]:
        digest = digest_of(benchmark(), samples_of(benchmark(), data), Protocol({**made, **change}["protocol"]), data)
        path.write_text(json.dumps({**made, **change, "digest": digest}))
        written = write_report(tmp_path / "out", data, KNOWN)
        assert [entry.results.benchmark.name for entry in written.entries] == ["other"]
        assert re.search(message, written.lines()[1]), written.lines()


def test_damaged_answers_are_refused(data, tmp_path):
    run(data, tmp_path / "out", Double(reply))
    path = tmp_path / "out" / "tiny" / "answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for text, message in [
        ("".join(lines[:-1]), "has other ids than the questions; remove it and what is beside it"),
        ("".join([*lines[:-1], "{}\n"]), "line 12 is no answer; remove it and what is beside it"),
        ("".join([*lines[:-1], "{\n"]), r"answers.jsonl: cannot be read \(.*remove it and what is beside it"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_results(tmp_path / "out", benchmark(), data)
    path.unlink()
    with pytest.raises(DataError, match="is not there or not finished; run evaluate with the same settings again"):
        read_results(tmp_path / "out", benchmark(), data)
    settings = path.with_name("answers.jsonl.settings.json")
    settings.write_text("{}")
    with pytest.raises(DataError, match="does not say what was asked; give a folder of evaluate"):
        read_results(tmp_path / "out", benchmark(), data)


def judged_of(rng: random.Random, pictures: int, each: int) -> list[Judged]:
    samples = [
        Sample(id=f"{p}-{n}", picture=None, picture_id=str(p), fields={}, answers=("yes",), group=str(p))
        for p in range(pictures)
        for n in range(rng.randint(1, each))
    ]
    values = [float(rng.random() < 0.6) for _ in samples]
    return [Judged(Answered(sample=one, text=""), Verdict(v, "x")) for one, v in zip(samples, values, strict=True)]


def test_means_are_drawn_as_if_they_were_computed_anew(monkeypatch):
    """The short way for means gives what the long way gives, and draws of groups are told from copies of them."""
    judged = judged_of(random.Random(3), 30, 4)

    def mean(those):
        return {"mean": 100 * sum(one.verdict.value for one in those) / len(those)}

    short = scores_of(judged, mean)
    monkeypatch.setattr(scores, "_factors", lambda *_: {})
    long = scores_of(judged, mean)
    assert short.replicates == long.replicates == scores.REPLICATES
    one, other = short.figures["mean"], long.figures["mean"]
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))
    whole = scores_of(judged, METRIC.figures).figures["whole"]
    assert whole.low < whole.value < whole.high


def test_intervals_are_those_of_a_share(monkeypatch):
    """One answer a picture: the interval of the mean is that of a binomial share."""
    rng = random.Random(1)
    samples = [Sample(id=str(n), picture=None, picture_id=str(n), fields={}) for n in range(400)]
    judged = [Judged(Answered(sample=one, text=""), Verdict(float(rng.random() < 0.3), None)) for one in samples]
    found = scores_of(judged, lambda those: {"mean": float(np.mean([one.verdict.value for one in those]))})
    share = found.figures["mean"]
    half = 1.96 * (share.value * (1 - share.value) / 400) ** 0.5
    assert share.high - share.low == pytest.approx(2 * half, rel=0.15)
    assert (found.unparsed, found.judged) == (400, 400)


def test_pairs_of_pictures_are_drawn_as_pairs():
    """The interval of a share of pairs is that of a binomial share; both halves are right in 36 % of them."""
    rng = random.Random(2)
    samples = [Sample(id=str(n), picture=None, picture_id=str(n), fields={}, group=str(n // 2)) for n in range(600)]
    judged = [Judged(Answered(sample=one, text=""), Verdict(float(rng.random() < 0.6), "x")) for one in samples]
    share = scores_of(judged, PAIRS.figures).figures["pair accuracy"]
    assert share.low < share.value < share.high
    half = 196 * (share.value / 100 * (1 - share.value / 100) / 300) ** 0.5
    assert share.high - share.low == pytest.approx(2 * half, rel=0.15)


def test_work_is_bounded_and_numbers_that_are_none_are_left_out(monkeypatch):
    monkeypatch.setattr(scores, "_MOST_WORK", 40_000)
    judged = judged_of(random.Random(4), 100, 3)
    found = scores_of(judged, lambda those: {**METRIC.figures(those), "none": float("nan")})
    assert set(found.figures) == {"accuracy", "whole"}
    assert found.replicates == max(100, 40_000 // len(judged))
    assert scores_of([], METRIC.figures).figures == {}


def test_submissions_and_tables_are_written(data, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    of = benchmark(submission=lambda answered: {"answers.json": json.dumps([one.text for one in answered])})
    run(data, tmp_path / "out", Double(lambda messages, picture: f"{reply(messages, picture)}\tand\x01\nmore"), of=of)
    results = read_results(tmp_path / "out", of, data)
    written = {path.name: path for path in write_exports(results, tmp_path / "out" / "tiny")}
    assert len(json.loads(written["answers.json"].read_text())) == 12
    sheet = openpyxl.load_workbook(written["double_Tiny_one.xlsx"]).active
    rows = list(sheet.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "answer", "prediction")
    assert rows[1][0] == results.answered[0].sample.id
    assert rows[1][3] == results.answered[0].text.replace("\x01", "")
    import pandas

    table = pandas.read_csv(written["double_Tiny_one.tsv"], sep="\t")
    assert list(table["prediction"]) == [one.text for one in results.answered]


def test_a_benchmark_that_only_its_server_judges_has_no_score(data, tmp_path):
    def without_answers(folder):
        return (Sample(**{**vars(sample), "answers": ()}) for sample in read(folder))

    def fails(*_):
        raise AssertionError("judged without answers")

    metric = Metric("server", fails, METRIC.figures)
    of = benchmark(read=without_answers, metric=metric, submission=lambda answered: {"x.json": str(len(answered))})
    run(data, tmp_path / "out", Double(reply), of=of)
    written = write_report(tmp_path / "out", data, {"tiny": of})
    assert written.lines() == ["Tiny | one: waits for its server"]
    assert (tmp_path / "out" / "tiny" / "submission" / "x.json").read_text() == "12"
    assert "send it what is in the folder submission" in (tmp_path / "out" / "report.md").read_text()


def test_pages_say_the_same_in_both_forms():
    blocks = [Heading("A <b>", 1), Paragraph("x & y"), Table(("a", "b"), (("1|2", "3\n4"),)), Plot("p.png", "it", b"z")]
    assert markdown(blocks) == "# A <b>\n\nx & y\n\n| a | b |\n| --- | ---: |\n| 1\\|2 | 3 4 |\n\n![it](p.png)\n"
    page = html(blocks)
    assert "<title>A &lt;b&gt;</title>" in page
    assert '<th class="word">a</th><th>b</th>' in page
    assert '<td class="word">1|2</td>' in page
    assert 'src="data:image/png;base64,eg=="' in page
