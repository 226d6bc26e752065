"""The tokenizer, micro-batches and pixels: what a rank gets of the plan of a step."""

import json
from itertools import pairwise

import pytest
from conftest import train_tokenizer
from test_pairs import spoilable_pairs
from test_text import all_documents

from megatron_sphinx import config as configuration
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.packing import views_in
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.pixels import PixelLoader
from megatron_sphinx.data.plan import Planner
from megatron_sphinx.data.sources import make_planner, open_sources
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError


def test_tokenizers_that_do_not_fit_are_refused(tiny, tmp_path):
    other = train_tokenizer(tmp_path / "other", ["quite other words about something else " * 3] * 20, 290)
    config = configuration.load(tiny.write(tmp_path / "run.yaml"))
    with pytest.raises(
        DataError, match=r"data\.tokenizer=.*has 300 pieces, but model\.vocabulary=320; set that to 300"
    ):
        open_sources(config.data, configuration.load(tiny.write(tmp_path / "a.yaml", {"model.vocabulary": 320})).model)
    size = Tokenizer(other).identity.vocabulary
    changed = configuration.load(
        tiny.write(tmp_path / "b.yaml", {"data.tokenizer": str(other), "model.vocabulary": size})
    )
    sources = open_sources(changed.data, changed.model)
    for source, name in ((sources.text, "text"), (sources.samples, "pairs")):
        with pytest.raises(DataError, match=rf"data\.{name}=.*: was made with a tokenizer of 300 pieces \("):
            source.check(sources.tokenizer)
    with pytest.raises(DataError, match="was made with a tokenizer"):
        sources.check()
    with pytest.raises(DataError, match="No such file or directory; give a sentencepiece"):
        Tokenizer(tmp_path / "nowhere.model")
    (tmp_path / "bad.model").write_text("nonsense")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer(tmp_path / "bad.model")


def opened(tiny, tmp_path, overrides=None) -> tuple[configuration.Config, Planner, BatchBuilder]:
    config = configuration.load(tiny.write(tmp_path / "run.yaml", overrides))
    sources = open_sources(config.data, config.model)
    planner = make_planner(config.data, sources, config.model, config.vision, replicas=2, seed=1)
    return config, planner, BatchBuilder(config.data, sources, config.vision)


@pytest.mark.parametrize("isolate", [True, False])
def test_a_micro_batch_holds_what_the_plan_says(tiny, tmp_path, isolate):
    config, planner, builder = opened(tiny, tmp_path, {"data.isolate_documents": isolate})
    tokenizer, block = tiny.tokenizer, config.vision.tokens_per_view
    index, plan = builder.sources.samples, planner.step(2)
    seen_pairs, targets = [], 0
    for rows in (rows for replicas in plan.micro_batches for rows in replicas):
        batch = builder.build(rows)
        assert list(batch.lengths) == sorted(batch.lengths)
        assert sum(batch.lengths) == len(batch.tokens) == len(batch.targets)
        for number, pair in enumerate(batch.samples):
            mine = batch.sample_of_token == number
            tokens, goal = batch.tokens[mine].tolist(), batch.targets[mine].tolist()
            caption = index.caption(pair).tolist()
            assert tokens == [tokenizer.bos] + [0] * block + caption + [tokenizer.eos]
            assert goal == [-100] * block + caption + [tokenizer.eos, -100]
            first = int(mine.nonzero()[0])
            views = batch.view_positions.view(-1, block)[batch.sample_of_view == number]
            assert views.tolist() == [list(range(first + 1, first + 1 + block))]
        seen_pairs += batch.samples
        targets += int((batch.targets >= 0).sum())
    assert sorted(seen_pairs) == plan.samples
    assert targets == plan.targets(of_samples=True) + plan.targets(of_samples=False)


def test_a_pair_that_comes_twice_in_a_step_has_its_views_twice(tiny, tmp_path):
    config, planner, builder = opened(tiny, tmp_path, {"data.pairs_per_step": 100, "data.micro_batch_rows": 200})
    block, rows = config.vision.tokens_per_view, planner.step(0).rows
    batch = builder.build(rows)
    assert len(set(batch.samples)) == 60 < len(batch.samples) == 100
    assert [pair for pair, _ in views_in(rows)] == list(batch.samples)
    for number in range(100):
        first = int((batch.sample_of_token == number).nonzero()[0])
        positions = batch.view_positions.view(-1, block)[number]
        assert positions.tolist() == list(range(first + 1, first + 1 + block))


def test_text_predicts_its_next_token_over_cuts(tiny, tmp_path):
    _, planner, builder = opened(tiny, tmp_path)
    whole = all_documents(builder.sources.text)
    for rows in planner.step(0).micro_batches[0]:
        batch = builder.build([tuple(segment for segment in row if not segment.is_sample) for row in rows])
        known = [whole[document] for document in set(batch.documents)]
        follows = {(a, b) for document in known for a, b in pairwise(document)}
        pairs = zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
        assert all((token, target) in follows for token, target in pairs if target >= 0)


def test_a_replica_without_rows_still_has_one_position(tiny, tmp_path):
    _, _, builder = opened(tiny, tmp_path)
    batch = builder.build([])
    assert batch.lengths == (1,)
    assert batch.targets.tolist() == [-100]
    assert len(batch.view_positions) == len(batch.sample_of_view) == 0


def test_bad_images_are_quarantined_and_counted(tiny, tmp_path):
    folder, shard = spoilable_pairs(tiny, tmp_path)
    index = SampleIndex([folder])
    place = index.location(2)
    with shard.open("r+b") as file:
        file.seek(place.offset + place.bytes // 2)
        file.write(b"\0" * (place.bytes // 2))
    config = configuration.load(tiny.write(tmp_path / "run.yaml"))
    loader = PixelLoader(index, config.vision, workers=2, quarantine=tmp_path / "quarantine.jsonl")
    pixels = loader.submit([(1, 0), (2, 0), (3, 0)]).result()
    assert pixels.bad == (1,)
    assert {side: tuple(view.shape) for side, view in pixels.views.items()} == {56: (3, 3, 56, 56), 64: (3, 3, 64, 64)}
    (line,) = [json.loads(text) for text in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert (line["shard"], line["key"], line["pair"]) == (str(shard), "000000002", 2)
    assert "does not decode" in line["reason"]
