"""Validation: the loss of held-out data, the same in every layout, and nothing of the training changed by it."""

import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.store import load_weights
from megatron_sphinx.data.validation import HeldOut
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.sizing import dry_run
from megatron_sphinx.stage.schedule import Schedule
from megatron_sphinx.training import metrics
from megatron_sphinx.training.step import Trainer
from tests.conftest import HELD_OUT

STEADY = {"optimizer.epsilon": 1e-4}  # else rounding decides where a gradient is nearly 0
EXPERTS = {"model.experts": 4, "model.experts_per_token": 2, "model.balance_loss_coefficient": 0.1}
EXACT = ("loss", "loss_pairs", "loss_text", "gradient_norm", "sample_ids", "bad_pairs", "learning_rate")


@pytest.fixture
def validated(held_out):
    """The section of a configuration with pairs and text."""
    return {
        "validation.pairs": str(held_out / "pairs"),
        "validation.text": str(held_out / "text"),
        "validation.interval": 2,
        "validation.steps": 2,
    }


def validations(run) -> list[dict]:
    """The lines of a run's validations."""
    return metrics.read(run.folder / "metrics.jsonl", of_validations=True)


def assert_alike(found: list[dict], wanted: list[dict]) -> None:
    """Lines of validations are equal but for the last bits of the losses, and the time that it took."""
    assert len(found) == len(wanted) > 0
    for line, other in zip(found, wanted, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"validation_seconds"}:
            value = other[name]
            assert line[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


@pytest.fixture(scope="module")
def references():
    """What one rank computes, by what is validated."""
    return {}


LAYOUTS = [
    pytest.param(2, {"parallel.tensor": 2, "parallel.sequence": True}, 1, {}, id="TP2+SP and an encoder rank"),
    pytest.param(2, {"parallel.pipeline": 2}, 0, {}, id="PP2"),
    pytest.param(4, {"parallel.pipeline": 2}, 2, {}, id="DP2xPP2 and two", marks=pytest.mark.slow),
    pytest.param(2, {}, 1, EXPERTS, id="Mixtral DP2 and an encoder rank"),
    pytest.param(2, {"parallel.expert": 2}, 0, EXPERTS, id="Mixtral EP2", marks=pytest.mark.slow),
    pytest.param(
        4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2}, 1, EXPERTS,
        id="Mixtral TP2+SPxPP2 and an encoder rank", marks=pytest.mark.slow,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("language", "layout", "encoder", "model"), LAYOUTS)
def test_the_loss_is_the_same_in_every_layout(train, validated, references, language, layout, encoder, model):
    given = STEADY | validated | model
    key = json.dumps(model)
    if key not in references:
        references[key] = validations(train(1, given | {"data.micro_batch_rows": 3}, "one"))
    wanted = references[key]
    assert [line["step"] for line in wanted] == [1, 2]
    assert all(line["validation_bad_pairs"] == 1 and line["validation_target_tokens_text"] > 100 for line in wanted)
    found = train(language + encoder, given | layout | {"parallel.encoder": encoder}, "many")
    assert_alike(validations(found), wanted)


@pytest.mark.parametrize("language", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_conversations_are_validated_on_with_skipped_views(train, held_out, references, language):
    """A run on pairs is validated on conversations: each gives as many samples a step."""
    given = STEADY | {
        "validation.conversations": str(held_out / "conversations"), "vision.views": 5, "vision.padding": "corner",
        "vision.skip_padding_views": True, "training.steps": 1, "data.sequence_length": 400,
    }  # fmt: skip
    wanted = validations(train(1, given, "one"))
    assert_alike(validations(train(language + 1, given | {"parallel.encoder": 1}, "many")), wanted)
    assert wanted[0]["validation_loss_text"] is None
    assert wanted[0]["validation_loss"] > 0


def test_nothing_of_the_training_is_changed_by_it(train, validated):
    """Losses, norms and the order of the data, and at the end the weights and the random numbers, bit for bit."""
    overrides = {"parallel.encoder": 1, "training.steps": 4, "checkpoint.interval": 4} | EXPERTS
    without, with_it = train(2, overrides, "without"), train(2, overrides | validated, "with")
    steps = metrics.read(with_it.folder / "metrics.jsonl")
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    for line, other in zip(steps, without.metrics, strict=True):
        assert {name: line[name] for name in EXACT} == {name: other[name] for name in EXACT}
        assert line["feature_bytes"] == other["feature_bytes"]
    weights, others = (load_weights(run.folder / "checkpoints") for run in (with_it, without))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert len(validations(with_it)) == 2


def test_the_loss_is_what_a_step_of_training_has_on_the_same_data(train, held_out, validated):
    """Weights that one run ends with have the loss of its last validation in the first step of another."""
    everything = {"data.pairs_per_step": HELD_OUT, "training.steps": 1, "data.text_tokens_per_step": 0}
    given = {name: value for name, value in validated.items() if name != "validation.text"} | {"validation.steps": 1}
    first = train(1, everything | given | {"loss.text_weight": 0.5}, "first")
    weights = next((first.folder / "checkpoints").glob("step_*"))
    second = train(
        1, everything | {"data.pairs": str(held_out / "pairs"), "data.max_bad_share": 1, "model.weights": str(weights)},
        "second",
    )  # fmt: skip
    [found], [wanted] = validations(first), second.metrics
    assert found["validation_loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found["validation_target_tokens_pairs"] == wanted["target_tokens_pairs"]
    assert found["validation_bad_pairs"] == wanted["bad_pairs"] == 1


@pytest.fixture
def interrupted(train, monkeypatch):
    """`interrupted(call, number, world, …)` trains; the first rank sends itself a signal in a validation."""

    def start(call: int, number: signal.Signals, world: int, overrides: dict):
        calls, evaluate = [], Trainer.evaluate

        def evaluate_and_kill(self, plan, batches, known):
            calls.append(1)
            if len(calls) == call and os.environ["RANK"] == "0":
                os.kill(os.getpid(), number)
                time.sleep(0.2)  # a thread hears of it
            return evaluate(self, plan, batches, known)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "evaluate", evaluate_and_kill)
            _, ranks = train.start(world, overrides)
            return ranks.wait()

    return start


@pytest.mark.parametrize(
    ("call", "number", "statuses", "encoder"),
    [
        pytest.param(1, signal.SIGTERM, [75], 0, id="stopped"),
        pytest.param(5, signal.SIGKILL, [-9], 0, id="killed in the last", marks=pytest.mark.slow),
        pytest.param(4, signal.SIGTERM, [75, 75], 1, id="stopped in the last, with an encoder rank"),
    ],
)
def test_one_that_is_interrupted_is_made_again(train, validated, interrupted, call, number, statuses, encoder):
    """Whichever of the steps' worth it was in; and what comes of all is what an uninterrupted run has."""
    three = {"data.pairs_per_step": 4, "validation.steps": 3}
    overrides, validated = {"parallel.encoder": encoder, "checkpoint.interval": 3}, validated | three
    assert interrupted(call, number, len(statuses), overrides | validated) == statuses
    again = train(len(statuses), overrides | validated)
    whole = train(len(statuses), overrides | validated, "whole")
    steps, others = (metrics.read(run.folder / "metrics.jsonl") for run in (again, whole))
    assert [{name: line[name] for name in EXACT} for line in steps] == [
        {name: line[name] for name in EXACT} for line in others
    ]
    assert [line["step"] for line in validations(again)] == [1, 2]
    assert_alike(validations(again), validations(whole))
    assert "validation after step 3  loss" in again.ranks.text(0)
    assert train(len(statuses), overrides | validated).metrics == again.metrics  # nothing is owed any more


def refusal(train, overrides: dict) -> str:
    """What a run is refused with: its last line."""
    return train(1, overrides, status=2).ranks.text().splitlines()[-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"validation.pairs": "{h}/none"}, "validation.pairs={h}/none: {h}/none/index.json: No such file"),
        (
            {"validation.pairs": "{h}/conversations"},
            "is an index of conversations; give it as validation.conversations",
        ),
        ({"validation.text": "{h}/none"}, "validation.text={h}/none: {h}/none.bin is missing"),
        ({"validation.text": "{h}/pairs"}, "validation.text={h}/pairs: damaged index.json"),
        ({"validation.pairs": "{t}/pairs"}, "validation.pairs={t}/pairs: is what data.pairs={t}/pairs trains on"),
        ({"validation.text": "{t}/text/000000"}, "validation.text={t}/text/000000: is what data.text={t}/text trains"),
        (
            {"validation.pairs": "{h}/pairs", "validation.steps": 3},
            "validation.steps=3: take 18 of validation.pairs, which has 14; use fewer steps",
        ),
    ],
)
def test_bad_data_is_refused_by_name(train, tiny, held_out, overrides, message):
    places = {"h": held_out, "t": tiny.folder}
    given = {name: value.format(**places) if isinstance(value, str) else value for name, value in overrides.items()}
    assert message.format(**places) in refusal(train, given)


def test_a_copy_of_what_is_trained_on_is_refused(train, tiny, tmp_path):
    """Wherever it lies, its content is the same."""
    shutil.copytree(tiny.folder / "text", tmp_path / "copy")
    assert "is what data.text=" in refusal(train, {"validation.text": str(tmp_path / "copy")})


def test_weighted_sources_that_give_too_much_are_named(tiny, held_out, train):
    sources = [{"path": str(held_out / "pairs"), "weight": 1}, {"path": str(held_out / "pairs"), "weight": 20}]
    message = refusal(train, {"validation.pairs": sources, "data.pairs_per_step": 25})
    assert (
        "validation.steps=1: take 24 of validation.pairs.1, which has 14; use fewer steps, or other weights" in message
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["validation.pairs=a", "validation.conversations=b"],
            "validation.conversations: validation.pairs are given too",
        ),
        (["validation.samples=2"], "validation.samples=2: there are neither validation.pairs nor"),
        (
            ["validation.text=a", "data.text_tokens_per_step=0"],
            "validation.text: .* which takes no text; leave this out",
        ),
        (["validation.pairs=a", "data.pairs_per_step=0"], "validation.pairs: .* takes no pairs and no conversations"),
        (["validation.interval=0"], "validation.interval=0: must be at least 1"),
        (["validation.steps=0"], "validation.steps=0: must be at least 1"),
        (["validation.text=[{path: a, weight: 1}, b]"], "validation.text: some of the sources have no weight"),
    ],
)
def test_a_section_that_cannot_be_is_refused(tiny, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        configuration.load(tiny.write(tmp_path / "run.yaml"), overrides)


def test_small_sources_are_taken_whole(train, held_out):
    """A step of a validation takes what there is where that is less than a step of the training takes."""
    overrides = {"validation.pairs": str(held_out / "pairs"), "data.pairs_per_step": 20, "training.steps": 1}
    run = train(1, overrides)
    [line] = validations(run)
    assert line["validation_bad_pairs"] == 1
    assert "validation: every 1000 steps and at the end, on 1 x (14 samples, 0 text tokens)" in run.ranks.text()


def test_the_check_opens_what_is_validated_on(tiny, tmp_path, validated, run_ranks):
    config = tiny.write(tmp_path / "run.yaml", validated)

    ranks = run_ranks(1, lambda: main(["train", str(config), "--check"]))
    assert "validation: every 2 steps and at the end, on 2 x (6 samples, 150 text tokens)" in ranks.text()


def test_plans_count_it(tiny, tmp_path, validated, capsys):
    """Its work beside that of the training."""
    config = tiny.write(tmp_path / "run.yaml", validated)
    assert main(["plan", "sizes", str(config), "--json"]) == 0
    share = json.loads(capsys.readouterr().out)["validation"]["language_flops_over_training"]
    assert share == pytest.approx(1 / 3)  # of as many steps, each a forward without a backward
    assert main(["plan", "sizes", str(tiny.write(config)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["validation"] == "none"


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_validation_holds_less_than_a_step(tiny, tmp_path, validated, run_ranks, rank):
    path = tiny.write(tmp_path / "run.yaml", validated | {"parallel.pipeline": 2, "parallel.encoder": 1})
    config = configuration.load(path)

    def check() -> None:
        counted = dry_run.count(config, ParallelLayout(world=3, config=config.parallel), rank).rows()
        held = counted["bytes held: weights"] + counted["bytes held: optimizer"]
        assert held < counted["bytes at the peak of a validation"] < counted["bytes at the peak"]

    run_ranks(1, check)


def line_of(step: int, **values: float | None) -> dict:
    """The line of a validation behind a step."""
    names = ("loss", "loss_pairs", "loss_text", "seconds")
    return {"step": step} | {f"validation_{name}": values.get(name) for name in names}


def test_reports_have_it_in_all_files(tmp_path, capsys):
    step = {"step": 3, "loss": 5.0, "loss_pairs": 5.0, "loss_text": None, "gradient_norm": 1.0, "step_seconds": 2.0,
            "tokens_per_second": 9.0, "exposed_encoder_seconds": 0.0, "data_wait_seconds": 0.0}  # fmt: skip
    reporter = metrics.Reporter(
        tmp_path, start=3, steps=10, interval=1, validations_left=lambda done: 10 // 4 - done // 4
    )
    reporter.write(step)
    reporter.write_validation(line_of(3, loss=4.5, loss_pairs=4.5, seconds=60.0))
    reporter.write(step | {"step": 4})
    reporter.close()
    out = capsys.readouterr().out
    assert "validation after step 4  loss 4.5000  pairs 4.5000  text -  in 60.0 s" in out
    assert "ETA 00:00:12" in out  # nothing is known of validations
    assert "ETA 00:01:10" in out  # 5 steps of 2 s, and one validation
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("validation_loss")] == [(3, 4.5)]
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 4]
    assert metrics.is_validated(tmp_path / "metrics.jsonl", 3)
    assert not metrics.is_validated(tmp_path / "metrics.jsonl", 4)


def test_half_a_line_is_no_validation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert not metrics.is_validated(path, 1)
    path.write_text('{"step": 0, "validation_loss": 1.0}\n{"step": 1, "validation_loss": 1.')
    assert (metrics.is_validated(path, 0), metrics.is_validated(path, 1)) == (True, False)


def test_the_plot_shows_it(tmp_path):
    """A dotted line of another shape for each validation that had a finite loss."""
    steps = [{"step": n, "loss_pairs": 3.0 - n / 10, "loss_text": None} for n in range(10)]
    for name, lines in (("without", []), ("with", [line_of(4, loss_pairs=2.0), line_of(9, loss_pairs=1.0)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps + lines))
        metrics.plot(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.png")
    without, with_it = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("without", "with"))
    assert without.shape == with_it.shape
    assert (without != with_it).any()


def test_validations_stand_between_steps_in_the_schedule():
    def plan(count: int) -> SimpleNamespace:
        return SimpleNamespace(micro_batches=[f"rows {n}" for n in range(count)])

    training = SimpleNamespace(step=lambda step: plan(1 + step % 2))
    held_out = HeldOut(None, SimpleNamespace(step=lambda step: plan(step + 1)), steps=2, interval=2, last_step=5)
    schedule = Schedule(training, "training", held_out, "held out")
    found = [(one.step, one.number, one.pixels) for one in schedule.between(2, 5, is_owed=True)]
    assert found == [
        *((1, n, "held out") for n in range(3)), (2, 0, "training"), (3, 0, "training"), (3, 1, "training"),
        *((3, n, "held out") for n in range(2, 5)), (4, 0, "training"), *((4, n, "held out") for n in range(1, 4)),
    ]  # fmt: skip
    assert [held_out.left(done) for done in range(6)] == [3, 3, 2, 2, 1, 0]
    assert not any(one.pixels == "held out" for one in Schedule(training, "training").between(0, 5))
