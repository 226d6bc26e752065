"""Visual experts: their contracts at full size, and the work of a view."""

import pytest
import torch

from megatron_sphinx.model.architecture import (
    VISUAL_EXPERTS,
)
from megatron_sphinx.model.visual_experts import FAMILIES, build_expert, count_work, work_of

# Counted by the sources: open_clip's and dinov2's models, transformers' Blip2 vision model and Q-Former with queries.
PARAMETERS = {
    "clip_vit_l14": 303_179_776,
    "clip_convnext_xxl": 843_398_016,
    "clip_convnext_xxl_512": 843_398_016,
    "dinov2_vitg14": 1_134_769_664,
    "blip2_qformer": 985_952_256 + 105_137_664 + 32 * 768,
    "efficientnet_lite0": 3_371_008,
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
    assert work_of(VISUAL_EXPERTS[name]).flops == pytest.approx(1e9 * GFLOPS[name], rel=0.01)


def test_what_is_known_of_an_expert_is_what_its_library_builds():
    known = [expert for expert in VISUAL_EXPERTS.values() if expert.work]
    assert [count_work(expert) for expert in known] == [expert.work for expert in known]
    assert known
