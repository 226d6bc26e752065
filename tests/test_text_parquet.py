"""Text from parquet: types of columns, and what damage costs: its row, the rest of its row group, or its file."""

import random
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from test_text_readers import assert_holds, prepare, settings, texts

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.text import write_text

TYPES = [
    pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(), pyarrow.large_binary(),
    pyarrow.binary_view(),
]  # fmt: skip


def write(path: Path, column: pyarrow.Array, **options: object) -> Path:
    table = pyarrow.table({"url": ["u"] * len(column), "content": column})
    parquet.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("name", ["t.parquet", "t.PQ", "no ending"])
@pytest.mark.parametrize("kind", [*TYPES, "dictionary", "binary dictionary"], ids=str)
def test_columns_of_all_types_that_hold_text_are_read(tiny, tmp_path, kind, name):
    documents = texts(40)
    values = pyarrow.array([*documents[:10], None, *documents[10:], ""])
    if isinstance(kind, str):
        column = values.cast(pyarrow.binary()) if kind.startswith("binary") else values
        column = column.dictionary_encode()
    else:
        column = values.cast(kind)
    path = write(tmp_path / name, column, row_group_size=7)
    _, quarantine = prepare(tiny, path, part_bytes=500)
    assert [(line["key"], line["reason"]) for line in quarantine] == [
        ("row 10", "no text: null"), ("row 41", "empty: a text without letters")
    ]  # fmt: skip
    assert_holds(tiny, path, documents)


def test_a_column_that_holds_nothing_is_listed_row_by_row(tiny, tmp_path):
    path = write(tmp_path / "t.parquet", pyarrow.nulls(3))
    good = write(tmp_path / "u.parquet", pyarrow.array(["fine"]))
    empty = write(tmp_path / "v.parquet", pyarrow.array([], pyarrow.string()))
    report = write_text([path, good, empty], tmp_path / "out", tiny.tokenizer)
    assert (report.inputs, report.taken, report.rejected) == (5, 1, {"no text": 3, "no document": 1})


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pyarrow.array([1, 2]), "int64"),
        (pyarrow.array([["a"], ["b"]]), "list<element: string>"),
        (pyarrow.array([{"text": "a"}, {"text": "b"}]), "struct<text: string>"),
        (pyarrow.array([1, 2]).dictionary_encode(), "int64"),
        (pyarrow.array(['"a"', '"b"'], pyarrow.json_()), "extension<arrow.json>"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_columns_of_other_types_are_refused_by_name_and_type(tiny, tmp_path, column, kind):
    path = write(tmp_path / "t.parquet", column)
    with pytest.raises(DataError) as caught:
        write_text([path], tmp_path / "out", tiny.tokenizer)
    assert str(caught.value).startswith(f"{path}: its column 'content' is ")
    assert str(caught.value).endswith("not text; give another --key, or convert it to string")
    assert kind in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_column_is_the_one_of_that_name(tiny, tmp_path):
    table = pyarrow.table({"a.b": ["with a dot"], "a": [{"b": "nested"}]})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert prepare(tiny, tmp_path / "t.parquet", settings(keys=["a.b"]))[1] == []
    assert_holds(tiny, tmp_path / "t.parquet", ["with a dot"])
    for names, why in {
        ("content", "content"): r"has 2 columns 'content'; rename one",
        ("content", "text"): r"has the columns 'content' and 'text'; say by --key which is the text",
    }.items():
        parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names), tmp_path / "t.parquet")
        with pytest.raises(DataError, match=why):
            write_text([tmp_path / "t.parquet"], tmp_path / "new", tiny.tokenizer)


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_a_row_that_is_not_utf8_costs_itself_alone(tiny, tmp_path, kind):
    documents = texts(40)
    raw = [text.encode() for text in documents]
    raw[7] = b"caf\xe9 in latin-1"
    column = pyarrow.array(raw, pyarrow.binary())
    if kind == "string":
        column = pyarrow.Array.from_buffers(pyarrow.string(), 40, column.buffers())
    path = write(tmp_path / "t.parquet", column, row_group_size=20)
    _, (line,) = prepare(tiny, path)
    assert (line["key"], line["reason"]) == ("row 7", "not UTF-8: 0xE9 at byte 3; say its --encoding, such as latin-1")
    assert_holds(tiny, path, documents[:7] + documents[8:])
    if kind == "binary":  # a string says that it is UTF-8
        assert prepare(tiny, path, settings(encodings=["latin-1"]))[1] == []


@pytest.mark.parametrize("part_bytes", [1, 10**9])
def test_a_damaged_page_costs_the_rest_of_its_row_group(tiny, tmp_path, part_bytes):
    rng = random.Random(0)
    documents = ["".join(rng.choices("abcdefgh ", k=2000)) for _ in range(3000)]
    path = write(
        tmp_path / "t.parquet", pyarrow.array(documents), row_group_size=1000, use_dictionary=False,
        data_page_size=100_000, write_batch_size=50, write_page_checksum=True,
    )  # fmt: skip
    content = bytearray(path.read_bytes())
    column = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    at = column.data_page_offset + column.total_compressed_size // 2 + 9999  # not in a page's header
    content[at] ^= 255
    path.write_bytes(content)
    report, (line,) = prepare(tiny, path, part_bytes=part_bytes)
    first, last = (int(row) for row in line["key"].removeprefix("rows ").split(" to "))
    assert 1000 < first < last == 1999
    assert (line["documents"], report.taken) == (2000 - first, 3000 - (2000 - first))
    assert line["reason"].startswith("damaged: ")
    assert_holds(tiny, path, documents[:first] + documents[2000:])


def test_a_damaged_file_costs_itself_alone(tiny, tmp_path):
    path = write(tmp_path / "t.parquet", pyarrow.array(texts(9)))
    good = write(tmp_path / "u.parquet", pyarrow.array(texts(9)))
    path.write_bytes(path.read_bytes()[:-50])
    report = write_text([path, good], tmp_path / "out", tiny.tokenizer)
    assert (report.inputs, report.taken, report.rejected) == (10, 9, {"damaged": 1})
