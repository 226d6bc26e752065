"""Frozen experts: their contracts at full size, bits that do not depend on company, and the released files."""

import hashlib
import math
import os
import random
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2Config,
    Blip2Model,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
)

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model.architecture import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    VISUAL_EXPERTS,
    VisionConfig,
    VisualExpert,
    VisualExpertConfig,
)
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.expert_files import load_expert, translate
from megatron_sphinx.model.visual_experts import FAMILIES, build_expert, encoder_work

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
    return VisionConfig(experts=tuple(VisualExpertConfig(name=name, weights="random") for name in names), **more)


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
    expert = VISUAL_EXPERTS[name]
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
    rank = int(os.environ["RANK"])
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
    source, _ = load_expert(VisualExpertConfig(name=name, weights="random"), seed=9)
    path = tmp_path / f"w.{ending}"
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    model, mark = load_expert(VisualExpertConfig(name=name, weights=str(path)), seed=1)
    assert mark == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_weights_that_do_not_fit_are_refused(tmp_path):
    other, _ = load_expert(VisualExpertConfig(name="clip_vit_small", weights="random"), seed=1)
    torch.save(other.state_dict(), tmp_path / "clip.pth")
    message = (
        r"dinov2_small: .*clip\.pth holds weights of another architecture: by timm's names, tensors \d+ absent "
        r"\(blocks\.\S+\), \d+ unknown \(\S+\), \d+ of another shape \(\S+\); give weights of vit_giant_patch14_dinov2"
    )
    with pytest.raises(ConfigError, match=message):
        load_expert(VisualExpertConfig(name="dinov2_small", weights=str(tmp_path / "clip.pth")), seed=1)
    with pytest.raises(ConfigError, match=r"nowhere\.pth: no such file; give a weights file, or random"):
        load_expert(VisualExpertConfig(name="dinov2_small", weights=str(tmp_path / "nowhere.pth")), seed=1)
    (tmp_path / "bad.pth").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"bad\.pth cannot be read as weights"):
        load_expert(VisualExpertConfig(name="dinov2_small", weights=str(tmp_path / "bad.pth")), seed=1)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match=r"list\.pth holds a list, not tensors by name; give a state dict"):
        load_expert(VisualExpertConfig(name="dinov2_small", weights=str(tmp_path / "list.pth")), seed=1)


# The released layouts. What the other libraries compute is compared with what their files give here.

ODD = {  # widths, depths, heads and grids that are no powers of two
    "clip": VisualExpert(
        family="clip", model="vit_large_patch14_clip_quickgelu_224", pixels=70, channels=60, grid=5,
        options={"embed_dim": 60, "depth": 3, "num_heads": 5, "img_size": 70},
    ),
    "convnext": VisualExpert(
        family="convnext", model="convnext_xxlarge", pixels=96, channels=33, grid=3,
        options={"depths": (1, 2, 1, 1), "dims": (9, 15, 21, 33)},
    ),
    "dinov2": VisualExpert(
        family="dinov2", model="vit_giant_patch14_dinov2", pixels=70, channels=120, grid=5,
        options={"embed_dim": 120, "depth": 3, "num_heads": 5, "img_size": 70},
    ),
    "qformer": VisualExpert(
        family="qformer", pixels=42, channels=36, queries=5,
        options={"vision": (60, 3, 3, 100), "qformer": (36, 4, 3, 72)},
    ),
}  # fmt: skip


@pytest.fixture(params=["small", "odd"])
def expert_named(request, monkeypatch):
    """The name of a family's expert, small or odd."""
    small = {VISUAL_EXPERTS[name].family: name for name in SMALL}

    def name_of(family: str) -> str:
        if request.param == "small":
            return small[family]
        monkeypatch.setitem(VISUAL_EXPERTS, f"odd {family}", ODD[family])
        return f"odd {family}"

    return name_of


def randomise(model, seed: int):
    """Weights that no mapping can mix up: norms and layer scales too, which begin as ones, zeros or nearly so."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            fan_in = weight[0].numel() if weight.ndim else 1
            weight.copy_(weight + 0.3 * noise if weight.ndim < 2 else noise * fan_in**-0.5)
    return model.eval()


def features_of(expert: VisualExpert, model, views):
    """All tokens of an expert before they are rounded: the global one, then the patches; or the queries."""
    with torch.no_grad():
        if expert.family == "qformer":
            return model.eval()(views)
        whole, patches = FAMILIES[expert.family](model.eval(), views)
        return torch.cat([whole[:, None], patches], 1)


def load(name: str, path, **more):
    return load_expert(VisualExpertConfig(name=name, weights=str(path)), seed=1, **more)[0]


def assert_same_features(name: str, path, views, wanted):
    """Equal to what another library computes, within 1e-5."""
    found = features_of(VISUAL_EXPERTS[name], load(name, path), views)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def normal_views(expert: VisualExpert, count: int = 3):
    return torch.randn(count, 3, expert.pixels, expert.pixels, generator=torch.Generator().manual_seed(0))


def open_clip_model(expert: VisualExpert, seed: int):
    """A CLIP of open_clip, with its text tower."""
    options = expert.options
    vision = {"image_size": expert.pixels, "patch_size": 14, "width": expert.channels, "layers": options["depth"],
              "head_width": expert.channels // options["num_heads"]}  # fmt: skip
    text = {"context_length": 7, "vocab_size": 11, "width": 16, "heads": 2, "layers": 1}
    return randomise(open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True), seed)


def open_clip_features(model, views):
    """All tokens behind the last norm, without the projection, as the released encode_image computes them."""
    visual = model.visual
    with torch.no_grad():
        return visual.ln_post(visual.transformer(visual._embeds(views)))


def test_clip_is_open_clips(expert_named, tmp_path):
    expert = VISUAL_EXPERTS[name := expert_named("clip")]
    source = open_clip_model(expert, 1)
    torch.save(source.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    views = normal_views(expert)
    assert_same_features(name, tmp_path / "open_clip_pytorch_model.bin", views, open_clip_features(source, views))


def test_clip_is_transformers(expert_named, tmp_path):
    expert = VISUAL_EXPERTS[name := expert_named("clip")]
    vision = CLIPVisionConfig(
        hidden_size=expert.channels, intermediate_size=4 * expert.channels, patch_size=14, image_size=expert.pixels,
        num_hidden_layers=expert.options["depth"], num_attention_heads=expert.options["num_heads"],
        hidden_act="quick_gelu",
    )  # fmt: skip
    text = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                          vocab_size=11)  # fmt: skip
    source = randomise(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())), 2)
    source.save_pretrained(tmp_path)
    views = normal_views(expert)
    with torch.no_grad():
        wanted = source.vision_model.post_layernorm(source.vision_model(views).last_hidden_state)
    assert_same_features(name, tmp_path / "model.safetensors", views, wanted)


def saved_by(model, folder: Path) -> dict[str, torch.Tensor]:
    """What transformers writes: the names of its releases, which those in memory may differ from."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def renamed(state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    out = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        out[key] = value
    return out


def transformers_convnext(expert: VisualExpert, seed: int, folder: Path):
    """A ConvNeXt of transformers, its norms as fine as open_clip's, and its tensors under timm's names."""
    config = ConvNextConfig(depths=expert.options["depths"], hidden_sizes=expert.options["dims"])
    model = randomise(ConvNextModel(config), seed)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    names = {
        "embeddings.patch_embeddings": "stem.0", "embeddings.layernorm": "stem.1", "encoder.stages": "stages",
        "downsampling_layer": "downsample", ".layers.": ".blocks.", "dwconv": "conv_dw", ".layernorm": ".norm",
        "pwconv": "mlp.fc", "layer_scale_parameter": "gamma",
    }  # fmt: skip
    state = renamed(saved_by(model, folder), names)
    for kind in ("weight", "bias"):
        state[f"head.norm.{kind}"] = state.pop(f"layernorm.{kind}")
    return model, state


def transformers_convnext_features(model, views):
    with torch.no_grad():
        patches = model.layernorm(model(views).last_hidden_state.flatten(2).transpose(1, 2))
    return torch.cat([patches.mean(1, keepdim=True), patches], 1)


def test_convnext_is_transformers(expert_named, tmp_path):
    expert = VISUAL_EXPERTS[name := expert_named("convnext")]
    source, state = transformers_convnext(expert, 3, tmp_path)
    beside = {"visual.head.proj.weight": torch.zeros(2, expert.channels), "token_embedding.weight": torch.zeros(3, 2)}
    torch.save({f"visual.trunk.{key}": value for key, value in state.items()} | beside, tmp_path / "w.bin")
    views = normal_views(expert)
    assert_same_features(name, tmp_path / "w.bin", views, transformers_convnext_features(source, views))


def test_convnext_is_open_clips(monkeypatch, tmp_path):
    """Its wrapper takes no small shapes, so this is the smallest ConvNeXt of timm; cut as the released code cuts."""
    atto = VisualExpert(family="convnext", model="convnext_atto", pixels=96, channels=320, grid=3)
    monkeypatch.setitem(VISUAL_EXPERTS, "atto", atto)
    source = randomise(TimmModel("convnext_atto", embed_dim=24, image_size=96, pool="", proj="linear"), 4)
    state = {f"visual.{key}": value for key, value in source.state_dict().items()}
    torch.save(state | {"positional_embedding": torch.zeros(7, 16)}, tmp_path / "open_clip_pytorch_model.bin")
    source.trunk.head.global_pool = source.trunk.head.flatten = torch.nn.Identity()
    views = normal_views(atto)
    with torch.no_grad():
        patches = source.trunk(views).flatten(2).transpose(1, 2)
    found = features_of(atto, load("atto", tmp_path / "open_clip_pytorch_model.bin"), views)
    assert torch.equal(found[:, 1:], patches)
    assert torch.equal(found[:, 0], patches.mean(1))


def transformers_dinov2(expert: VisualExpert, seed: int, folder: Path):
    """A DINOv2 of transformers, saved in a folder, and its tensors under facebookresearch/dinov2's names."""
    config = Dinov2Config(
        hidden_size=expert.channels, num_hidden_layers=expert.options["depth"], image_size=expert.pixels,
        num_attention_heads=expert.options["num_heads"], patch_size=14, use_swiglu_ffn=True,
    )  # fmt: skip
    model = randomise(Dinov2Model(config), seed)
    saved = saved_by(model, folder)
    for key in [key for key in saved if ".attention.query." in key]:
        parts = [saved.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        saved[key.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    names = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings.position_embeddings": "pos_embed",
        "embeddings.": "", "encoder.layer.": "blocks.", "attention.output.dense": "attn.proj", "layernorm": "norm",
        "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "weights_in": "w12",
        "weights_out": "w3",
    }  # fmt: skip
    return model, renamed(saved, names)


def test_dinov2_is_transformers(expert_named, tmp_path):
    expert = VISUAL_EXPERTS[name := expert_named("dinov2")]
    source, state = transformers_dinov2(expert, 5, tmp_path)
    torch.save(state, tmp_path / "dinov2_vitg14_pretrain.pth")
    views = normal_views(expert)
    with torch.no_grad():
        wanted = source(views).last_hidden_state
    assert "mask_token" in state
    assert_same_features(name, tmp_path / "model.safetensors", views, wanted)
    assert_same_features(name, tmp_path / "dinov2_vitg14_pretrain.pth", views, wanted)


def transformers_blip2(expert: VisualExpert, seed: int):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    vision = dict(zip(names, expert.options["vision"], strict=True)) | {"image_size": expert.pixels, "patch_size": 14}
    qformer = dict(zip(names, expert.options["qformer"], strict=True))
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 11,
            "word_embed_proj_dim": 16, "max_position_embeddings": 8}  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer | {"encoder_hidden_size": vision["hidden_size"]},
        text_config=text, num_query_tokens=expert.queries,
    )  # fmt: skip
    return randomise(Blip2Model(config), seed)


def test_the_qformer_is_transformers(expert_named, tmp_path):
    expert = VISUAL_EXPERTS[name := expert_named("qformer")]
    source = transformers_blip2(expert, 6)
    source.save_pretrained(tmp_path)
    views = normal_views(expert)
    with torch.no_grad():
        wanted = source.get_qformer_features(views)
    assert_same_features(name, tmp_path / "model.safetensors", views, wanted)


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def dinov2_vitg14() -> dict[str, torch.Tensor]:
    """Every tensor of dinov2_vitg14_pretrain.pth, by facebookresearch/dinov2's hubconf.py and its layers."""
    block = {
        "norm1.weight": (1536,), "norm1.bias": (1536,), "attn.qkv.weight": (4608, 1536), "attn.qkv.bias": (4608,),
        "attn.proj.weight": (1536, 1536), "attn.proj.bias": (1536,), "ls1.gamma": (1536,), "norm2.weight": (1536,),
        "norm2.bias": (1536,), "mlp.w12.weight": (8192, 1536), "mlp.w12.bias": (8192,), "mlp.w3.weight": (1536, 4096),
        "mlp.w3.bias": (1536,), "ls2.gamma": (1536,),
    }  # fmt: skip
    whole = {
        "cls_token": (1, 1, 1536), "pos_embed": (1, 1370, 1536), "mask_token": (1, 1536), "norm.weight": (1536,),
        "norm.bias": (1536,), "patch_embed.proj.weight": (1536, 3, 14, 14), "patch_embed.proj.bias": (1536,),
    }  # fmt: skip
    whole |= {f"blocks.{number}.{name}": shape for number in range(40) for name, shape in block.items()}
    return {name: torch.empty(shape, device="meta") for name, shape in whole.items()}


@pytest.mark.parametrize("name", ["clip_vit_l14", "clip_convnext_xxl", "dinov2_vitg14"])
def test_released_files_have_the_names_and_shapes_of_full_size(name):
    released = {"clip_vit_l14": "ViT-L-14", "clip_convnext_xxl": "convnext_xxlarge"}
    with torch.device("meta"):
        wanted = shapes(build_expert(VISUAL_EXPERTS[name]).state_dict())
        if name in released:
            state = open_clip.create_model(released[name], pretrained=None, device="meta").state_dict()
        else:
            state = dinov2_vitg14()
    found = shapes(translate(state, VISUAL_EXPERTS[name].family)[0])
    found.pop("mask_token", None)
    if name == "dinov2_vitg14":
        assert found.pop("pos_embed") == (1, 1 + 37 * 37, 1536)
        assert wanted.pop("pos_embed") == (1, 1 + 16 * 16, 1536)
    assert found == wanted


def consolidated(states: dict[str, dict[str, torch.Tensor]], *, bare: bool = False):
    """A shard of LLaMA2-Accessory: the language model's part of it, the projections, and each expert whole."""
    state = {
        "llma.tok_embeddings.weight": torch.zeros(11, 16), "llma.layers.0.attention.wq.weight": torch.zeros(16, 32),
        "llma.norm.weight": torch.zeros(32), "llma.visual_proj.0.weight": torch.zeros(32, 8),
        "llma.qformer_proj.0.weight": torch.zeros(32, 8), "llma.start_img": torch.zeros(1, 1, 32),
    }  # fmt: skip
    for name, tensors in states.items():
        state |= {f"llma.{name}.{key}": value for key, value in tensors.items()}
    return state if bare else {"model": state}


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


def cubic_positions(saved: torch.Tensor, side: int) -> torch.Tensor:
    """DINOv2's fitting written out: the four taps around (i + 0.5) / scale - 0.5 of output i, cubic with a = -0.75."""
    native, a = round((saved.shape[1] - 1) ** 0.5), -0.75
    weights = torch.zeros(side, native, dtype=torch.float64)
    for i in range(side):
        at = (i + 0.5) * native / (side + 0.1) - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            x = abs(at - tap)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[i, min(max(tap, 0), native - 1)] += near if x <= 1 else far
    grid = saved[0, 1:].double().unflatten(0, (native, native))
    fitted = torch.einsum("ia,jb,abc->ijc", weights, weights, grid).flatten(0, 1)
    return torch.cat([saved[:, :1], fitted[None].to(saved.dtype)], 1)


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


def test_the_released_mixture_is_its_libraries_side_by_side(tmp_path):
    """Four models of other libraries, joined as encode_image of llama_ens.py joins them, from one released file."""
    clip, convnext, dinov2, qformer = (VISUAL_EXPERTS[name] for name in SMALL)
    opened = open_clip_model(clip, 11)
    convolutions, convnext_state = transformers_convnext(convnext, 12, tmp_path)
    dino, dino_state = transformers_dinov2(dinov2, 13, tmp_path)
    blip2 = transformers_blip2(qformer, 14)
    dino_state["pos_embed"] = torch.randn(1, 1 + 37 * 37, 96, generator=torch.Generator().manual_seed(15))
    dino.embeddings.position_embeddings.data = cubic_positions(dino_state["pos_embed"], 4)
    language = ("transformer.", "language_")
    states = {
        "clip": {key: value for key, value in opened.state_dict().items() if not key.startswith(language)},
        "openclip_convnext_xxl": convnext_state,
        "dinov2_vitg14": dino_state,
        "qformer": {key: value for key, value in saved_by(blip2, tmp_path).items() if not key.startswith(language)},
    }
    path = tmp_path / "consolidated.01-of-02.model.pth"
    torch.save(consolidated(states), path)
    named = tuple(VisualExpertConfig(name=name, weights=str(path)) for name in (SMALL[3], *SMALL[:3]))
    config = VisionConfig(experts=named, grid=4, batch_views=3, resize="accessory")
    views = pixels(config, 5)
    found = encoders(config)(views)

    def normalised(side, mean, std):
        return (views[side] / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    view, std, mean = normalised(56, CLIP_MEAN, CLIP_STD), torch.tensor(CLIP_STD), torch.tensor(CLIP_MEAN)
    denormalised = view * std.view(3, 1, 1) + mean.view(3, 1, 1)
    again = (denormalised - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        channels = transformers_convnext_features(convolutions, normalised(64, CLIP_MEAN, CLIP_STD))[:, 1:]
        channels = channels.view(5, 2, 2, 96).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
        channels = torch.cat([channels.mean(1, keepdim=True), channels], 1)
        mixed = torch.cat([open_clip_features(opened, view), channels, dino(again).last_hidden_state], 2)
        wanted = torch.cat([mixed.flatten(1), blip2.get_qformer_features(view).flatten(1)], 1)
    assert mixed.shape == (5, 17, 64 + 96 + 96)
    torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=1e-5)  # rounded to bf16 at the end


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


# Multiply-adds of the published shapes, twice; BLIP-2: its vision model, then its Q-Former.
GFLOPS = {
    "clip_vit_l14": 162,
    "clip_convnext_xxl": 396,
    "clip_convnext_xxl_512": 1584,
    "dinov2_vitg14": 598,
    "blip2_qformer": 520.6 + 12.7,
}


@pytest.mark.parametrize("name", GFLOPS)
def test_the_work_of_a_view_is_counted(name):
    assert encoder_work(VISUAL_EXPERTS[name])[0] == pytest.approx(1e9 * GFLOPS[name], rel=0.01)
