"""What a run takes where its configuration says `auto`, by the memory that a rank has. Arithmetic only."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_sphinx.config import Config
from megatron_sphinx.data.plan import Planner
from megatron_sphinx.model.architecture import LEAST_BATCH_VIEWS, MOST_BATCH_VIEWS
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.sizing.hardware import Hardware, load
from megatron_sphinx.sizing.memory import EncoderCost, heaviest, peak
from megatron_sphinx.sizing.sizes import encoder_cost
from megatron_sphinx.sizing.work import Work

_MICRO_BATCHES_OF_A_STAGE = 4  # with so many, a pipeline's bubble is small: GPipe, arXiv:1811.06965, section 3


@dataclass(frozen=True)
class Settled:
    """A configuration whose values of auto have been taken, and what it needs by the plan.

    Attributes:
        config: with a number of rows and of views, and a precision.
        role: of the rank that holds most.
        needed: bytes that it holds.
        usable: bytes that it may hold.
    """

    config: Config
    role: str
    needed: float
    usable: float

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory that it needs."""
        return self.needed <= self.usable

    @property
    def reason(self) -> str:
        """Why the values were taken, or that they do not fit, in a line."""
        verdict = "" if self.fits else ", which does not fit; divide the model further, or compute activations again"
        return f"by the plan {self.role} holds {self.needed / 1e9:.3g} of {self.usable / 1e9:.3g} usable GB{verdict}"


def most_rows(work: Work, layout: ParallelLayout) -> int:
    """Return the most rows that are worth a micro-batch: a replica's rows of a step, in a pipeline a part of them."""
    rows, stages = -(-work.rows // layout.data), layout.config.pipeline
    return rows if stages == 1 else max(1, rows // (_MICRO_BATCHES_OF_A_STAGE * stages))


def settle(config: Config, layout: ParallelLayout, work: Work, hardware: Hardware, encoders: EncoderCost) -> Settled:
    """Take a value for each `auto`, and leave numbers as they are.

    The encoders' precision is what the hardware is fast in. Of views and rows, the most are taken that fit: first of
    views, up to MOST_BATCH_VIEWS on a GPU, with one row beside them; then of rows, up to `most_rows`. Where nothing
    fits, the least is taken.

    Args:
        config: the run; its `parallel` is not read.
        layout: how it is divided.
        work: the rows of a step.
        hardware: what each rank has.
        encoders: what it takes to encode.
    """
    precision = hardware.encoder_precision(config.vision.precision)
    config = replace(config, vision=replace(config.vision, precision=precision))
    least = config
    for least in _fewer_views(config, hardware):
        if _need(_with_rows(least, 1), layout, work, hardware, encoders).fits:
            break
    rows = most_rows(work, layout) if config.data.micro_batch_rows == "auto" else 1
    for count in range(rows, 0, -1):
        settled = _need(_with_rows(least, count), layout, work, hardware, encoders)
        if settled.fits:
            break
    return settled


def _fewer_views(config: Config, hardware: Hardware) -> Iterator[Config]:
    """Yield the configuration with the views that it may take at once, most first."""
    views = config.vision.batch_views
    if views == "auto":
        views = MOST_BATCH_VIEWS if hardware.is_cuda else LEAST_BATCH_VIEWS
        while views > LEAST_BATCH_VIEWS:
            yield replace(config, vision=replace(config.vision, batch_views=views))
            views //= 2
    yield replace(config, vision=replace(config.vision, batch_views=views))


def _with_rows(config: Config, rows: int) -> Config:
    """Return the configuration with so many rows at once, unless it names a number itself."""
    is_auto = config.data.micro_batch_rows == "auto"
    return replace(config, data=replace(config.data, micro_batch_rows=rows)) if is_auto else config


def _need(config: Config, layout: ParallelLayout, work: Work, hardware: Hardware, encoders: EncoderCost) -> Settled:
    """Count what the rank with most needs."""
    role, needed = heaviest(peak(config, layout, work, hardware, encoders))
    return Settled(config, role, needed, hardware.usable_bytes)


def fit(config: Config, layout: ParallelLayout, planner: Planner, memory_bytes: float, *, is_cuda: bool) -> Settled:
    """Settle a run that begins, on ranks that have so much memory; see run.automatic.Fit.

    On a CPU a rank takes no more than hardware.yaml gives one: the rest is its machine's, and more rows at once are not
    faster there.
    """
    work = Work.of_plan(planner.step(0), planner.lengths)
    kind = load("h100-80g" if is_cuda else "cpu")
    memory = memory_bytes if is_cuda else min(memory_bytes, kind.memory_bytes)
    return settle(config, layout, work, replace(kind, memory_bytes=memory), encoder_cost(config.vision))
