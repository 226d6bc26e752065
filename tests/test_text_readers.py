"""Text as people have it: compressions, encodings, shapes of JSON, and what is wrong with single documents."""

import bz2
import gzip
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from test_text import all_documents

from megatron_sphinx.data.text import TextIndex
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.prepare.text import write_text
from megatron_sphinx.prepare.text_formats import MOST_CHARACTERS, PerFile, TextSettings, format_of
from megatron_sphinx.prepare.text_items import items_of
from megatron_sphinx.prepare.workers import Report

WORDS = ["red", "blue", "paint", "light", "café"]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"text {n} " + " ".join(rng.choices(WORDS, k=20)) for n in range(count)]


def lines(documents: list[str], key: str = "content", end: str = "\n") -> bytes:
    return "".join(json.dumps({key: text}, ensure_ascii=False) + end for text in documents).encode()


def settings(**options: list[str] | int) -> TextSettings:
    flags = {"keys": "--key", "encodings": "--encoding", "formats": "--format"}
    return TextSettings(**{k: PerFile(flags[k], v) if k in flags else v for k, v in options.items()})


def prepare(tiny, path: Path, said: TextSettings | None = None, **options) -> tuple[Report, list[dict]]:
    """What is taken of a file, and the quarantine; they are all that was in it."""
    target = path.parent / "out"
    report = write_text([path], target, tiny.tokenizer, said, **options)
    quarantine = [json.loads(line) for line in (target / "quarantine.jsonl").read_text().splitlines()]
    assert report.inputs == report.taken + sum(line.get("documents", 1) for line in quarantine)
    assert report.balance("documents").startswith(f"input {report.inputs} = {report.taken} documents")
    return report, quarantine


def assert_holds(tiny, path: Path, wanted: list[str]) -> None:
    found = all_documents(TextIndex([path.parent / "out"]))
    assert found == [[1, *tiny.tokenizer.encode(text), 2] for text in wanted]


def zstd_long(content: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


PACKED = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress,
    ".lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE), ".ZST": zstd_long, ".GZ": gzip.compress,
}  # fmt: skip


@pytest.mark.parametrize("ending", PACKED)
def test_compressed_files_of_several_members_are_read(tiny, tmp_path, ending):
    documents = texts(50)
    members = [lines(documents[:20]), lines(documents[20:])]
    if ending == ".lzma":  # has one member
        members = [b"".join(members)]
    path = tmp_path / f"c4-train.00000-of-01024.json{ending}"
    path.write_bytes(b"".join(PACKED[ending](member) for member in members))
    assert prepare(tiny, path)[1] == []
    assert_holds(tiny, path, documents)
    path.rename(tmp_path / "no ending that says so")  # the content does
    assert prepare(tiny, tmp_path / "no ending that says so")[0].taken == 50
    twice = tmp_path / "twice.jsonl.gz"
    twice.write_bytes(gzip.compress((tmp_path / "no ending that says so").read_bytes()) + b"\0" * 512)
    assert prepare(tiny, twice)[0].taken == 50


def test_a_frame_that_is_passed_over_is_no_damage(tiny, tmp_path):
    path = tmp_path / "t.jsonl.zst"
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstandard.compress(lines(texts(5))))
    assert prepare(tiny, path)[0].taken == 5


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_of_a_cut_off_archive_what_is_whole_is_kept(tiny, tmp_path, ending):
    rng = random.Random(0)
    documents = ["".join(rng.choices("abcdefgh ", k=3000)) for _ in range(900)]
    content = PACKED[ending](lines(documents))
    path = tmp_path / f"t.jsonl{ending}"
    path.write_bytes(content[: len(content) * 2 // 3])
    report, (line,) = prepare(tiny, path)
    assert 100 < report.taken < 900
    assert_holds(tiny, path, documents[: report.taken])
    assert line["key"] == f"behind byte {len(lines(documents[: report.taken])) - 1}"
    assert line["reason"].startswith("cut off: its ")
    path.write_bytes(content + b"something else")
    report, (line,) = prepare(tiny, path)
    assert (report.taken, line["reason"][:12]) == (900, "damaged: no ")


def test_a_bomb_is_left_out_before_it_fills_the_memory(tiny, tmp_path):
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b"a" * 2**26, mtime=0))
    with pytest.raises(
        DataError, match=r"t\.txt\.gz: no text; 1 left out \(longer than 8,388,608 characters\); .* --most-char"
    ):
        write_text([tmp_path / "t.txt.gz"], tmp_path / "out", tiny.tokenizer)
    quine = gzip.compress(b"text", 1, mtime=0)
    for _ in range(5):
        quine = gzip.compress(quine, mtime=0)
    (tmp_path / "t.txt.gz").write_bytes(quine)
    with pytest.raises(DataError, match=r"t\.txt\.gz: no text; 1 left out \(compressed more than 4 times\)"):
        write_text([tmp_path / "t.txt.gz"], tmp_path / "out", tiny.tokenizer)


def test_lz4_is_read_where_it_is_installed(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lz4", None)
    (tmp_path / "t.jsonl.lz4").write_bytes(b"\x04\x22\x4d\x18" + bytes(20))
    with pytest.raises(ConfigError, match=r"lz4: is read by a package that is not installed; pip install lz4, or"):
        write_text([tmp_path / "t.jsonl.lz4"], tmp_path / "out", tiny.tokenizer)


@pytest.mark.parametrize("name", ["t.json", "t.JSONL", "t.ndjson", "t.jl", "t", "part-00000"])
@pytest.mark.parametrize(
    "shape", ["lines", "crlf", "array", "indented array", "indented", "joined", "one", "one indented"]
)
def test_json_is_read_in_every_shape(tiny, tmp_path, name, shape):
    documents = [*texts(20), 'brackets ] } , { [ " \\ in text', "two\nlines"]
    if shape.startswith("one"):
        documents = documents[-2:-1]
    objects = [{"url": {"a": [1, {}]}, "content": text} for text in documents]
    content = {
        "lines": lambda: "\n".join(map(json.dumps, objects)),  # and no end of the last one
        "crlf": lambda: "\ufeff" + "\r\n\r\n".join(map(json.dumps, objects)) + "\r\n",
        "array": lambda: json.dumps(objects),
        "indented array": lambda: json.dumps(objects, indent=2, ensure_ascii=False),
        "indented": lambda: "\n".join(json.dumps(one, indent=2) for one in objects),
        "joined": lambda: "".join(map(json.dumps, objects)),
        "one": lambda: json.dumps(objects[0]),
        "one indented": lambda: json.dumps(objects[0], indent="\t") + "\n",
    }[shape]()
    path = tmp_path / name
    path.write_text(content)
    assert prepare(tiny, path)[1] == []
    assert_holds(tiny, path, documents)
    path.write_bytes(content.encode("utf-16"))
    assert prepare(tiny, path)[1] == []
    assert_holds(tiny, path, documents)


BAD = {
    b'{"content": "cut emoji \\ud83d"}': "not valid Unicode: half of a surrogate pair as character 11 of the text",
    b'{"content": "a\\u0000b"}': "holds a NUL character: as character 2 of the text",
    b'{"content": "' + b"[" * 5000 + b'", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}": "not JSON that can be read: lists",
    b'{"content": "a", "content": "b"}': "the key twice: 'content'",
    b'{"content": 3}': "not a text under 'content': a number",
    b'{"content": ["a"]}': "not a text under 'content': a list",
    b'{"content": null}': "not a text under 'content': null",
    b'{"content": " \\n"}': "empty: a text without letters",
    b'{"title": "a"}': "no key 'content': it has 'title'",
    b"{}": "no key 'content': it is empty",
    b'["a"]': "not a JSON object: a list",
    b"3": "not a JSON object: a number",
    b'{"content": "caf\xe9"}': "not UTF-8: 0xE9 at byte ",
    b'{"content": "a", "n": ' + b"1" * 5000 + b"}": "not JSON that can be read: Exceeds the limit",
    b'{"content": "a"': "not JSON",
    b"\xff\xfe\x00": "not UTF-8: 0xFF at byte ",
    b'{"content": "' + b"a" * 9000 + b'"}': "longer than 8,192 characters: cut it, or raise --most-characters",
}


@pytest.mark.parametrize("is_array", [False, True])
def test_a_bad_document_costs_itself_alone_and_is_listed_by_line(tiny, tmp_path, is_array):
    good = texts(2 * len(BAD))
    bad = [content for content in BAD if not (is_array and content == b'{"content": "a"')]  # that takes all behind it
    rows = [row for n, content in enumerate(bad) for row in (lines(good[2 * n : 2 * n + 1], end=""), content)]
    path = tmp_path / "t.json"
    path.write_bytes(b"[\n" + b",\n".join(rows) + b"\n]" if is_array else b"\n".join(rows))
    said = settings(most_characters=8192)
    _, quarantine = prepare(tiny, path, said, part_bytes=1000)
    assert_holds(tiny, path, good[0 : 2 * len(bad) : 2])
    for content, line in zip(bad, quarantine, strict=True):
        assert line["reason"].startswith(BAD[content])
        offset = int(line["key"].removeprefix("byte "))
        assert path.read_bytes()[offset : offset + len(content)] == content
        assert path.read_bytes()[:offset].count(b"\n") + 1 == line["line"]


def test_json_too_deep_is_left_out(tiny, tmp_path):
    deep = b'{"content": "x", "y": ' + b'{"a":[' * 50_000 + b"]}" * 50_000 + b"}\n"
    (tmp_path / "t.jsonl").write_bytes(lines(["one"]) + deep + lines(["two"]))
    _, (line,) = prepare(tiny, tmp_path / "t.jsonl")
    assert line["reason"] == "not JSON that can be read: lists or objects lie too deep in one another"


def test_an_array_that_is_cut_off_loses_its_last_element_alone(tiny, tmp_path):
    path = tmp_path / "t.json"
    content = json.dumps([{"content": text} for text in texts(9)])
    path.write_text(content[:-30])
    report, quarantine = prepare(tiny, path)
    assert (report.taken, [line["reason"].split(":")[0] for line in quarantine]) == (
        8, ["not JSON up to the end of the file", "cut off"]
    )  # fmt: skip
    path.write_text(content[:-1])
    report, (line,) = prepare(tiny, path)
    assert (report.taken, line["reason"]) == (9, "cut off: its array has no end; copy it again")
    path.write_text(content + content)
    report, (line,) = prepare(tiny, path)
    assert (report.taken, line["reason"]) == (9, "not a JSON object: a list")


SENTENCE = "Les élèves sont allés à la forêt.\n" * 3


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
def test_files_that_say_their_encoding_are_read(tiny, tmp_path, encoding):
    (tmp_path / "t.txt").write_bytes(SENTENCE.encode(encoding))
    assert prepare(tiny, tmp_path / "t.txt")[1] == []
    assert_holds(tiny, tmp_path / "t.txt", [SENTENCE])


@pytest.mark.parametrize(("name", "stated"), [("t.txt", "latin-1"), ("t.txt", "*.txt=latin-1"), ("t.jsonl", "cp1252")])
def test_a_stated_encoding_reads_what_is_else_left_out(tiny, tmp_path, name, stated):
    path = tmp_path / name
    content = SENTENCE if name == "t.txt" else lines([SENTENCE, "one"]).decode()
    path.write_bytes(content.encode("latin-1"))
    (tmp_path / "u.txt").write_text("fine")
    report = write_text([path, tmp_path / "u.txt"], tmp_path / "out", tiny.tokenizer)
    assert (report.rejected, report.inputs) == ({"not UTF-8": 1}, report.taken + 1)
    why = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())["reason"]
    assert why.startswith(f"not UTF-8: 0xE9 at byte {content.index('é')}; say its --encoding, such as latin-1")
    assert prepare(tiny, path, settings(encodings=[stated]))[1] == []
    assert_holds(tiny, path, [SENTENCE] if name == "t.txt" else [SENTENCE, "one"])


def test_what_is_not_of_the_stated_encoding_is_left_out(tiny, tmp_path):
    (tmp_path / "t.jsonl").write_bytes(lines(["one"]) + b'{"content": "\x81"}\n' + lines(["two"]))
    _, (line,) = prepare(tiny, tmp_path / "t.jsonl", settings(encodings=["cp1252"]))
    assert (line["reason"], line["line"]) == ("not cp1252: at byte 13 of this document", 2)
    (tmp_path / "u.jsonl").write_bytes(lines(["one", "two"]).decode().encode("utf-16") + b"x")
    _, (line,) = prepare(tiny, tmp_path / "u.jsonl")
    assert line["reason"] == "not utf-16 from here on: truncated data"
    for name in ("no-such", "rot13", "hex", "undefined"):
        with pytest.raises(DataError, match=rf"--encoding={name}: is no encoding of text that is known; give one such"):
            write_text([tmp_path / "t.jsonl"], tmp_path / "out", tiny.tokenizer, settings(encodings=[name]))


def test_a_file_may_have_a_key_of_its_own(tiny, tmp_path):
    files = {"a.jsonl": "content", "b.jsonl": "text", "c.jsonl": "body"}
    for name, key in files.items():
        (tmp_path / name).write_bytes(lines([f"of {name}"], key))
    paths = [tmp_path / name for name in files]
    for keys in (
        ["*/c.jsonl=body"],
        ["c.*=body"],
        ["body", "text", "content"],
        ["c.*=x", "c.*=body", "text", "content"],
    ):
        assert write_text(paths, tmp_path / "out", tiny.tokenizer, settings(keys=keys)).taken == 3
    for keys, why in {
        (): r"c\.jsonl: has no key 'content' or 'text', but \['body'\]; give --key",
        ("body",): r"a\.jsonl: has no key 'body', but \['content'\]; give --key",
        ("d.*=body",): r"--key=d\.\*=body: no file has a name like d\.\*; mend the pattern",
        ("d.*=",): r"--key=d\.\*=: says nothing; give a value, or PATTERN=VALUE",
    }.items():
        with pytest.raises(DataError, match=why):
            write_text(paths, tmp_path / "new", tiny.tokenizer, settings(keys=list(keys)))
    assert not (tmp_path / "new").exists()  # nothing is written before all is known
    (tmp_path / "b.jsonl").write_text('{"text": "one", "content": "two"}')
    with pytest.raises(DataError, match=r"b\.jsonl: has the keys 'content' and 'text'; say by --key which is the text"):
        write_text(paths[:2], tmp_path / "new", tiny.tokenizer)


OTHERS = {
    "t.csv": (b"a,b\n1,2\n", "neither its ending nor its content tells its format; rename it (known: .json, "),
    "t": (b"text", "neither its ending nor its content tells its format; rename it (known: .json, "),
    "t.txt": (b'{"content": "a"}\n', "is named as text, but holds JSON; say --format json or --format text"),
    "t.docx": (
        b"PK\3\4" + bytes(99),
        "is a zip archive (perhaps .docx or .epub), which is not read; unpack or convert",
    ),
    "u.txt": (b"%PDF-1.5\n", "is a PDF (see prepare ocr), which is not read; unpack or convert it"),
    "t.tar.gz": (gzip.compress(bytes(257) + b"ustar\0" + bytes(300)), "is a tar archive, which is not read; unpack"),
    "t.parquet.gz": (
        gzip.compress(b"PAR1" + bytes(99), mtime=0),
        "is parquet that was compressed as a whole; unpack it",
    ),
    "t.arrow": (b"ARROW1\0\0" + bytes(99), "is an Arrow file, which is not read; unpack or convert it"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_refused_before_work(tiny, tmp_path, name):
    content, why = OTHERS[name]
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        write_text([tmp_path / "a.jsonl", tmp_path / name], tmp_path / "out", tiny.tokenizer)
    assert str(caught.value).startswith(f"{tmp_path / name}: {why}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    if not content.startswith((b"P", b"%", b"A", b"\x1f")):
        said = settings(formats=["text"])
        assert write_text([tmp_path / name], tmp_path / "out", tiny.tokenizer, said).taken == 1


def test_a_folder_or_a_wrong_format_is_refused(tiny, tmp_path):
    with pytest.raises(
        DataError, match=rf"{tmp_path}: is no file; give files, such as {tmp_path}/\*\.jsonl of a folder"
    ):
        write_text([tmp_path], tmp_path / "out", tiny.tokenizer)
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(DataError, match=r"--format=csv: is no format of text; known: text, json, parquet"):
        write_text([tmp_path / "t.txt"], tmp_path / "out", tiny.tokenizer, settings(formats=["csv"]))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.jsonl", b"", "empty file"),
        ("t.jsonl.gz", gzip.compress(b"", mtime=0), "empty file"),
        ("t.parquet", b"", "empty file"),
        ("t.jsonl", b"\n \n", "no document: nothing is in the file"),
        ("t.json", b"[]", "no document: nothing is in the file"),
        ("t.jsonl.gz", b"<html>", "named as gzip, but is none: copy it again"),
        ("t.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer: fetch the file itself by"),
        ("t.parquet", b"<html>", "damaged: "),
        (
            "t.txt",
            b"a" * (MOST_CHARACTERS + 1),
            "longer than 8,388,608 characters: cut it, or raise --most-characters where there is memory",
        ),
    ],
)
def test_a_file_of_which_nothing_can_be_used_costs_itself_alone(tiny, tmp_path, name, content, reason):
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]))
    (tmp_path / name).write_bytes(content)
    report = write_text([tmp_path / name, tmp_path / "a.jsonl"], tmp_path / "out", tiny.tokenizer)
    line = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert (report.inputs, report.taken, line["shard"], line["key"]) == (2, 1, str(tmp_path / name), "whole")
    assert line["reason"].startswith(reason)


def document_of(name, size):
    """A file with a document of `a` only, between others where it is JSON."""
    if name.startswith("t.txt"):
        return b"a" * size
    rows = [lines(["one"], end=""), b'{"content": "' + b"a" * size + b'"}', lines(["two"], end="")]
    return b"\n".join(rows) if "jsonl" in name else b"[" + b",".join(rows) + b"]"


@pytest.mark.parametrize("name", ["t.txt.gz", "t.jsonl.gz", "t.json.gz", "t.jsonl", "t.json"])
def test_a_document_above_the_limit_is_never_held(tmp_path, name):
    content, most = document_of(name, 2**25), 2**17
    (tmp_path / name).write_bytes(gzip.compress(content, 1, mtime=0) if name.endswith(".gz") else content)
    said = settings(most_characters=most)
    form = format_of(str(tmp_path / name), said)
    tracemalloc.start()
    try:
        items = list(items_of(str(tmp_path / name), form, most))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20  # of 32 MiB
    reasons = [item.reason for item in items if item.reason]
    assert reasons == ["longer than 131,072 characters: cut it, or raise --most-characters where there is memory"]
    assert [item.text for item in items if item.text is not None] == ([] if "txt" in name else ["one", "two"])


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("letter", ["a", "中", "😀"])
def test_the_limit_counts_characters_whatever_bytes_they_take(tiny, tmp_path, letter, over):
    (tmp_path / "t.jsonl").write_bytes(lines([letter * (50 + over), "short"]))
    (tmp_path / "t.txt").write_text(letter * (50 + over))
    for name, others in (("t.jsonl", 1), ("t.txt", 0)):
        form = format_of(str(tmp_path / name), settings())
        items = list(items_of(str(tmp_path / name), form, 50))
        assert sum(item.text is not None for item in items) == others + 1 - over
