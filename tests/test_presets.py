"""The SPHINX family at full size, without memory: parameters, tokens, work, and the papers' recipes."""

import json
from pathlib import Path

import pytest
import torch
from test_model import groups

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.model.language import build_language
from megatron_sphinx.model.vision import VisualProjection

SPHINX = {
    "blip2_qformer": 985_952_256 + 105_137_664 + 32 * 768,
    "clip_vit_l14": 303_179_776,
    "clip_convnext_xxl": 843_398_016,
    "dinov2_vitg14": 1_134_769_664,
}
SPHINX_X = {name: SPHINX[name] for name in ("clip_convnext_xxl", "dinov2_vitg14")}
LLAMA_7B, LLAMA_13B, TINYLLAMA, MIXTRAL = 6_738_415_616, 13_015_864_320, 1_100_048_384, 46_702_792_704
INTERNLM2 = 7_737_708_544
# language parameters, active ones, experts, visual tokens of an image
FAMILY = {
    "sphinx_7b": (LLAMA_7B, LLAMA_7B, SPHINX, 289),
    "sphinx_13b": (LLAMA_13B, LLAMA_13B, SPHINX, 289),
    "sphinx_1k": (LLAMA_13B, LLAMA_13B, SPHINX, 1445),
    "sphinx_2k": (LLAMA_13B, LLAMA_13B, SPHINX, 2890),
    "sphinx_tiny": (TINYLLAMA, TINYLLAMA, SPHINX_X, 1285),
    "sphinx_intern2": (INTERNLM2, INTERNLM2, SPHINX_X, 1285),
    "sphinx_plus": (LLAMA_13B, LLAMA_13B, SPHINX_X, 1285),
    "sphinx_plus_2k": (LLAMA_13B, LLAMA_13B, SPHINX_X, 2570),
    "sphinx_moe": (MIXTRAL, 12_879_925_248, SPHINX_X, 1285),
}
RELEASED = {
    "sphinx_tiny_released": (512, 1, 257),
    "sphinx_tiny_1k_released": (1024, 5, 1285),
    "sphinx_moe_released": (512, 1, 289),
    "sphinx_moe_1k_released": (1024, 5, 1445),
}
# recipe, samples a step, learning rate, tensor ranks, of arXiv:2311.07575 section 4.1 and arXiv:2402.05935 section 4.1
RECIPES = {
    "sphinx_7b": ("stage1", 640, 5e-5, 1),
    "sphinx_13b": ("stage1", 640, 5e-5, 2),
    "sphinx_1k": ("stage2", 128, 2e-5, 2),
    "sphinx_2k": ("stage2", 128, 2e-5, 2),
    "sphinx_tiny": ("one_stage", 256, 2e-5, 1),
    "sphinx_intern2": ("one_stage", 256, 2e-5, 1),
    "sphinx_plus": ("one_stage", 256, 2e-5, 2),
    "sphinx_plus_2k": ("one_stage", 256, 2e-5, 2),
    "sphinx_moe": ("one_stage", 256, 5e-6, 8),
}


@pytest.mark.parametrize("preset", FAMILY)
def test_plan_prints_the_papers_sizes(preset, capsys):
    language, active, experts, tokens = FAMILY[preset]
    assert main(["plan", preset, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["language"] == language
    assert found["parameters"]["active"] == active
    assert found["parameters"]["experts"] == experts
    assert found["visual_tokens_per_image"] == tokens
    assert found["parameters"]["trained"] == language + found["parameters"]["projections"]
    assert found["parameters"]["frozen"] == sum(experts.values())
    views = found["views_per_image"]
    assert found["flops"]["encoders_per_image"] == pytest.approx(
        sum(found["flops"]["experts_per_view"].values()) * views
    )


def test_the_readable_plan_has_the_same_numbers(capsys):
    assert main(["plan", "sphinx_tiny", "training.train=projections"]) == 0
    out = capsys.readouterr().out
    assert "language                                             1,100,048,384" in out.replace("  language", "language")
    assert "visual_tokens_per_image                                        1,285" in out
    trained = 4608 * 2048 + 3 * 2048 + 3 * 2048  # the projection and its norm, two tags and the skip token
    assert f"{trained:,}" in next(line for line in out.splitlines() if "trained" in line)


@pytest.mark.parametrize("preset", FAMILY)
def test_recipes_are_the_papers(preset):
    config = configuration.load(Path(preset))
    found = (config.training.recipe, config.data.samples_per_step, config.optimizer.learning_rate)
    assert (*found, config.parallel.tensor) == RECIPES[preset]
    is_stage1 = config.training.recipe == "stage1"
    assert config.data.text_tokens_per_step == (65536 if is_stage1 else 0)
    assert config.optimizer.minimum_learning_rate == (5e-6 if is_stage1 else 0)
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.9, 0.95)
    assert config.optimizer.weight_decay == (0.1 if is_stage1 else 0)
    assert config.vision.has_skip_token is (config.training.recipe == "one_stage")


def test_a_preset_is_trained_by_another_recipe():
    config = configuration.load(Path("sphinx_13b"), ["training.recipe=stage2", "vision.views=5"])
    assert (config.data.conversations_per_step, config.data.pairs_per_step, config.training.epochs) == (128, 0, 1.0)


@pytest.mark.parametrize("preset", RELEASED)
def test_released_variants(preset):
    vision = configuration.load(Path(preset)).vision
    assert (vision.released_pixels, vision.views, vision.visual_tokens_per_image) == RELEASED[preset]
    assert (vision.resize, vision.has_skip_token, vision.padding) == ("accessory", False, "centre")


@pytest.mark.parametrize("preset", FAMILY)
def test_what_is_built_has_these_parameters(run_ranks, preset):
    """megatron-core's own modules at full size, with the vocabulary padded, and our projections."""
    config = configuration.load(Path(preset), ["parallel={}"])
    model = config.model

    def check() -> None:
        here = groups()
        with torch.device("meta"):
            language = build_language(model, here, dtype=torch.bfloat16, sequence_length=config.data.sequence_length)
            vision = VisualProjection(config.vision, model.hidden, dtype=torch.bfloat16, device=torch.device("meta"))
        padding = 2 * (model.padded_vocabulary - model.vocabulary) * model.hidden
        assert sum(weight.numel() for weight in language.parameters()) - padding == FAMILY[preset][0]
        width = config.vision.channels
        assert vision.visual_proj[0].weight.shape == (model.hidden, width)
        assert width == (5632 if len(FAMILY[preset][2]) == 4 else 4608)

    run_ranks(1, check)


@pytest.mark.parametrize(
    ("name", "classes", "more"),
    [
        ("sphinx_7b", "Llama", {}),
        ("sphinx_13b", "Llama", {}),
        ("sphinx_tiny", "Llama", {}),
        ("sphinx_intern2", "Llama", {}),  # its weights are packed otherwise, its shape is LLaMA's
        ("sphinx_moe", "Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ],
)
def test_huggingfaces_classes_have_as_many(name, classes, more):
    import transformers

    model = configuration.load(Path(name)).model
    shape = {
        "vocab_size": model.vocabulary, "hidden_size": model.hidden, "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers, "num_attention_heads": model.heads, "num_key_value_heads": model.groups,
        "tie_word_embeddings": False,
    }  # fmt: skip
    config = getattr(transformers, f"{classes}Config")(**shape, **more)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{classes}ForCausalLM")(config)
    assert theirs.num_parameters() == model.parameters == FAMILY[name][0]
