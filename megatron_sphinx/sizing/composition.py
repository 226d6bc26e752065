"""The composition of any step, read from the indexes."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_sphinx.config import Config
from megatron_sphinx.data.packing import Segment, positions
from megatron_sphinx.data.pixels import views_in
from megatron_sphinx.data.sources import make_planner, open_sources
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.stage.dealing import deal


def step(config: Config, layout: ParallelLayout, number: int) -> Iterator[dict[str, Any]]:
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
        "pairs": plan.samples,
        "text": plan.text,
        "target_tokens_pairs": plan.targets(of_samples=True),
        "target_tokens_text": plan.targets(of_samples=False),
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
                "flops": sum(map(planner.cost, rows)),
                "views": counts[replica],
                "encoders": [asdict(share) for share in shares if share.replica == replica and layout.config.encoder],
            }


def _name(piece: Segment) -> str:
    if piece.is_sample:
        return f"pair {piece.item}"
    return f"text {piece.item}[{piece.start}:{piece.start + piece.tokens}]"
