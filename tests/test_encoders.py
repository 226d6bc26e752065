"""Frozen experts: the feature contracts at full size, and bits that do not depend on company."""

import hashlib
import random

import pytest
import torch
from safetensors.torch import save_file

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model.architecture import EXPERTS, ExpertConfig, VisionConfig
from megatron_sphinx.model.encoders import FAMILIES, FrozenEncoders, build_expert, load_expert

SMALL = ["clip_vit_small", "clip_convnext_small", "dinov2_small", "blip2_qformer_small"]
MIXTURES = [
    ("clip_vit_small", "clip_convnext_small", "dinov2_small"),
    ("blip2_qformer_small", "dinov2_small"),
    ("efficientnet_lite0", "dinov2_small"),
]
# Counted by the sources: open_clip's and dinov2's models, transformers' Blip2 vision model and Q-Former with queries.
PARAMETERS = {
    "clip_vit_l14": 303_179_776,
    "clip_convnext_xxl": 843_398_016,
    "clip_convnext_xxl_512": 843_398_016,
    "dinov2_vitg14": 1_134_769_664,
    "blip2_qformer": 985_952_256 + 105_137_664 + 32 * 768,
    "efficientnet_lite0": 3_371_008,
}


def mixture(*names: str, **more) -> VisionConfig:
    return VisionConfig(experts=tuple(ExpertConfig(name=name, weights="random") for name in names), **more)


def encoders(config: VisionConfig, dtype: torch.dtype = torch.float32, seed: int = 5) -> FrozenEncoders:
    return FrozenEncoders(config, device=torch.device("cpu"), dtype=dtype, seed=seed)


def pixels(config: VisionConfig, count: int, seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        side: torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
        for side in config.sides
    }


@pytest.mark.parametrize("name", PARAMETERS)
def test_experts_at_full_size_keep_their_contract(name):
    expert = EXPERTS[name]
    with torch.device("meta"):
        model = build_expert(expert).eval()
        views = torch.empty(2, 3, expert.pixels, expert.pixels)
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
    if expert.family == "qformer":
        assert model(views).shape == (2, 32, 768)
        return
    whole, patches = FAMILIES[expert.family](model, views)
    assert whole.shape == (2, expert.channels)
    assert patches.shape == (2, expert.grid**2, expert.channels)


def test_the_four_experts_of_sphinx_make_5632_channels_and_289_tokens():
    config = mixture("blip2_qformer", "clip_vit_l14", "clip_convnext_xxl", "dinov2_vitg14")
    assert (config.channels, config.tokens_per_view) == (5632, 291)  # start and end tags counted
    assert config.feature_values == 257 * 5632 + 32 * 768
    assert config.sides == (224, 256)


def test_a_mixture_is_its_experts_side_by_side():
    config = mixture("blip2_qformer_small", "clip_vit_small", "clip_convnext_small", "dinov2_small", grid=4)
    views = pixels(config, 3)
    features = encoders(config)(views).float()
    mixed = features[:, : 17 * config.channels].view(3, 17, config.channels)
    at = 0
    for name in SMALL[:3]:
        alone = mixture(name, grid=4)
        out = encoders(alone)({side: views[side] for side in alone.sides}).float().view(3, 17, -1)
        torch.testing.assert_close(mixed[..., at : at + out.shape[-1]], out, rtol=0, atol=0)
        at += out.shape[-1]
    assert features[:, 17 * at :].view(3, 8, 48).isfinite().all()


def test_convnext_patches_are_repeated_and_its_global_token_is_their_mean():
    out = encoders(mixture("clip_convnext_small", grid=4))(pixels(mixture("clip_convnext_small", grid=4), 2)).float()
    whole, patches = out.view(2, 17, 96)[:, 0], out.view(2, 17, 96)[:, 1:].view(2, 4, 4, 96)
    assert torch.equal(patches[:, ::2, ::2], patches[:, 1::2, 1::2])
    torch.testing.assert_close(whole, patches.mean((1, 2)), rtol=0.02, atol=0.02)  # both are rounded to bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", MIXTURES, ids=lambda names: names[0])
def test_the_bits_of_a_feature_do_not_depend_on_its_company(names, dtype):
    config = mixture(*names, grid=4, batch_views=5)
    views, count = pixels(config, 23), 23
    model = encoders(config, dtype)
    reference = model(views)
    rng = random.Random(0)
    for _ in range(3):
        some = rng.sample(range(count), rng.randint(1, count))
        again = model({side: stack[some] for side, stack in views.items()})
        assert torch.equal(again, reference[some])


def encode_alone(folder, config, views):
    rank = int(__import__("os").environ["RANK"])
    torch.save(
        encoders(config, torch.bfloat16)({side: stack[rank:] for side, stack in views.items()}), folder / f"{rank}"
    )


def test_the_bits_of_a_feature_do_not_depend_on_the_rank(run_ranks, tmp_path):
    config = mixture("clip_convnext_small", "dinov2_small", grid=4)
    views = pixels(config, 6)
    run_ranks(2, lambda: encode_alone(tmp_path, config, views))
    one, other = torch.load(tmp_path / "0"), torch.load(tmp_path / "1")
    assert torch.equal(one[1:], other)


def test_experts_stay_in_eval_mode_and_give_no_gradient():
    config = mixture("blip2_qformer_small", "dinov2_small", grid=4)
    model = encoders(config)
    model.train()
    assert not any(module.training for module in model.modules())
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model(pixels(config, 1)).grad_fn is None


def test_random_weights_follow_from_the_seed():
    config = mixture("dinov2_small", grid=4)
    views = pixels(config, 1)
    torch.manual_seed(1)
    one = encoders(config)(views)
    torch.manual_seed(2)
    assert torch.equal(one, encoders(config)(views))
    assert not torch.equal(one, encoders(config, seed=6)(views))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_come_from_local_files(tmp_path, name, ending):
    source, _ = load_expert(ExpertConfig(name=name, weights="random"), seed=9)
    path = tmp_path / f"w.{ending}"
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    model, mark = load_expert(ExpertConfig(name=name, weights=str(path)), seed=1)
    assert mark == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_dinov2_weights_of_518_pixels_are_fitted_to_224():
    big = EXPERTS["dinov2_small"].options | {"img_size": 518}
    import timm

    from megatron_sphinx.model.encoders import _fit_positions

    saved = timm.create_model(EXPERTS["dinov2_small"].model, num_classes=0, **big).state_dict()["pos_embed"]
    wanted = build_expert(EXPERTS["dinov2_small"]).state_dict()["pos_embed"]
    fitted = _fit_positions(saved, wanted)
    assert saved.shape[1] == 1 + 37 * 37
    assert fitted.shape == wanted.shape
    assert torch.equal(fitted[:, 0], saved[:, 0])


def test_weights_that_do_not_fit_are_refused(tmp_path):
    other, _ = load_expert(ExpertConfig(name="clip_vit_small", weights="random"), seed=1)
    torch.save(other.state_dict(), tmp_path / "clip.pth")
    message = (
        r"dinov2_small: .*clip\.pth holds weights of another architecture: tensors \d+ absent \(blocks\.\S+\), "
        r"\d+ unknown \(\S+\), \d+ of another shape \(\S+\); give weights of vit_giant_patch14_dinov2"
    )
    with pytest.raises(ConfigError, match=message):
        load_expert(ExpertConfig(name="dinov2_small", weights=str(tmp_path / "clip.pth")), seed=1)
    with pytest.raises(ConfigError, match=r"nowhere\.pth: no such file; give a weights file, or random"):
        load_expert(ExpertConfig(name="dinov2_small", weights=str(tmp_path / "nowhere.pth")), seed=1)
    (tmp_path / "bad.pth").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"bad\.pth cannot be read as weights"):
        load_expert(ExpertConfig(name="dinov2_small", weights=str(tmp_path / "bad.pth")), seed=1)


def test_clip_is_huggingfaces():
    """The contract of the released code: every token behind the last norm, OpenAI's quick GELU."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    ours, _ = load_expert(ExpertConfig(name="clip_vit_small", weights="random"), seed=3)
    config = CLIPVisionConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                              image_size=56, patch_size=14, hidden_act="quick_gelu")  # fmt: skip
    theirs = CLIPVisionModel(config).eval()
    theirs.load_state_dict({f"vision_model.{name}" if not has_prefix(theirs) else name: value for name, value in
                            hf_clip(ours.state_dict()).items()}, strict=False)  # fmt: skip
    views = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        hidden = theirs(views).last_hidden_state
        norm = theirs.get_submodule("post_layernorm") if has_prefix(theirs) else theirs.vision_model.post_layernorm
        whole, patches = FAMILIES["clip"](ours.eval(), views)
        torch.testing.assert_close(torch.cat([whole[:, None], patches], 1), norm(hidden), rtol=1e-4, atol=1e-5)


def has_prefix(model) -> bool:
    return hasattr(model, "post_layernorm")


def hf_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A timm CLIP's tensors under transformers' names."""
    out = {
        "embeddings.class_embedding": state["cls_token"].view(-1),
        "embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "embeddings.position_embedding.weight": state["pos_embed"][0],
    }
    for ours, theirs in (("norm_pre", "pre_layrnorm"), ("norm", "post_layernorm")):
        out |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    for block in range(2):
        here, there = f"blocks.{block}", f"encoder.layers.{block}"
        for kind in ("weight", "bias"):
            parts = state[f"{here}.attn.qkv.{kind}"].chunk(3)
            out |= {f"{there}.self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
            names = {"attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
                     "norm1": "layer_norm1", "norm2": "layer_norm2"}  # fmt: skip
            out |= {f"{there}.{n}.{kind}": state[f"{here}.{o}.{kind}"] for o, n in names.items()}
    return out
