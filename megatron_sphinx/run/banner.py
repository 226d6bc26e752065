"""What a run says of itself: what every rank holds, what the first step is made of, and how the run ended."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.console import say, say_of_ranks
from megatron_sphinx.errors import writing
from megatron_sphinx.model.kernels import describe
from megatron_sphinx.run import start_clock
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.training.engine import Engine
from megatron_sphinx.training.memory import rank_weights, zero2_bytes

_UNEVEN = 1.05  # the costliest replica's work over the mean, above which the user is told


class Holding(NamedTuple):
    """What a rank holds.

    Attributes:
        role: what the rank is for.
        language_bytes: bytes of its weights of the language model and projections.
        encoder_bytes: bytes of its frozen weights.
        encoders: what identifies those, by the visual expert's name; empty where it has none.
    """

    role: str
    language_bytes: int
    encoder_bytes: int
    encoders: dict[str, str]


def bytes_of(module: torch.nn.Module) -> int:
    """Count the bytes of a module's weights."""
    return sum(weight.nbytes for weight in module.parameters())


def say_start(context: RankContext, holdings: list[Holding]) -> None:
    """Print the layout, what every rank holds, and the composition of step 0; on the first rank."""
    config, layout = context.config, context.groups.layout
    say(f"{layout} = {layout.world} ranks, {context.platform.device.type}, {config.training.precision}")
    say_of_ranks(
        [
            f"{held.role}, language weights {held.language_bytes:,} bytes, encoder weights {held.encoder_bytes:,} bytes"
            for held in holdings
        ]
    )
    kernels, attention = describe(config.model.kernels, context.platform, config.training.precision)
    say(f"kernels: {kernels}; attention: {attention}")
    plan = context.planner.step(0)
    say(f"step 0: {len(plan.rows)} rows, {plan.fill:.1%} full; costliest replica {plan.imbalance:.3f} of the mean")
    if plan.imbalance > _UNEVEN and config.data.row_multiple % layout.data:
        say(f"the replicas' work is uneven: data.row_multiple={layout.data} would divide it better")
    if context.held_out:
        say(f"validation: {context.held_out}")
    if config.parallel.encoder:
        views, values = sum(len(segment.views) for row in plan.rows for segment in row), config.vision.feature_values
        total = views * values * 2
        say(f"step 0: {views} views x {values} values x 2 bytes = {total:,} bytes of features cross, 0 come back")


def report_start(context: RankContext, ranks: list[dict[str, float]]) -> None:
    """Print how long the start took, and keep it in the run folder; on the first rank.

    Args:
        context: of the rank.
        ranks: by rank, the seconds of its phases.
    """
    total = start_clock.process_seconds()
    say(start_clock.line(total, ranks))
    if context.clock.is_profiled:
        for line in start_clock.table(ranks):
            say(f"  {line}")
    with writing(context.folder):
        start_clock.keep(context.folder, total, ranks)


def report_first_step(context: RankContext) -> None:
    """Print on the first rank when the job's first step was done, and keep it."""
    if context.is_first_rank:
        total = start_clock.process_seconds()
        say(f"first step: done {total:.1f} s after the process began")
        with writing(context.folder):
            start_clock.keep_first_step(context.folder, total)


def say_memory(context: RankContext, engine: Engine) -> None:
    """Print what each language rank holds for weights, gradients and optimizer beside what ZeRO-2 needs at least.

    Every language rank calls this, together.
    """
    config, groups = context.config, context.groups
    needed = zero2_bytes(
        rank_weights(config.model, config.vision, groups.layout, groups.seat.pipeline, config.training.train),
        groups.layout,
        precision=config.training.precision,
    )
    own = (engine.held, needed)
    everyone = [own] * groups.layout.language
    dist.all_gather_object(everyone, own, group=groups.language)
    if context.is_first_rank:
        facts = [[f"{name} {held[name]:,} (formula {known[name]:,})" for name in known] for held, known in everyone]
        say_of_ranks([f"bytes of {', '.join(fact)}" for fact in facts])


def why_stopped(context: RankContext) -> str:
    """Tell which signal has come, and to which rank if not to the first; every language rank calls this, together."""
    seat, own = context.groups.seat, context.stop.reason
    if own and seat.rank:
        own = f"{own} to {seat.role} rank {seat.rank}"
    reasons = [own] * context.groups.layout.language
    dist.all_gather_object(reasons, own, group=context.groups.language)
    return next(filter(None, reasons), "a signal")


def note_early_stop(context: RankContext, reason: str) -> None:
    """Let the last line of the run be that it was stopped before its first step."""
    if context.hold:
        context.hold.end = f"stopped by {reason} before the first step; nothing new to save{_how_to_go_on(context)}"


def note_end(context: RankContext, how: str, store: CheckpointStore, start: int, done: int) -> None:
    """Let the last line of the run be how it ended, after how many steps, and where to look.

    Args:
        context: of the rank.
        how: the run ended: done, failed, or stopped by what.
        store: of its checkpoints.
        start: step that this job began at.
        done: steps done by now.
    """
    if not context.hold:
        return
    plot = context.folder / "loss.png"
    drawn = f", plot {plot}" if plot.is_file() else ""
    way_on = _how_to_go_on(context) if how.startswith("stopped") else ""
    steps = context.config.training.steps
    where = f"checkpoint {store.newest or 'none'}{drawn}"
    if how == "done" and start >= steps:
        known = f"training.steps={steps}: nothing to train, {start} steps were done before"
        context.hold.end = f"{known}; {where}; raise training.steps to go on"
        return
    context.hold.end = f"{how} after {done} of {steps} steps; {where}{way_on}"


def _how_to_go_on(context: RankContext) -> str:
    """Tell how a run that was stopped goes on."""
    is_same = context.config.checkpoint.resume == "auto"
    return "; the same command goes on" if is_same else "; go on with checkpoint.resume=auto"
