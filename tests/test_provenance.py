"""Who is who: a run goes on with its own model, data and encoders, and says what a user changed."""

import json
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_content import ENDLESS, foreign

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.identity import comparable, differences
from megatron_sphinx.checkpoint.mix import interpolate
from megatron_sphinx.checkpoint.steps import complete, newest_of
from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.data.content import Scan
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.run.provenance import require_trained_as


def test_what_was_changed_on_purpose_is_said_and_kept(train):
    run = train(1)
    on = train(1, {"training.steps": 4, "optimizer.learning_rate": 5e-3, "loss.text_weight": 0.5})
    said = [line for line in on.ranks.text().splitlines() if line.startswith("  changed: ")]
    assert said == [
        "  changed: loss.text_weight: 1.0 -> 0.5",
        "  changed: optimizer.learning_rate: 0.01 -> 0.005",
        "  changed: optimizer.minimum_learning_rate: 0.001 -> 0.0005",
        "  changed: training.steps: 3 -> 4",
    ]
    manifest = json.loads((newest_of(on.folder) / "checkpoint.json").read_text())
    assert manifest["config"]["loss"] == {"text_weight": 0.5}
    assert "text_weight: 1.0" in (run.folder / "config.1.yaml").read_text()
    assert "text_weight: 0.5" in (run.folder / "config.yaml").read_text()


def test_a_checkpoint_that_tells_no_configuration_is_compared_with_the_folders(train):
    run = train(1)
    path = newest_of(run.folder) / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["config"]  # as the version before wrote it
    path.write_text(json.dumps(manifest))
    on = train(1, {"training.steps": 4, "optimizer.weight_decay": 0.2})
    assert re.search(r"^  changed: optimizer\.weight_decay: \S+ -> 0\.2$", on.ranks.text(), re.MULTILINE)
    assert "resumed after step 3" in on.ranks.text()


def test_every_difference_is_named(train):
    train(1)
    refused = train(1, {"training.steps": 5, "run.seed": 4, "data.pairs_per_step": 5}, status=2).ranks.text()
    assert "was made with data.pairs_per_step=6, this run has 5; with run.seed=3, this run has 4; with vi" in refused


def test_weights_of_other_encoders_are_refused_and_other_views_said(train, tiny):
    first = train(1, {"training.steps": 1}, name="first")
    begin = {"model.weights": str(first.folder), "training.steps": 1}
    refused = train(1, begin | {"run.seed": 4}, name="second", status=2).ranks.text()
    assert "was made with vision.experts.clip_convnext_small=random 3, this run has random 4; with vision.e" in refused
    assert "configure the same model, tokenizer and encoders, or begin with other weights" in refused
    turned = {"vision.experts": tiny.values["vision"]["experts"][::-1]}
    for key in ({"model.weights": str(first.folder)}, {"checkpoint.resume": str(newest_of(first.folder))}):
        said = train(1, key | turned | {"training.steps": 2}, name="third", status=2).ranks.text()
        order = "['clip_convnext_small', 'dinov2_small'], this run has ['dinov2_small', 'clip_convnext_small']"
        assert f"was made with vision.order={order}" in said
    begun = train(1, begin | {"vision.views": 5, "data.sequence_length": 256}, name="fourth").ranks.text()
    assert "  changed: vision.views was 1, is 5" in begun


def test_a_converted_checkpoint_still_says_what_it_was_trained_with(train, tiny, tmp_path):
    first = train(1, {"training.steps": 1}, name="first")
    convert(first.folder, tmp_path / "converted", "megatron", WriteOptions())
    begin = {"model.weights": str(tmp_path / "converted"), "training.steps": 1}
    refused = train(1, begin | {"run.seed": 4}, name="second", status=2).ranks.text()
    assert "was made with vision.experts.clip_convnext_small=random 3, this run has random 4" in refused
    train(1, begin, name="third")


def test_checkpoints_of_encoders_in_another_order_are_not_mixed(train, tiny, tmp_path):
    turned = {"vision.experts": tiny.values["vision"]["experts"][::-1]}
    one, other = train(1, {"training.steps": 1}, name="one"), train(1, {"training.steps": 1} | turned, name="other")
    with pytest.raises(CheckpointError, match=r"was made with vision\.order=\['dinov2_small', 'clip_convnext_small'\]"):
        interpolate([one.folder, other.folder], {tmp_path / "mixed": [0.5, 0.5]})


def test_weights_are_evaluated_as_they_were_trained(train):
    folder = train(1, {"training.steps": 1}).folder
    config = configuration.load(folder / "config.yaml")
    marks = {"clip_convnext_small": "random 3", "dinov2_small": "random 3"}
    tokenizer = json.loads((newest_of(folder) / "checkpoint.json").read_text())["identity"]["tokenizer"]
    require_trained_as(folder, config, tokenizer, marks)
    others = [
        (config, "other", marks, r"tokenizer=\w+, this run has other"),
        (config, tokenizer, marks | {"dinov2_small": "a"}, r"vision\.experts\.dinov2_small=random 3, this run has a"),
        (config, tokenizer, dict(reversed(marks.items())), r"vision\.order="),
        (
            configuration.load(folder / "config.yaml", ["vision.padding=corner"]),
            tokenizer,
            marks,
            r"vision\.padding=centre, this",
        ),
    ]
    for settings, mark, experts, message in others:
        with pytest.raises(CheckpointError, match=message):
            require_trained_as(folder, settings, mark, experts)


# the data


def other_tokens(source: Path, target: Path, tokens: str) -> Path:
    """A copy of prepared data in which two neighbouring token ids have changed places; all counts are the same."""
    shutil.copytree(source, target)
    file = target / tokens
    ids = np.fromfile(file, np.uint16)
    place = next(n for n in range(len(ids) // 2, len(ids)) if ids[n] != ids[n + 1] and min(ids[n], ids[n + 1]) > 2)
    ids[[place, place + 1]] = ids[[place + 1, place]]
    ids.tofile(file)
    return target


def forget(folder: Path) -> None:
    """Let an index not say what it holds, as those made before did not."""
    index = json.loads((folder / "index.json").read_text())
    for part in (index, *index.get("files", [])):
        part.pop("content", None)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("key", "tokens"), [("text", "000000.bin"), ("pairs", "captions.bin")])
def test_other_data_of_equal_counts_is_refused(train, tiny, tmp_path, key, tokens):
    """Found in the background, where the data itself does not say what it holds, and remembered for the next start."""
    other = other_tokens(tiny.folder / key, tmp_path / key, tokens)
    shutil.copytree(tiny.folder / "shards", tmp_path / "shards")
    forget(other)
    begun = train(2, {"checkpoint.interval": 1})
    settings = ENDLESS | {f"data.{key}": str(other), "parallel.encoder": 1}
    known = rf"was made with data\.{key}\.fingerprint=[0-9a-f]{{64}}, this run has [0-9a-f]{{64}}; use the config"
    for count in (1, 2):
        refused = train(3, settings, status=2).ranks.text(0)
        assert len(re.findall(rf"checkpoint\.resume=\S+step_00000003: {known}", refused)) == 1
        assert ("step 4/" in refused) == (count == 1), "the second time it is known before the first step"
        assert complete(begun.folder / "checkpoints")[-1].name == "step_00000003", "what was saved since is moved aside"
    shutil.rmtree(begun.folder / "checkpoints")
    (begun.folder / "metrics.jsonl").unlink()
    assert len(train(1, {f"data.{key}": str(other)}).metrics) == 3


def test_data_may_move(train, tiny, tmp_path):
    train(1)
    for name in ("text", "pairs", "shards"):
        shutil.copytree(tiny.folder / name, tmp_path / "there" / name)
    moved = {f"data.{name}": str(tmp_path / "there" / name) for name in ("text", "pairs")}
    assert "resumed after step 3" in train(1, moved | {"training.steps": 4}).ranks.text()


def test_other_data_that_is_found_at_the_very_end_is_refused_too(train, start_ranks, tiny, tmp_path):
    """The scan ends while the last checkpoint is written: neither that nor the run counts."""
    other = other_tokens(tiny.folder / "text", tmp_path / "text", "000000.bin")
    forget(other)
    begun = train(1)
    config = tiny.write(tmp_path / "run.yaml", {"data.text": str(other), "training.steps": 5})

    def work() -> int:
        write, read = CheckpointStore._write_pieces, Scan._read
        is_writing = threading.Event()

        def late(scan: Scan, data: object) -> None:
            is_writing.wait(60)
            read(scan, data)

        def slow(store: CheckpointStore, *arguments: object) -> None:
            if list(store.folder.glob(".step_00000005*")):
                is_writing.set()
                time.sleep(2)
            write(store, *arguments)

        CheckpointStore._write_pieces, Scan._read = slow, late
        return main(["train", str(config)])

    ranks = start_ranks(2, work)
    assert ranks.wait() == [2, 2], ranks.text()
    assert "was made with data.text.fingerprint=" in ranks.text(0)
    assert complete(begun.folder / "checkpoints")[-1].name == "step_00000003"
    assert len(list(begun.folder.glob("checkpoints/superseded_1/step_0000000[45]"))) == 2


def test_a_checkpoint_keeps_what_is_found_meanwhile(train, tmp_path):
    prefix = foreign(tmp_path / "foreign")
    begun = train(1, {"data.text": str(prefix), "training.steps": 30, "checkpoint.interval": 29})
    manifest = json.loads((newest_of(begun.folder) / "checkpoint.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["identity"]["data"]["text"]["fingerprint"])


def test_a_checkpoint_of_the_version_before_is_resumed(train):
    """It knows neither of fingerprints nor of its configuration."""
    begun = train(2, {"parallel.encoder": 1})
    for path in complete(begun.folder / "checkpoints"):
        manifest = json.loads((path / "checkpoint.json").read_text())
        del manifest["config"]
        for stream in ("pairs", "text"):
            del manifest["identity"]["data"][stream]["fingerprint"]
        (path / "checkpoint.json").write_text(json.dumps(manifest))
    on = train(3, {"parallel.encoder": 1, "training.steps": 4})
    assert "resumed after step 3" in on.ranks.text()
    manifest = json.loads((newest_of(on.folder) / "checkpoint.json").read_text())
    assert manifest["identity"]["data"]["pairs"]["fingerprint"]


def test_only_what_both_know_of_data_is_compared():
    def identity(fingerprint: str | None, bounds: list[int]) -> dict:
        return {"data": {"pairs": {"bounds": bounds, "fingerprint": fingerprint}, "text": None}, "vision": {}}

    def found(one: dict, other: dict) -> list[str]:
        return [key for key, *_ in differences(*comparable(one, other))]

    assert found(identity("a", [0, 1]), identity("b", [0, 1])) == ["data.pairs.fingerprint"]
    assert found(identity(None, [0, 1]), identity("b", [0, 1])) == []
    assert found(identity("a", [0, 1]), identity(None, [0, 2])) == ["data.pairs.bounds"]
    assert found({}, identity("a", [0, 1])) == ["data.pairs"]
