"""Validation: the loss of held-out data, the same in every layout, and nothing of the training changed by it."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch

from megatron_sphinx import config as configuration
from megatron_sphinx.checkpoint.store import load_weights
from megatron_sphinx.prepare.conversations import index_conversations
from megatron_sphinx.prepare.pairs import index_shards, write_shards
from megatron_sphinx.prepare.text import write_text
from megatron_sphinx.training import metrics
from megatron_sphinx.training.step import Trainer
from tests.conftest import COLOURS, draw

STEADY = {"optimizer.epsilon": 1e-4}  # else rounding decides where a gradient is nearly 0
EXPERTS = {"model.experts": 4, "model.experts_per_token": 2, "model.balance_loss_coefficient": 0.1}
EXACT = ("loss", "loss_pairs", "loss_text", "gradient_norm", "sample_ids", "bad_pairs", "learning_rate")
PAIRS = 14


@pytest.fixture(scope="session")
def held_out(tiny, tmp_path_factory):
    """14 more pictures with captions, one of which cannot be read; conversations on them; 12 more texts."""
    folder = tmp_path_factory.mktemp("held_out")
    (folder / "pictures").mkdir()
    dialogs = []
    for number in range(PAIRS):
        image, caption = draw(1000 + number)
        image.save(folder / "pictures" / f"{number:03d}.png")
        (folder / "pictures" / f"{number:03d}.txt").write_text(caption)
        turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": caption}]
        picture = {} if number % 5 == 4 else {"image": f"{number:03d}.png"}
        dialogs.append({"id": f"h{number}", **picture, "conversations": turns})
    (folder / "dialogs.json").write_text(json.dumps(dialogs))
    rng = np.random.default_rng(7)
    texts = [" ".join(rng.choice(COLOURS, int(rng.integers(5, 60)))) for _ in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    [shard] = shards = write_shards(folder / "pictures", folder / "shards", PAIRS)
    index_shards(shards, folder / "pairs", tiny.tokenizer)
    content = bytearray(shard.read_bytes())
    place = content.index(b"IDAT")
    content[place : place + 40] = bytes(40)
    shard.write_bytes(content)
    write_text([folder / "text.jsonl"], folder / "text", tiny.tokenizer)
    index_conversations(
        [folder / "dialogs.json"], folder / "conversations", tiny.tokenizer, images=folder / "pictures",
        samples_per_shard=PAIRS,
    )  # fmt: skip
    return folder


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
    assert wanted[0]["validation_loss_text"] is None and wanted[0]["validation_loss"] > 0


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
    everything = {"data.pairs_per_step": PAIRS, "training.steps": 1, "data.text_tokens_per_step": 0}
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
