"""Token files: what text becomes, what is read of it, and what bad input gets."""

import json
import random

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from test_pairs import quarantined

from megatron_sphinx.data.text import TextIndex, TokenFile
from megatron_sphinx.data.tokenizer import TokenizerIdentity
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.text import InputRange, digest_of, write_text
from megatron_sphinx.prepare.text_formats import PerFile, TextFormat, TextSettings


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"content": text}) + "\n" for text in texts).encode()


def all_documents(index: TextIndex) -> list[list[int]]:
    spans = index.spans(0, index.bounds[-1])
    assert spans.is_end.all()
    return [index.read(n, 0, int(length)).tolist() for n, length in zip(spans.document, spans.length, strict=True)]


def test_text_is_megatrons_own_format(tiny, tmp_path):
    texts = ["a red circle", "blue", "  ", "green paint"]
    (tmp_path / "t.jsonl").write_bytes(jsonl(*texts))
    (tmp_path / "t.txt").write_text("plain text")
    report = write_text([tmp_path / "t.jsonl", tmp_path / "t.txt"], tmp_path / "out", tiny.tokenizer)
    index = TextIndex([tmp_path / "out"])
    index.check(tiny.tokenizer)
    assert (report.taken, report.tokens) == (4, index.bounds[-1])
    wanted = [[1, *tiny.tokenizer.encode(text), 2] for text in [*texts[:2], texts[3], "plain text"]]
    assert all_documents(index) == wanted
    megatron = IndexedDataset(str(tmp_path / "out" / "000000"))
    assert [megatron[n].tolist() for n in range(3)] == wanted[:3]
    assert index.read(3, 1, 2).tolist() == wanted[3][1:3]


def test_token_files_that_megatron_wrote_are_read_as_they_are(tiny, tmp_path):
    rng = np.random.default_rng(0)
    for name, kind in (("a", np.int32), ("b", np.uint16)):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=kind)
        for number in range(20):
            length = int(rng.integers(0, 9)) if number else 5
            builder.add_document(torch.from_numpy(rng.integers(0, 300, length)), [length])  # some are empty
        builder.finalize(str(tmp_path / f"{name}.idx"))
    index = TextIndex([tmp_path / "a", tmp_path / "b"])
    files = [IndexedDataset(str(tmp_path / name)) for name in ("a", "b")]
    assert index.bounds == [0, *np.cumsum([file.sequence_lengths.sum() for file in files])]
    whole = [file[n].tolist() for file in files for n in range(20)]
    assert all_documents(index) == [document for document in whole if document]
    tokens = [token for document in whole for token in document]
    for _ in range(50):
        first, last = sorted(int(n) for n in rng.integers(0, len(tokens) + 1, 2))
        if first == last:
            continue
        spans = index.spans(first, last)
        found = [
            token
            for document, start, length in zip(spans.document, spans.start, spans.length, strict=True)
            for token in index.read(document, int(start), int(length)).tolist()
        ]
        assert found == tokens[first:last]
        ends = spans.start + spans.length == np.array([len(whole[n]) for n in spans.document])
        assert np.array_equal(ends, spans.is_end)


def test_large_files_are_divided_and_nothing_is_lost(tiny, tmp_path):
    import pyarrow
    from pyarrow import parquet

    rng = random.Random(0)
    texts = [" ".join(rng.choices(["red", "blue", "paint", "light"], k=rng.randint(1, 30))) for _ in range(300)]
    (tmp_path / "t.jsonl").write_bytes(jsonl(*texts))
    parquet.write_table(pyarrow.table({"content": texts}), tmp_path / "t.parquet", row_group_size=37)
    wanted = [[1, *tiny.tokenizer.encode(text), 2] for text in texts]
    for name in ("t.jsonl", "t.parquet"):
        for part_bytes in (700, 5000, 10**9):
            report = write_text([tmp_path / name], tmp_path / "out", tiny.tokenizer, part_bytes=part_bytes, workers=2)
            index = TextIndex([tmp_path / "out"])
            index.check(tiny.tokenizer)
            files = list((tmp_path / "out").glob("*.bin"))
            assert all_documents(index) == wanted
            assert report.taken == 300
            assert (len(files) > 1) == (part_bytes < 10**9)  # those of the call before are gone


def test_compressed_jsonl_is_read(tiny, tmp_path):
    import gzip

    import pyarrow

    content = jsonl("one red", "two blue")
    with pyarrow.CompressedOutputStream(str(tmp_path / "t.jsonl.zst"), "zstd") as file:
        file.write(content)
    frames = (tmp_path / "t.jsonl.zst").read_bytes()
    (tmp_path / "t.jsonl.zst").write_bytes(frames + frames)  # as tools that compress in parallel write them
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(content))
    report = write_text([tmp_path / "t.jsonl.zst", tmp_path / "t.jsonl.gz"], tmp_path / "out", tiny.tokenizer)
    assert report.taken == 6
    for name in ("t.jsonl.zst", "t.jsonl.gz"):
        (tmp_path / name).write_bytes(b"nonsense")
        why = rf"{name}: no text; 1 left out \(named as (zstd|gzip), but is none\); .*; see .*quarantine\.jsonl"
        with pytest.raises(DataError, match=why):
            write_text([tmp_path / name], tmp_path / "out2", tiny.tokenizer)


def test_text_may_be_behind_a_url(tiny, tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe("/text/t.jsonl", jsonl("one red", "two blue"))
    report = write_text(["memory://text/t.jsonl"], tmp_path / "out", tiny.tokenizer, part_bytes=20)
    assert report.taken == 2


def test_parquet_is_read_by_column(tiny, tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"content": ["one", None, "two"], "url": ["x", "y", "z"]}), tmp_path / "t.parquet"
    )
    assert write_text([tmp_path / "t.parquet"], tmp_path / "out", tiny.tokenizer).taken == 2
    settings = TextSettings(keys=PerFile("--key", ["text"]))
    with pytest.raises(DataError, match=r"has no column 'text', but \['content', 'url'\]; give --key"):
        write_text([tmp_path / "t.parquet"], tmp_path / "out2", tiny.tokenizer, settings)
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-9])
    with pytest.raises(
        DataError, match=r"bad\.parquet: no text; 1 left out \(damaged\); the first: damaged: .*; copy it"
    ):
        write_text([tmp_path / "bad.parquet"], tmp_path / "out2", tiny.tokenizer)


def test_documents_that_cannot_be_read_are_left_out_and_listed(tiny, tmp_path):
    bad = [
        b'{"text": "no content"}\n',
        b"not json\n",
        b'{"content": "caf\xe9"}\n',
        json.dumps({"content": "a\0b"}).encode(),
    ]
    good = jsonl("fine")
    (tmp_path / "t.jsonl").write_bytes(good + b"".join(bad) + b'\n{"content": "also')  # and the last line is cut
    report = write_text([tmp_path / "t.jsonl"], tmp_path / "out", tiny.tokenizer)
    assert report.taken == 1
    assert report.rejected == {
        "no key 'content'": 1, "not JSON": 2, "not UTF-8": 1, "holds a NUL character": 1,
    }  # fmt: skip
    assert report.inputs == 6
    at = len(good)
    found = quarantined(tmp_path / "out")
    for line in bad:
        assert f"byte {at}" in found
        at += len(line)


def test_text_that_cannot_be_prepared_leaves_no_index(tiny, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"title": "another key"}\n')
    why = r"t\.jsonl: has no key 'content' or 'text', but \['title'\]; give --key"
    with pytest.raises(DataError, match=why):
        write_text([tmp_path / "t.jsonl"], tmp_path / "out", tiny.tokenizer)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(
        DataError, match=r"empty\.txt: no text; 1 left out \(empty\); .*; see .*jsonl, or give another --key"
    ):
        write_text([tmp_path / "empty.txt"], tmp_path / "out", tiny.tokenizer)
    assert not (tmp_path / "out" / "index.json").exists()
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read \(No such file or directory\)"):
        write_text([tmp_path / "nowhere.jsonl"], tmp_path / "out", tiny.tokenizer)


def test_a_held_out_share_of_text_is_chosen_by_the_text(tiny, tmp_path):
    texts = [f"red paint {n} blue" for n in range(200)]
    (tmp_path / "t.jsonl").write_bytes(jsonl(*texts, *texts))
    report = write_text([tmp_path / "t.jsonl"], tmp_path / "out", tiny.tokenizer, held_out=0.2)
    kept, held_out = (all_documents(TextIndex([tmp_path / name])) for name in ("out", "out/held_out"))
    assert (len(kept), len(held_out)) == (report.taken, report.held_out)
    assert len(kept) + len(held_out) == 400
    assert 40 <= len(held_out) <= 120
    assert not {tuple(document) for document in kept} & {tuple(document) for document in held_out}


def test_token_files_that_are_missing_or_damaged_are_refused(tiny, tmp_path):
    for ending in (".bin", ".idx"):
        (tmp_path / f"t{ending}").write_bytes((tiny.folder / "text" / f"000000{ending}").read_bytes())
    assert TextIndex([tmp_path / "t"]).documents == 50
    content = (tmp_path / "t.bin").read_bytes()
    (tmp_path / "t.bin").write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"data\.text=.*t\.bin has \d+ bytes, its index says \d+; copy it again"):
        TokenFile(tmp_path / "t")
    (tmp_path / "t.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.text=.*t: holds no tokens"):
        TokenFile(tmp_path / "t")
    (tmp_path / "t.bin").write_bytes(content)
    (tmp_path / "t.idx").write_bytes(b"nonsense" * 8)
    with pytest.raises(DataError, match="is not an index of tokens"):
        TokenFile(tmp_path / "t")
    (tmp_path / "t.idx").unlink()
    with pytest.raises(DataError, match=r"t\.idx is missing; make it by megatron-sphinx prepare text"):
        TokenFile(tmp_path / "t")
    write_text([tiny.folder / "text.jsonl"], tmp_path / "out", tiny.tokenizer)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    index["files"][0]["documents"] += 1
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"000000 is not the file its index was made for"):
        TextIndex([tmp_path / "out"]).check(tiny.tokenizer)
    (tmp_path / "out" / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"damaged index\.json"):
        TextIndex([tmp_path / "out"])
    (tmp_path / "out" / "index.json").unlink()
    with pytest.raises(DataError, match=r"index\.json: No such file or directory; make it by megatron-sphinx prep"):
        TextIndex([tmp_path / "out"])


@pytest.mark.parametrize("vocabulary", [1, 300, 32000, 65499, 65500, 65536, 250_000])
def test_token_ids_are_of_the_type_that_megatron_would_take(vocabulary):
    assert TokenizerIdentity(vocabulary, "x").token_type == DType.optimal_dtype(vocabulary)


def test_parts_are_known_by_a_digest_that_stays():
    """Else the same command over a folder of before would make all of it again; of pairs and conversations, too.

    Parts that versions have made which did not count what they left out are made again: they may lack documents.
    """
    assert repr(TokenizerIdentity(300, "ab")) == "TokenizerMark(vocabulary=300, sha256='ab')"
    form = TextFormat("lines", "content", "utf-8", is_plain=True)
    settings = (form, 0.5, 64 * 2**20, 16 * 2**20, TokenizerIdentity(300, "ab"))
    known = "269acf0611676c9ae9a6ead74fe42f2e1e049f796597d9235f7fa8433535fdc9"
    assert digest_of(InputRange(3, "/x/t.jsonl", 0, 99), (99, "77"), settings) == known
