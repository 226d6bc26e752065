"""Visual experts: their contracts at full size, and the work of a view."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megatron_sphinx.model.architecture import VISUAL_EXPERTS, VisualExpert
from megatron_sphinx.model.expert_work import WORK, ExpertWork
from megatron_sphinx.model.visual_experts import FAMILIES, build_expert

# Counted by the sources: open_clip's and dinov2's models, transformers' Blip2 vision model and Q-Former with queries.
PARAMETERS = {
    "clip_vit_l14": 303_179_776,
    "clip_convnext_xxl": 843_398_016,
    "clip_convnext_xxl_512": 843_398_016,
    "dinov2_vitg14": 1_134_769_664,
    "blip2_qformer": 985_952_256 + 105_137_664 + 32 * 768,
    "efficientnet_lite0": 3_371_008,
    "efficientnet_lite0_stride16": 3_371_008,
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


def test_patches_of_16_pixels_are_those_within_the_whole_network_and_nothing_behind_them_is_computed():
    model = build_expert(VISUAL_EXPERTS["efficientnet_lite0_stride16"]).eval()
    views, within, later = torch.randn(2, 3, 112, 112), [], []
    model.blocks[4].register_forward_hook(lambda _module, _inputs, output: within.append(output))
    model.blocks[5].register_forward_hook(lambda _module, _inputs, output: later.append(output))
    with torch.no_grad():
        model.forward_features(views)
        whole, patches = FAMILIES["cnn_stride16"](model, views)
    assert (len(within), len(later)) == (2, 1)
    assert torch.equal(patches, within[0].flatten(2).transpose(1, 2))
    assert torch.equal(whole, patches.mean(1))


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
    assert WORK[name].flops == pytest.approx(1e9 * GFLOPS[name], rel=0.01)


def count_work(expert: VisualExpert) -> ExpertWork:
    """Count what it takes to encode one view with a visual expert, on a model without memory."""
    peak = 0

    def count(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal peak
        sizes = [value.numel() for value in (*inputs, output) if isinstance(value, Tensor)]
        peak = max(peak, sum(sizes) + min(sizes, default=0))

    with torch.device("meta"):
        model = build_expert(expert).eval().requires_grad_(False)
        pixels = torch.empty(1, 3, expert.pixels, expert.pixels)
    for module in model.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        if expert.family == "qformer":
            model(pixels)
        else:
            FAMILIES[expert.family](model, pixels)
    weights = sum(weight.numel() for weight in model.parameters())
    return ExpertWork(weights, counter.get_total_flops(), peak)


@pytest.mark.parametrize("name", VISUAL_EXPERTS)
def test_the_work_of_an_expert_is_that_of_what_its_library_builds(name):
    assert WORK[name] == count_work(VISUAL_EXPERTS[name])
