"""What is in a given step of a run, row by row, read from the indexes of its data."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from megatron_sphinx.config import Config
from megatron_sphinx.data.packing import Segment, positions, views_in
from megatron_sphinx.data.plan import Planner
from megatron_sphinx.data.sources import Sources, make_planner, open_sources
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.sizing.layouts import settled
from megatron_sphinx.stage.dealing import deal

_STEPS = 20  # that are looked at


def text_of_steps(config: Config) -> dict[str, float]:
    """Tell how many documents a step has on average, and the largest share that one has of any step's text.

    Returns:
        `documents_per_step` and `largest_document_share` of the run's first steps; nothing where the run takes no
        text, or where its data is not there.
    """
    try:
        alone = replace(config, data=replace(config.data, micro_batch_rows=1))
        sources = open_sources(alone.data, alone.model)
    except DataError:
        return {}
    planner = _planner(alone, sources, ParallelLayout(world=1, config=ParallelConfig()))
    shares = [planner.step(number).document_shares for number in range(min(_STEPS, config.training.steps or _STEPS))]
    if not any(shares):
        return {}
    return {
        "documents_per_step": fmean(map(len, shares)),
        "largest_document_share": max(share for of_step in shares for share in of_step),
    }


def _planner(config: Config, sources: Sources, layout: ParallelLayout) -> Planner:
    """Make the planner of a run, from the indexes of its data."""
    return make_planner(
        config.data, sources, config.model, config.vision,
        replicas=layout.data, seed=config.run.seed, multiple=layout.config.token_multiple,
    )  # fmt: skip


def step(config: Config, layout: ParallelLayout, number: int, kind: str) -> Iterator[dict[str, Any]]:
    """Yield what is in a step: first the whole step, then each micro-batch of each replica.

    Args:
        config: the run, whose data is there.
        layout: how its ranks are divided.
        number: of the step, counted from 0.
        kind: the hardware on which a value of auto is taken, a name of hardware.yaml or the path of a file.

    Raises:
        ConfigError: the run has no such step.
    """
    if config.data.micro_batch_rows == "auto":
        config = settled(config, layout, kind).config
    sources = open_sources(config.data, config.model)
    steps = config.with_epochs_in_steps(sources.samples.bounds[-1] if sources.samples else 0).training.steps
    if not 0 <= number < steps:
        raise ConfigError(f"--step={number}: the run has steps 0 to {steps - 1}; give one of them")
    planner = _planner(config, sources, layout)
    plan = planner.step(number)
    yield {
        "step": number,
        "sample_ids": plan.digest,
        "pairs": plan.samples,
        "text": plan.text,
        "documents": len(plan.document_shares),
        "largest_document_share": max(plan.document_shares, default=0.0),
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
