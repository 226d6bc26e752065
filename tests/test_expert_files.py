"""Files of visual experts: checkpoints of LLaMA2-Accessory, other input sizes, and files that do not fit."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from released_experts import (
    SMALL,
    consolidated,
    cubic_positions,
    features_of,
    load,
    normal_views,
    open_clip_model,
    randomise,
    renamed,
    saved_by,
    transformers_dinov2,
)
from safetensors.torch import save_file

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model.architecture import (
    VISUAL_EXPERTS,
    VisualExpertConfig,
)
from megatron_sphinx.model.expert_files import load_expert
from megatron_sphinx.model.visual_experts import build_expert


@pytest.mark.parametrize("bare", [False, True])
def test_all_experts_come_from_one_file_of_llama2_accessory(tmp_path, bare):
    """As accessory/model/LLM/llama_ens.py names them; bit for bit what the experts themselves give."""
    random = {name: load_expert(VisualExpertConfig(name=name, weights="random"), seed=7)[0] for name in SMALL}
    clip, convnext, dinov2, qformer = (randomise(model, 7).state_dict() for model in random.values())
    opened = open_clip_model(VISUAL_EXPERTS["clip_vit_small"], 7)
    visual = opened.visual.state_dict()
    for block in range(2):
        there, here = f"transformer.resblocks.{block}", f"blocks.{block}"
        names = {"ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
                 "attn.out_proj": "attn.proj"}  # fmt: skip
        for kind in ("weight", "bias"):
            visual[f"{there}.attn.in_proj_{kind}"] = clip[f"{here}.attn.qkv.{kind}"]
            visual |= {f"{there}.{key}.{kind}": clip[f"{here}.{value}.{kind}"] for key, value in names.items()}
            visual |= {f"ln_pre.{kind}": clip[f"norm_pre.{kind}"], f"ln_post.{kind}": clip[f"norm.{kind}"]}
    visual |= {"class_embedding": clip["cls_token"][0, 0], "positional_embedding": clip["pos_embed"][0],
               "conv1.weight": clip["patch_embed.proj.weight"]}  # fmt: skip
    texts = {
        key: value for key, value in opened.state_dict().items() if not key.startswith(("visual.", "transformer."))
    }
    states = {
        "clip": {f"visual.{key}": value for key, value in visual.items()} | texts,
        "openclip_convnext_xxl": convnext,
        "dinov2_vitg14": renamed(dinov2, {"fc1": "w12", "fc2": "w3"}) | {"mask_token": torch.zeros(1, 96)},
        "qformer": qformer,
    }
    path = tmp_path / "consolidated.00-of-02.model.pth"
    torch.save(consolidated(states, bare=bare), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for name, source in random.items():
        model, mark = load_expert(VisualExpertConfig(name=name, weights=str(path)), seed=1)
        views = normal_views(VISUAL_EXPERTS[name])
        assert mark == digest
        assert torch.equal(
            features_of(VISUAL_EXPERTS[name], model, views), features_of(VISUAL_EXPERTS[name], source, views)
        )


@pytest.mark.parametrize("side", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dinov2_positions_of_518_pixels_are_fitted_as_its_own_code_fits_them(tmp_path, monkeypatch, side, dtype):
    expert = replace(VISUAL_EXPERTS["dinov2_small"], pixels=14 * side, grid=side,
                     options=VISUAL_EXPERTS["dinov2_small"].options | {"img_size": 14 * side})  # fmt: skip
    monkeypatch.setitem(VISUAL_EXPERTS, "fitted", expert)
    big = replace(expert, options=expert.options | {"img_size": 518})
    state = {key: value.to(dtype) for key, value in randomise(build_expert(big), 8).state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    released = load("fitted", tmp_path / "w.pth", resize="accessory").state_dict()["pos_embed"]
    antialiased = load("fitted", tmp_path / "w.pth").state_dict()["pos_embed"]
    assert state["pos_embed"].shape[1] == 1 + 37 * 37
    assert released.shape == antialiased.shape == (1, 1 + side * side, 96)
    assert released.dtype == antialiased.dtype == dtype
    for fitted in (released, antialiased):
        assert torch.equal(fitted[:, 0], state["pos_embed"][:, 0])
    rtol, atol = (0, 1e-5) if dtype == torch.float32 else (2**-7, 1e-5)
    torch.testing.assert_close(released, cubic_positions(state["pos_embed"], side), rtol=rtol, atol=atol)
    difference = (released[:, 1:] - antialiased[:, 1:]).float().square().mean().sqrt()
    assert difference > 0.3 * state["pos_embed"].float().std()


def test_only_dinov2_has_a_fitting_of_its_own(tmp_path, monkeypatch):
    small = VISUAL_EXPERTS["clip_vit_small"]
    monkeypatch.setitem(
        VISUAL_EXPERTS, "big", replace(small, pixels=84, grid=6, options=small.options | {"img_size": 84})
    )
    torch.save(build_expert(VISUAL_EXPERTS["big"]).state_dict(), tmp_path / "w.pth")
    one = load("clip_vit_small", tmp_path / "w.pth").state_dict()
    other = load("clip_vit_small", tmp_path / "w.pth", resize="accessory").state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


BROKEN = {
    "absent": (lambda s: s.pop("visual.ln_post.bias"), r"tensors 1 absent \(norm\.bias\); give"),
    "unknown": (lambda s: s.update({"visual.extra": torch.zeros(1)}), r"tensors 1 unknown \(extra\); give"),
    "misshapen": (lambda s: s.update({"visual.conv1.weight": torch.zeros(64, 3, 16, 16)}),
                  r"tensors 1 of another shape \(patch_embed\.proj\.weight\); give"),
    "positions that make no square": (lambda s: s.update({"visual.positional_embedding": torch.zeros(19, 64)}),
                                      r"tensors 1 of another shape \(pos_embed\); give"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_released_weights_that_do_not_fit_are_refused(tmp_path, kind):
    damage, message = BROKEN[kind]
    state = dict(open_clip_model(VISUAL_EXPERTS["clip_vit_small"], 1).state_dict())
    damage(state)
    torch.save(state, tmp_path / "clip.bin")
    with pytest.raises(ConfigError, match="by open_clip's names, " + message):
        load("clip_vit_small", tmp_path / "clip.bin")
    torch.save(consolidated({"clip": state}), tmp_path / "consolidated.00-of-01.model.pth")
    with pytest.raises(ConfigError, match=r"by open_clip's names under llma\.clip\.\*, " + message):
        load("clip_vit_small", tmp_path / "consolidated.00-of-01.model.pth")


def test_an_expert_that_the_file_does_not_hold_is_refused(tmp_path):
    torch.save(consolidated({}), tmp_path / "w.pth")
    for name, place in (("dinov2_small", "dinov2_vitg14"), ("efficientnet_lite0", "cnn")):
        with pytest.raises(ConfigError, match=rf"by timm's names under llma\.{place}\.\*, tensors \d+ absent"):
            load(name, tmp_path / "w.pth")


def test_keys_of_another_shape_than_queries_are_refused(tmp_path):
    source, _ = transformers_dinov2(VISUAL_EXPERTS["dinov2_small"], 1, tmp_path)
    state = saved_by(source, tmp_path)
    state["encoder.layer.0.attention.attention.key.weight"] = torch.zeros(96, 95)
    save_file(state, tmp_path / "w.safetensors")
    message = r"1 absent \(blocks\.0\.attn\.qkv\.weight\), 3 unknown \(blocks\.0\.attn\.k\.weight\)"
    with pytest.raises(ConfigError, match=message):
        load("dinov2_small", tmp_path / "w.safetensors")


def test_weights_are_mapped_and_not_copied(tmp_path):
    source, _ = load_expert(VisualExpertConfig(name="dinov2_small", weights="random"), seed=1)
    torch.save(source.state_dict(), tmp_path / "mapped.pth")
    torch.save(source.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    mapped, old = load("dinov2_small", tmp_path / "mapped.pth"), load("dinov2_small", tmp_path / "old.pth")
    assert all(torch.equal(value, old.state_dict()[key]) for key, value in mapped.state_dict().items())
    if (maps := Path("/proc/self/maps")).exists():
        assert "mapped.pth" in maps.read_text()


def test_a_file_that_changed_has_another_mark(tmp_path):
    marks = set()
    for seed in (1, 2):
        source, _ = load_expert(VisualExpertConfig(name="dinov2_small", weights="random"), seed=seed)
        save_file(source.state_dict(), tmp_path / "new.safetensors")
        os.replace(tmp_path / "new.safetensors", tmp_path / "w.safetensors")
        marks.add(
            load_expert(VisualExpertConfig(name="dinov2_small", weights=str(tmp_path / "w.safetensors")), seed=1)[1]
        )
    assert len(marks) == 2
