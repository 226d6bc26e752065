"""Parameters, tokens, work and memory of a run, in numbers."""

from collections.abc import Iterator
from typing import Any

from megatron_sphinx.config import Config
from megatron_sphinx.model.architecture import VISUAL_EXPERTS, VisionConfig
from megatron_sphinx.model.expert_work import WORK
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.sizing.memory import EncoderCost
from megatron_sphinx.training.memory import projection_weights, rank_weights, zero2_bytes


def sizes(config: Config, layout: ParallelLayout) -> dict[str, Any]:
    """Count the parameters, tokens, work and memory of a run; opens no data."""
    vision, model, data = config.vision, config.model, config.data
    costs = {item.name: expert_cost(item.name) for item in vision.experts}
    experts = {name: cost.weights for name, cost in costs.items()}
    flops = {name: cost.flops for name, cost in costs.items()}
    weights = {"projections": projection_weights(vision, model.hidden), "language": model.parameters}
    trained = sum(weights.values()) if config.training.train == "all" else weights[config.training.train]
    memory = [
        zero2_bytes(
            rank_weights(model, vision, layout, stage, config.training.train),
            layout,
            precision=config.training.precision,
        )
        for stage in range(layout.config.pipeline)
    ]
    validation = config.validation
    images = data.samples_per_step * vision.views
    return {
        "layout": str(layout),
        "parameters": {
            **weights,
            "active": model.active_parameters,
            "trained": trained,
            "frozen": sum(weights.values()) - trained + sum(experts.values()),
            "experts": experts,
        },
        "visual_tokens_per_image": vision.visual_tokens_per_image,
        "positions_per_image": vision.most_image_positions,
        "tokens_per_view": vision.tokens_per_view,
        "views_per_image": vision.views,
        "flops": {
            "experts_per_view": flops,
            "encoders_per_image": sum(flops.values()) * vision.views,
            "language_per_row": model.train_flops([data.sequence_length], data.sequence_length),
        },
        "bytes_per_rank": {f"stage {stage}": bytes_of for stage, bytes_of in enumerate(memory)}
        | {"encoders": {"weights": 2 * sum(experts.values())}},
        "feature_bytes_per_view": 2 * vision.feature_values,
        "feature_bytes_per_step": 2 * vision.feature_values * images if layout.config.encoder else 0,
        "validation": {
            "interval": validation.interval,
            "steps": validation.steps,
            "language_flops_over_training": validation.steps / validation.interval / 3,  # forward is a third of a step
        }
        if validation.is_on
        else "none",
    }


def expert_cost(name: str) -> EncoderCost:
    """Tell what it takes to encode with one visual expert."""
    work = WORK[name]
    flops = float(work.flops)
    return EncoderCost(work.weights, flops, float(work.values), ((VISUAL_EXPERTS[name].family, flops),))


def encoder_cost(config: VisionConfig) -> EncoderCost:
    """Count what it takes to encode with the mixture, one expert after the other."""
    costs = [expert_cost(item.name) for item in config.experts]
    return EncoderCost(
        sum(cost.weights for cost in costs),
        sum(cost.flops for cost in costs),
        max(cost.values for cost in costs),
        tuple(family for cost in costs for family in cost.families),
    )


def table(values: dict[str, Any]) -> str:
    """Format what `sizes` returns: a line for each number, sections indented."""

    def lines(section: dict[str, Any], indent: str) -> Iterator[str]:
        for name, value in section.items():
            if isinstance(value, dict):
                yield f"{indent}{name}"
                yield from lines(value, f"{indent}  ")
            else:
                text = f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else value
                yield f"{indent}{name:{40 - len(indent)}}{text:>28}"

    return "\n".join(lines(values, ""))
