"""What a language rank must hold for weights, gradients and optimizer. Arithmetic only: imports no torch."""

from dataclasses import dataclass

from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig
from megatron_sphinx.parallel.layout import ParallelLayout

BUCKET = 2**26  # numbers of the gradient that are reduced over the replicas at once, at most


@dataclass(frozen=True)
class RankWeights:
    """Weights on one language rank, in numbers.

    Attributes:
        shared: trained ones that all replicas hold.
        experts: trained ones of MoE experts, which only the copies of those hold.
        frozen: those that are not trained.
    """

    shared: int
    experts: int
    frozen: int


def projection_weights(vision: VisionConfig, hidden: int) -> int:
    """Count the weights of the projections, their norms, the tags and the skip token."""
    widths = [vision.channels] + ([vision.qformer.channels] if vision.qformer else [])
    return sum(width * hidden + 3 * hidden for width in widths) + (2 + vision.has_skip_token) * hidden


def rank_weights(
    model: LanguageConfig, vision: VisionConfig | None, layout: ParallelLayout, stage: int, train: str
) -> RankWeights:
    """Count the weights on a rank of a pipeline stage, the vocabulary padded.

    Args:
        model: the language model.
        vision: what its projections are for; None for a model of text.
        layout: how they are divided.
        stage: of the pipeline.
        train: what is trained: all, projections or language.
    """
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
    projections = projection_weights(vision, hidden) if vision is not None and stage == 0 else 0
    if stage == 0:
        shared += embedding
    if stage == sizes.pipeline - 1:
        shared += embedding + hidden
    if train == "projections":
        return RankWeights(projections, 0, frozen=shared + experts)
    if train == "language":
        return RankWeights(shared, experts, frozen=projections)
    return RankWeights(shared + projections, experts, frozen=0)


def zero2_bytes(weights: RankWeights, layout: ParallelLayout, *, precision: str) -> dict[str, int]:
    """Count the bytes of weights, gradients and optimizer on one rank under ZeRO-2, partitions not aligned.

    Weights and whole gradients are 2 bytes each in bf16, 4 in fp32; a partition of the gradient 4; the optimizer 12,
    for the fp32 weight and two moments. In a pipeline the gradients stay whole until the schedule has ended. Frozen
    weights have neither; their fp32 values are in the CPU's memory.

    Source: ZeRO, arXiv:1910.02054, section 5.
    """
    width = 2 if precision == "bf16" else 4
    whole = weights.shared + weights.experts
    partition = -(-weights.shared // layout.data) + -(-weights.experts // layout.expert_data)
    return {
        "weights": width * (whole + weights.frozen),
        "gradients": 4 * partition + (width * whole if layout.config.pipeline > 1 else 0),
        "optimizer": 12 * partition,
    }
