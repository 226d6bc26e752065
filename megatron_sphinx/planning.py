"""What a configuration means, before anything is started: sizes, work, and the composition of any step."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from typing import Any

import torch

from megatron_sphinx.config import RunConfig
from megatron_sphinx.data.loader import make_planner, open_sources, views_in
from megatron_sphinx.data.packing import Piece, positions
from megatron_sphinx.model.architecture import EXPERTS
from megatron_sphinx.model.encoders import build_expert, encoder_flops
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.stage.dealing import deal
from megatron_sphinx.training.memory import projection_weights, rank_weights, zero2_bytes


def sizes(config: RunConfig, layout: ParallelLayout) -> dict[str, Any]:
    """Parameters, tokens, work and memory of a run. Builds the experts without memory, opens no data."""
    vision, model, data = config.vision, config.model, config.data
    found = {item.name: _expert(item.name) for item in vision.experts}
    experts = {name: weights for name, (weights, _) in found.items()}
    flops = {name: work for name, (_, work) in found.items()}
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
            "language_per_row": model.train_flops([data.sequence_length]),
        },
        "bytes_per_rank": {f"stage {stage}": bytes_of for stage, bytes_of in enumerate(memory)}
        | {"encoders": {"weights": 2 * sum(experts.values())}},
        "feature_bytes_per_view": 2 * vision.feature_values,
        "feature_bytes_per_step": 2 * vision.feature_values * images if layout.config.encoder else 0,
    }


@cache
def _expert(name: str) -> tuple[int, float]:
    """Weights of an expert, and FLOPs of a view."""
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in build_expert(EXPERTS[name]).parameters())
    return weights, float(encoder_flops(EXPERTS[name]))


def table(found: dict[str, Any]) -> str:
    """What `sizes` has found, readable: a line for each number, sections indented."""

    def lines(values: dict[str, Any], indent: str) -> Iterator[str]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield f"{indent}{name}"
                yield from lines(value, f"{indent}  ")
            else:
                text = f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else value
                yield f"{indent}{name:{40 - len(indent)}}{text:>28}"

    return "\n".join(lines(found, ""))


def step(config: RunConfig, layout: ParallelLayout, number: int) -> Iterator[dict[str, Any]]:
    """The composition of one step, read from the indexes: first the whole, then a line per micro-batch and replica."""
    sources = open_sources(config.data, config.model)
    planner = make_planner(
        config.data, sources, config.model, config.vision,
        replicas=layout.data, seed=config.run.seed, multiple=layout.config.token_multiple,
    )  # fmt: skip
    plan = planner.step(number)
    yield {
        "step": number,
        "sample_ids": plan.digest,
        "pairs": plan.pairs,
        "text": plan.text,
        "target_tokens_pairs": plan.targets(of_pairs=True),
        "target_tokens_text": plan.targets(of_pairs=False),
        "captions_cut": plan.captions_cut,
        "positions_of_rows": [positions([row]) for row in plan.rows],
        "fill": plan.fill,
        "padding_share": plan.padding_share,
        "imbalance": plan.imbalance,
    }
    for micro, replicas in enumerate(plan.micro_batches):
        counts = [len(views_in(rows)) for rows in replicas]
        shares = deal([[1.0] * count for count in counts], layout.config.encoder or 1)
        for replica, rows in enumerate(replicas):
            yield {
                "micro_batch": micro,
                "replica": replica,
                "rows": [[_name(piece) for piece in row] for row in rows],
                "tokens": sum(piece.length for row in rows for piece in row),
                "flops": sum(config.model.train_flops(planner.lengths(row)) for row in rows),
                "views": counts[replica],
                "encoders": [asdict(share) for share in shares if share.replica == replica and layout.config.encoder],
            }


def _name(piece: Piece) -> str:
    if piece.is_pair:
        return f"pair {piece.item}"
    return f"text {piece.item}[{piece.start}:{piece.start + piece.tokens}]"
