"""Indexes, images, token files and micro-batches: what is read, and what bad input gets."""

import io
import json
import os
import random
import runpy
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw, train_tokenizer
from megatron.core.datasets.indexed_dataset import IndexedDataset
from PIL import Image

from megatron_sphinx import config as configuration
from megatron_sphinx.data import images
from megatron_sphinx.data.loader import BatchBuilder, PixelLoader, make_planner, open_sources, views_in
from megatron_sphinx.data.pairs import ImageReader, PairIndex, index_shards, write_shards
from megatron_sphinx.data.plan import Planner
from megatron_sphinx.data.text import TokenFile, TokenWriter, write_text
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.model.views import GLOBAL
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
    view = images.cut(Image.fromarray(stripes), GLOBAL, 32)
    assert view.shape == (3, 32, 32)
    assert abs(view[:, 4:-4, 4:-4].astype(int) - 127).max() <= 2  # aliasing would keep stripes


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


def test_a_decompression_bomb_is_not_decoded(monkeypatch):
    bomb = png(Image.new("1", (20000, 20000)))
    assert len(bomb) < 100_000
    with pytest.raises(DataError, match="decompression bomb"):
        images.decode(bomb)
    small = png(Image.new("1", (10000, 9001)))
    with pytest.raises(DataError, match="decompression bomb: 10000x9001 pixels, at most 89478485 are decoded"):
        images.decode(small)


# pairs


def test_an_index_knows_every_pair_without_reading_it(tiny):
    index = PairIndex(tiny.folder / "pairs")
    assert len(index) == 60
    assert [shard.samples for shard in index.shards] == [25, 25, 10]
    reader = ImageReader(index)
    for pair in (0, 24, 25, 59):
        image, caption = draw(pair)
        assert index.size(pair) == image.size
        assert images.decode(reader.read(pair)).tobytes() == image.tobytes()
        assert (
            tiny.tokenizer.decode(index.captions.read(pair, 0, int(index.captions.lengths[pair])).tolist()) == caption
        )
        assert reader.name(pair) == (f"../shards/{pair // 25:06d}.tar", f"{pair:09d}")


def test_img2dataset_tars_are_indexed_where_they_are(tiny, tmp_path):
    members = {
        "0.jpg": png(draw(0)[0], "JPEG"), "0.txt": b"from txt", "0.json": json.dumps({"caption": "from json"}).encode(),
        "1.webp": png(draw(1)[0], "WEBP"), "1.json": json.dumps({"caption": "only json"}).encode(),
        "2.png": png(draw(2)[0]),
        "3.txt": b"no picture",
        "4.png": b"broken", "4.txt": b"a caption",
        "5.png": png(draw(5)[0]), "5.txt": b"",
    }  # fmt: skip
    shard = write_tar(tmp_path / "00000.tar", members)
    report = index_shards([shard], tmp_path / "pairs", tiny.tokenizer)
    assert report.pairs == 2
    assert report.rejected == {"no caption": 2, "no image": 2, "not an image": 1}
    index = PairIndex(tmp_path / "pairs")
    captions = [
        tiny.tokenizer.decode(index.captions.read(n, 0, int(index.captions.lengths[n])).tolist()) for n in (0, 1)
    ]
    assert captions == ["from txt", "only json"]


def test_shards_that_cannot_be_indexed(tiny, tmp_path):
    bare = write_tar(tmp_path / "bare.tar", {"0.png": png(draw(0)[0])})
    with pytest.raises(DataError, match=r"bare\.tar: no image has a caption \(\.txt, or caption in \.json\)"):
        index_shards([bare], tmp_path / "a", tiny.tokenizer)
    assert not (tmp_path / "a" / "index.json").exists()
    whole = (tiny.folder / "shards" / "000000.tar").read_bytes()
    rng = random.Random(0)
    for size in [512, 1024, *(rng.randrange(len(whole) - 10240) for _ in range(20))]:
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut\.tar: (cut short|cannot be read as a tar file).*copy it again"):
            index_shards([tmp_path / "cut.tar"], tmp_path / "b", tiny.tokenizer)
    (tmp_path / "no.tar").write_text("this is no tar file")
    with pytest.raises(DataError, match=r"no\.tar: cannot be read as a tar file"):
        index_shards([tmp_path / "no.tar"], tmp_path / "c", tiny.tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image with a caption beside it"):
        write_shards(tmp_path / "empty", tmp_path / "d")


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
    PairIndex(folder).check(tiny.tokenizer)
    content = shard.read_bytes()
    os.utime(shard, (1, 1))
    PairIndex(folder).check(tiny.tokenizer)  # another time, the same content: a copy
    shard.write_bytes(content[:1000] + b"\1" + content[1001:])
    with pytest.raises(DataError, match=r"is not the file its index was made for; run tools/prepare_pairs\.py again"):
        PairIndex(folder).check(tiny.tokenizer)
    shard.write_bytes(content[:-512])
    with pytest.raises(DataError, match=rf"has {len(content) - 512} bytes, its index was made for {len(content)}"):
        PairIndex(folder).check(tiny.tokenizer)
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        PairIndex(folder).check(tiny.tokenizer)


def test_an_index_that_is_missing_or_damaged_is_refused(tiny, copied, tmp_path):
    folder, _ = copied
    with pytest.raises(DataError, match=r"No such file or directory; make the index by tools/prepare_pairs.py"):
        PairIndex(tmp_path / "nowhere")
    np.save(folder / "samples.npy", np.load(folder / "samples.npy")[:-1])
    with pytest.raises(DataError, match="the files of the index disagree"):
        PairIndex(folder)
    (folder / "index.json").write_text("{}")
    with pytest.raises(DataError, match="damaged index"):
        PairIndex(folder)


def test_a_picture_that_the_encoders_cannot_take_is_quarantined_too(tiny, copied, tmp_path):
    config = configuration.load(tiny.write(tmp_path / "run.yaml"))
    loader = PixelLoader(PairIndex(copied[0]), config.vision, workers=1, quarantine=tmp_path / "quarantine.jsonl")

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
    index = PairIndex(folder)
    with shard.open("r+b") as file:
        file.truncate(int(index.samples[5]["offset"]) + 10)
    with pytest.raises(DataError, match="the shard ends inside the image"):
        ImageReader(index).read(5)


# text


def test_text_is_megatrons_own_format(tiny, tmp_path):
    texts = ["a red circle", "blue", "  ", "green paint"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    (tmp_path / "t.txt").write_text("plain text")
    documents, tokens = write_text([tmp_path / "t.jsonl", tmp_path / "t.txt"], tmp_path / "out", tiny.tokenizer)
    file, megatron = TokenFile(tmp_path / "out", "data.text"), IndexedDataset(str(tmp_path / "out"))
    assert (documents, tokens) == (4, int(file.lengths.sum()))
    for number, text in enumerate([*texts[:2], texts[3], "plain text"]):
        ids = megatron[number].tolist()
        assert ids == [1, *tiny.tokenizer.encode(text), 2]
        assert file.read(number, 1, len(ids) - 2).tolist() == ids[1:-1]


def test_parquet_is_read_by_column(tiny, tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"content": ["one", "two"], "url": ["x", "y"]}), tmp_path / "t.parquet")
    assert write_text([tmp_path / "t.parquet"], tmp_path / "out", tiny.tokenizer)[0] == 2
    with pytest.raises(DataError, match=r"has no column 'text', but \['content', 'url'\]; give --key"):
        write_text([tmp_path / "t.parquet"], tmp_path / "out2", tiny.tokenizer, key="text")


def test_text_that_cannot_be_prepared_leaves_no_file(tiny, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"content": "fine"}\n{"text": "no content"}\n')
    with pytest.raises(DataError, match=r"t\.jsonl:2: not a JSON object with the key 'content'; give --key"):
        write_text([tmp_path / "t.jsonl"], tmp_path / "out", tiny.tokenizer)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="the files hold no text"):
        write_text([tmp_path / "empty.txt"], tmp_path / "out", tiny.tokenizer)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_token_files_that_are_missing_or_damaged_are_refused(tiny, tmp_path):
    for ending in (".bin", ".idx"):
        (tmp_path / f"t{ending}").write_bytes((tiny.folder / f"text{ending}").read_bytes())
    assert TokenFile(tmp_path / "t", "data.text").tokenizer is None
    (tmp_path / "t.bin").write_bytes((tiny.folder / "text.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match=r"data\.text=.*t\.bin has \d+ bytes, its index says \d+; copy it again"):
        TokenFile(tmp_path / "t", "data.text")
    (tmp_path / "t.idx").write_bytes(b"nonsense" * 8)
    with pytest.raises(DataError, match="is not an index of tokens"):
        TokenFile(tmp_path / "t", "data.text")
    (tmp_path / "t.idx").unlink()
    with pytest.raises(DataError, match=r"t\.idx is missing; make it by tools/prepare_text.py"):
        TokenFile(tmp_path / "t", "data.text")


# the tokenizer


def test_tokenizers_that_do_not_fit_are_refused(tiny, tmp_path):
    other = train_tokenizer(tmp_path / "other", ["quite other words about something else " * 3] * 20, 290)
    config = configuration.load(tiny.write(tmp_path / "run.yaml"))
    with pytest.raises(
        DataError, match=r"data\.tokenizer=.*has 300 pieces, but model\.vocabulary=320; set that to 300"
    ):
        open_sources(config.data, configuration.load(tiny.write(tmp_path / "a.yaml", {"model.vocabulary": 320})).model)
    size = Tokenizer(other).mark.vocabulary
    changed = configuration.load(
        tiny.write(tmp_path / "b.yaml", {"data.tokenizer": str(other), "model.vocabulary": size})
    )
    with pytest.raises(DataError, match=r"data\.text=.*: was made with a tokenizer of 300 pieces \("):
        open_sources(changed.data, changed.model)
    with pytest.raises(DataError, match=r"data\.pairs=.*: was made with a tokenizer of 300 pieces \("):
        PairIndex(tiny.folder / "pairs").check(Tokenizer(other))
    with pytest.raises(DataError, match="No such file or directory; give a sentencepiece"):
        Tokenizer(tmp_path / "nowhere.model")
    (tmp_path / "bad.model").write_text("nonsense")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer(tmp_path / "bad.model")


# micro-batches


def opened(tiny, tmp_path, overrides=None) -> tuple[configuration.RunConfig, Planner, BatchBuilder]:
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
            mine = batch.pair_of_token == number
            tokens, goal = batch.tokens[mine].tolist(), batch.targets[mine].tolist()
            caption = index.captions.read(pair, 0, int(index.captions.lengths[pair])).tolist()
            assert tokens == [tokenizer.bos] + [0] * block + caption + [tokenizer.eos]
            assert goal == [-100] * block + caption + [tokenizer.eos, -100]
            first = int(mine.nonzero()[0])
            views = batch.view_positions.view(-1, block)[batch.pair_of_view == number]
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
        first = int((batch.pair_of_token == number).nonzero()[0])
        positions = batch.view_positions.view(-1, block)[number]
        assert positions.tolist() == list(range(first + 1, first + 1 + block))


def test_a_text_file_without_tokens_is_refused(tiny, tmp_path):
    with TokenWriter(tmp_path / "empty", tiny.tokenizer):
        pass
    config = configuration.load(tiny.write(tmp_path / "run.yaml", {"data.text": str(tmp_path / "empty")}))
    with pytest.raises(DataError, match=r"data\.text=.*empty: holds no tokens"):
        open_sources(config.data, config.model)


def test_text_predicts_its_next_token_over_cuts(tiny, tmp_path):
    _, planner, builder = opened(tiny, tmp_path)
    text = builder.sources.text
    for rows in planner.step(0).micro_batches[0]:
        batch = builder.build([tuple(piece for piece in row if not piece.is_pair) for row in rows])
        known = {tuple(text.read(d, 0, int(text.lengths[d])).tolist()) for d in set(batch.documents)}
        follows = {(a, b) for document in known for a, b in pairwise(document)}
        pairs = zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
        assert all((token, target) in follows for token, target in pairs if target >= 0)


def test_a_replica_without_rows_still_has_one_position(tiny, tmp_path):
    _, _, builder = opened(tiny, tmp_path)
    batch = builder.build([])
    assert batch.lengths == (1,)
    assert batch.targets.tolist() == [-100]
    assert len(batch.view_positions) == len(batch.pair_of_view) == 0


def test_bad_images_are_quarantined_and_counted(tiny, copied, tmp_path):
    folder, shard = copied
    index = PairIndex(folder)
    sample = index.samples[2]
    with shard.open("r+b") as file:
        file.seek(int(sample["offset"]) + int(sample["bytes"]) // 2)
        file.write(b"\0" * (int(sample["bytes"]) // 2))
    config = configuration.load(tiny.write(tmp_path / "run.yaml"))
    loader = PixelLoader(index, config.vision, workers=2, quarantine=tmp_path / "quarantine.jsonl")
    pixels = loader.submit([(1, 0), (2, 0), (3, 0)]).result()
    assert pixels.bad == (1,)
    assert {side: tuple(view.shape) for side, view in pixels.views.items()} == {56: (3, 3, 56, 56), 64: (3, 3, 64, 64)}
    (line,) = [json.loads(text) for text in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert (line["shard"], line["key"], line["pair"]) == ("../shards/000000.tar", "000000002", 2)
    assert "does not decode" in line["reason"]


# the tools


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """`run_tool(name, *args)` runs a tool as if from the shell; its status, and what it printed."""

    def run(name: str, *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        status = runpy.run_path(str(TOOLS / name))["main"]()
        return status, *capsys.readouterr()

    return run


def test_the_tools_end_to_end(tiny, tmp_path, run_tool):
    model = tiny.folder / "tokenizer.model"
    done = run_tool("prepare_pairs.py", tiny.folder / "pictures", tmp_path / "pairs", "--tokenizer", model)
    assert done == (0, f"{tmp_path / 'pairs'}: 60 pairs in 1 shards\n", "")
    PairIndex(tmp_path / "pairs").check(tiny.tokenizer)
    status, out, _ = run_tool("prepare_text.py", tiny.folder / "text.jsonl", tmp_path / "text", "--tokenizer", model)
    assert (status, out.startswith(f"{tmp_path / 'text'}: 50 documents, ")) == (0, True)
    status, _, error = run_tool("prepare_text.py", tmp_path / "nowhere.jsonl", tmp_path / "t", "--tokenizer", model)
    assert (status, error.endswith("nowhere.jsonl: no such file\n")) == (2, True)
    status, _, error = run_tool("prepare_pairs.py", tmp_path / "nowhere", tmp_path / "t", "--tokenizer", model)
    assert (status, error.endswith("nowhere: no such file or folder\n")) == (2, True)
