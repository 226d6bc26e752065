"""Indexes of image-text pairs: what is read and written, and what bad shards get."""

import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw, size_of
from PIL import Image

from megatron_sphinx import config as configuration
from megatron_sphinx.data import images
from megatron_sphinx.data.pairs import ImageReader, SampleIndex
from megatron_sphinx.data.pixels import PixelLoader
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare import index as index_writer
from megatron_sphinx.prepare.pairs import index_shards, write_shards
from megatron_sphinx.stage.channel import encode


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
    assert reader.name(0) == ("memory://gone/0.tar", f"at byte {reader.index.location(0).offset}")


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


def spoilable_pairs(tiny, tmp_path: Path) -> tuple[Path, Path]:
    """Index and shard of six of the tiny pairs, which a test may spoil."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(6):
        image, caption = draw(number)
        image.save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(caption)
    shards = write_shards(pictures, tmp_path / "shards")
    index_shards(shards, tmp_path / "pairs", tiny.tokenizer)
    return tmp_path / "pairs", shards[0]


@pytest.fixture
def copied(tiny, tmp_path) -> tuple[Path, Path]:
    return spoilable_pairs(tiny, tmp_path)


def test_a_shard_that_is_not_the_indexed_one_is_refused(tiny, copied):
    folder, shard = copied
    content, index = shard.read_bytes(), SampleIndex([folder])
    os.utime(shard, (1, 1))
    index.check(tiny.tokenizer)  # another time, the same content: a copy
    place = index.location(2)
    shard.write_bytes(content[: place.offset - 512] + b"other" + content[place.offset - 507 :])
    index.check(tiny.tokenizer)
    with pytest.raises(DataError, match="the shard is not the one its index was made for"):
        ImageReader(index).read(2)
    assert ImageReader(index).read(3) == content[index.location(3).offset :][: index.location(3).bytes]
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

    features = encode(encoders, [loader.submit([(1, 0), (4, 0), (5, 0)])])[0]
    assert features.isnan().all(1).tolist() == [False, True, False]
    line = json.loads((tmp_path / "quarantine.jsonl").read_text())
    assert (line["pair"], line["reason"]) == (4, "the encoders give NaN for it")


def test_a_shard_that_ends_inside_an_image_is_a_bad_sample(copied):
    folder, shard = copied
    index = SampleIndex([folder])
    with shard.open("r+b") as file:
        file.truncate(index.location(5).offset + 10)
    with pytest.raises(DataError, match="the shard ends inside the image"):
        ImageReader(index).read(5)


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
