"""Indexes, images, token files and micro-batches: what is read, and what bad input gets."""

import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ranks, draw, kill, size_of, train_tokenizer
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from PIL import Image

from megatron_sphinx import config as configuration
from megatron_sphinx.data import images
from megatron_sphinx.data.loader import BatchBuilder, PixelLoader, make_planner, open_sources, views_in
from megatron_sphinx.data.pairs import ImageReader, SampleIndex
from megatron_sphinx.data.plan import Planner
from megatron_sphinx.data.text import TextIndex, TokenFile
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.model.architecture import VisionConfig, VisualExpertConfig
from megatron_sphinx.model.views import GLOBAL, View
from megatron_sphinx.prepare import index as index_writer
from megatron_sphinx.prepare.pairs import index_shards, write_shards
from megatron_sphinx.prepare.text import write_text
from megatron_sphinx.prepare.workers import in_parallel
from megatron_sphinx.stage.channel import encode

TOOLS = Path(__file__).parents[1] / "tools"


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


VISION = VisionConfig(experts=(VisualExpertConfig(name="dinov2_small", weights="random"),), grid=4)


# images


def test_a_picture_is_padded_at_centre_or_corner():
    image = Image.new("RGB", (20, 10), "red")
    for padding, top in (("centre", 5), ("corner", 0)):
        square = np.asarray(images.to_square(image, padding))
        assert square.shape == (20, 20, 3)
        assert (square[top : top + 10] == (255, 0, 0)).all()
        rest = np.delete(square, range(top, top + 10), axis=0)
        assert (rest == (122, 116, 104)).all()


def test_a_view_is_resized_with_antialiasing():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    view = images.Canvas(Image.fromarray(stripes), VISION).cut(GLOBAL, 32)
    assert view.shape == (3, 32, 32)
    assert abs(view[:, 4:-4, 4:-4].astype(int) - 127).max() <= 2  # aliasing would keep stripes


@pytest.mark.parametrize("size", [40, 224, 300, 701])
def test_a_view_is_pillows_to_two_levels(size):
    """Pillow's resize is the one that released models were trained with."""
    noise = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    square = Image.fromarray(noise)
    canvas = images.Canvas(square, VISION)
    for side in (64, 224):
        wanted = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert abs(canvas.cut(GLOBAL, side).astype(int) - wanted).max() <= 2
        whole = np.asarray(square.resize((2 * side, 2 * side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        found = canvas.cut(View(1, 0, 2), side)
        assert abs(found.astype(int) - whole[:, :side, side:]).max() <= 2


def test_transparent_pixels_become_white():
    for mode in ("RGBA", "LA"):
        image = Image.new(mode, (4, 4), 0)
        assert np.asarray(images.decode(png(image))).min() == 255
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert np.asarray(images.decode(png(palette))).min() == 255


def test_images_that_do_not_decode_say_why():
    whole = png(draw(1)[0].resize((200, 200)))
    with pytest.raises(DataError, match="does not decode: "):
        images.decode(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not an image: "):
        images.decode(b"no image at all")


def test_damaged_bytes_never_raise_anything_else():
    """Whatever Pillow's plugins meet in them."""
    rng = random.Random(0)
    whole = [png(draw(1)[0].resize((60, 40)), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")]
    refused = []
    for number in range(900):
        content = bytearray(whole[number % len(whole)])
        for _ in range(rng.randint(1, 12)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        for read in (images.size_of, images.decode):
            try:
                read(bytes(content))
            except DataError as error:
                refused.append(str(error))
    reasons = ("not an image: ", "does not decode: ", "decompression bomb: ", "a side of one pixel: ")
    assert all(reason.startswith(reasons) for reason in refused)
    assert len(refused) > 100


def test_a_decompression_bomb_is_not_decoded(monkeypatch):
    bomb = png(Image.new("1", (20000, 20000)))
    assert len(bomb) < 100_000
    with pytest.raises(DataError, match="decompression bomb"):
        images.decode(bomb)
    small = png(Image.new("1", (10000, 9)))
    with pytest.raises(DataError, match="decompression bomb: 10000x9 pixels, on a square at most 89478485 are decoded"):
        images.decode(small)
    with pytest.raises(DataError, match="a side of one pixel: 1x9 pixels"):
        images.decode(png(Image.new("RGB", (1, 9))))


# pairs


def caption_of(tiny, index: SampleIndex, pair: int) -> str:
    return tiny.tokenizer.decode(index.caption(pair).tolist())


def quarantined(folder: Path) -> dict[str, str]:
    """Reason by key."""
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert all(line["shard"] for line in lines)
    return {line["key"]: line["reason"] for line in lines}


def test_an_index_knows_every_pair_without_reading_it(tiny):
    index = SampleIndex([tiny.folder / "pairs"])
    assert len(index) == 60
    reader = ImageReader(index)
    sizes = index.sizes(20, 60)
    for pair in (0, 24, 25, 59):
        image, caption = draw(pair)
        assert size_of(index, pair) == image.size
        assert images.decode(reader.read(pair)).tobytes() == image.tobytes()
        assert caption_of(tiny, index, pair) == caption
        assert index.caption(pair, 2).tolist() == index.caption(pair).tolist()[:2]
        assert reader.name(pair) == (f"{tiny.folder}/shards/{pair // 25:06d}.tar", f"{pair:09d}")
        if pair >= 20:
            assert (sizes.width[pair - 20], sizes.height[pair - 20]) == image.size
            assert sizes.tokens[pair - 20] == len(index.caption(pair))


def test_pairs_of_several_indexes_are_numbered_one_behind_the_other(tiny, tmp_path):
    parts = [tmp_path / name for name in ("a", "b")]
    shards = sorted((tiny.folder / "shards").glob("*.tar"))
    index_shards(shards[:1], parts[0], tiny.tokenizer)
    index_shards(shards[1:], parts[1], tiny.tokenizer)
    joined, whole = SampleIndex(parts), SampleIndex([tiny.folder / "pairs"])
    assert joined.bounds == [0, 25, 60]
    for first, last in ((0, 60), (20, 30), (30, 31)):
        for name in ("width", "height", "tokens"):
            assert np.array_equal(getattr(joined.sizes(first, last), name), getattr(whole.sizes(first, last), name))
    for pair in (3, 24, 25, 59):
        assert ImageReader(joined).read(pair) == ImageReader(whole).read(pair)
        assert joined.caption(pair).tolist() == whole.caption(pair).tolist()


def test_img2dataset_tars_are_indexed_where_they_are(tiny, tmp_path):
    members = {
        "1.json": json.dumps({"caption": "only json", "url": "x"}).encode(),  # members of a pair need not be neighbours
        "0.jpg": png(draw(0)[0], "JPEG"), "0.txt": b"from txt", "0.json": json.dumps({"caption": "from json"}).encode(),
        "1.webp": png(draw(1)[0], "WEBP"),
        "6.json": json.dumps({"caption": None}).encode(), "6.jpeg": png(draw(6)[0], "JPEG"),
        "a/b.x.png": png(draw(2)[0]),  # WebDataset calls its key a/b, and x.png is no image ending
        "2.png": png(draw(2)[0]),
        "3.txt": b"no picture",
        "4.png": b"broken", "4.txt": b"a caption",
        "5.png": png(draw(5)[0]), "5.txt": b"",
    }  # fmt: skip
    shard = write_tar(tmp_path / "00000.tar", members)
    report = index_shards([shard], tmp_path / "pairs", tiny.tokenizer)
    assert (report.taken, report.rejected) == (2, {"no caption": 3, "no image": 1, "not an image": 1})
    index = SampleIndex([tmp_path / "pairs"])
    assert sorted(caption_of(tiny, index, n) for n in (0, 1)) == ["from txt", "only json"]
    assert set(quarantined(tmp_path / "pairs")) == {"2", "3", "4", "5", "6"}
    report = index_shards([shard], tmp_path / "by_key", tiny.tokenizer, caption_key="caption")
    assert report.taken == 2
    index = SampleIndex([tmp_path / "by_key"])
    assert sorted(caption_of(tiny, index, n) for n in (0, 1)) == ["from json", "only json"]


def animated() -> bytes:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green")]
    content = io.BytesIO()
    frames[0].save(content, "PNG", save_all=True, append_images=frames[1:])
    return content.getvalue()


def test_bad_pairs_are_left_out_and_listed_and_odd_ones_are_used(tiny, tmp_path):
    picture = png(draw(0)[0])
    odd = {
        "cmyk": png(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG"),
        "palette": png(Image.new("RGB", (20, 10), "red").convert("P")),
        "animated": animated(),
        "grey": png(Image.new("I;16", (20, 10), 40000)),
    }
    bad = {
        "zero_bytes": (b"", b"a caption", "not an image"),
        "not_an_image": (b"<html>404</html>", b"a caption", "not an image"),
        "bomb": (png(Image.new("1", (10001, 10000))), b"a caption", "decompression bomb"),
        "one_pixel": (png(Image.new("RGB", (1, 1))), b"a caption", "a side of one pixel"),
        "line": (png(Image.new("RGB", (1, 10000))), b"a caption", "decompression bomb"),
        "short_line": (png(Image.new("RGB", (1, 100))), b"a caption", "a side of one pixel"),
        "empty": (picture, b" \n", "no caption"),
        "long": (picture, b"word " * 2048, "caption too long"),
        "not_utf8": (picture, b"caf\xe9", "caption is not UTF-8"),
        "nul": (picture, b"a\0b", "caption with a NUL character"),
    }
    members = {f"{key}.png": content for key, content in odd.items()} | {f"{key}.txt": b"red" for key in odd}
    members |= {f"{key}.png": content for key, (content, _, _) in bad.items()}
    members |= {f"{key}.txt": caption for key, (_, caption, _) in bad.items()}
    shards = [write_tar(tmp_path / "0.tar", members)]
    shards.append(write_tar(tmp_path / "1.tar", {"a.png": picture, "a.txt": b"one", "b.png": picture, "b.txt": b"two"}))
    with tarfile.open(shards[1]) as tar:
        end = tar.getmember("b.png").offset_data + 10
    shards[1].write_bytes(shards[1].read_bytes()[:end])
    with tarfile.open(tmp_path / "2.tar", "w") as tar:
        for content in (picture, b"", picture):
            member = tarfile.TarInfo("twice.png" if content else "twice.txt")
            member.size = len(content or b"red")
            tar.addfile(member, io.BytesIO(content or b"red"))
    shards.append(tmp_path / "2.tar")
    (tmp_path / "3.tar").write_text("this is no tar file")
    shards.append(tmp_path / "3.tar")
    report = index_shards(shards, tmp_path / "pairs", tiny.tokenizer)
    found = quarantined(tmp_path / "pairs")
    for key, (_, _, reason) in bad.items():
        assert found.pop(key).startswith(reason), key
    assert found.pop("twice").startswith("duplicate key: twice.png comes after another image")
    assert found.pop("b").startswith("the shard is cut short: ")
    assert found.pop(None).startswith("not a tar file")
    assert not found
    assert report.taken == len(odd) + 2
    reader, used = ImageReader(SampleIndex([tmp_path / "pairs"])), {}
    for pair in range(report.taken):
        used[reader.name(pair)[1]] = np.asarray(images.decode(reader.read(pair)))
    assert set(used) == {*odd, "twice", "a"}
    for key in ("cmyk", "palette", "animated"):  # the first frame
        assert used[key].shape == (10, 20, 3)
        assert (np.abs(used[key].astype(int) - (255, 0, 0)) < 12).all(), key
    assert used["grey"].shape == (10, 20, 3)


def test_a_shard_that_is_cut_short_gives_the_pairs_before(tiny, tmp_path):
    whole = (tiny.folder / "shards" / "000000.tar").read_bytes()
    rng = random.Random(0)
    for size in [512 * 30, *(rng.randrange(20_000, len(whole) - 10240) for _ in range(10))]:
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        report = index_shards([tmp_path / "cut.tar"], tmp_path / "pairs", tiny.tokenizer)
        assert 0 < report.taken < 25
        assert report.rejected["the shard is cut short"] == 1
        index = SampleIndex([tmp_path / "pairs"])
        for pair in range(report.taken):
            assert images.decode(ImageReader(index).read(pair)).tobytes() == draw(pair)[0].tobytes()


def test_shards_that_cannot_be_indexed(tiny, tmp_path):
    bare = write_tar(tmp_path / "bare.tar", {"0.png": png(draw(0)[0])})
    with pytest.raises(
        DataError, match=r"bare\.tar: no image has a caption \(\.txt, or caption in \.json\); 1 left out \(no caption\)"
    ):
        index_shards([bare], tmp_path / "a", tiny.tokenizer)
    assert not (tmp_path / "a" / "index.json").exists()
    with pytest.raises(DataError, match=r"nowhere\.tar: cannot be read \(No such file or directory\)"):
        index_shards([tmp_path / "nowhere.tar"], tmp_path / "a", tiny.tokenizer)
    with pytest.raises(DataError, match=r"nothing://a\.tar: .*[Pp]rotocol"):
        index_shards(["nothing://a.tar"], tmp_path / "a", tiny.tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image with a caption beside it"):
        write_shards(tmp_path / "empty", tmp_path / "d")


def test_a_shard_that_could_not_be_read_this_time_is_not_taken_for_a_bad_one(tiny, tmp_path, monkeypatch):
    class Reset(io.FileIO):
        def read(self, size=-1):
            if self.tell() > 20_000:
                raise ConnectionResetError("connection reset by peer")
            return super().read(size)

    shards = sorted((tiny.folder / "shards").glob("*.tar"))
    monkeypatch.setattr(index_writer, "open_file", Reset)
    with pytest.raises(DataError, match=r"000000\.tar: cannot be read \(connection reset by peer\); run this again"):
        index_shards(shards, tmp_path / "pairs", tiny.tokenizer)
    monkeypatch.undo()
    assert index_shards(shards, tmp_path / "pairs", tiny.tokenizer).taken == 60


def test_shards_may_be_behind_a_url(tiny, tmp_path):
    import fsspec

    store = fsspec.filesystem("memory")
    shards = sorted((tiny.folder / "shards").glob("*.tar"))
    for shard in shards:
        store.pipe(f"/bucket/{shard.name}", shard.read_bytes())
    index_shards([f"memory://bucket/{shard.name}" for shard in shards], tmp_path / "pairs", tiny.tokenizer)
    there, here = SampleIndex([tmp_path / "pairs"]), SampleIndex([tiny.folder / "pairs"])
    there.check(tiny.tokenizer)
    for pair in range(60):
        assert ImageReader(there).read(pair) == ImageReader(here).read(pair)
        assert there.caption(pair).tolist() == here.caption(pair).tolist()
    assert ImageReader(there).name(30) == ("memory://bucket/000001.tar", "000000030")


def test_a_range_that_a_file_system_cannot_give_is_a_bad_pair_whatever_it_raises(tiny, tmp_path, monkeypatch):
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/gone/0.tar", (tiny.folder / "shards" / "000000.tar").read_bytes())
    index_shards(["memory://gone/0.tar"], tmp_path / "pairs", tiny.tokenizer)
    reader = ImageReader(SampleIndex([tmp_path / "pairs"]))

    def fail(*_args, **_kwargs):
        raise RuntimeError("the service is away")

    monkeypatch.setattr(type(store), "cat_file", fail)
    with pytest.raises(OSError, match="RuntimeError: the service is away"):
        reader.read(0)
    assert reader.name(0) == ("memory://gone/0.tar", f"at byte {reader.index.place(0).offset}")


def test_a_held_out_share_is_chosen_by_key_and_shares_no_pair(tiny, tmp_path):
    shards = sorted((tiny.folder / "shards").glob("*.tar"))
    report = index_shards(shards, tmp_path / "pairs", tiny.tokenizer, held_out=0.3)
    kept, held_out = SampleIndex([tmp_path / "pairs"]), SampleIndex([tmp_path / "pairs" / "held_out"])
    assert (len(kept), len(held_out)) == (report.taken, report.held_out)
    assert len(kept) + len(held_out) == 60
    assert 5 <= len(held_out) <= 35
    keys = []
    for index in (kept, held_out):
        index.check(tiny.tokenizer)
        for pair in range(len(index)):
            keys.append(ImageReader(index).name(pair)[1])
            assert caption_of(tiny, index, pair) == draw(int(keys[-1]))[1]
    assert sorted(map(int, keys)) == list(range(60))
    alone = index_shards(shards[1:], tmp_path / "fewer", tiny.tokenizer, held_out=0.3)  # a key decides alone
    fewer = SampleIndex([tmp_path / "fewer" / "held_out"])
    assert alone.held_out == sum(int(key) >= 25 for key in keys[report.taken :])
    assert {ImageReader(fewer).name(pair)[1] for pair in range(len(fewer))} <= set(keys[report.taken :])


@pytest.fixture
def copied(tiny, tmp_path):
    """The tiny pairs, copied, so that a test may spoil them."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(6):
        image, caption = draw(number)
        image.save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(caption)
    shards = write_shards(pictures, tmp_path / "shards")
    index_shards(shards, tmp_path / "pairs", tiny.tokenizer)
    return tmp_path / "pairs", shards[0]


def test_a_shard_that_is_not_the_indexed_one_is_refused(tiny, copied):
    folder, shard = copied
    content, index = shard.read_bytes(), SampleIndex([folder])
    os.utime(shard, (1, 1))
    index.check(tiny.tokenizer)  # another time, the same content: a copy
    place = index.place(2)
    shard.write_bytes(content[: place.offset - 512] + b"other" + content[place.offset - 507 :])
    index.check(tiny.tokenizer)
    with pytest.raises(DataError, match="the shard is not the one its index was made for"):
        ImageReader(index).read(2)
    assert ImageReader(index).read(3) == content[index.place(3).offset :][: index.place(3).bytes]
    shard.write_bytes(content[:-512])
    with pytest.raises(DataError, match=rf"has {len(content) - 512} bytes, its index was made for {len(content)}"):
        index.check(tiny.tokenizer)
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        index.check(tiny.tokenizer)


def test_an_index_that_is_missing_or_damaged_is_refused(tiny, copied, tmp_path):
    folder, _ = copied
    with pytest.raises(DataError, match=r"No such file or directory; make the index by megatron-sphinx prepare pairs"):
        SampleIndex([tmp_path / "nowhere"])
    content = (folder / "samples.bin").read_bytes()
    (folder / "samples.bin").write_bytes(content[:-40])
    with pytest.raises(DataError, match="the files of the index disagree"):
        SampleIndex([folder])
    (folder / "samples.bin").write_bytes(b"")
    with pytest.raises(DataError, match="damaged index"):
        SampleIndex([folder])
    (folder / "index.json").write_text("{}")
    with pytest.raises(DataError, match="damaged index"):
        SampleIndex([folder])


def test_a_picture_that_the_encoders_cannot_take_is_quarantined_too(tiny, copied, tmp_path):
    config = configuration.load(tiny.write(tmp_path / "run.yaml"))
    loader = PixelLoader(SampleIndex([copied[0]]), config.vision, workers=1, quarantine=tmp_path / "quarantine.jsonl")

    def encoders(views: dict[int, torch.Tensor]) -> torch.Tensor:
        features = torch.ones(3, 4, dtype=torch.bfloat16)
        features[1, 2] = float("nan")
        return features

    features = encode(encoders, loader.submit([(1, 0), (4, 0), (5, 0)]))
    assert features.isnan().all(1).tolist() == [False, True, False]
    line = json.loads((tmp_path / "quarantine.jsonl").read_text())
    assert (line["pair"], line["reason"]) == (4, "the encoders give NaN for it")


def test_a_shard_that_ends_inside_an_image_is_a_bad_sample(copied):
    folder, shard = copied
    index = SampleIndex([folder])
    with shard.open("r+b") as file:
        file.truncate(index.place(5).offset + 10)
    with pytest.raises(DataError, match="the shard ends inside the image"):
        ImageReader(index).read(5)


# text


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"content": text}) + "\n" for text in texts).encode()


def all_documents(index: TextIndex) -> list[list[int]]:
    runs = index.runs(0, index.bounds[-1])
    assert runs.is_end.all()
    return [index.read(n, 0, int(length)).tolist() for n, length in zip(runs.document, runs.length, strict=True)]


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
        runs = index.runs(first, last)
        found = [
            token
            for document, start, length in zip(runs.document, runs.start, runs.length, strict=True)
            for token in index.read(document, int(start), int(length)).tolist()
        ]
        assert found == tokens[first:last]
        ends = runs.start + runs.length == np.array([len(whole[n]) for n in runs.document])
        assert np.array_equal(ends, runs.is_end)


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
        with pytest.raises(DataError, match=rf"{name}: does not decompress \(.*\); copy it again"):
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
    with pytest.raises(DataError, match=r"has no column 'text', but \['content', 'url'\]; give --key"):
        write_text([tmp_path / "t.parquet"], tmp_path / "out2", tiny.tokenizer, key="text")
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"bad\.parquet: not a parquet file \(.*\); copy it again"):
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
    assert report.rejected == {"not a JSON object with the key 'content'": 4, "holds a NUL character": 1}
    at = len(good)
    found = quarantined(tmp_path / "out")
    for line in bad:
        assert f"byte {at}" in found
        at += len(line)


def test_text_that_cannot_be_prepared_leaves_no_index(tiny, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "another key"}\n')
    why = r"t\.jsonl: no text; 1 left out \(not a JSON object with the key 'content'\); name its column or key by --key"
    with pytest.raises(DataError, match=why):
        write_text([tmp_path / "t.jsonl"], tmp_path / "out", tiny.tokenizer)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"empty\.txt: no text; name"):
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
    with pytest.raises(
        DataError, match=r"index\.json: No such file or directory; make it by megatron-sphinx prepare text"
    ):
        TextIndex([tmp_path / "out"])


# the tokenizer


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
    for source, name in ((sources.text, "text"), (sources.pairs, "pairs")):
        with pytest.raises(DataError, match=rf"data\.{name}=.*: was made with a tokenizer of 300 pieces \("):
            source.check(sources.tokenizer)
    with pytest.raises(DataError, match="was made with a tokenizer"):
        sources.check()
    with pytest.raises(DataError, match="No such file or directory; give a sentencepiece"):
        Tokenizer(tmp_path / "nowhere.model")
    (tmp_path / "bad.model").write_text("nonsense")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer(tmp_path / "bad.model")


# micro-batches


def opened(tiny, tmp_path, overrides=None) -> tuple[configuration.Config, Planner, BatchBuilder]:
    config = configuration.load(tiny.write(tmp_path / "run.yaml", overrides))
    sources = open_sources(config.data, config.model)
    planner = make_planner(config.data, sources, config.model, config.vision, replicas=2, seed=1)
    return config, planner, BatchBuilder(config.data, sources, config.vision)


@pytest.mark.parametrize("isolate", [True, False])
def test_a_micro_batch_holds_what_the_plan_says(tiny, tmp_path, isolate):
    config, planner, builder = opened(tiny, tmp_path, {"data.isolate_documents": isolate})
    tokenizer, block = tiny.tokenizer, config.vision.tokens_per_view
    index, plan = builder.sources.pairs, planner.step(2)
    seen_pairs, targets = [], 0
    for rows in (rows for replicas in plan.micro_batches for rows in replicas):
        batch = builder.build(rows)
        assert list(batch.lengths) == sorted(batch.lengths)
        assert sum(batch.lengths) == len(batch.tokens) == len(batch.targets)
        for number, pair in enumerate(batch.pairs):
            mine = batch.sample_of_token == number
            tokens, goal = batch.tokens[mine].tolist(), batch.targets[mine].tolist()
            caption = index.caption(pair).tolist()
            assert tokens == [tokenizer.bos] + [0] * block + caption + [tokenizer.eos]
            assert goal == [-100] * block + caption + [tokenizer.eos, -100]
            first = int(mine.nonzero()[0])
            views = batch.view_positions.view(-1, block)[batch.sample_of_view == number]
            assert views.tolist() == [list(range(first + 1, first + 1 + block))]
        seen_pairs += batch.pairs
        targets += int((batch.targets >= 0).sum())
    assert sorted(seen_pairs) == plan.pairs
    assert targets == plan.targets(of_pairs=True) + plan.targets(of_pairs=False)


def test_a_pair_that_comes_twice_in_a_step_has_its_views_twice(tiny, tmp_path):
    config, planner, builder = opened(tiny, tmp_path, {"data.pairs_per_step": 100, "data.micro_batch_rows": 200})
    block, rows = config.vision.tokens_per_view, planner.step(0).rows
    batch = builder.build(rows)
    assert len(set(batch.pairs)) == 60 < len(batch.pairs) == 100
    assert [pair for pair, _ in views_in(rows)] == list(batch.pairs)
    for number in range(100):
        first = int((batch.sample_of_token == number).nonzero()[0])
        positions = batch.view_positions.view(-1, block)[number]
        assert positions.tolist() == list(range(first + 1, first + 1 + block))


def test_text_predicts_its_next_token_over_cuts(tiny, tmp_path):
    _, planner, builder = opened(tiny, tmp_path)
    whole = all_documents(builder.sources.text)
    for rows in planner.step(0).micro_batches[0]:
        batch = builder.build([tuple(piece for piece in row if not piece.is_sample) for row in rows])
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


def test_bad_images_are_quarantined_and_counted(tiny, copied, tmp_path):
    folder, shard = copied
    index = SampleIndex([folder])
    place = index.place(2)
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


# the tools


def test_the_tools_end_to_end(tiny, tmp_path, run_tool):
    model = tiny.folder / "tokenizer.model"
    status, out, _ = run_tool("prepare_pairs.py", tiny.folder / "pictures", tmp_path / "pairs", "--tokenizer", model)
    assert status == 0
    assert re.fullmatch(r".*pairs: 60 pairs in 1 shards, \d+ caption tokens\n", out)
    SampleIndex([tmp_path / "pairs"]).check(tiny.tokenizer)
    whole = ["prepare_pairs.py", tiny.folder / "shards", tmp_path / "pairs", "--tokenizer", model, "--held-out", "0.3"]
    status, out, _ = run_tool(*whole)
    assert re.fullmatch(r".*pairs: \d+ pairs in 3 shards, \d+ caption tokens, \d+ more held out\n", out)
    text = ["prepare_text.py", tiny.folder / "text.jsonl", tmp_path / "text", "--tokenizer", model]
    status, out, _ = run_tool(*text)
    assert (status, out.startswith(f"{tmp_path / 'text'}: 50 documents, ")) == (0, True)
    status, _, error = run_tool("prepare_text.py", tmp_path / "nowhere.jsonl", tmp_path / "t", "--tokenizer", model)
    assert (status, "nowhere.jsonl: cannot be read (No such file or directory)" in error) == (2, True)
    status, _, error = run_tool("prepare_pairs.py", tmp_path / "nowhere", tmp_path / "t", "--tokenizer", model)
    assert (status, error.endswith("nowhere: no such file or folder\n")) == (2, True)
    shard = write_tar(
        tmp_path / "bad.tar", {"0.png": b"broken", "0.txt": b"x", "1.png": png(draw(1)[0]), "1.txt": b"y"}
    )
    _, out, _ = run_tool("prepare_pairs.py", shard, tmp_path / "t", "--tokenizer", model)
    assert out.endswith("  left out: 1 (not an image)\n")


@pytest.mark.parametrize("tool", ["prepare_pairs.py", "prepare_text.py"])
def test_a_tool_that_is_killed_goes_on_where_it_was(tiny, tmp_path, start_ranks, tool):
    """Whenever it is killed, no half file has its final name, and the parts that were done are not done again."""
    shutil.copytree(tiny.folder / "shards", tmp_path / "shards")
    for number in range(40):
        shutil.copy(tmp_path / "shards" / "000000.tar", tmp_path / "shards" / f"{number + 100:06d}.tar")
        (tmp_path / "shards" / f"{number:02d}.jsonl").write_bytes((tiny.folder / "text.jsonl").read_bytes() * 8)
    inputs = sorted((tmp_path / "shards").glob("*.tar" if tool == "prepare_pairs.py" else "*.jsonl"))
    done = ".parts/*.npz" if tool == "prepare_pairs.py" else "*.json"
    model = ["--tokenizer", tiny.folder / "tokenizer.model", "--workers", "2"]

    def start(target: str) -> Ranks:
        def run() -> int:
            sys.argv = [tool, *map(str, (*inputs, tmp_path / target, *model))]
            return runpy.run_path(str(TOOLS / tool))["main"]()

        return start_ranks(1, run)

    kept: dict[Path, int] = {}
    for wanted in (3, 12, 25):
        (pid,) = start("out").pids
        while len(found := list((tmp_path / "out").glob(done))) < wanted:
            time.sleep(0.005)
        kill(pid)
        assert not (tmp_path / "out" / "index.json").exists()
        assert len(found) < len(inputs)
        assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
        kept |= {path: path.stat().st_mtime_ns for path in found}
    for target in ("out", "whole"):
        assert start(target).wait() == [0]
    if tool == "prepare_text.py":
        assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_worker_that_is_killed_is_one_line(tiny, tmp_path):
    def die(number: int) -> int:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(DataError, match=r"a worker was killed, .* run this again with fewer --workers"):
        list(in_parallel(die, range(8), workers=2, what="part"))
    assert list(in_parallel(lambda number: number * 2, range(8), workers=3, what="part")) == list(range(0, 16, 2))


def test_webdataset_reads_our_shards(tiny):
    import webdataset

    shards = sorted(map(str, (tiny.folder / "shards").glob("*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert len(samples) == 60
    for number, sample in enumerate(samples):
        image, caption = draw(number)
        assert sample["txt"] == caption
        assert np.array_equal(sample["png"], np.asarray(image))


def test_energon_reads_our_shards(tiny, tmp_path, run_ranks):
    why = "megatron-energon is not installed; it brings megatron-core another storage layer, so no test needs it"
    energon = pytest.importorskip("megatron.energon", reason=why)
    from megatron.energon.cli.main import main as energon_command

    (tmp_path / "shards").mkdir()
    for shard in (tiny.folder / "shards").glob("*.tar"):
        shutil.copy(shard, tmp_path / "shards")

    def prepare() -> int:
        options = ["--non-interactive", "--no-progress", "--num-workers", "1", "--split-ratio", "1,0,0"]
        options += ["--sample-type", "CaptioningSample", "--field-map", '{"image": "png", "caption": "txt"}']
        energon_command(["prepare", *options, str(tmp_path / "shards")], standalone_mode=False)
        return 0

    def read() -> int:
        worker = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
        data = energon.get_train_dataset(
            str(tmp_path / "shards"), worker_config=worker, batch_size=1, shuffle_buffer_size=None,
            max_samples_per_sequence=None, repeat=False,
        )  # fmt: skip
        found = {int(sample.__key__[0].rpartition("/")[2]): sample for sample in energon.get_loader(data)}
        assert sorted(found) == list(range(60))
        for number, sample in found.items():
            image, caption = draw(number)
            assert sample.caption[0] == caption
            pixels = (sample.image[0] * 255).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(pixels, np.asarray(image))
        return 0

    run_ranks(1, prepare)
    run_ranks(1, read)
