"""What it takes to encode with each visual expert, counted once for all: sizes are known without what builds it."""

from typing import NamedTuple


class ExpertWork(NamedTuple):
    """What it takes to encode one view with a visual expert.

    Attributes:
        weights: numbers in its weights.
        flops: two for each multiply-add of matrix products and convolutions.
        values: numbers in memory at the moment when most are: a module's inputs, its output, and a residual that goes
            around it.
    """

    weights: int
    flops: int
    values: int


# As PyTorch counts it on the models that timm and transformers build; a test counts again.
WORK = {
    "clip_vit_l14": ExpertWork(303_179_776, 162_023_964_672, 3_158_016),
    "clip_convnext_xxl": ExpertWork(843_398_016, 395_930_370_048, 18_874_368),
    "clip_convnext_xxl_512": ExpertWork(843_398_016, 1_583_721_480_192, 75_497_472),
    "dinov2_vitg14": ExpertWork(1_134_769_664, 598_780_133_376, 3_158_016),
    "blip2_qformer": ExpertWork(1_091_114_496, 533_467_126_272, 4_737_024),
    "efficientnet_lite0": ExpertWork(3_371_008, 211_222_176, 903_168),
    "efficientnet_lite0_stride16": ExpertWork(3_371_008, 121_634_464, 903_168),
    "clip_vit_small": ExpertWork(139_008, 4_694_528, 13_056),
    "clip_convnext_small": ExpertWork(201_520, 6_738_688, 49_152),
    "dinov2_small": ExpertWork(394_944, 13_419_648, 13_056),
    "blip2_qformer_small": ExpertWork(155_360, 4_503_552, 11_456),
}
