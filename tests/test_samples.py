"""Samples in tars and folders as people have them: each is a pair, or has a line that says why not."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from PIL import Image
from test_pairs import caption_of, png, write_tar

from megatron_sphinx.data import images
from megatron_sphinx.data.pairs import ImageReader, SampleIndex
from megatron_sphinx.prepare.pairs import index_shards


def picture(level: int) -> bytes:
    return png(Image.new("RGB", (8, 8), (level, 0, 0)))


def sample(key: str, level: int, ending: str = "png") -> dict[str, bytes]:
    return {f"{key}.{ending}": picture(level), f"{key}.txt": b"picture %d" % level}


def tar(files: dict[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=kind, encoding="utf-8", errors="surrogateescape") as shard:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return content.getvalue()


def indexed(tiny, folder: Path, content: bytes, **options: object) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Index a tar: captions by the level of the picture beside each; keys and reasons of what is listed."""
    folder.mkdir(exist_ok=True)
    (folder / "0.tar").write_bytes(content)
    report = index_shards([folder / "0.tar"], folder / "pairs", tiny.tokenizer, **options)
    lines = [json.loads(line) for line in (folder / "pairs" / "quarantine.jsonl").read_text().splitlines()]
    assert report.inputs == report.taken + report.held_out + len(lines)
    found = {}
    for part in ("pairs", "pairs/held_out"):
        if (folder / part / "index.json").exists():
            index = SampleIndex([folder / part])
            reader = ImageReader(index)
            for pair in range(len(index)):
                level = np.asarray(images.decode(reader.read(pair)))[0, 0, 0]
                found[f"picture {level}"] = caption_of(tiny, index, pair)
    return found, [(line["key"], line["reason"]) for line in lines]


def right(levels: range) -> dict[str, str]:
    return {f"picture {level}": f"picture {level}" for level in levels}


LONG = "a/very/" + "long/" * 40 + "name"


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("name", [LONG, "./v1.0.data/part.0/x", "caf\udce9", "日本"], ids=["a", "b", "c", "d"])
def test_names_are_names(tiny, tmp_path, kind, name):
    if kind == tarfile.PAX_FORMAT and "\udce9" in name:
        kind = tarfile.USTAR_FORMAT
    files = sample(f"{name}0", 1) | sample(f"{name}1", 2, "PNG") | {f"{name}2.JPG": b"broken", f"{name}2.TXT": b"x"}
    found, listed = indexed(tiny, tmp_path, tar(files, kind), held_out=0.5)
    assert found == right(range(1, 3))
    [(key, reason)] = listed
    assert key == f"{name}2".replace("\udce9", "\\xe9")
    assert reason.startswith("not an image: it begins with b'broken'")


@pytest.mark.parametrize("zeros", [0, 512, 512 * 7, 2**21 + 512])
def test_joined_tars_are_read_to_their_end(tiny, tmp_path, zeros):
    """Also where their keys are the same, and where the first lacks its mark."""
    parts = [tar(sample("0", 1) | sample("1", 2)), tar(sample("0", 3) | sample("2", 4)), tar(sample("3", 5))]
    found, listed = indexed(tiny, tmp_path, bytes(zeros).join(parts))
    assert (found, listed) == (right(range(1, 6)), [])


def test_what_is_behind_a_tar_and_is_none_is_listed(tiny, tmp_path):
    content = tar(sample("0", 1)) + b"no tar" * 300 + bytes(512 - 1800 % 512) + tar(sample("1", 2))
    found, listed = indexed(tiny, tmp_path, content)
    assert found == right(range(1, 3))
    [(key, reason)] = listed
    assert (key, reason.split(":")[0]) == (None, "the shard is damaged")
    assert "are no tar, and are passed over" in reason


def test_a_damaged_header_costs_what_is_behind_it(tiny, tmp_path):
    whole = bytearray(tar(sample("0", 1) | sample("1", 2) | sample("2", 3)))
    with tarfile.open(fileobj=io.BytesIO(whole)) as shard:
        place = shard.getmember("1.png").offset_data - 512
    whole[place + 150] ^= 255
    found, listed = indexed(tiny, tmp_path, bytes(whole))
    assert found == {"picture 1": "picture 1", "picture 3": "picture 3"}
    assert sorted(reason.split(":")[0] for _, reason in listed) == ["no image", "the shard is damaged"]


def test_a_tar_that_lacks_its_end_gives_all_whole_pairs(tiny, tmp_path):
    whole = tar(sample("0", 1) | sample("1", 2)).rstrip(b"\0")
    found, listed = indexed(tiny, tmp_path, whole + bytes(-len(whole) % 512))
    assert found == right(range(1, 3))
    assert listed == [(None, "the shard is cut short: it lacks the mark of its end")]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_say_how_to_unpack_them(tiny, tmp_path, pack):
    (tmp_path / "good.tar").write_bytes(tar(sample("0", 1)))
    (tmp_path / "bad.tar").write_bytes(pack(tar(sample("1", 2))))
    report = index_shards([tmp_path / "good.tar", tmp_path / "bad.tar"], tmp_path / "pairs", tiny.tokenizer)
    assert (report.taken, report.inputs, report.rejected) == (1, 2, {"not a tar file": 1})
    assert "is compressed, but images are read from where they lie; unpack it (" in report.first


def test_odd_members_are_used_or_listed(tiny, tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as shard:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, link
            shard.addfile(member, io.BytesIO(data))

        add("folder", kind=tarfile.DIRTYPE)
        add("0.txt", b"picture 1")
        add("0.png", picture(1))
        add("1.png", kind=tarfile.LNKTYPE, link="0.png")
        add("1.txt", b"picture 1")
        add("2.png", kind=tarfile.SYMTYPE, link="0.png")
        add("2.txt", b"x")
        add("3.png", kind=tarfile.LNKTYPE, link="nowhere.png")
        add("3.txt", b"x")
        add("4.psd", b"8BPS")
        add("4.txt", b"x")
        add("5.png", picture(5))
        add("5.txt", b"picture 5")
        add("5.cls", b"7")  # one more file of a pair
        add("5.seg.png", picture(6))  # and another
        add("IMG.2020.png", picture(7))
        add("IMG.2020.txt", b"picture 7")
        add("6.cls", b"7")
        add("7.png", kind=tarfile.FIFOTYPE)
    found, listed = indexed(tiny, tmp_path, content.getvalue())
    assert found == {f"picture {level}": f"picture {level}" for level in (1, 5, 7)}
    assert {key: reason.split(":")[0] for key, reason in listed} == {
        "2": "a symbolic link", "3": "a hard link to no file before it", "4": "no image", "6": "no image",
        "7": "no file",
    }  # fmt: skip
    assert dict(listed)["4"].startswith("no image: .psd is none of jpg, ")
    assert len(SampleIndex([tmp_path / "pairs"])) == 4  # the hard link too


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_sparse_files_are_listed(tiny, tmp_path, kind):
    (tmp_path / "0.txt").write_text("x")
    with (tmp_path / "0.png").open("wb") as file:
        file.write(picture(1))
        file.truncate(2_000_000)
    for name, content in sample("1", 2).items():
        (tmp_path / name).write_bytes(content)
    command = ["tar", "--sparse", f"--format={kind}", "-cf", tmp_path / "s.tar", "-C", tmp_path]
    subprocess.run([*command, "0.png", "0.txt", "1.png", "1.txt"], check=True)
    found, listed = indexed(tiny, tmp_path / "out", (tmp_path / "s.tar").read_bytes())
    assert found == {"picture 2": "picture 2"}
    assert listed == [("0", "a sparse file: its holes are not in the tar; pack without --sparse")]


def in_json(caption: object) -> bytes:
    return json.dumps({"caption": caption}).encode()


def test_captions_of_every_kind(tiny, tmp_path):
    captions = {
        "txt": {"txt": b"right"},
        "bom": {"txt": b"\xef\xbb\xbfright"},
        "caption": {"caption": b"right"},
        "json": {"json": in_json("right")},
        "one": {"json": in_json(["right"])},
        "first": {"json": in_json("wrong"), "caption": b"wrong", "txt": b"right"},
        "empty_txt": {"txt": b" ", "json": in_json("right")},
        "unread_json": {"txt": b"right", "json": b"{"},
        "several": {"json": in_json(["a", "b"])},
        "half": {"json": b'{"caption": "a \\ud83d"}'},
        "number": {"json": in_json(5)},
        "none": {"json": in_json(None)},
        "list": {"json": b"[]"},
        "cut": {"json": b'{"caption": "a'},
        "deep": {"json": b"[" * 100_000},
        "latin": {"txt": b"caf\xe9"},
        "utf16": {"txt": "right".encode("utf-16")},
        "blank": {"txt": b"\n"},
        "bare": {},
    }
    files = {}
    for key, texts in captions.items():
        files |= {f"{key}.png": picture(1)} | {f"{key}.{ending}": content for ending, content in texts.items()}
    report_lines: dict[str, str]
    (tmp_path / "0.tar").write_bytes(tar(files))
    report = index_shards([tmp_path / "0.tar"], tmp_path / "pairs", tiny.tokenizer)
    index = SampleIndex([tmp_path / "pairs"])
    assert {caption_of(tiny, index, pair) for pair in range(len(index))} == {"right"}
    lines = [json.loads(line) for line in (tmp_path / "pairs" / "quarantine.jsonl").read_text().splitlines()]
    report_lines = {line["key"]: line["reason"].split(":")[0] for line in lines}
    assert report_lines == {
        "several": "several captions", "half": "caption is not Unicode", "number": "caption is no text",
        "none": "no caption", "list": "no caption", "cut": "caption is not JSON", "deep": "caption is not JSON",
        "latin": "caption is not UTF-8", "utf16": "caption is not UTF-8", "blank": "no caption", "bare": "no caption",
    }  # fmt: skip
    assert len(lines) == len(report_lines)
    assert report.inputs == len(captions) == report.taken + len(lines)


def test_a_file_that_comes_twice_is_listed_once(tiny, tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as shard:
        for level in (1, 2):
            for name, data in sample("0", level).items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    found, listed = indexed(tiny, tmp_path, content.getvalue())
    assert found == right(range(1, 2))
    assert listed == [("0", "duplicate key: 0.png, 0.txt comes after another file of that name and kind")]


def test_a_folder_takes_what_a_tar_takes(tiny, tmp_path, run_tool):
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    image = Image.new("RGB", (8, 8), "red")
    kinds = {"ok": "jpg", "upper": "JPG", "kohya": "png", "json": "jpg", "gif": "gif", "bmp": "bmp", "tiff": "tiff",
             "jfif": "jfif", "dots.in.name": "webp", "more/x": "jpeg"}  # fmt: skip
    captions = {"upper": ".TXT", "kohya": ".caption", "json": ".json"}
    for name, ending in kinds.items():
        image.save(pictures / f"{name}.{ending}", {"jfif": "JPEG", "JPG": "JPEG"}.get(ending))
        caption = captions.get(name, ".txt")
        (pictures / f"{name}{caption}").write_bytes(in_json("a red square") if caption == ".json" else b"a red square")
    image.save(pictures / "none.jpg")
    (pictures / "lonely.txt").write_text("x")
    (pictures / "README").write_text("x")
    (pictures / "psd.psd").write_bytes(b"8BPS")
    (pictures / "psd.txt").write_bytes(b"x")
    (pictures / "bad.png").write_bytes(b"bad")
    (pictures / "bad.txt").write_bytes(b"x")
    model = ["--tokenizer", tiny.folder / "tokenizer.model"]
    for _ in range(2):  # the second time, its own shards lie in the folder
        status, out, _ = run_tool("prepare_pairs.py", pictures, pictures / "out", *model)
        assert (status, out.splitlines()[-1]) == (0, "input 15 = 10 pairs + 5 in quarantine.jsonl")
    index = SampleIndex([pictures / "out"])
    assert {caption_of(tiny, index, pair) for pair in range(len(index))} == {"a red square"}
    lines = [json.loads(line) for line in (pictures / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["key"]: line["reason"].split(":")[0] for line in lines} == {
        "none": "no caption", "lonely": "no image", "README": "no image", "psd": "no image", "bad": "not an image",
    }  # fmt: skip


def test_a_folder_of_tars_lists_what_else_is_there(tiny, tmp_path, run_tool):
    shards = tmp_path / "shards"
    (shards / "more").mkdir(parents=True)
    (shards / "00000.tar").write_bytes(tar(sample("0", 1)))
    (shards / "more" / "1.TAR").write_bytes(tar(sample("1", 2)))
    (shards / "2.tar.gz").write_bytes(gzip.compress(tar(sample("2", 3))))
    for table in ("00000.parquet", "00000_stats.json"):  # img2dataset's own
        (shards / table).write_bytes(b"")
    draw(0)[0].save(shards / "x.png")
    model = ["--tokenizer", tiny.folder / "tokenizer.model"]
    status, out, _ = run_tool("prepare_pairs.py", shards, tmp_path / "pairs", *model)
    assert (status, out.splitlines()[-1]) == (0, "input 4 = 2 pairs + 2 in quarantine.jsonl")
    assert "  left out: 1 (beside tars)\n  left out: 1 (not a tar file)\n" in out


def test_quarantine_has_one_line_a_sample(tiny, tmp_path):
    shard = write_tar(
        tmp_path / "0.tar", {"0.png": b"x", "0.txt": b"caf\xe9", "1.png": b"", "1.json": b"{", **sample("2", 3)}
    )
    index_shards([shard], tmp_path / "pairs", tiny.tokenizer)
    lines = (tmp_path / "pairs" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["0", "1"]
    assert not any("<_io" in line for line in lines)
