"""What the version before has made is read: a run goes on from its checkpoint, on the data that it has prepared."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import draw

from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint import inspect
from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.checkpoint.store import load_weights
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
EXACT = ("step", "sample_ids", "target_tokens_pairs", "target_tokens_text", "pairs", "bad_pairs", "learning_rate")
CLOSE = ("loss", "loss_pairs", "loss_text", "gradient_norm")


@pytest.fixture
def before(tmp_path, monkeypatch) -> Path:
    """The run folder of the version before, beside its data; paths in its configuration are relative."""
    for name in ("checkpoint_v0", "prepared_v0"):
        shutil.copytree(DATA / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "checkpoint_v0"


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("world", "layout"), [(1, []), (2, []), (2, ["parallel.encoder=1"])], ids=str)
def test_its_run_goes_on_with_its_configuration_and_its_data(before, start_ranks, world, layout):
    recorded = lines_of(before / "metrics.jsonl")
    config = before.parent / "run.yaml"
    shutil.copy(before / "config.yaml", config)
    ranks = start_ranks(world, lambda: main(["train", str(config), *layout]))
    assert ranks.wait() == [0] * world, ranks.text()
    assert "resumed after step 2 from checkpoint_v0/checkpoints/step_00000002" in ranks.text(0)
    assert "data.text_order=documents" in ranks.text(0)  # the order that it began with, which had no name then
    found = lines_of(before / "metrics.jsonl")
    assert [[line[name] for name in EXACT] for line in found] == [[line[name] for name in EXACT] for line in recorded]
    for one, other in zip(found, recorded, strict=True):
        assert [one[name] for name in CLOSE] == pytest.approx([other[name] for name in CLOSE], rel=1e-5)


def test_a_run_begins_with_its_weights(before, start_ranks):
    values = yaml.safe_load((before / "config.yaml").read_text())
    values["run"]["folder"] = "other"
    values["model"]["weights"] = str(before)
    values["training"]["steps"] = 1
    values["optimizer"] |= {"learning_rate": 0.0, "minimum_learning_rate": 0.0, "weight_decay": 0.0}
    config = before.parent / "other.yaml"
    config.write_text(yaml.safe_dump(values))
    ranks = start_ranks(1, lambda: main(["train", str(config)]))
    assert ranks.wait() == [0], ranks.text()
    kept, weights = load_weights(before), load_weights(before.parent / "other")
    assert kept.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in kept.items())


def test_its_checkpoint_is_inspected_converted_and_comes_back(before, tmp_path):
    opened = open_checkpoint(before)
    assert inspect.describe(opened)["parameters"]["all"] == 13_184
    convert(before, tmp_path / "hf", "hf", WriteOptions(), verify=True)
    convert(tmp_path / "hf", tmp_path / "again", "megatron", WriteOptions(), verify=True)
    kept, again = load_weights(before), load_weights(tmp_path / "again")
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        rows = 300 if "embedding" in name or "output_layer" in name else len(value)  # the vocabulary's padding is zero
        assert torch.equal(value[:rows], again[name][:rows]), name


def test_its_index_says_of_each_pair_what_was_drawn(before):
    folder = before.parent / "prepared_v0"
    index, tokenizer = SampleIndex([folder / "pairs"], "pairs"), Tokenizer(folder / "tokenizer.model")
    assert len(index) == 12
    for pair in range(12):
        image, caption = draw(pair)
        sizes = index.sizes(pair, pair + 1)
        assert (int(sizes.width[0]), int(sizes.height[0])) == image.size
        assert tokenizer.decode([int(token) for token in index.caption(pair)]) == caption
