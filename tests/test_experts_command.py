"""The command that looks at experts, from questions to the page; and what it refuses, by a line."""

import json
import re
import shutil

import pytest
from evaluation_double import write_pope
from test_answers import drawn, saved
from test_answers_sources import pictures_of

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.evaluation.benchmarks.registry import named
from megatron_sphinx.evaluation.expert_data import DataSet
from megatron_sphinx.evaluation.expert_look import Looking, look
from megatron_sphinx.evaluation.expert_sweep import check_benchmarks
from megatron_sphinx.serving.model import load

EXPERTS = {"model.experts": 4, "model.experts_per_token": 2, "vision.views": 5, "data.sequence_length": 400}


@pytest.fixture
def asked(tiny, tmp_path):
    """A file of questions about pictures, one of them missing; and a folder of benchmarks."""
    rows = [{"image": path.name, "question": "What is it?"} for path in pictures_of(tiny)]
    rows += [{"image": "none.png", "question": "What?"}, {"question": "red?"}]
    shutil.copytree(tiny.folder / "pictures", tmp_path / "asked")
    file = tmp_path / "asked" / "captions.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_pope(tmp_path / "benchmarks", pictures_of(tiny), 4)
    return file, tmp_path / "benchmarks"


def test_a_look_at_the_experts_of_a_run(train, run_ranks, asked, tmp_path):
    run = train(1, {"training.steps": 2, "optimizer.learning_rate": 0.1} | EXPERTS)
    out = tmp_path / "look"
    file, benchmarks = asked
    words = ["experts", str(run.folder), "--data", f"words={file}", "--data", f"pope={benchmarks}",
             "--output", str(out), "--max-new-tokens", "3", "--cache-gib", "0.01"]  # fmt: skip
    pruning = ["--prune", "random", "usage", "reconstruction", "--keep", "3", "2", "--seeds", "2"]
    run_ranks(1, lambda: main([*words, *pruning]))
    found = json.loads((out / "experts.json").read_text())
    assert found["faults"] == 1
    assert found["data"].keys() == {"words", "pope"}
    words_seen = found["data"]["words"]
    assert words_seen["units"] == 5
    assert words_seen["tokens"]["generated"] <= 5 * 2
    each = configuration.load(run.folder / "config.yaml").vision.tokens_per_view
    assert words_seen["tokens"]["view 0"] == words_seen["tokens"]["view 4"] == 4 * each
    assert words_seen["uniform"] == {"share": 0.25, "any_repeated": 1 - 1 / 6}
    assert found["divergence"].keys() == {"words and pope", "words: image and text", "pope: image and text"}
    assert len(found["pruned"]) == 2 * (2 + 1 + 1)
    kept = json.loads((out / "kept_usage_3.json").read_text())
    assert kept["kept"] == found["pruned"]["usage_3"]
    assert (kept["model"], kept["method"], kept["seed"]) == ("run", "usage", None)
    page = (out / "experts.md").read_text()
    assert "| uniform | 25.0% | 25.0% | 1.000 |" in page
    assert {path.name for path in out.glob("*.png")} == {
        "usage_words.png", "usage_pope.png", "together_words.png", "together_pope.png", "evenness.png",
        "divergence.png",
    }  # fmt: skip
    ranks = run_ranks(1, lambda: main(["generate", str(run.folder), "--input", str(file), "--max-new-tokens", "2",
                                       "--output", str(tmp_path / "answers.jsonl"), "--cache-gib", "0.01",
                                       "--keep-experts", str(out / "kept_usage_3.json")]))  # fmt: skip
    assert "6 answers, 1 errors" in ranks.text() or "5 answers, 1 errors" in ranks.text()


@pytest.mark.slow
def test_a_sweep_evaluates_benchmarks_with_other_experts(train, run_ranks, asked, tmp_path):
    run = train(1, {"training.steps": 2, "optimizer.learning_rate": 0.1} | EXPERTS)
    out = tmp_path / "look"
    words = ["experts", str(run.folder), "--data", f"pope={asked[1]}", "--cache-gib", "0.01", "--output", str(out),
             "--max-new-tokens", "2", "--limit", "4", "--prune", "usage", "--keep", "2", "--sweep"]  # fmt: skip
    ranks = run_ranks(1, lambda: main(words))
    names = ["active_1", "active_2", "active_3", "active_4", "usage_2"]
    found = json.loads((out / "experts.json").read_text())["sweep"]
    assert [(one["name"], one["active"]) for one in found] == list(zip(names, (1, 2, 3, 4, 2), strict=True))
    assert all(f"{name}: POPE" in ranks.text() for name in names)
    told = json.loads((out / "sweep" / "usage_2" / "evaluation.json").read_text())["model"]
    assert told["keep_experts"] == str(" ".join(",".join(map(str, row)) for row in json.loads(
        (out / "kept_usage_2.json").read_text())["kept"]))  # fmt: skip
    assert "active_experts" not in json.loads((out / "sweep" / "active_2" / "evaluation.json").read_text())["model"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in out.rglob("answers.jsonl")}
    assert len(before) == len(names)
    run_ranks(1, lambda: main(words))
    assert {path: path.read_bytes() for path in out.rglob("answers.jsonl")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x.jsonl"], r"--data=x.jsonl: x.jsonl: no such file or folder; give \[NAME=\]PATH"),
        (["--data", "pope=."], r"pope lacks .*; get it and put it there"),
        (["--limit", "0"], "--limit=0: must be at least 1"),
        (["--seeds", "0"], "--seeds=0: must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens=0: must be at least 1"),
        (["--keep", "0", "--prune", "usage"], "--keep=0: must be at least 1"),
        (["--prune", "usage"], "--prune and --keep: one is given without the other; give both, or none"),
        (["--keep", "2"], "--prune and --keep: one is given without the other; give both, or none"),
        (
            ["--prune", "usage", "--keep", "2", "--active-experts", "1"],
            "--prune: chooses among all experts; leave out --keep-experts and --active-experts",
        ),
        (
            ["--prune", "reconstruction", "--keep", "2", "--expert", "2"],
            "--prune reconstruction: each rank must have all experts of its layers whole; divide by --pipeline alone",
        ),
        (["--active-experts", "0"], "active_experts=0: must be at least 1"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_at_once(words, message, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = [] if "--data" in words else ["--data", "."]
    assert main(["experts", checkpoint, "--output", "out", *data, *words]) == 2
    assert re.search(f"^megatron-sphinx experts: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_what_gives_no_score_is_not_swept(tmp_path):
    with pytest.raises(ConfigError, match="--sweep: x is no benchmark, so it has no score; give BENCHMARK=DIR"):
        check_benchmarks([DataSet("x", tmp_path)])
    with pytest.raises(ConfigError, match="--sweep: mm_vet is judged by another model; give benchmarks that are not"):
        check_benchmarks([DataSet("mm_vet", tmp_path, named("mm_vet"))])


def test_models_and_questions_without_anything_to_see_are_refused(run_ranks, tiny, tmp_path):
    vocabulary = tiny.tokenizer.identity.vocabulary
    dense = saved(drawn(1, vocabulary), tiny, tmp_path / "dense")
    mixture = saved(drawn(7, vocabulary, experts=4), tiny, tmp_path / "mixture")
    (tmp_path / "some.jsonl").write_text('{"question": "red?"}\n')
    none = tmp_path / "none.jsonl"
    none.write_text('{"question": "red?", "image": "none.png"}\n')
    end = ["--output", str(tmp_path / "out"), "--cache-gib", "0.01"]

    def check():
        how, asked = {"cache_bytes": 2**22}, DataSet.of(f"{none}")
        message = "dense: has no MoE experts to look at; give a mixture of experts"
        with load(dense, **how) as model, pytest.raises(ConfigError, match=message):
            look(model, [], Looking())
        message = r"--data=none=.*: no question can be asked \(.*\); give others"
        with load(mixture, **how) as model, pytest.raises(DataError, match=message):
            look(model, [asked], Looking())
        assert main(["experts", str(mixture), "--data", str(tmp_path / "some.jsonl"), "--prune", "usage", "--keep", "4",
                     *end]) == 2  # fmt: skip
        (tmp_path / "out").write_text("")
        assert main(["experts", str(mixture), "--data", str(tmp_path / "some.jsonl"), *end]) == 2

    text = run_ranks(1, check).text()
    assert "--keep=4: the model has 4 experts in each layer; keep fewer" in text
    assert "out: cannot be written" in text
