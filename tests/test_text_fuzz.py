"""Readers of text and of PDFs over damaged files: they raise nothing but our own errors, end soon, and lose nothing.

Each file is a valid one with some bytes changed, cut out, doubled or put in; the seed of one that fails is in its name.
"""

import bz2
import gzip
import io
import json
import lzma
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from test_pdf import columns, write_pdf
from test_text_readers import lines, texts

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.documents import write_documents
from megatron_sphinx.prepare.pdf import DocumentSettings
from megatron_sphinx.prepare.text import write_text

QUICK, SLOW = 60, 2000
SECONDS, MEGABYTES = 10, 1024  # that one file may take
ODD = [b"\0", b"\xff", b"\\", b'"', b"{", b"[", b"]", b"}", b",", b"\n", b"\xed\xa0\x80", b"\\ud83d", b"\xef\xbb\xbf"]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A file with one to a few damages."""
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at, length = rng.randrange(len(damaged) + 1), rng.choice([1, 1, 2, 8, 64, 512])
        kind = rng.randrange(7)
        if kind == 0 and at < len(damaged):
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            damaged[at : at + length] = rng.randbytes(min(length, len(damaged) - at))
        elif kind == 2:
            del damaged[at : at + length]
        elif kind == 3:
            damaged[at:at] = damaged[at : at + length]
        elif kind == 4:
            damaged[at:at] = rng.choice(ODD) * rng.choice([1, 1, 3, 2000])
        elif kind == 5:
            damaged[at : at + 4] = rng.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4, b"\xff\xff\xff\x7f"])
        elif rng.random() < 0.3:
            del damaged[at:]
    return bytes(damaged)


def as_parquet(kind: pyarrow.DataType, compression: str) -> bytes:
    file = io.BytesIO()
    table = pyarrow.table({"url": ["u"] * 60, "content": pyarrow.array(texts(60)).cast(kind)})
    parquet.write_table(table, file, row_group_size=20, compression=compression, data_page_size=500)
    return file.getvalue()


def as_array(indent: int | None) -> bytes:
    return json.dumps([{"content": text, "n": [1, {"a": "]"}]} for text in texts(20)], indent=indent).encode()


TEXT: dict[str, Callable[[], bytes]] = {
    "t.jsonl": lambda: lines(texts(30)),
    "utf16.jsonl": lambda: lines(texts(20)).decode().encode("utf-16"),
    "array.json": lambda: as_array(None),
    "indented.json": lambda: as_array(2),
    "t.txt": lambda: "\n".join(texts(9)).encode(),
    "t.jsonl.gz": lambda: gzip.compress(lines(texts(30)), mtime=0) * 2,
    "t.jsonl.bz2": lambda: bz2.compress(lines(texts(30))),
    "t.jsonl.xz": lambda: lzma.compress(lines(texts(30))),
    "t.jsonl.zst": lambda: zstandard.compress(lines(texts(30))) * 2,
    "string.parquet": lambda: as_parquet(pyarrow.string(), "snappy"),
    "binary.parquet": lambda: as_parquet(pyarrow.binary(), "zstd"),
}


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Fail where a block takes long, or much memory."""
    sys.stdout.write(f"fuzz: {what}\n")  # pytest shows it where something fails
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()

    def stop(*_: object) -> None:
        pytest.fail(f"{what} takes more than {SECONDS} s")

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"{what} takes {grown:.0f} MB, and {time.monotonic() - begun:.1f} s"


def assert_is_one_line(error: DataError, path: Path) -> None:
    assert "\n" not in str(error)
    assert str(error).startswith(str(path))


def fuzz_text(tiny, folder: Path, name: str, count: int) -> None:
    whole, path = TEXT[name](), folder / name
    taken = 0
    for seed in range(count):
        path.write_bytes(mutated(whole, random.Random(seed)))
        with bounded(f"{name}, seed {seed}"):
            try:
                report = write_text(
                    [path], folder / "out", tiny.tokenizer, part_bytes=random.Random(seed).choice([500, 10**8])
                )
            except DataError as error:
                assert_is_one_line(error, path)
                continue
        entries = [json.loads(line) for line in (folder / "out" / "quarantine.jsonl").open()]
        assert report.inputs == report.taken + sum(entry.get("documents", 1) for entry in entries)
        assert all(entry["shard"] == str(path) and entry["reason"] for entry in entries)
        taken += report.taken
    assert taken  # most of what is damaged a little is read


def fuzz_pdf(pymupdf, folder: Path, count: int) -> None:
    whole = write_pdf(pymupdf, folder / "whole.pdf", columns(), columns(2)).read_bytes()
    path, settings = folder / "t.pdf", DocumentSettings(pixels=200)
    taken = 0
    for seed in range(count):
        path.write_bytes(mutated(whole, random.Random(seed)))
        with bounded(f"t.pdf, seed {seed}"):
            try:
                report = write_documents({"t": path}, folder / "out", settings)
            except DataError as error:
                assert_is_one_line(error, folder / "out")
                continue
        entries = [json.loads(line) for line in (folder / "out" / "quarantine.jsonl").open()]
        assert report.inputs == report.taken + sum(entry.get("documents", 1) for entry in entries)
        taken += report.taken
    assert taken


@pytest.mark.parametrize("name", TEXT)
def test_damaged_text_costs_no_more_than_itself(tiny, tmp_path, name):
    fuzz_text(tiny, tmp_path, name, QUICK)


@pytest.mark.fuzz
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TEXT)
def test_much_damaged_text_costs_no_more_than_itself(tiny, tmp_path, name):
    fuzz_text(tiny, tmp_path, name, SLOW)


@pytest.fixture
def pymupdf():
    return pytest.importorskip("pymupdf", reason="PyMuPDF is not installed: pip install 'megatron-sphinx[ocr]'")


def test_damaged_pdfs_cost_no_more_than_themselves(pymupdf, tmp_path):
    fuzz_pdf(pymupdf, tmp_path, QUICK)


@pytest.mark.fuzz
@pytest.mark.timeout(1800)
def test_many_damaged_pdfs_cost_no_more_than_themselves(pymupdf, tmp_path):
    fuzz_pdf(pymupdf, tmp_path, SLOW)
