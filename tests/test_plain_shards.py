"""What is read without `tarfile` and Pillow is what these would have read; also where it is damaged."""

import io
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

from megatron_sphinx.data import images
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare import plain_jpeg, shards
from megatron_sphinx.prepare.pairs import write_shards
from megatron_sphinx.prepare.plain_tar import PlainFiles


def jpeg(draw, mode="RGB", **options):
    width, height = draw.randint(2, 90), draw.randint(2, 90)
    pixels = np.random.default_rng(draw.randint(0, 99)).integers(0, 256, (height, width, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, "JPEG", **options)
    return content.getvalue(), (width, height)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "quality": 100}, {"comment": b"of a camera"}])
def test_a_plain_jpeg_needs_no_pillow(mode, options):
    draw = random.Random(str(options))
    content, (width, height) = jpeg(draw, mode, **options)
    assert plain_jpeg.shape_of(content) == images.Shape(width, height) == images.shape_of(content)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(
    ("mode", "options"), [("CMYK", {}), ("RGB", {"exif": exif(6)}), ("RGB", {"icc_profile": b"profile"})]
)
def test_other_jpegs_are_left_to_pillow(mode, options):
    content, _ = jpeg(random.Random(0), mode, **options)
    assert plain_jpeg.shape_of(content) is None
    images.shape_of(content)


def test_a_damaged_jpeg_is_never_taken_where_pillow_refuses_it():
    draw = random.Random(1)
    taken = left = 0
    for seed in range(400):
        content = bytearray(jpeg(draw, progressive=seed % 2)[0])
        head = content.index(b"\xff\xda") + 14
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(head)] = draw.randrange(256)
        damaged = bytes(content[: draw.randrange(head)] if seed % 5 == 0 else content)
        found = plain_jpeg.shape_of(damaged)
        if found is None:
            left += 1
        else:
            assert found == images.shape_of(damaged)
            taken += 1
    assert min(taken, left) > 40


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (9460, 9)])
def test_a_size_that_is_refused_is_left_to_who_says_why(size):
    content = io.BytesIO()
    Image.new("L", size).save(content, "JPEG")
    assert plain_jpeg.shape_of(content.getvalue()) is None
    with pytest.raises(DataError, match=r"a side of one pixel|decompression bomb"):
        images.shape_of(content.getvalue())


def tar(draw, style):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=style) as whole:
        for number in range(draw.randint(0, 6)):
            odd = draw.choice(["", "", "", "", "é", "d/" * 60, "n" * (30 if style == tarfile.USTAR_FORMAT else 120)])
            member = tarfile.TarInfo(f"{odd}{number:03d}.{draw.choice(['jpg', 'txt', 'json', 'npy'])}")
            member.mtime = draw.choice([0, 1_700_000_000, 1_700_000_000.25])
            member.type = draw.choice([tarfile.REGTYPE] * 8 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.AREGTYPE])
            member.size = draw.choice([0, 1, 511, 512, 700]) if member.isreg() else 0
            whole.addfile(member, io.BytesIO(draw.randbytes(member.size)))
    whole = content.getvalue()
    return whole[: len(whole.rstrip(b"\0")) + draw.choice([0, 600, 1024])] if draw.random() < 0.2 else whole


def read(path):
    """What is found in a tar, and what is told of it."""
    told = []
    members = list(
        shards.members(str(path), lambda key, reason: told.append((key, reason)), lambda name: "np" not in name)
    )
    return members, told


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_are_read_as_tarfile_reads_them(tmp_path, monkeypatch, style):
    draw, path = random.Random(style), tmp_path / "t.tar"
    plain = 0

    class NoPlainFiles(PlainFiles):
        def __iter__(self):
            return iter(())

    for seed in range(150):
        content = bytearray(b"".join(tar(draw, style) for _ in range(draw.choice([1, 1, 2]))))
        for _ in range(draw.choice([0, 0, 1, 3])):
            if content:
                block = draw.randrange(len(content)) // 512 * 512
                content[min(block + draw.choice([0, 124, 136, 148, 156, 257, 300]), len(content) - 1)] = draw.randrange(
                    256
                )
        path.write_bytes(content[: draw.randrange(len(content))] if content and seed % 4 == 0 else content)
        with path.open("rb") as file:
            plain += len(list(PlainFiles(file, 0))) if seed % 4 else 0
        ours = read(path)
        with monkeypatch.context() as context:
            context.setattr(shards, "PlainFiles", NoPlainFiles)
            assert read(path) == ours, seed
    assert plain > 50


def test_a_tar_that_ends_inside_padding_is_cut_short(tmp_path):
    draw = random.Random(0)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as whole:
        for name in ("a.txt", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 700
            whole.addfile(member, io.BytesIO(draw.randbytes(700)))
    (tmp_path / "t.tar").write_bytes(content.getvalue()[: 2 * (512 + 1024) - 10])
    found, told = read(tmp_path / "t.tar")
    assert [member.name for member in found] == ["a.txt", "b.txt"]
    assert told == [("b", "the shard is cut short: unexpected end of data")]


def test_shards_are_those_of_webdataset(tmp_path):
    from webdataset import TarWriter

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(jpeg(random.Random(number))[0])
        (folder / f"{number}.txt").write_text(f"picture {number}")
    (shard,) = write_shards(folder, tmp_path / "shards")
    newest = max(path.stat().st_mtime for path in folder.iterdir())
    with TarWriter(str(tmp_path / "theirs.tar"), encoder=False, mtime=newest) as theirs:
        for number in range(5):
            files = {ending: (folder / f"{number}.{ending}").read_bytes() for ending in ("txt", "jpg")}
            theirs.write({"__key__": f"{number:09d}", **files})
    assert shard.read_bytes() == (tmp_path / "theirs.tar").read_bytes()
