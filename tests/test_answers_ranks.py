"""A model on several ranks: the answers of one process, an end in which all leave, and ranks that are lost."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from test_answers import drawn, saved
from test_answers_sources import pictures_of

import megatron_sphinx
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.liveness import lifeline
from megatron_sphinx.serving.ranks import RankLostError

LAYOUTS = {
    "T1": (1, {}),
    "T2": (2, {"tensor": 2}),
    "P2": (2, {"pipeline": 2}),
    "T2xP2": (4, {"tensor": 2, "pipeline": 2}),
    "E2": (2, {"expert": 2}),
    "T2xE2": (2, {"tensor": 2, "expert": 2}),
    "D2": (2, {}),
    "T1+encoder": (2, {"encoder": 1}),
}
FAST = {("llama", "T2xP2"), ("llama", "T1+encoder"), ("mixtral", "T2xE2"), ("llama", "D2")}
EXPERTS = {"model.experts": 4, "model.experts_per_token": 2}


def leaving(work):
    """What a rank does, with the status that it ends with."""

    def run():
        try:
            return work()
        except SystemExit as ended:
            return ended.code

    return run


def ask(path, sizes, pictures, target: Path):
    """Load a model on this rank; the first one asks it, and writes what it says."""
    with megatron_sphinx.load(path, cache_bytes=2**20, **sizes) as model:
        questions = ["red or green?", "What?", "blue circle", "a", "a"]
        shown = [*pictures[:3], None, pictures[0]]
        answers = [
            *model.generate(questions, shown, max_new_tokens=12, top_logprobs=0),
            *model.generate(questions, shown, max_new_tokens=12, temperature=0.9, top_p=0.9, seed=4, top_logprobs=0),
        ]
        scores = model.score("red?", ["green", "a blue circle", "blue"], pictures[1])
        load = model.load()
        assert load.waiting == load.running == 0
        logprobs = [[one.logprob for one in answer.logprobs] for answer in answers]
        torch.save(([answer.tokens for answer in answers], logprobs, scores), target)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param(kind, layout, marks=() if (kind, layout) in FAST else pytest.mark.slow)
        for kind in ("llama", "mixtral")
        for layout in LAYOUTS
        if layout != "T1" and (kind == "mixtral" or "E2" not in layout)
    ],
)
def test_all_layouts_answer_alike(train, tiny, run_ranks, tmp_path, kind, layout):
    more = EXPERTS if kind == "mixtral" else {}
    run = train(
        1, {"training.steps": 2, "optimizer.learning_rate": 0.1, "vision.views": 5, "data.sequence_length": 400} | more
    )
    pictures = pictures_of(tiny)
    world, sizes = LAYOUTS[layout]
    if kind == "mixtral" and sizes.get("tensor", 1) > 1:
        sizes = {"expert": 1} | sizes
    run_ranks(1, lambda: ask(run.folder, {}, pictures, tmp_path / "alone.pt"))
    ranks = run_ranks(world, leaving(lambda: ask(run.folder, sizes, pictures, tmp_path / "together.pt")))
    assert "leaves" not in ranks.text()
    tokens, logprobs, scores = torch.load(tmp_path / "alone.pt")
    found_tokens, found_logprobs, found_scores = torch.load(tmp_path / "together.pt")
    assert found_tokens == tokens
    for one, other in zip([*found_logprobs, *found_scores], [*logprobs, *scores], strict=True):
        assert list(one) == pytest.approx(list(other), abs=1e-4)


@pytest.fixture
def plain(tiny, tmp_path):
    """The folder of a small Llama that two tensor ranks can share."""
    return saved(drawn(11, tiny.tokenizer.identity.vocabulary, layers=2), tiny, tmp_path / "llama")


def answer_until_lost(path, sizes, begun: Path):
    """Answer on the first rank until a rank is lost; say what the request heard."""
    with megatron_sphinx.load(path, cache_bytes=2**22, command="chat", **sizes) as model:
        while True:
            try:
                for _ in model.stream("red", max_new_tokens=300, ignore_eos=True):
                    begun.touch()
            except SphinxError as error:
                print(f"heard {type(error).__name__} of {error}", flush=True)  # noqa: T201
                with pytest.raises(RankLostError):
                    model.load()
                raise


@pytest.mark.parametrize(
    ("lost", "sizes"),
    [(1, {"pipeline": 2}), pytest.param(0, {"pipeline": 2}, marks=pytest.mark.slow),
     pytest.param(1, {}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_rank_that_is_killed_while_it_answers_is_named(plain, start_ranks, tmp_path, monkeypatch, lost, sizes):
    monkeypatch.setattr(lifeline, "_MOST_BEAT_SECONDS", 0.5)
    ranks = start_ranks(2, leaving(lambda: answer_until_lost(plain, sizes, tmp_path / "begun")))
    deadline = time.monotonic() + 20
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline, ranks.text()
        time.sleep(0.01)
    killed = time.monotonic()
    os.kill(ranks.pids[lost], signal.SIGKILL)
    assert sorted(ranks.wait()) == [-9, 1]
    assert time.monotonic() - killed < 20
    line = (
        rf"language rank {lost} on host \S+ has not been heard of for \d s \(killed, stopped, or its node is gone\), "
    )
    line += r"last in .*load it again"
    assert len(re.findall(rf"^megatron-sphinx chat: {line}$", ranks.text(), re.MULTILINE)) == 1
    assert len(re.findall(rf"^heard RankLostError of {line}$", ranks.text(), re.MULTILINE)) == (lost == 1)
    assert "Traceback" not in ranks.text()


def test_a_process_that_ends_lets_the_others_go(plain, start_ranks):
    def work():
        model = megatron_sphinx.load(plain, cache_bytes=2**22, pipeline=2)
        assert model.generate(["red"], max_new_tokens=3)
        import atexit

        atexit._run_exitfuncs()  # what the interpreter does at its end; a forked rank has none

    ranks = start_ranks(2, leaving(work))
    assert ranks.wait() == [0, 0], ranks.text()
