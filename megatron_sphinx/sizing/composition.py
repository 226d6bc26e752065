"""What is in a given step of a run, row by row, read from the indexes of its data."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_sphinx.config import Config
from megatron_sphinx.data.packing import Segment, positions
from megatron_sphinx.data.pixels import views_in
from megatron_sphinx.data.sources import make_planner, open_sources
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.stage.dealing import deal


def step(config: Config, layout: ParallelLayout, number: int, kind: str) -> Iterator[dict[str, Any]]:
    """Yield what is in a step: first the whole step, then each micro-batch of each replica.

    Args:
        config: the run, whose data is there.
        layout: how its ranks are divided.
        number: of the step, counted from 0.
        kind: the hardware on which a value of auto is taken, a name of hardware.yaml or the path of a file.
    """
    if config.data.micro_batch_rows == "auto":
        from megatron_sphinx.sizing.layouts import settled  # which imports torch

        config = settled(config, layout, kind).config
    sources = open_sources(config.data, config.model)
    planner = make_planner(
        config.data, sources, config.model, config.vision,
        replicas=layout.data, seed=config.run.seed, multiple=layout.config.token_multiple,
    )  # fmt: skip
    plan = planner.step(number)
    yield {
        "step": number,
        "sample_ids": plan.digest,
        "pairs": plan.samples,
        "text": plan.text,
        "target_tokens_pairs": plan.targets(of_samples=True),
        "target_tokens_text": plan.targets(of_samples=False),
        "captions_cut": plan.captions_cut,
        "positions_of_rows": [positions([row]) for row in plan.rows],
        "fill": plan.fill,
        "padding_share": plan.padding_share,
        "imbalance": plan.imbalance,
        "micro_batch_rows": config.data.micro_batch_rows,
    }
    for micro, replicas in enumerate(plan.micro_batches):
        counts = [len(views_in(rows)) for rows in replicas]
        dealt = deal([[1.0] * count for count in counts], layout.config.encoder or 1)
        for replica, rows in enumerate(replicas):
            yield {
                "micro_batch": micro,
                "replica": replica,
                "rows": [[_name(segment) for segment in row] for row in rows],
                "tokens": sum(segment.length for row in rows for segment in row),
                "flops": sum(map(planner.cost, rows)),
                "views": counts[replica],
                "encoders": [asdict(views) for views in dealt if views.replica == replica and layout.config.encoder],
            }


def _name(segment: Segment) -> str:
    """Name a segment of a row: the number of its sample, or of its document and which tokens of it."""
    if segment.is_sample:
        return f"pair {segment.item}"
    return f"text {segment.item}[{segment.start}:{segment.start + segment.tokens}]"
