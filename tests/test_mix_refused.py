"""What mixing refuses: shares that are none, checkpoints that do not belong together, damage."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixes import SMALL, accessory, make, ours, with_expert

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.encoders import ENCODERS
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.mix import interpolate, shares_of
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.errors import CheckpointError


def test_frozen_experts_that_differ_are_refused(tmp_path):
    expert = torch.randn(3, 5)
    accessory(tmp_path / "a", 1, expert)
    accessory(tmp_path / "b", 2, expert + 1e-6)
    refused(tmp_path, r"b: llma\.clip\.w of clip is frozen, but differs from that of \S+/a; give checkpoints with the")
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    with_expert(make(tmp_path / "a", 1), expert)
    make(tmp_path / "b", 2)
    refused(tmp_path, r"b: holds no w of clip, \S+/a does; give checkpoints with the same encoders")
    with_expert(tmp_path / "b", -expert)
    refused(tmp_path, r"b: w of clip is frozen, but differs from that of \S+/a; give checkpoints with the same enc")
    with_expert(tmp_path / "b", expert)
    (tmp_path / "secret").mkdir()
    (tmp_path / "a" / ENCODERS / "more").symlink_to(tmp_path / "secret")  # which is not theirs
    interpolate([tmp_path / "a", tmp_path / "b"], {tmp_path / "mix": (0.5, 0.5)})
    kept = f"{ENCODERS}/clip.safetensors"
    assert [path.name for path in (tmp_path / "mix" / ENCODERS).iterdir()] == ["clip.safetensors"]
    assert (tmp_path / "mix" / kept).read_bytes() == (tmp_path / "a" / kept).read_bytes()


# what is refused


def refused(folder: Path, message: str, shares: tuple[float, ...] = (0.5, 0.5)) -> None:
    """Mix `a` and `b` in vain; nothing is left of it."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        interpolate([folder / "a", folder / "b"], {folder / "mix": shares})
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("beta", [-0.1, 1.001, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(tmp_path, beta):
    with pytest.raises(CheckpointError, match=r"beta=\S+: is not from 0 to 1; give the share of REAL"):
        shares_of(beta)
    refused(tmp_path, r"a=\S+: is not from 0 to 1; give the share of this checkpoint", (beta, 1 - beta))


def test_shares_that_are_not_all_are_refused(tmp_path):
    refused(tmp_path, r"0\.5\+0\.4: sums to 0\.9; give shares that sum to 1", (0.5, 0.4))


def test_a_target_that_exists_is_refused(tmp_path):
    for name in "ab":
        make(tmp_path / name, 1)
    (tmp_path / "mix").symlink_to("nowhere")
    refused(tmp_path, r"mix: exists; give another target, or remove it")
    (tmp_path / "mix").unlink()
    (tmp_path / "mix").mkdir()
    refused(tmp_path, r"mix: exists; give another target, or remove it")


def test_another_format_is_refused(tmp_path):
    ours(tmp_path / "a", 1)
    make(tmp_path / "b", 2)
    refused(tmp_path, r"b: is hf, \S+/a is megatron; convert one of them first")


def test_other_tensors_are_refused(tmp_path):
    make(tmp_path / "a", 1)
    make(tmp_path / "b", 2, channels=6)
    refused(tmp_path, r"/a: holds no end_tag in sphinx\.safetensors, \S+/b does; give checkpoints of the same model")
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "a")
    (tmp_path / "c").rename(tmp_path / "b")
    refused(tmp_path, r"/b: holds no \S+ in sphinx\.safetensors, \S+/a does; give checkpoints of the same model")
    shutil.rmtree(tmp_path / "a")
    make(tmp_path / "a", 1, replace(SMALL, vocabulary=24))
    refused(tmp_path, r"/b: \S+ has shape \[20, 8\], that of \S+/a has \[24, 8\]; give checkpoints of the same model")
    shutil.rmtree(tmp_path / "a")
    make(tmp_path / "a", 1, dtype=torch.bfloat16)
    refused(tmp_path, r"/b: \S+ has type float32, that of \S+/a has bfloat16; give checkpoints of the")


def test_other_ranks_are_refused(tmp_path):
    for name, ranks in (("a", 1), ("b", 2)):
        source = make(tmp_path / f"hf_{name}", 1, replace(SMALL, groups=2))
        convert(source, tmp_path / name, "meta", WriteOptions(ranks))
    refused(tmp_path, r"/a: holds no \S+ in consolidated\.01\.pth, \S+/b does; \S+ checkpoints .*, divided alike")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 2}, r"model\.layers=2, \S+/a with 1; give checkpoints with the same model, encoders and tokenizer"),
        ({"tokenizer": "t2"}, r"tokenizer=\w+, \S+/a with \w+; give checkpoints with the same model, encoders and"),
    ],
)
def test_another_model_is_refused(tmp_path, change, message):
    ours(tmp_path / "a", 1, tokenizer="t1")
    ours(tmp_path / "b", 2, **{"tokenizer": "t1"} | change)
    refused(tmp_path, rf"/b: was made with {message}")


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("form", ["megatron", "hf"])
def test_damage_is_refused(tmp_path, side, form):
    for seed, name in enumerate("ab"):
        ours(tmp_path / name, seed) if form == "megatron" else make(tmp_path / name, seed)
    victim = tmp_path / side / ("__0_1.distcp" if form == "megatron" else "model.safetensors")
    content = bytearray(victim.read_bytes())
    if form == "megatron":
        chunk = next(e.chunks[0] for e in open_checkpoint(tmp_path / side).source.entries.values()
                     if e.chunks[0].path == victim)  # fmt: skip
        victim.write_bytes(content[: chunk.start] + bytes([content[chunk.start] ^ 1]) + content[chunk.start + 1 :])
        refused(tmp_path, rf"/{side}: __0_1\.distcp is damaged \(its checksum differs\); give an earlier checkpoint")
    victim.write_bytes(content[: len(content) // 2])
    refused(tmp_path, rf"/{side}/{victim.name}: (is damaged|cannot be read) ")
    victim.unlink()
    refused(tmp_path, rf"/{side}: (no checkpoint of a known format|.*__0_1.distcp is missing)|__0_1.distcp is missing")
    shutil.rmtree(tmp_path / side)
    refused(tmp_path, rf"/{side}: no such folder; give the folder of a checkpoint")


def test_where_nothing_can_be_written(tmp_path):
    inputs = [make(tmp_path / name, 1) for name in "ab"]
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"mix: could not be written \(.*Not a directory.*\); put that right and"):
        interpolate(inputs, {tmp_path / "file" / "mix": (0.5, 0.5)})
