"""Measured runs on gloo ranks, and the data that is made up for them."""

import io
import json
import sys

import numpy as np
import pytest
from conftest import size_of
from fake_runs import planner_of
from PIL import Image

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.benchmark import report, sweep, synthetic
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.packing import views_in
from megatron_sphinx.data.pairs import ImageReader
from megatron_sphinx.data.sources import open_sources
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.parallel.launch import run_launcher

# synthetic data


@pytest.mark.parametrize("kind", ["pairs", "conversations"])
def test_synthetic_data_has_the_composition_of_the_step(tiny, tmp_path, kind):
    amounts = {"pairs_per_step": 0, "text_tokens_per_step": 200, f"{kind}_per_step": 300}
    path = tiny.write(tmp_path / "c.yaml", {f"data.{name}": value for name, value in amounts.items()})
    words = int(np.random.default_rng().integers(40, 3000))
    given = [*synthetic.PATHS, f"model.vocabulary={words}", "vision.experts.0.weights=no_such_file"]
    config = synthetic.prepared(configuration.load(path, given), tmp_path / "made")
    assert [item.weights for item in config.vision.experts] == ["random", "random"]
    sources = open_sources(config.data, config.model)
    sources.check()
    plan = planner_of(config).step(3)
    assert (len(plan.samples), sum(tokens for _, _, tokens in plan.text)) == (300, 200)
    assert sources.tokenizer.encode("a b c") == [3, 4, 5]
    batch = BatchBuilder(config.data, sources, config.vision).build(plan.rows)
    assert (int(batch.tokens.max()) < words, len(batch.samples), len(batch.sample_of_view)) == (True, 300, 300)
    reader = ImageReader(sources.samples)
    for pair in plan.samples[:2]:
        image = Image.open(io.BytesIO(reader.read(pair)))
        assert image.size == size_of(sources.samples, pair)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "made").rglob("*")}
    assert synthetic.prepared(configuration.load(path, given), tmp_path / "made") == config
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "made").rglob("*")}


def test_too_few_words(tiny, tmp_path):
    path = tiny.write(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"model.vocabulary=3: synthetic text needs a word; use at least 4"):
        synthetic.prepared(configuration.load(path, ["model.vocabulary=3"]), tmp_path / "made")


# real runs


@pytest.mark.parametrize(
    ("sizes", "world", "axes"),
    [
        ({"tensor": 2, "pipeline": 2, "encoder": 1}, 5, {"tensor", "pipeline", "features"}),
        ({"tensor": 2, "sequence": True, "expert": 2}, 2, {"tensor", "expert", "replica"}),
    ],
)
def test_every_rank_tells_what_it_did(tiny, tmp_path, run_ranks, sizes, world, axes):
    overrides = {f"parallel.{name}": size for name, size in sizes.items()}
    overrides |= {"training.steps": 1 + 2 + 3} | ({"model.experts": 4} if "expert" in sizes else {})
    config = tiny.write(tmp_path / "c.yaml", overrides)
    run_ranks(world, lambda: main(["measure", str(config), "--steps", "2", "--warmup", "1"]))
    folder = config.with_suffix("")
    ranks = [json.loads((folder / "ranks" / f"{rank}.json").read_text()) for rank in range(world)]
    encoders = sizes.get("encoder", 0)
    assert [rank["role"] for rank in ranks] == ["language"] * (world - encoders) + ["encoder"] * encoders
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for rank in ranks[: world - encoders]:
        assert {len(values) for values in rank["steps"].values()} == {2}
        assert rank["work"]["pairs"] == 6
        others = {"language", "data", "expert data"}  # of one rank each, or of all
        assert axes <= set(rank["communication"]) <= axes | others
        assert all(0 <= share <= 1 for share in rank["communication"].values())
        assert all(rank["communication"][axis] > 0 for axis in axes - {"features"})
    assert ranks[0]["steps"]["seconds"] == [line["step_seconds"] for line in lines[1:3]]
    plans = planner_of(configuration.load(config))
    if encoders:
        views = sum(len(views_in(plans.step(step).rows)) for step in (1, 2)) / 2
        assert ranks[-1]["views_per_step"] == views == ranks[0]["work"]["views"]
        assert min(ranks[-1][f"{name}_seconds"] for name in ("read", "encode", "send")) >= 0
    assert not (folder / "checkpoints").exists()


@pytest.mark.slow
def test_a_real_sweep(start_ranks, tiny, tmp_path, capsys, monkeypatch):
    """The whole command, on gloo ranks, with data that is made up.

    torchrun starts the ranks of the first point; those of the second are forked, which saves importing everything anew.
    """
    commands = []

    def launch(command, **streams):
        commands.append(command)
        if len(commands) == 1:
            return run_launcher(command, **streams)
        return max(start_ranks(2, lambda: main(command[command.index("measure") :])).wait())

    monkeypatch.setattr(sweep, "run_launcher", launch)
    config = tiny.write(tmp_path / "c.yaml", {"data.tokenizer": "no_such_file", "data.pairs": "no_such_folder"})
    options = [
        "data.micro_batch_rows=auto",
        "--ranks",
        "2",
        "--steps",
        "2",
        "--warmup",
        "1",
        "--repeats",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["benchmark", str(config), *options, "--synthetic", "--sweep", "parallel.encoder=1,0"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["ratios"]) == ["parallel.encoder=0"]
    assert min(found["tokens_per_second"].values()) > 0
    assert len(commands) == 2
    assert [torchrun[:3] for torchrun in commands] == [[sys.executable, "-m", "torch.distributed.run"]] * 2
    stage, colocated = report.read([tmp_path / "out"])[::-1]
    for point in (stage, colocated):
        assert isinstance(point["config"]["data"]["micro_batch_rows"], int), "a point tells what its runs have taken"
        assert (point["config"]["vision"]["batch_views"], point["config"]["vision"]["precision"] == "auto") == (
            8,
            False,
        )
    assert [rank["role"] for rank in stage["per_rank"]] == ["language", "encoder"]
    assert [rank["role"] for rank in colocated["per_rank"]] == ["language", "language"]
    assert (stage["work"]["pairs"], stage["work"]["text_tokens"]) == (6, 150)
    assert stage["feature_bytes_per_step"] > 0 == colocated["feature_bytes_per_step"]
    assert "data" in colocated["roles"]["language"]["communication"]
    assert "Synthetic data: 256 JPEG pictures" in (tmp_path / "out" / "report.md").read_text()
