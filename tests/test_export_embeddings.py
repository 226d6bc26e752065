"""Embeddings of prompts for other engines: transformers computes our logits of them."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.errors import FolderError
from megatron_sphinx.generation.pictures import picture_of, views_of_picture
from megatron_sphinx.generation.runner import ModelRunner
from megatron_sphinx.generation.ticks import Piece
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.run.evaluation import join_alone
from megatron_sphinx.serving.export import export_embeddings
from megatron_sphinx.serving.questions import Asking
from megatron_sphinx.serving.ranks import build_model
from megatron_sphinx.serving.rows import sources_of
from megatron_sphinx.serving.source import ModelSource

LONG = {"training.steps": 1, "data.sequence_length": 640}
VIEWS = {"vision.views": 5, "vision.padding": "corner", "vision.skip_padding_views": True}


@pytest.fixture
def asked(tmp_path) -> Path:
    """Questions about pictures and about none, two of which cannot be asked."""
    folder = tmp_path / "asked"
    folder.mkdir()
    Image.linear_gradient("L").resize((60, 20)).save(folder / "wide.png")
    Image.radial_gradient("L").resize((40, 40)).save(folder / "square.png")
    (folder / "bad.png").write_bytes(b"no picture")
    rows = [
        {"id": 7, "image": "wide.png", "question": "What is this?"},
        {"image": "square.png", "question": "Is it red?"},
        {"image": "bad.png", "question": "Is it red?"},
        {"question": "What is red?"},
        {"image": "wide.png", "question": "Is it red? " * 300},
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def our_logits(run: Path, picture: Path | None, tokens: list[int]) -> torch.Tensor:
    source, (groups, platform) = ModelSource.open(run, None, None), join_alone("cpu")
    runner = ModelRunner(
        build_model(source, groups, platform, torch.float32, source.positions),
        places=len(tokens), vocabulary=source.language.vocabulary,
    )  # fmt: skip
    key = None
    if picture is not None:
        shown = picture_of(picture.read_bytes(), source.vision)
        dtype = platform.encoder_dtype(source.vision.precision)
        encoders = FrozenEncoders(source.vision, device=platform.device, dtype=dtype, seed=source.seed)
        runner.add_picture(shown.key, encoders(views_of_picture(shown, source.vision)), shown.encoded)
        key = shown.key
    targets = tuple((number, 0) for number in range(len(tokens)))
    return runner.run([Piece(tuple(tokens), 0, ((0, len(tokens)),), key, targets=targets)])


@pytest.mark.parametrize("experts", [0, 4])
def test_transformers_computes_our_logits_of_them(train, run_ranks, tmp_path, asked, experts):
    model = {"model.experts": experts} if experts else VIEWS
    run = train(1, LONG | model, "run").folder
    convert(run, tmp_path / "hf", "hf", WriteOptions())
    words = ["export-embeddings", run, "--input", asked, "--output", tmp_path / "out", "--dtype", "fp32",
             "--new-tokens", 8]  # fmt: skip
    run_ranks(1, lambda: main([*map(str, words)]) and pytest.fail("the command failed"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [sorted(line.keys() & {"error", "file"}) for line in lines] == [
        ["file"], ["file"], ["error"], ["file"], ["error"]
    ]  # fmt: skip
    assert lines[0]["id"] == 7
    assert "bad.png" in lines[2]["image"]
    assert "chat too long" in lines[4]["error"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    for line in lines:
        if "error" in line:
            continue
        held = load_file(tmp_path / "out" / line["file"])
        embeddings, tokens = held["prompt_embeds"], held["tokens"].tolist()
        assert embeddings.shape == (line["positions"], theirs.config.hidden_size) == (len(tokens), 32)
        with torch.no_grad():
            wanted = theirs(inputs_embeds=embeddings[None]).logits[0]
        picture = asked.parent / line["image"] if "image" in line else None

        def is_ours(picture=picture, tokens=tokens, wanted=wanted):
            found = our_logits(run, picture, tokens)
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()

        run_ranks(1, is_ours)


def test_what_cannot_be_exported_is_said_in_a_line(train, run_ranks, tmp_path, asked, capfd):
    run = train(1, LONG, "run").folder
    (tmp_path / "out").mkdir()
    shutil.copy(asked.parent / "square.png", tmp_path)
    words = [*map(str, ["export-embeddings", run, "--input", asked, "--output"])]

    def refuses():
        assert main([*words, str(tmp_path / "out")]) == 2
        assert main([*words, str(tmp_path / "new"), "--template", "vicuna"]) == 2
        assert main([*words, str(tmp_path / "new"), "--new-tokens", "0"]) == 2

    ranks = run_ranks(1, refuses)
    text = capfd.readouterr().err + (ranks.text() if hasattr(ranks, "text") else "")
    assert f"--output={tmp_path}/out: exists; give another folder, or remove it" in text
    assert "template=vicuna: unknown; did you mean vicuna_v1_1?" in text
    assert "--new-tokens=0: must be at least 1" in text
    assert not (tmp_path / "new").exists()


def test_rows_that_are_no_unicode_are_indexed_and_room_is_left_by_the_positions(train, run_ranks, tmp_path, asked):
    run = train(1, LONG | {"data.sequence_length": 256}, "short").folder
    asked.write_text(json.dumps({"question": "\ud800"}) + "\n" + json.dumps({"question": "red?", "id": "\udcff"}))
    words = ["export-embeddings", run, "--input", asked, "--output", tmp_path / "out"]
    run_ranks(1, lambda: main([*map(str, words)]) and pytest.fail("the command failed"))
    bad, good = map(json.loads, (tmp_path / "out" / "index.jsonl").read_text().splitlines())
    assert "half a surrogate pair" in bad["error"]
    assert (good["id"], good["file"]) == ("\udcff", "00000001.safetensors")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_export_that_ends_early_leaves_nothing_behind(tmp_path, asked, error):
    class Ending:
        def prompt(self, *_):
            raise error

    with pytest.raises((KeyboardInterrupt, FolderError)):
        export_embeddings(Ending(), sources_of([asked]), tmp_path / "new" / "out", Asking(), 8)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_language_model_alone_has_no_eyes(train, run_ranks, tiny, tmp_path, asked):
    run = train(1, LONG, "run").folder
    convert(run, tmp_path / "hf", "hf", WriteOptions())
    (tmp_path / "hf" / "sphinx.safetensors").unlink()
    words = ["export-embeddings", tmp_path / "hf", "--input", asked, "--output", tmp_path / "out", "--new-tokens", 8]
    run_ranks(1, lambda: main([*map(str, words)]) and pytest.fail("the command failed"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert lines[0]["error"] == "image: this model has no projections of pictures; ask it without one"
    assert load_file(tmp_path / "out" / lines[3]["file"])["prompt_embeds"].dtype is torch.bfloat16
