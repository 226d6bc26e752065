"""Visual experts as the libraries that release them build, save and compute them: helpers of tests."""

import math
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file
from transformers import (
    Blip2Config,
    Blip2Model,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
)

from megatron_sphinx.model.architecture import (
    VISUAL_EXPERTS,
    VisualExpert,
    VisualExpertConfig,
)
from megatron_sphinx.model.expert_files import load_expert
from megatron_sphinx.model.visual_experts import FAMILIES

SMALL = ["clip_vit_small", "clip_convnext_small", "dinov2_small", "blip2_qformer_small"]


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


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


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
