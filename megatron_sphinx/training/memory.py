"""What a language rank must hold for weights, gradients and optimizer. Arithmetic only: imports no torch."""

from dataclasses import dataclass

from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig
from megatron_sphinx.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class RankWeights:
    """Weights on one language rank, in numbers.

    Attributes:
        shared: those that all replicas hold.
        experts: those that only the copies of its experts hold.
    """

    shared: int
    experts: int


def projection_weights(vision: VisionConfig, hidden: int) -> int:
    """Weights of the projections, their norms, the tags and the skip token."""
    widths = [vision.channels] + ([vision.qformer.channels] if vision.qformer else [])
    return sum(width * hidden + 3 * hidden for width in widths) + (2 + vision.has_skip_token) * hidden


def rank_weights(model: LanguageConfig, vision: VisionConfig, layout: ParallelLayout, stage: int) -> RankWeights:
    """Weights on a rank of a pipeline stage, the vocabulary padded."""
    sizes = layout.config
    layers, hidden = sizes.stage_layers(model.layers)[stage], model.hidden
    embedding = model.padded_vocabulary * hidden // sizes.tensor
    shared = layers * (model.attention_matrices // sizes.tensor + 2 * hidden)
    experts = 0
    if model.experts:
        shared += layers * model.experts * hidden  # routers
        experts = layers * model.experts * model.expert_matrices // (sizes.expert * sizes.expert_tensor)
    else:
        shared += layers * model.expert_matrices // sizes.tensor
    if stage == 0:
        shared += embedding + projection_weights(vision, hidden)
    if stage == sizes.pipeline - 1:
        shared += embedding + hidden
    return RankWeights(shared, experts)


def zero2_bytes(weights: RankWeights, layout: ParallelLayout, *, precision: str) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer on one rank under ZeRO-2, alignment of partitions left out.

    Weights and whole gradients are 2 bytes each in bf16, 4 in fp32; a partition of the gradient 4; the optimizer 12,
    for the fp32 weight and two moments. In a pipeline the gradients stay whole until the schedule has ended.

    Source: ZeRO, arXiv:1910.02054, section 5.
    """
    width = 2 if precision == "bf16" else 4
    whole = weights.shared + weights.experts
    partition = -(-weights.shared // layout.data) + -(-weights.experts // layout.expert_data)
    return {
        "weights": width * whole,
        "gradients": 4 * partition + (width * whole if layout.config.pipeline > 1 else 0),
        "optimizer": 12 * partition,
    }
