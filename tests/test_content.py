"""What data holds: found once, remembered, and identified by a fingerprint that is equal exactly where the data is."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_sphinx.data.content import Content, Memory, Scan, check_ids
from megatron_sphinx.data.index import SAMPLE
from megatron_sphinx.data.pairs import ImageReader, SampleIndex
from megatron_sphinx.data.text import TextIndex
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.conversations import index_conversations
from megatron_sphinx.prepare.pairs import index_shards, write_shards
from megatron_sphinx.prepare.text import write_text

VOCABULARY = 300  # of the tiny tokenizer; its embedding has 384 rows
LENGTH = 20  # of a document of `foreign`
ENDLESS = {"training.steps": 100_000, "run.print_interval": 1000, "checkpoint.interval": 1}


def foreign(prefix: Path, documents: int = 400, kind: type = np.int32, bad: dict[int, int] | None = None) -> Path:
    """A token file as somebody else's program writes it; `bad` gives documents a token id that they have in it."""
    rng = np.random.default_rng(documents)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=kind)
    for number in range(documents):
        tokens = rng.integers(3, VOCABULARY, LENGTH)
        tokens[LENGTH // 2] = (bad or {}).get(number, tokens[LENGTH // 2])
        builder.add_document(torch.from_numpy(tokens), [LENGTH])
    builder.finalize(f"{prefix}.idx")
    return prefix


def scanned(index: TextIndex | SampleIndex, memory: Path | None = None) -> TextIndex | SampleIndex:
    """The index when all of it was read or remembered."""
    scan = Scan(index.content_sources, VOCABULARY, Memory(memory))
    with scan:
        scan._thread.join()
    assert scan.error is None
    return index


def refused(index: TextIndex | SampleIndex) -> str:
    """What a scan of it ends with."""
    scan = Scan(index.content_sources, VOCABULARY, Memory())
    with scan:
        scan._thread.join()
    assert isinstance(scan.error, DataError)
    return str(scan.error)


def edit(path: Path, change) -> None:
    """Change JSON as `change` does."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def as_before(folder: Path, target: Path) -> Path:
    """A copy of prepared data, as it was prepared before indexes said what they hold."""
    shutil.copytree(folder, target)

    def forget(index: dict) -> None:
        for part in [index, *index.get("files", [])]:
            part.pop("content", None)

    edit(target / "index.json", forget)
    return target


def opened(folder: Path, kind: str) -> TextIndex | SampleIndex:
    return TextIndex([folder]) if kind == "text" else SampleIndex([folder], kind)


def prepared(tiny, dialogs: Path) -> dict[str, Path]:
    return {"text": tiny.folder / "text", "pairs": tiny.folder / "pairs", "conversations": dialogs}


# what is known, and of what


@pytest.mark.parametrize("kind", ["text", "pairs", "conversations"])
def test_prepared_data_says_what_it_holds_and_a_scan_of_it_says_the_same(tiny, dialogs, tmp_path, kind):
    folder = prepared(tiny, dialogs)[kind]
    known = opened(folder, kind)
    tokens = np.fromfile(folder / ("000000.bin" if kind == "text" else "captions.bin"), np.uint16)
    (content,) = [part.content for part in known.content_sources]
    assert (content.lowest, content.highest) == (tokens.min(), tokens.max())
    assert not list(folder.glob("*content.json"))
    old = opened(as_before(folder, tmp_path / "old"), kind)
    old.check(tiny.tokenizer) if kind == "text" else None  # shards are elsewhere now
    assert [part.content for part in old.content_sources] == [None]
    assert old.fingerprint is None
    assert [part.content for part in scanned(old).content_sources] == [content]
    assert old.fingerprint == known.fingerprint is not None


def test_every_part_of_text_says_what_it_holds_and_so_does_the_held_out_share(tiny, tmp_path):
    write_text([tiny.folder / "text.jsonl"], tmp_path / "out", tiny.tokenizer, held_out=0.2, part_bytes=900, workers=2)
    for folder in (tmp_path / "out", tmp_path / "out" / "held_out"):
        index = TextIndex([folder])
        assert len(index.content_sources) > 2
        found = [part.content for part in index.content_sources]
        assert [
            part.content for part in scanned(TextIndex([part.prefix for part in index.content_sources])).content_sources
        ] == found
        empty = [part for part in json.loads((folder / "index.json").read_text())["files"] if not part["tokens"]]
        assert all("content" not in part for part in empty)


def test_a_part_of_text_that_an_earlier_version_has_done_is_done_again(tiny, tmp_path):
    """It did not count what it left out; so do parts that were made of other files or settings."""
    write_text([tiny.folder / "text.jsonl"], tmp_path / "out", tiny.tokenizer, part_bytes=3000)
    whole, times = (tmp_path / "out" / "index.json").read_text(), {}
    old = tmp_path / "out" / "000001.json"
    edit(old, lambda about: [about.update(mark="another"), about.pop("documents"), about.pop("rejected")])
    for path in (tmp_path / "out").glob("*.bin"):
        times[path] = path.stat().st_mtime_ns
    assert write_text([tiny.folder / "text.jsonl"], tmp_path / "out", tiny.tokenizer, part_bytes=3000).inputs == 50
    assert (tmp_path / "out" / "index.json").read_text() == whole
    assert [path.name for path, at in times.items() if path.stat().st_mtime_ns != at] == ["000001.bin"]


def test_what_a_scan_has_found_is_remembered_beside_the_data(tmp_path):
    prefix = foreign(tmp_path / "t")
    scanned(TextIndex([prefix]))
    memory = tmp_path / "t.content.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bin", "t.content.json", "t.idx"]
    edit(memory, lambda found: found["content"].update(sha256="of nothing that was read"))
    written = memory.stat().st_mtime_ns
    (part,) = scanned(TextIndex([prefix])).content_sources  # the second run reads that, not the data
    assert part.content.sha256 == "of nothing that was read"
    assert memory.stat().st_mtime_ns == written
    for path in (tmp_path / "t.bin", tmp_path / "t.idx"):
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        (part,) = scanned(TextIndex([prefix])).content_sources
        assert part.content.sha256 != "of nothing that was read"
        edit(memory, lambda found: found["content"].update(sha256="of nothing that was read"))


@pytest.mark.parametrize("nonsense", ["", "[]", "{}", '"x"', '{"files": {}}', '{"content": {"lowest": "0"}}'])
def test_a_memory_that_is_not_ours_is_written_again(tmp_path, nonsense):
    prefix = foreign(tmp_path / "t")
    (tmp_path / "t.content.json").write_text(nonsense)
    (part,) = scanned(TextIndex([prefix])).content_sources
    assert (part.content.lowest, part.content.highest) == (3, VOCABULARY - 1)
    assert json.loads((tmp_path / "t.content.json").read_text())["content"]["sha256"] == part.content.sha256
    edit(tmp_path / "t.content.json", lambda found: found["content"].update(lowest="3"))
    assert scanned(TextIndex([prefix])).content_sources == [part]


def test_where_nothing_can_be_written_beside_the_data_the_run_remembers(tmp_path):
    prefix = foreign(tmp_path / "t")
    (tmp_path / "t.content.json").mkdir()  # in the way, for root too
    scanned(TextIndex([prefix]), tmp_path / "run" / "content")
    (memory,) = (tmp_path / "run" / "content").iterdir()
    edit(memory, lambda found: found["content"].update(sha256="remembered"))
    (part,) = scanned(TextIndex([prefix]), tmp_path / "run" / "content").content_sources
    assert part.content.sha256 == "remembered"
    (tmp_path / "file").touch()
    (part,) = scanned(TextIndex([prefix]), tmp_path / "file" / "content").content_sources  # nowhere, and no error
    assert part.content.sha256 != "remembered"
    assert not list(tmp_path.glob(".*"))


def test_runs_that_scan_the_same_file_at_once_do_not_hurt_each_other(tmp_path, run_ranks):
    prefix = foreign(tmp_path / "t")
    (part,) = scanned(TextIndex([prefix])).content_sources

    def scan() -> int:
        for _ in range(60):
            (tmp_path / "t.content.json").unlink(missing_ok=True)
            assert scanned(TextIndex([prefix])).content_sources == [part]
        return 0

    run_ranks(3, scan)
    assert not list(tmp_path.glob("*.partial"))


def test_a_scan_stops_when_its_run_ends_and_remembers_nothing_half_read(tmp_path):
    prefix, tokens = foreign(tmp_path / "t", documents=1), 2**31 - 1
    index = bytearray((tmp_path / "t.idx").read_bytes())
    index[34:38] = np.int32(tokens).tobytes()  # the length of the only document
    (tmp_path / "t.idx").write_bytes(index)
    os.truncate(tmp_path / "t.bin", 4 * tokens)  # which needs no space
    text = TextIndex([prefix])
    began = time.monotonic()
    with Scan(text.content_sources, VOCABULARY, Memory()) as scan:
        pass
    assert time.monotonic() - began < 1  # it takes several seconds to read
    assert not scan._thread.is_alive()
    assert (scan.error, text.fingerprint) == (None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bin", "t.idx"]


def test_a_file_that_cannot_be_read_ends_the_scan(tmp_path):
    prefix = foreign(tmp_path / "t")
    index = TextIndex([prefix])
    (tmp_path / "t.idx").unlink()
    assert re.fullmatch(rf"data\.text={prefix}: .*t\.idx cannot be read \(No such file or directory\); copy it again",
                        refused(index))  # fmt: skip


# fingerprints


def test_a_fingerprint_is_of_the_content_and_not_of_where_it_lies(tiny, dialogs, tmp_path):
    for kind, folder in prepared(tiny, dialogs).items():
        shutil.copytree(folder, tmp_path / kind)
        for path in (tmp_path / kind).iterdir():
            os.utime(path, (1, 1))
        assert opened(tmp_path / kind, kind).fingerprint == opened(folder, kind).fingerprint
    of_folder, of_prefix = TextIndex([tiny.folder / "text"]), TextIndex([tiny.folder / "text" / "000000"])
    assert of_prefix.fingerprint is None
    for ending in (".bin", ".idx"):
        shutil.copy(tiny.folder / "text" / f"000000{ending}", tmp_path / f"other{ending}")
    assert scanned(TextIndex([tmp_path / "other"])).fingerprint == of_folder.fingerprint


def test_data_prepared_twice_has_one_fingerprint(tiny, dialogs, tmp_path):
    for name in ("a", "b"):
        shards = write_shards(tiny.folder / "pictures", tmp_path / name / "shards", 25)
        index_shards(shards, tmp_path / name / "pairs", tiny.tokenizer, workers=2)
        write_text([tiny.folder / "text.jsonl"], tmp_path / name / "text", tiny.tokenizer, workers=2)
        index_conversations(
            [tiny.folder / "dialogs.json"], tmp_path / name / "conversations", tiny.tokenizer,
            images=tiny.folder / "pictures", samples_per_shard=15,
        )  # fmt: skip
        if name == "a":
            time.sleep(1.1)  # a tar keeps the seconds of its members
    for kind, folder in prepared(tiny, dialogs).items():
        found = {opened(tmp_path / name / kind, kind).fingerprint for name in ("a", "b")}
        assert len(found) == 1, kind
        if kind != "pairs":
            assert found == {opened(folder, kind).fingerprint}


def test_one_token_one_size_or_another_order_is_another_fingerprint(tiny, tmp_path):
    def of_text(*names: str) -> str:
        return scanned(TextIndex([tmp_path / name for name in names])).fingerprint

    first, second = foreign(tmp_path / "a"), foreign(tmp_path / "b", bad={17: 5})
    foreign(tmp_path / "c", kind=np.uint16)
    assert first.with_suffix(".idx").read_bytes() == second.with_suffix(".idx").read_bytes()
    assert len({of_text(*names) for names in (["a"], ["b"], ["c"], ["a", "b"], ["b", "a"], ["a", "a"])}) == 6

    shutil.copytree(tiny.folder / "pairs", tmp_path / "p")
    shutil.copytree(tiny.folder / "pairs", tmp_path / "q")
    samples = np.fromfile(tmp_path / "q" / "samples.bin", SAMPLE)
    samples["width"][30] += 1
    samples.tofile(tmp_path / "q" / "samples.bin")
    for name in ("p", "q"):
        edit(tmp_path / name / "index.json", lambda index: index.pop("content"))
    found = {scanned(SampleIndex([tmp_path / name for name in names])).fingerprint for names in ("p", "q", "pq", "qp")}
    assert len(found) == 4
    assert opened(tiny.folder / "pairs", "pairs").fingerprint in found


# indexes of strangers


@pytest.mark.parametrize("kind", ["<f4", "?", "<U1", "m8", "O"])
def test_captions_must_be_of_whole_numbers(tiny, tmp_path, kind):
    shutil.copytree(tiny.folder / "pairs", tmp_path / "pairs")
    edit(tmp_path / "pairs" / "index.json", lambda index: index.update(caption_type=kind))
    with pytest.raises(
        DataError, match=rf"damaged index \(caption_type={re.escape(kind)}: is no type of whole numbers\)"
    ):
        SampleIndex([tmp_path / "pairs"])


def test_a_token_file_and_an_index_of_other_files_are_refused(tmp_path):
    IndexedDatasetBuilder(f"{tmp_path}/empty.bin", dtype=np.int32).finalize(f"{tmp_path}/empty.idx")
    (tmp_path / "empty.bin").write_bytes(bytes(8))
    with pytest.raises(
        DataError, match=r"empty\.bin and \S+empty\.idx do not belong together|is not an index of tokens"
    ):
        TextIndex([tmp_path / "empty"])
    foreign(tmp_path / "cut", 3)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"cut\.bin and \S+cut\.idx do not belong together; make them again"):
        TextIndex([tmp_path / "cut"])


def test_what_a_scan_cannot_make_sense_of_is_one_line(tmp_path, monkeypatch):
    index = TextIndex([foreign(tmp_path / "odd", 3)])

    def odd(*_: object) -> None:
        raise ValueError("buffer size must be a multiple of element size")

    monkeypatch.setattr(type(index.content_sources[0]), "measure", odd)
    assert re.search(r"odd\.bin is damaged \(buffer size must be a multiple .*\); make it again", refused(index))


def test_a_message_shows_nothing_of_a_file_that_is_no_shard(tiny, tmp_path):
    """An index may name any file for a shard."""
    shutil.copytree(tiny.folder / "pairs", tmp_path / "pairs")
    secret = tmp_path / "id_rsa"
    secret.write_bytes(b"-----BEGIN PRIVATE KEY-----".ljust(4096, b"x"))
    edit(tmp_path / "pairs" / "index.json", lambda index: [one.update(path="../id_rsa") for one in index["shards"]])
    reader = ImageReader(SampleIndex([tmp_path / "pairs"]))
    assert reader.name(0) == (str(secret), f"at byte {reader.index.location(0).offset}")
    with pytest.raises(DataError, match="the shard is not the one its index was made for"):
        reader.read(0)


@pytest.mark.parametrize(("lowest", "highest", "bad"), [(0, 299, None), (0, 300, 300), (-1, 299, -1), (-1, 300, -1)])
def test_a_token_id_is_at_least_0_and_less_than_the_vocabulary(lowest, highest, bad):
    data = SimpleNamespace(label="data.text=x", paths=[Path("x.bin")])
    if bad is None:
        check_ids(data, Content(lowest, highest, "none"), 300)
    else:
        with pytest.raises(DataError, match=f"data.text=x: x.bin holds token id {bad}, but model.vocabulary=300"):
            check_ids(data, Content(lowest, highest, "none"), 300)
