"""Losses that are not finite or spike: what stops a run, what is skipped, and what is remembered."""

import json
import os
import random
import re
import time
from pathlib import Path

import pytest
import torch
from test_faults import verdict
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.slices import read_tensors
from megatron_sphinx.checkpoint.steps import complete
from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.data.sources import make_planner, open_sources
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.training import step as training_step
from megatron_sphinx.training.divergence import DivergenceConfig, Watch
from megatron_sphinx.training.engine import Engine

SKIP = {"divergence.on_nan": "skip", "training.steps": 6, "checkpoint.interval": 1, "checkpoint.keep": 9}

MIXTRAL = {"model.experts": 4, "model.heads": 4, "model.groups": 4}

SPIKE = r"loss is \d+\.\d+, \d+\.\d standard deviations above the mean \d\.\d+ of the last \d trained steps"

EXACT = ("loss", "loss_pairs", "loss_text", "gradient_norm", "skipped", "sample_ids")


# runs


def poison(config: Path, pairs: list[int], factor: float | None) -> int:
    """Train, but micro-batches with these pairs have a loss so many times too high, or features that overflow."""
    mask_bad, loss = training_step.mask_bad, training_step.Forward._loss

    def overflow(batch, features):
        features, bad = mask_bad(batch, features)
        is_hit = torch.tensor([pair in pairs for pair in batch.samples], dtype=torch.bool)[batch.sample_of_view]
        return torch.where(is_hit[:, None], features * 1e38, features), bad

    def enlarge(self, batch, losses, *rest):
        return loss(self, batch, losses * (factor if set(pairs) & set(batch.samples) else 1.0), *rest)

    if factor is None:
        training_step.mask_bad = overflow
    else:
        training_step.Forward._loss = enlarge
    return main(["train", str(config)])


def pairs_of(config: Path, *steps: int) -> list[int]:
    """A pair of each of these steps."""
    read = configuration.load(config)
    sources = open_sources(read.data, read.model)
    planner = make_planner(read.data, sources, read.model, read.vision, replicas=1, seed=read.run.seed)
    return [random.choice(planner.step(step).samples) for step in steps]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def spoil(start_ranks, tiny, tmp_path):
    """`spoil(world, overrides, steps, value)` trains with a pair of each of these steps spoiled."""
    chosen: dict[tuple[int, ...], list[int]] = {}

    def train(
        world: int, overrides: dict, steps: tuple[int, ...], factor: float | None = None, status: int = 0, name="run"
    ):
        config = tiny.write(tmp_path / f"{name}.yaml", overrides)
        if steps not in chosen:
            chosen[steps] = pairs_of(config, *steps)
        ranks = start_ranks(world, lambda: poison(config, chosen[steps], factor))
        assert ranks.wait() == [status] * world, ranks.text()
        return config.with_suffix(""), ranks, chosen[steps]

    return train


def test_a_loss_that_is_not_finite_stops_the_run_unless_told_otherwise(spoil):
    _, ranks, pairs = spoil(1, {}, (1,), status=1)
    assert "megatron-sphinx train: step=1: loss is nan; weights unchanged; samples in it: pairs [" in verdict(ranks)
    assert str(pairs[0]) in re.findall(r"\d+", verdict(ranks).split("pairs [")[1].split("]")[0])
    assert "resume with a lower optimizer.learning_rate, or with divergence.on_nan=skip" in verdict(ranks)


def slowly(config: Path) -> int:
    """Train, but writing a checkpoint takes much longer than a step."""
    write = CheckpointStore._write_pieces

    def wait(self, *args):
        time.sleep(3.0)
        return write(self, *args)

    CheckpointStore._write_pieces = wait
    return main(["train", str(config)])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(start_ranks, tiny, tmp_path):
    settings = {"optimizer.learning_rate": 1e30, "optimizer.gradient_clip": 0.0, "optimizer.warmup_steps": 0}
    settings |= {"training.steps": 9, "checkpoint.interval": 1, "parallel.encoder": 1}
    config = tiny.write(tmp_path / "run.yaml", settings)
    ranks, folder = start_ranks(3, lambda: slowly(config)), config.with_suffix("")
    assert ranks.wait() == [1, 1, 1]
    assert json.loads((folder / "ended.json").read_text()) == {"status": 1}
    (said,) = [line for line in ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    assert "weights unchanged; samples in it: pairs [" in said
    step = int(said.split("step=")[1].split(":")[0])
    (newest, *_) = reversed(complete(folder / "checkpoints"))
    assert newest.name == f"step_{step:08d}"  # the save before it was completed, the step that failed left no trace
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == step


def overflow(config: Path) -> int:
    """Train, but in the second step a gradient is infinite though the loss is not."""
    backward, calls = Engine.backward, []

    def spoil(self, *args):
        backward(self, *args)
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            next(self.gradients())[1][0] = float("inf")

    Engine.backward = spoil
    return main(["train", str(config)])


def test_a_gradient_that_is_not_finite_changes_no_weight(start_ranks, tiny, tmp_path):
    config = tiny.write(tmp_path / "run.yaml", {"checkpoint.interval": 1})
    ranks = start_ranks(2, lambda: overflow(config))
    assert ranks.wait() == [1, 1]
    (said,) = [line for line in ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    assert "step=1: the gradient's norm is inf; weights unchanged; resume with a lower optimizer.learning_rate" in said
    assert [path.name for path in complete(config.with_suffix("") / "checkpoints")] == ["step_00000001"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_skipped_step_changes_nothing_and_is_logged(spoil, precision):
    folder, ranks, pairs = spoil(3, SKIP | {"parallel.encoder": 1, "training.precision": precision}, (0, 3))
    lines = lines_of(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if line["skipped"]] == [0, 3]
    assert [line["skipped"] for line in lines] == ["loss is nan", None, None, "loss is nan", None, None]
    assert all((line["loss"] is None) == bool(line["skipped"]) for line in lines)
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    logged = lines_of(folder / "skipped.jsonl")
    assert [(line["step"], line["reason"], line["loss"]) for line in logged] == [
        (n, "loss is nan", None) for n in (0, 3)
    ]
    for line, pair in zip(logged, pairs, strict=True):
        assert pair in line["pairs"]
        assert line["sample_ids"] == lines[line["step"]]["sample_ids"]
    assert "step 4 is skipped: loss is nan; its samples are in skipped.jsonl" in ranks.text(0)
    states = [states_of(path) for path in complete(folder / "checkpoints")]
    for step in range(1, 6):
        same = [torch.equal(states[step][name], states[step - 1][name]) for name in states[step]]
        assert all(same) if step == 3 else not all(same)


def states_of(path: Path) -> dict[str, torch.Tensor]:
    """The whole weights and moments of a checkpoint."""
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    shapes = {name: about.size for name, about in saved.items() if hasattr(about, "size")}
    assert any(name.startswith("exp_avg_sq/") for name in shapes)
    return read_tensors(path, shapes)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"parallel.tensor": 2, "parallel.sequence": True}),
        (4, {"parallel.pipeline": 2, "parallel.expert": 2, **MIXTRAL}),
    ],
    ids=str,
)
def test_every_layout_skips_the_same_steps(spoil, world, layout):
    model = MIXTRAL if "model.experts" in layout else {}
    wanted, _, _ = spoil(1, SKIP | model, (0, 3), name="one")
    folder, _, _ = spoil(world, SKIP | layout, (0, 3))
    for line, other in zip(lines_of(folder / "metrics.jsonl"), lines_of(wanted / "metrics.jsonl"), strict=True):
        assert line["skipped"] == other["skipped"]
        if not line["skipped"]:
            assert [line[n] for n in EXACT[:4]] == pytest.approx([other[n] for n in EXACT[:4]], rel=1e-4)


def test_a_run_with_skipped_steps_goes_on_to_the_same_bits(spoil):
    """The steps after a skipped one, its optimizer's count of steps, and what a spike is measured by, all survive."""
    settings = SKIP | {"training.steps": 10, "checkpoint.keep": 99, "parallel.encoder": 1}
    settings |= {"divergence.on_spike": "skip", "divergence.window": 8, "divergence.sigma": 6.0}
    folder, _, pairs = spoil(3, settings, (6, 9), factor=20.0)
    whole = lines_of(folder / "metrics.jsonl")
    assert [line["step"] for line in whole if line["skipped"]] == [6, 9]
    assert re.fullmatch(SPIKE, whole[6]["skipped"]), whole[6]
    for first in (7, 4):
        for path in complete(folder / "checkpoints"):
            if path.name > f"step_{first:08d}":
                (path / "checkpoint.json").unlink()
        folder, ranks, _ = spoil(3, settings, (6, 9), factor=20.0)
        assert f"resumed after step {first}" in ranks.text(0)
        lines = lines_of(folder / "metrics.jsonl")
        assert [[line[n] for n in EXACT] for line in lines] == [[line[n] for n in EXACT] for line in whole]
        logged = lines_of(folder / "skipped.jsonl")
        assert [line["step"] for line in logged] == [6, 9]
        assert all(pair in line["pairs"] for pair, line in zip(pairs, logged, strict=True))


def test_too_many_skipped_steps_in_a_row_stop_the_run(spoil):
    settings = SKIP | {"divergence.most_skipped": 2}
    folder, ranks, _ = spoil(1, settings, (0, 2, 3, 4), status=1)
    assert "divergence.most_skipped=2: 3 steps in a row would be skipped, the last one step=4: loss is" in verdict(
        ranks
    )
    assert [line["step"] for line in lines_of(folder / "skipped.jsonl")] == [0, 2, 3]


def test_a_spike_stops_the_run_where_it_is_told_to(spoil):
    settings = {"divergence.on_spike": "stop", "divergence.window": 8, "training.steps": 10}
    folder, ranks, pairs = spoil(1, settings, (9,), factor=20.0, status=1)
    said = re.search(rf"step=9: {SPIKE}; weights unchanged; samples in it: pairs \[(.*?)\],", verdict(ranks))
    assert str(pairs[0]) in said[1].split(", ")
    assert verdict(ranks).endswith("or with divergence.on_spike=skip")
    assert len(lines_of(folder / "metrics.jsonl")) == 9


# the policy


@pytest.mark.parametrize("seed", range(5))
def test_a_watch_knows_spikes_by_its_window_only_and_remembers_it(seed):
    rng = random.Random(seed)
    window = rng.randint(4, 40)
    watch = Watch(DivergenceConfig(on_spike="skip", window=window, sigma=6.0))
    for step in range(3 * window):
        loss, norm = rng.gauss(3, 0.1), rng.gauss(1, 0.1)
        if 2 * step < window:
            assert not watch.fault(1e9, 1e9)
        else:
            assert "loss is 1e+09, " in watch.fault(1e9, norm)
            assert "the gradient's norm is 1e+09, " in watch.fault(2.5, 1e9)
            assert f"of the last {min(step, window)} trained steps" in watch.fault(1e9, norm)
            assert not watch.fault(-1e9, 0.0)
            watch.settle(step, 1e9, norm, watch.fault(1e9, norm), ([], []))  # leaves no trace in the window
            again = Watch(watch.config, json.loads(json.dumps(watch.state())))
            value = rng.gauss(3.5, 0.3)
            assert again.fault(value, norm) == watch.fault(value, norm)
            assert again.state() == watch.state()
        watch.settle(step, loss, norm, "", ([], []))
    assert Watch(DivergenceConfig(window=window), watch.state()).fault(1e9, 1e9) == ""
    assert watch.fault(float("nan"), 1.0) == "loss is nan"
    assert watch.fault(1.0, float("inf")) == "the gradient's norm is inf"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on_nan": "skpi"}, r"divergence\.on_nan=skpi: unknown value; did you mean skip\?"),
        ({"on_spike": "never"}, r"divergence\.on_spike=never: unknown value; known: off, stop, skip"),
        ({"window": 3}, r"divergence\.window=3: must be at least 4"),
        ({"most_skipped": 0}, r"divergence\.most_skipped=0: must be at least 1"),
        ({"sigma": 0.0}, r"divergence\.sigma=0\.0: must be above 0"),
    ],
    ids=str,
)
def test_impossible_policies_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        DivergenceConfig(**values)
