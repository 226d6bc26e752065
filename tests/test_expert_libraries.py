"""Visual experts from the files of each library that releases them give what the library computes."""

import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel
from released_experts import (
    SMALL,
    assert_same_features,
    consolidated,
    cubic_positions,
    features_of,
    load,
    normal_views,
    open_clip_features,
    open_clip_model,
    randomise,
    saved_by,
    shapes,
    transformers_blip2,
    transformers_convnext,
    transformers_convnext_features,
    transformers_dinov2,
)
from test_encoders import encoders, pixels
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

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
from megatron_sphinx.model.expert_files import translate
from megatron_sphinx.model.visual_experts import build_expert

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


def test_the_qformer_is_transformers(expert_named, tmp_path):
    expert = VISUAL_EXPERTS[name := expert_named("qformer")]
    source = transformers_blip2(expert, 6)
    source.save_pretrained(tmp_path)
    views = normal_views(expert)
    with torch.no_grad():
        wanted = source.get_qformer_features(views)
    assert_same_features(name, tmp_path / "model.safetensors", views, wanted)


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
