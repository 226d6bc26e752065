"""What is trained is a configuration: what is not stays to the last bit, in any layout, over checkpoints and stages."""

import shutil

import pytest
import torch
from test_parity import Result, train_and_keep_gradients

from megatron_sphinx import config as configuration
from megatron_sphinx.checkpoint.store import load_weights
from megatron_sphinx.errors import ConfigError

MIXTRAL = {"model.experts": 4, "model.balance_loss_coefficient": 0.1}
VIEWS = {"vision.views": 5, "vision.padding": "corner", "vision.skip_padding_views": True, "data.sequence_length": 160}


def is_trained(name: str, train: str) -> bool:
    return train == "all" or name.startswith("vision.") is (train == "projections")


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {}),
        (3, {"parallel.encoder": 1}),
        (2, {"parallel.tensor": 2, "parallel.sequence": True}),
        (2, {"parallel.pipeline": 2}),
        (2, {"parallel.expert": 2} | MIXTRAL),
    ],
    ids=["one rank", "two replicas and an encoder", "tensor", "pipeline", "experts"],
)
@pytest.mark.parametrize("train_only", ["projections", "language"])
def test_what_is_not_trained_stays_and_the_rest_has_its_gradient(
    start_ranks, tiny, tmp_path, world, layout, train_only
):
    if train_only == "projections" and "parallel.pipeline" in layout:
        pytest.skip("refused: the second stage would have nothing to train")

    def run(name: str, ranks: int, overrides: dict) -> Result:
        config = tiny.write(tmp_path / f"{name}.yaml", VIEWS | {"training.steps": 3} | overrides)
        config.with_suffix("").mkdir()
        started = start_ranks(ranks, lambda: train_and_keep_gradients(config))
        assert started.wait() == [0] * ranks, started.text()
        return Result(config.with_suffix(""))

    model = {key: value for key, value in layout.items() if key.startswith("model.")}
    everything = run("everything", 1, model)
    part = run("part", world, layout | {"training.train": train_only})
    wanted = {name: value for name, value in everything.gradients[0].items() if is_trained(name, train_only)}
    assert part.gradients[0].keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(part.gradients[0][name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    one = run("one", 1, model | {"training.train": train_only})
    assert part.weights.keys() == everything.weights.keys()
    drawn = run("drawn", 1, model | {"optimizer.learning_rate": 0, "optimizer.minimum_learning_rate": 0}).weights
    for name, value in part.weights.items():
        assert torch.equal(value, drawn[name]) is not is_trained(name, train_only), name
        torch.testing.assert_close(value, one.weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("train_only", ["projections", "language"])
def test_a_second_stage_begins_with_the_first_and_resumes_exactly(train, train_only):
    """In bf16: what is frozen keeps the fp32 values that the first stage left, whatever the layout."""
    first = train(1, {"training.precision": "bf16"}, "first")
    left = load_weights(first.folder)
    second = {"model.weights": str(first.folder), "training.train": train_only, "training.precision": "bf16"}
    train(2, second, "whole")
    run = first.folder.with_name("whole")
    weights = load_weights(run)
    shutil.rmtree(run / "checkpoints" / "step_00000003")  # as if it was killed after the second step
    train(2, second, "whole")
    again = load_weights(run)
    moved = train(2, second | {"training.steps": 4, "parallel.tensor": 2}, "whole")  # another layout goes on
    for name, value in load_weights(moved.folder).items():
        assert torch.equal(weights[name], again[name])
        for found in (value, weights[name]):
            assert torch.equal(found, left[name]) is not is_trained(name, train_only), name


def test_another_choice_of_what_is_trained_is_another_run(train):
    train(1, {"training.steps": 1}, "run")
    refused = train(1, {"training.train": "language"}, "run", status=2)
    message = (
        "was made with training.train=all, this run has language; use the configuration and the data in its run folder"
    )
    assert message in refused.ranks.text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"parallel.pipeline": 2}, r"parallel\.pipeline=2: with training\.train=projections all but the first stage"),
        ({"data.pairs_per_step": 0}, r"training\.train=projections: the run takes no pairs and no conversations"),
    ],
)
def test_projections_alone_need_images_and_one_stage(tiny, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        configuration.load(tiny.write(tmp_path / "c.yaml", {"training.train": "projections"} | overrides))


def test_a_stage_with_more_views_draws_its_skip_token(train):
    """A checkpoint of a model that looks at one view has none; everything else is the checkpoint's."""
    first = train(1, {"training.steps": 1}, "first")
    left = load_weights(first.folder)
    still = {"optimizer.learning_rate": 0, "optimizer.minimum_learning_rate": 0, "training.steps": 1}
    second = train(2, VIEWS | still | {"model.weights": str(first.folder), "parallel.tensor": 2}, "second")
    assert ", a new skip token" in second.ranks.text(0)
    weights = load_weights(second.folder)
    assert weights.keys() - left.keys() == {"vision.skip_token"}
    assert all(torch.equal(weights[name], value) for name, value in left.items())
