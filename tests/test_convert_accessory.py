"""What LLaMA2-Accessory's checkpoints have: differences, frozen encoders, modules by name, the released models."""

import json
import random

import pytest
import torch
from llamas import assert_same_weights, drawn_model, extras_of, refused, save
from safetensors.torch import load_file, save_file

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions

# what LLaMA2-Accessory has


def test_differences_are_added(tmp_path, run_tool):
    """As its weight_operate.py makes them: of a tuned checkpoint and of Meta's, whose names have no prefix."""
    base = drawn_model(random.Random(4), experts=0, groups=2).to(torch.bfloat16)
    tuned = drawn_model(random.Random(4), experts=0, groups=2).to(torch.bfloat16)
    for weight in tuned.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.1)
    convert(save(base, tmp_path / "base"), tmp_path / "meta", "meta", WriteOptions(2))
    source = save(tuned, tmp_path / "tuned")
    extras = extras_of(base.config.hidden_size, random.Random(1), has_skip_token=False)
    save_file(extras, source / "sphinx.safetensors")
    convert(source, tmp_path / "accessory", "accessory", WriteOptions(2))
    (tmp_path / "diff").mkdir()
    for rank in range(2):
        one = torch.load(tmp_path / "accessory" / f"consolidated.{rank:02d}-of-02.model.pth", weights_only=True)[
            "model"
        ]
        other = torch.load(tmp_path / "meta" / f"consolidated.{rank:02d}.pth", weights_only=True)
        diff = {
            name: weight.float() - other[plain].float() if (plain := name.removeprefix("llma.")) in other else weight
            for name, weight in one.items()
        }
        torch.save({"model": diff}, tmp_path / "diff" / f"consolidated.{rank:02d}-of-02.model-diff.pth")
    arguments = (tmp_path / "meta", tmp_path / "back", "--to", "hf", "--diff", tmp_path / "diff", "--verify")
    assert run_tool("convert_checkpoint.py", *arguments)[0] == 0
    assert_same_weights(tmp_path / "back", tuned)
    found = load_file(tmp_path / "back" / "sphinx.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in extras.items())
    refused(source, "--diff .*: can be added to a checkpoint of meta or accessory; .* is none", diff=tmp_path / "diff")
    (tmp_path / "diff" / "consolidated.01-of-02.model-diff.pth").unlink()
    refused(tmp_path / "meta", r"diff: has 1 of 2 shards \(.*model-diff.pth\); fetch all", diff=tmp_path / "diff")
    one = drawn_model(random.Random(4), experts=0, groups=1)
    convert(save(one, tmp_path / "one"), tmp_path / "meta1", "meta", WriteOptions())
    torch.save(diff, tmp_path / "diff" / "consolidated.01-of-02.model-diff.pth")
    refused(tmp_path / "meta1", "has 2 shards, SOURCE 1; convert SOURCE to as many", diff=tmp_path / "diff")
    diff["llma.norm.weight"] = torch.zeros(3)
    torch.save(diff, tmp_path / "diff" / "consolidated.01-of-02.model-diff.pth")
    shapes = r"llma.norm.weight has shape \[3\], SOURCE's \[.*\]; give the difference from this SOURCE"
    refused(tmp_path / "meta", shapes, diff=tmp_path / "diff")


def test_frozen_encoders_go_to_files_of_their_own_and_come_back(tmp_path):
    source = save(drawn_model(random.Random(4), experts=0, groups=2), tmp_path / "hf")
    extras = extras_of(
        json.loads((source / "config.json").read_text())["hidden_size"], random.Random(1), has_skip_token=False
    )
    save_file(extras, source / "sphinx.safetensors")
    (source / "encoders").mkdir()
    encoders = {"clip": {"llma.clip.visual.conv1.weight": torch.randn(3, 5)},
                "qformer": {"llma.qformer.query_tokens": torch.randn(2).half()}}  # fmt: skip
    for name, weights in encoders.items():
        save_file(weights, source / "encoders" / f"{name}.safetensors")
    convert(source, tmp_path / "accessory", "accessory", WriteOptions(2))
    for rank in range(2):
        shard = torch.load(tmp_path / "accessory" / f"consolidated.{rank:02d}-of-02.model.pth", weights_only=True)[
            "model"
        ]
        assert all(torch.equal(shard[name], weight) for one in encoders.values() for name, weight in one.items())
    convert(tmp_path / "accessory", tmp_path / "start", "megatron", WriteOptions())
    apart = (tmp_path / "start" / "encoders").rename(tmp_path / "apart")
    convert(tmp_path / "start", tmp_path / "again", "accessory", WriteOptions(2), encoders=apart)
    (tmp_path / "empty").mkdir()
    refused(
        source,
        r"empty: holds no \*.safetensors of frozen experts; known: clip, ",
        "accessory",
        encoders=tmp_path / "empty",
    )
    for rank in range(2):
        name = f"consolidated.{rank:02d}-of-02.model.pth"
        one, other = (
            torch.load(tmp_path / folder / name, weights_only=True)["model"] for folder in ("accessory", "again")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(weight, other[key]) for key, weight in one.items())
    (source / "encoders" / "clip.safetensors").rename(source / "encoders" / "clap.safetensors")
    refused(source, "encoders: clap: unknown; known: clip, openclip_convnext_xxl, dinov2_vitg14, qformer", "accessory")


@pytest.mark.parametrize("has_qformer", [False, True])
@pytest.mark.parametrize(("experts", "is_sparse", "views"), [(0, False, 1), (0, False, 5), (2, True, 5), (2, True, 1)])
def test_the_released_module_is_named(tmp_path, experts, is_sparse, views, has_qformer):
    model = drawn_model(random.Random(4), experts=experts)
    extras = extras_of(model.config.hidden_size, random.Random(1), has_skip_token=False)
    kept = {name: weight for name, weight in extras.items() if has_qformer or "qformer" not in name}
    save_file(kept, save(model, tmp_path / "hf") / "sphinx.safetensors")
    convert(tmp_path / "hf", tmp_path / "there", "accessory", WriteOptions(is_sparse=is_sparse), views=views)
    kind = "mixtral_sparse" if experts else "llama"
    light = "_light" if not experts and not has_qformer else ""
    wanted = f"{kind}_ens{'5' if views == 5 else ''}{light}"
    assert json.loads((tmp_path / "there" / "meta.json").read_text()) == {"llama_type": wanted}
    if experts or not has_qformer:
        refused(tmp_path / "hf", r"--views 10: LLaMA2-Accessory has no \w+_ens10", "accessory", views=10)
    if experts:
        refused(tmp_path / "hf", "has no mixtral_ens, but llama, .*, mixtral_sparse_ens5; use --sparse$", "accessory")


def test_a_released_model_begins_one_of_two_experts(tmp_path):
    """The columns of the projection that read ConvNeXt and DINOv2; no Q-Former, no CLIP."""
    source = save(drawn_model(random.Random(4), experts=0), tmp_path / "hf")
    extras = extras_of(
        json.loads((source / "config.json").read_text())["hidden_size"], random.Random(1), has_skip_token=False
    )
    extras["visual_proj.0.weight"] = torch.randn(len(extras["start_tag"]), 1024 + 3072 + 1536)
    save_file(extras, source / "sphinx.safetensors")
    (source / "encoders").mkdir()
    for name in ("clip", "dinov2_vitg14"):
        save_file({f"llma.{name}.x": torch.randn(2)}, source / "encoders" / f"{name}.safetensors")
    two, ends = ["clip_convnext_xxl", "dinov2_vitg14"], ["dinov2_vitg14", "blip2_qformer", "clip_vit_l14"]
    for form in ("hf", "megatron", "accessory"):
        whole = tmp_path / f"all_{form}"
        convert(source, whole, form, WriteOptions())
        for number, kept in enumerate((two, ends)):
            there, back = tmp_path / f"{form}{number}", tmp_path / f"{form}{number}_back"
            convert(whole, there, "megatron", WriteOptions(), experts=kept, verify=True)
            convert(there, back, "hf", WriteOptions())
            found, matrix = load_file(back / "sphinx.safetensors"), extras["visual_proj.0.weight"]
            columns = matrix[:, 1024:] if kept is two else torch.cat([matrix[:, :1024], matrix[:, 4096:]], 1)
            assert torch.equal(found.pop("visual_proj.0.weight"), columns)
            assert found.keys() == {name for name in extras if kept is ends or "qformer" not in name} - {
                "visual_proj.0.weight"
            }
            assert all(torch.equal(weight, extras[name]) for name, weight in found.items())
            names = {path.stem for path in (there / "encoders").iterdir()}
            assert names == ({"dinov2_vitg14"} if kept is two else {"clip", "dinov2_vitg14"})
    refused(source, "--experts: clip: unknown; known: clip_vit_l14, clip_convnext_xxl", experts=["clip"])
    refused(source, "--experts: needs at least one expert beside a Q-Former", experts=["blip2_qformer"])
    refused(tmp_path / "hf0", "projects 4608 channels; can be chosen from the 5632 of clip_vit_l14", experts=two)
