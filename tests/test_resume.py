"""Runs that are killed, stopped or taken up by another layout go on to the same bits."""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import Ranks
from test_training import identical, worst_difference

from megatron_sphinx import config as configuration
from megatron_sphinx.checkpoint.steps import complete
from megatron_sphinx.data.sources import make_planner, open_sources


def kill_after(folder: Path, ranks: Ranks, steps: int) -> None:
    """Kill all ranks, without warning, once so many steps are done and there is a checkpoint."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = (folder / "metrics.jsonl").read_text().count("\n") if (folder / "metrics.jsonl").exists() else 0
        if lines >= steps and complete(folder / "checkpoints"):
            break
        time.sleep(0.005)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGKILL)
    ranks.wait()


def test_killed_at_a_random_step_a_run_goes_on_to_the_same_bits(train):
    settings = {"training.steps": 9, "checkpoint.interval": 2, "parallel.encoder": 1}
    whole = train(3, settings, name="whole").metrics
    folder, ranks = train.start(3, settings, name="killed")
    last = random.SystemRandom().randint(2, 7)
    kill_after(folder, ranks, last)
    resumed = train(3, settings, name="killed")
    assert "resumed after step " in resumed.ranks.text(0), f"killed after {last} steps"
    assert identical(resumed.metrics, whole), f"killed after {last} steps"
    names = {path.name for path in resumed.folder.iterdir()} - {"metrics.superseded.jsonl"}  # where steps were redone
    assert sorted(names) == [
        "checkpoints",
        "config.yaml",
        "encoders.json",
        "ended.json",
        "loss.png",
        "metrics.jsonl",
        "startup.json",
        "tensorboard",
    ]


def test_five_kills_and_other_layouts_lose_and_repeat_no_sample(train, tiny):
    """Two epochs of the pairs, each part of the run with other replicas, encoders and workers."""
    settings = {"training.steps": 20, "checkpoint.interval": 1}
    rng = random.SystemRandom()
    said = []
    for kill_at in sorted(rng.sample(range(1, 19), 5)):
        encoders, replicas, workers = rng.randint(0, 2), rng.randint(1, 3), rng.randint(1, 3)
        said.append(f"{kill_at}: E={encoders} D={replicas} workers={workers}")
        layout = {"parallel.encoder": encoders, "data.workers": workers, "stage.lookahead": rng.randint(1, 5)}
        folder, ranks = train.start(encoders + replicas, settings | layout)
        kill_after(folder, ranks, kill_at)
    lines = train(2, settings).metrics
    assert [line["step"] for line in lines] == list(range(20)), said
    config = configuration.load(folder / "config.yaml")
    sources = open_sources(config.data, config.model)
    planner = make_planner(config.data, sources, config.model, config.vision, replicas=1, seed=config.run.seed)
    plans = [planner.step(step) for step in range(20)]
    assert [line["sample_ids"] for line in lines] == [plan.digest for plan in plans], said
    assert sorted(pair for plan in plans for pair in plan.samples) == sorted(2 * list(range(60)))
    times = Counter((item, at) for plan in plans for item, start, n in plan.text for at in range(start, start + n))
    epochs = 20 * config.data.text_tokens_per_step / sources.text.bounds[-1]
    assert set(times.values()) <= {int(epochs), int(epochs) + 1}


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)], ids=["TERM", "USR1"]
)
def test_a_signal_saves_and_exits_75_and_the_run_goes_on(train, number):
    settings = {"training.steps": 40, "checkpoint.interval": 100}
    whole = train(1, settings | {"parallel.encoder": 0}, name="whole").metrics
    folder, ranks = train.start(3, settings | {"parallel.encoder": 1, "parallel.tensor": 2}, name="stopped")
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        time.sleep(0.01)
    for pid in ranks.pids:
        os.kill(pid, number)
    assert ranks.wait() == [75, 75, 75], ranks.text()
    assert json.loads((folder / "ended.json").read_text()) == {"status": 75}
    (saved,) = complete(folder / "checkpoints")
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    assert saved.name == f"step_{done:08d}"
    assert done < 40
    resumed = train(
        4, settings | {"parallel.encoder": 2, "parallel.tensor": 2}, name="stopped"
    ).metrics  # encoders are free
    assert len(resumed) == 40
    assert worst_difference(resumed[:3], whole[:3]) < 1e-5
    assert [line["sample_ids"] for line in resumed] == [line["sample_ids"] for line in whole]


def test_only_the_newest_checkpoints_stay(train):
    run = train(1, {"training.steps": 7, "checkpoint.interval": 2, "checkpoint.keep": 3})
    assert [path.name for path in complete(run.folder / "checkpoints")] == [f"step_{n:08d}" for n in (4, 6, 7)]
    assert train(1, {"training.steps": 7}).metrics == run.metrics  # nothing is left to do


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.layers": 1}, r"was made with model.layers=2, this run has 1"),
        ({"run.seed": 4}, r"was made with run.seed=3, this run has 4"),
        ({"data.pairs_per_step": 5}, r"was made with data.pairs_per_step=6, this run has 5"),
        ({"training.precision": "bf16"}, r"was made with training.precision=fp32, this run has bf16"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused(train, overrides, message):
    train(1)
    refused = train(1, {"training.steps": 5} | overrides, status=2)
    assert message in refused.ranks.text()
    assert (
        "use the configuration and the data in its run folder, or start in another run.folder" in refused.ranks.text()
    )
