"""The samples of a validation: who is shown what, in every layout, and what a reader finds in samples.md."""

import json

import pytest
import torch.distributed as dist
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sphinx.run import assembly
from megatron_sphinx.training import metrics
from megatron_sphinx.training.sample_book import SampleBook, Shown


class FakeAnswerer:
    """Answers with what it was given; and how many views it was shown, by the ranks that are shown any."""

    def __init__(self, context, _model) -> None:
        self.groups = context.groups

    def answer(self, questions, features):
        mine = [(number, len(part), bool(part.isnan().any())) for number, part in features.items()]
        found = [mine] * self.groups.layout.language
        dist.all_gather_object(found, mine, group=self.groups.language)
        shown = {number: facts for part in found for number, *facts in part}
        return [f"{question.shown.question}: {shown[number]}" for number, question in enumerate(questions)]


@pytest.mark.parametrize(
    ("language", "layout", "encoder"),
    [
        (2, {}, 1),
        pytest.param(2, {"parallel.pipeline": 2}, 0, marks=pytest.mark.slow),
        pytest.param(2, {"parallel.tensor": 2, "parallel.sequence": True}, 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["conversations", "pairs"])
def test_the_first_samples_are_answered(train, held_out, monkeypatch, kind, language, layout, encoder):
    """Each is shown to the ranks of its replica, pictures that cannot be read as NaN; training goes on unchanged."""
    monkeypatch.setattr(assembly, "build_answerer", FakeAnswerer)
    overrides = {f"validation.{kind}": str(held_out / kind), "validation.samples": 5, "validation.interval": 2,
                 "data.sequence_length": 300, "parallel.encoder": encoder} | layout  # fmt: skip
    run = train(language + encoder, overrides)
    lines = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    bad = [kind == "pairs" and number == 0 for number in range(5)]
    question = "What is it?" if kind == "conversations" else ""
    views = [0 if kind == "conversations" and number == 4 else 1 for number in range(5)]
    wanted = [f"{question}: {[view, is_bad]}" for view, is_bad in zip(views, bad, strict=True)]
    assert lines[0]["answers"] == lines[1]["answers"] == wanted
    page = (run.folder / "samples.md").read_text()
    assert page.count("| truth | a ") == 5
    assert page.count("| step 3 |") == page.count("| step 2 |") == 5
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert len(events.Images("sample 1")) == len(events.Tensors("sample 1/text_summary")) == 2
    assert [line["step"] for line in metrics.read(run.folder / "metrics.jsonl")] == [0, 1, 2]


MIXTRAL = {"model.experts": 4, "model.experts_per_token": 2}


@pytest.mark.parametrize(
    ("model", "language", "layout"),
    [
        ({}, 2, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.encoder": 1}),
        (MIXTRAL, 2, {"parallel.expert": 2}),
        pytest.param({}, 2, {"parallel.pipeline": 2}, marks=pytest.mark.slow),
        pytest.param({}, 4, {"parallel.tensor": 2, "parallel.pipeline": 2}, marks=pytest.mark.slow),
        pytest.param(
            MIXTRAL,
            4,
            {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2, "parallel.expert": 2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_answers_are_the_same_in_every_layout(train, held_out, model, language, layout):
    """Five pictures and conversations, one picture that cannot be read, after each step; and the loss is unchanged."""
    asked = {"validation.conversations": str(held_out / "conversations"), "validation.samples": 5,
             "validation.interval": 1, "data.sequence_length": 300, "model.init_std": 0.3} | model  # fmt: skip
    runs = [train(1, asked), train(language + layout.get("parallel.encoder", 0), asked | layout)]
    lines = [[json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()] for run in runs]
    assert lines[0] == lines[1]
    answers = [line["answers"] for line in lines[0]]
    assert len(answers) == 3
    assert all(len(set(each)) > 1 for each in answers), "all answers are alike"
    unasked = train(1, model | {"data.sequence_length": 300, "model.init_std": 0.3})
    losses = [[line["loss"] for line in metrics.read(run.folder / "metrics.jsonl")] for run in (unasked, runs[0])]
    assert losses[0] == losses[1]


class Board:
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.pictures, self.texts = {}, {}

    def add_image(self, tag, img_tensor, global_step, *, dataformats):
        assert dataformats == "HWC"
        self.pictures[tag, global_step] = img_tensor.shape

    def add_text(self, tag, text_string, global_step):
        self.texts[tag, global_step] = text_string


def test_a_page_of_answers_grows_and_is_cut_back(tmp_path):
    samples = [
        Shown("validation.pairs=x: pair 0", Image.new("RGB", (1000, 500), "red"), "", "a <b>bold</b> | *one*\n# two"),
        Shown("validation.pairs=x: pair 1", None, "Why?", "so"),
    ]
    book, board = SampleBook(tmp_path, 0, samples), Board()
    for step, answers in ((9, ["first", ""]), (19, ["older", "x"])):
        book.write(step, answers, board)
    again = SampleBook(tmp_path, 15, samples)
    again.write(19, ["newer\nline", "y"], board)
    page = (tmp_path / "samples.md").read_text()
    assert (
        page.index("| step 20 | newer<br>line |")
        < page.index("| step 10 | first |")
        < page.index("| question | Why? |")
    )
    assert "older" not in page
    assert r"| truth | a &lt;b&gt;bold&lt;/b&gt; &#124; \*one\*<br># two |" in page
    assert page.count("![](samples/000.png)") == 1
    assert Image.open(tmp_path / "samples" / "000.png").size == (224, 112)
    assert not (tmp_path / "samples" / "001.png").exists()
    assert board.pictures == {("sample 0", 9): (112, 224, 3), ("sample 0", 19): (112, 224, 3)}
    assert board.texts["sample 1", 19] == "**question** Why?\n\n**truth** so\n\n**answer** y"
