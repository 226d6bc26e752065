"""Token ids that the model does not have: found by a scan, in an index or in a row, on every rank."""

import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import Ranks
from test_content import ENDLESS, LENGTH, VOCABULARY, as_before, edit, foreign, opened, prepared, refused, scanned

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.steps import complete
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.index import CONVERSATION, SAMPLE
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.sources import Sources, make_planner, open_sources
from megatron_sphinx.data.text import TextIndex
from megatron_sphinx.errors import DataError


@pytest.mark.parametrize(
    ("token", "kind"), [(VOCABULARY, np.uint16), (2**31 - 1, np.int32), (-1, np.int32), (-1, np.int64)]
)
def test_a_scan_compares_token_ids_with_the_vocabulary_and_the_next_start_knows(tiny, tmp_path, token, kind):
    foreign(tmp_path / "good", bad={3: VOCABULARY - 1, 4: 0}, kind=kind)
    prefix = foreign(tmp_path / "bad", bad={300: token}, kind=kind)
    scanned(TextIndex([tmp_path / "good"])).check(tiny.tokenizer)
    TextIndex([prefix]).check(tiny.tokenizer)  # nothing is known yet
    message = (
        f"data.text={prefix}: {prefix}.bin holds token id {token}, but model.vocabulary=300; "
        f"it was made with another tokenizer, or is damaged: prepare it again with data.tokenizer"
    )
    assert refused(TextIndex([tmp_path / "good", prefix])) == message
    written = (tmp_path / "bad.content.json").stat().st_mtime_ns
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        TextIndex([prefix]).check(tiny.tokenizer)
    assert (tmp_path / "bad.content.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("key", ["text", "pairs", "conversations"])
@pytest.mark.parametrize("ids", [{"highest": VOCABULARY}, {"lowest": -1}])
def test_an_index_that_knows_of_a_bad_id_is_refused(tiny, dialogs, tmp_path, key, ids):
    folder = prepared(tiny, dialogs)[key]
    target = folder.with_name(f"{folder.name} of {sorted(ids.items())}")  # beside it, where its shards are found
    shutil.copytree(folder, target)

    def spoil(index: dict) -> None:
        (index["files"][0] if key == "text" else index)["content"].update(ids)

    edit(target / "index.json", spoil)
    (bad,) = ids.values()
    with pytest.raises(DataError, match=rf"data\.{key}=.*: .*\.bin holds token id {bad}, but model\.vocabulary=300; "):
        opened(target, key).check(tiny.tokenizer)
    edit(target / "index.json", lambda index: (index["files"][0] if key == "text" else index).update(content={"a": 1}))
    with pytest.raises(DataError, match=r"damaged index.*content must have lowest, highest, sha256"):
        opened(target, key)


def test_captions_are_scanned_too(tiny, tmp_path):
    folder = as_before(tiny.folder / "pairs", tmp_path / "pairs")
    with (folder / "captions.bin").open("r+b") as file:
        file.seek(200)
        file.write(np.uint16(383).tobytes())
    assert f"data.pairs={folder}: {folder}/captions.bin holds token id 383, but " in refused(SampleIndex([folder]))
    assert (folder / "content.json").is_file()


def test_numbers_that_are_no_ids_are_refused(tmp_path):
    prefix = foreign(tmp_path / "t", kind=np.float32)
    with pytest.raises(DataError, match=r"t\.idx is an index of float32, not of tokens; make it again"):
        TextIndex([prefix])


def tamper(folder: Path, place: int, token: int) -> None:
    """Overwrite a caption token of an index that goes on saying that all is well."""
    with (folder / "captions.bin").open("r+b") as file:
        file.seek(2 * place)
        file.write(np.uint16(token).tobytes())


def plans(config: configuration.Config, sources: Sources, steps: int) -> list:
    planner = make_planner(config.data, sources, config.model, config.vision, replicas=1, seed=config.run.seed)
    return [planner.step(step) for step in range(steps)]


@pytest.mark.parametrize("key", ["pairs", "conversations"])
def test_a_row_names_the_pair_whose_caption_has_a_bad_id(tiny, dialogs, tmp_path, key):
    folder, count = tmp_path / "data" / key, {"pairs": 60, "conversations": 40}[key]
    shutil.copytree(prepared(tiny, dialogs)[key], folder)
    shutil.copytree(tiny.folder / "shards", tmp_path / "data" / "shards")
    amounts = {"data.pairs_per_step": 0, "data.text_tokens_per_step": 0} | {f"data.{key}_per_step": count}
    config = configuration.load(tiny.write(tmp_path / "run.yaml", amounts | {f"data.{key}": str(folder)}))
    sources = open_sources(config.data, config.model)
    builder = BatchBuilder(config.data, sources, config.vision)
    rows = plans(config, sources, 1)[0].rows
    samples = np.fromfile(folder / "samples.bin", SAMPLE if key == "pairs" else CONVERSATION)
    for pair in (2, 3):  # one conversation in four has no picture
        place = int(samples["caption"][pair]) + 1
        was = int(np.fromfile(folder / "captions.bin", np.uint16)[place])
        tamper(folder, place, VOCABULARY + pair)
        of = "" if key == "conversations" and pair == 3 else r" \(\w+ of .*/000000\.tar\)"
        wanted = rf"data\.{key}={folder}: {key[:-1]} {pair}{of} holds token id 30{pair}, but model\.vocabulary=300; "
        with pytest.raises(DataError, match=wanted):
            builder.build(rows)
        tamper(folder, place, was)
        builder.build(rows)


@pytest.mark.parametrize("token", [VOCABULARY, 383, 40_000, -1, -2])
def test_a_row_names_the_document_that_has_a_bad_id_even_as_the_next_token(tiny, tmp_path, token):
    documents = {"a": foreign(tmp_path / "a", 10), "b": foreign(tmp_path / "b", 30, bad={7: token})}
    config = configuration.load(
        tiny.write(tmp_path / "run.yaml", {"data.text": list(map(str, documents.values())), "data.pairs_per_step": 0})
    )
    sources = open_sources(config.data, config.model)
    builder = BatchBuilder(config.data, sources, config.vision)
    wanted = rf"data\.text={documents['b']}: document 7 of .*b\.bin holds token id {token}, but model\.vocabulary=300; "
    for plan in plans(config, sources, 12):
        for row in plan.rows:
            for segment in row:
                bad_at = LENGTH // 2 - segment.start
                if segment.item == 17 and 0 <= bad_at < segment.tokens + (segment.targets == segment.tokens):
                    with pytest.raises(DataError, match=wanted):
                        builder.build([(segment,)])
                else:
                    builder.build([(segment,)])
    segment = next(
        segment for plan in plans(config, sources, 12) for row in plan.rows for segment in row if segment.item == 17
    )
    half = type(segment)(False, 17, 0, LENGTH // 2, LENGTH // 2, LENGTH // 2)
    with pytest.raises(DataError, match=wanted):  # it is only predicted here
        builder.build([(half,)])


def said(ranks: Ranks) -> str:
    """The one line that a job ended with."""
    assert "Traceback" not in ranks.text()
    (line,) = [line for line in ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    return line.removeprefix("megatron-sphinx train: ")


def documents_of(tiny, tmp_path, prefix: Path, steps: int) -> list[set[int]]:
    """The documents of the text of each of the first steps."""
    config = configuration.load(tiny.write(tmp_path / "look.yaml", {"data.text": str(prefix)}))
    found = plans(config, open_sources(config.data, config.model), steps)
    return [{document for document, _, _ in plan.text} for plan in found]


LAYOUTS = [
    (1, {}),
    (2, {"parallel.tensor": 2}),
    (3, {"parallel.encoder": 1}),
    (3, {"parallel.tensor": 2, "parallel.encoder": 1}),
]


@pytest.mark.parametrize(
    ("world", "layout", "token"),
    [
        (*LAYOUTS[0], 40_000),
        pytest.param(*LAYOUTS[1], VOCABULARY, marks=pytest.mark.slow),
        pytest.param(*LAYOUTS[2], -3, marks=pytest.mark.slow),
        (*LAYOUTS[3], 383),
    ],
)
def test_a_bad_id_that_the_scan_finds_ends_the_run_on_every_rank(train, tiny, tmp_path, world, layout, token):
    prefix = foreign(tmp_path / "t")
    used = set().union(*documents_of(tiny, tmp_path, prefix, 40))
    settings = ENDLESS | layout | {"data.text": str(prefix)}
    done = train(world, settings | {"training.steps": 2})
    assert (tmp_path / "t.content.json").is_file()
    foreign(prefix, bad={max(set(range(400)) - used): token})
    ended = train(world, settings, status=2)
    assert f"data.text={prefix}: {prefix}.bin holds token id {token}, but model.vocabulary=300; " in said(ended.ranks)
    if world > 1:
        assert json.loads((done.folder / "ended.json").read_text()) == {"status": 2}
    saved = [path.name for path in complete(done.folder / "checkpoints")]
    assert saved
    steps = len(ended.metrics)
    assert 2 < steps < 40
    written = (tmp_path / "t.content.json").stat().st_mtime_ns
    again = train(world, settings, status=2)  # now it is known when the data is opened
    assert said(again.ranks) == said(ended.ranks)
    assert len(again.metrics) == steps
    assert [path.name for path in complete(done.folder / "checkpoints")] == saved
    assert (tmp_path / "t.content.json").stat().st_mtime_ns == written
    foreign(prefix)
    mended = train(world, settings | {"training.steps": steps + 1}).metrics
    assert len(mended) == steps + 1


@pytest.mark.parametrize(("world", "layout"), [*LAYOUTS, (2, {}), (3, {"parallel.pipeline": 2, "parallel.encoder": 1})])
def test_a_bad_id_in_a_row_ends_the_run_on_every_rank(train, tiny, tmp_path, world, layout):
    prefix = foreign(tmp_path / "t")
    steps = documents_of(tiny, tmp_path, prefix, 4)
    bad = min(steps[3] - set().union(*steps[:3]))
    scanned(TextIndex([prefix]))
    foreign(prefix, bad={bad: 310})
    states = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in tmp_path.glob("t.[bi]*")}
    edit(tmp_path / "t.content.json", lambda found: found.update(files=states))  # a memory that is wrong
    ended = train(world, ENDLESS | layout | {"data.text": str(prefix)}, status=2)
    assert said(ended.ranks) == (
        f"data.text={prefix}: document {bad} of {prefix}.bin holds token id 310, but model.vocabulary=300; "
        f"it was made with another tokenizer, or is damaged: prepare it again with data.tokenizer"
    )
    assert len(ended.metrics) == 3
    assert [path.name for path in complete(ended.folder / "checkpoints")][-1] == "step_00000003"
    foreign(prefix)
    assert len(train(world, layout | {"data.text": str(prefix), "training.steps": 5}).metrics) == 5


@pytest.mark.parametrize(("world", "layout"), [(2, {"parallel.tensor": 2}), (3, {"parallel.encoder": 1})])
def test_a_bad_id_in_a_caption_ends_the_run_on_every_rank(train, tiny, tmp_path, world, layout):
    folder = tiny.folder / "pairs"
    shutil.copytree(folder, tmp_path / "pairs")
    shutil.copytree(tiny.folder / "shards", tmp_path / "shards")
    size = (folder / "captions.bin").stat().st_size // 2
    for place in range(0, size, 3):
        tamper(tmp_path / "pairs", place, 301)
    ended = train(world, layout | {"data.pairs": str(tmp_path / "pairs")}, status=2)
    assert re.match(
        rf"data\.pairs={tmp_path}/pairs: pair \d+ \(\d+ of {tmp_path}/shards/\d+\.tar\) holds token id 301, but ",
        said(ended.ranks),
    )


def test_a_scan_ends_with_its_run_and_planning_starts_none(train, tiny, tmp_path, capsys):
    prefix = foreign(tmp_path / "t")
    config = tiny.write(tmp_path / "plan.yaml", {"data.text": str(prefix)})
    before = threading.active_count()
    assert main(["plan", str(config), "--ranks", "1"]) == 0
    assert main(["plan", str(config), "--step", "1"]) == 0
    assert threading.active_count() == before
    assert not (tmp_path / "t.content.json").exists()
    train(1, {"data.text": str(prefix)})
    assert json.loads((tmp_path / "t.content.json").read_text())["content"]["highest"] == VOCABULARY - 1
    assert not (tmp_path / "run" / "content").exists()
