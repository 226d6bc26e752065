"""Images that cannot be read: masked, written down, and no more of them than a run may have."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from test_training import identical, worst_difference

from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.prepare.pairs import index_shards


@pytest.fixture
def spoiled(tiny, tmp_path):
    """The tiny pairs, copied, with some images overwritten inside a shard whose index does not know it yet."""
    shutil.copytree(tiny.folder / "shards", tmp_path / "shards")
    shutil.copytree(tiny.folder / "pairs", tmp_path / "pairs")
    index = SampleIndex([tmp_path / "pairs"])
    bad = [3, 30, 31]
    for pair in bad:
        place = index.location(pair)
        with Path(place.path).open("r+b") as file:
            file.seek(place.offset + place.bytes // 2)
            file.write(b"\0" * (place.bytes // 2))
    return str(tmp_path / "pairs"), bad


def test_bad_images_are_masked_and_the_loss_is_the_rest(train, spoiled):
    folder, bad = spoiled
    settings = {"data.pairs": folder, "training.steps": 10, "data.max_bad_share": 0.5}
    wanted = train(1, settings, name="one")
    assert sum(line["bad_pairs"] for line in wanted.metrics) == len(bad)  # ten steps of six pairs are one epoch
    assert all(line["pairs"] == 6 for line in wanted.metrics)
    quarantined = [json.loads(line) for line in (wanted.folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["pair"] for line in quarantined) == bad
    assert all(line["shard"] and line["key"] and "does not decode" in line["reason"] for line in quarantined)
    layouts = [
        (3, {"parallel.encoder": 1}),
        (4, {"parallel.tensor": 2}),
        (3, {"parallel.pipeline": 2, "parallel.encoder": 1}),
        (4, {"parallel.pipeline": 2, "parallel.tensor": 2, "parallel.sequence": True}),
    ]
    for name, (ranks, layout) in enumerate(layouts):
        lines = train(ranks, settings | layout, name=f"layout{name}").metrics
        assert worst_difference(lines, wanted.metrics) < 1e-5
        assert [line["bad_pairs"] for line in lines] == [line["bad_pairs"] for line in wanted.metrics]
    half = train(3, settings | {"parallel.encoder": 1, "training.precision": "bf16"}, name="bf16").metrics
    norms = [[line["gradient_norm"] for line in lines] for lines in (half, wanted.metrics)]
    assert norms[0][:3] == pytest.approx(norms[1][:3], rel=0.05)
    clean = train(1, {"training.steps": 10}, name="clean").metrics
    first = next(n for n, line in enumerate(wanted.metrics) if line["bad_pairs"])
    assert identical(wanted.metrics[:first], clean[:first])
    assert wanted.metrics[first]["target_tokens_pairs"] < clean[first]["target_tokens_pairs"]


def test_a_run_on_weighted_sources_with_bad_data_goes_on(train, tiny, tmp_path):
    """What is seen to be bad beforehand is in the index's quarantine, what is found while training in the run's."""
    content = {}
    for name in ("whole", "torn", "zero", "words"):
        image = io.BytesIO()
        Image.new("CMYK", (300, 200), (0, 200, 30, 0)).save(image, "JPEG")
        content[name] = image.getvalue()
    content |= {"torn": content["torn"][:-500], "zero": b"", "words": b"<html>not found</html>"}
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name, data in content.items():
            for ending, part in ((".jpg", data), (".txt", b"a red circle")):
                member = tarfile.TarInfo(name + ending)
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    report = index_shards([tmp_path / "odd.tar"], tmp_path / "odd", tiny.tokenizer)
    assert (report.taken, report.rejected) == (2, {"not an image": 2})
    sources = [{"path": str(tiny.folder / "pairs"), "weight": 2}, {"path": str(tmp_path / "odd"), "weight": 1}]
    run = train(3, {"data.pairs": sources, "data.max_bad_share": 0.5, "parallel.encoder": 1})
    assert [line["pairs"] for line in run.metrics] == [6, 6, 6]
    assert [line["bad_pairs"] for line in run.metrics] == [1, 1, 1]  # two of six are of the second source, one is torn
    lines = [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]
    shard = str(tmp_path / "odd.tar")
    assert {(line["shard"], line["key"]) for line in lines} == {(shard, "torn")}
    lines = [json.loads(line) for line in (tmp_path / "odd" / "quarantine.jsonl").read_text().splitlines()]
    assert {(line["shard"], line["key"]) for line in lines} == {(shard, key) for key in ("zero", "words")}


def test_too_many_bad_images_stop_the_run_with_one_line(train, spoiled):
    settings = {"data.pairs": spoiled[0], "training.steps": 10, "data.max_bad_share": 0.0, "parallel.encoder": 1}
    stopped = train(3, settings, status=2)
    said = [line for line in stopped.ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    assert len(said) == 1
    assert re.search(r"data\.max_bad_share=0\.0: \d of the \d+ pairs up to step=\d could not be read", said[0])
    assert "see quarantine.jsonl in run.folder" in said[0]


def test_a_shard_that_changed_is_refused_before_anything_is_trained(train, spoiled):
    folder = Path(spoiled[0])
    with (folder.parent / "shards" / "000000.tar").open("ab") as file:
        file.write(b"\0")
    refused = train(3, {"data.pairs": str(folder), "parallel.encoder": 1}, status=2)
    said = [line for line in refused.ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    assert len(said) == 1
    assert re.search(r"000000\.tar has \d+ bytes, its index was made for \d+; copy it again", said[0])
    assert not (refused.folder / "metrics.jsonl").exists()
