"""What a dry run has counted on a rank, and what arithmetic says of it, under the same names."""

from dataclasses import dataclass

from megatron_sphinx.config import Config
from megatron_sphinx.data.plan import Planner
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.sizing import counts
from megatron_sphinx.sizing.counts import TrainingSetup
from megatron_sphinx.sizing.sizes import encoder_cost
from megatron_sphinx.sizing.work import Work
from megatron_sphinx.training.memory import rank_weights, zero2_bytes


@dataclass(frozen=True)
class RankCounts:
    """What a rank did in a step.

    Attributes:
        parameters: that it holds.
        flops: of matrix products and convolutions, and of attention.
        held: bytes of weights, gradients and optimizer, as the engine itself finds them.
        peak: bytes by part when it held most.
        collectives: (group, kind) to how many there were and the bytes of their messages.
        validation_peak: bytes when it held most in a step's worth of a validation; None for a run without, and for a
            rank that does then what it does in a step.
    """

    parameters: int
    flops: dict[str, float]
    held: dict[str, int]
    peak: dict[str, int]
    collectives: dict[tuple[str, str], tuple[int, int]]
    validation_peak: int | None = None

    def rows(self) -> dict[str, float]:
        """Give every number by what it is called in a report."""
        rows: dict[str, float] = {"parameters": self.parameters, "FLOPs": sum(self.flops.values())}
        rows |= {f"FLOPs: {kind}": flops for kind, flops in self.flops.items()}
        rows |= {f"bytes held: {part}": nbytes for part, nbytes in self.held.items()}
        rows |= {"bytes at the peak": sum(self.peak.values())}
        rows |= {f"bytes at the peak: {part}": nbytes for part, nbytes in sorted(self.peak.items()) if nbytes}
        if self.validation_peak is not None:
            rows |= {"bytes at the peak of a validation": self.validation_peak}
        for (group, kind), (times, nbytes) in sorted(self.collectives.items()):
            rows |= {f"{group} {kind}: times": times, f"{group} {kind}: bytes": nbytes}
        return rows


def formulas(config: Config, layout: ParallelLayout, planner: Planner, rank: int) -> dict[str, float]:
    """Compute a rank's step by arithmetic, under the names that `RankCounts.rows` gives, as far as there is a formula.

    Work and messages are those that step times are predicted from: of rows as they are on average, on a replica that
    has most of them.
    """
    seat, ours = layout.seat(rank), TrainingSetup.ours(config, is_cuda=False)
    role = "encoder" if seat.encoder is not None else f"language stage {seat.pipeline}"
    work = Work.of_plan(planner.step(0), planner.lengths)
    known = {"FLOPs": sum(counts.flops(ours, layout, work, encoder_cost(config.vision))[role].values())}
    for transfer in counts.communication(ours, layout, work)[role]:
        name = f"{transfer.group} {transfer.kind.replace('_', '-')}"
        for unit, number in (("times", transfer.count), ("bytes", transfer.bytes)):
            known[f"{name}: {unit}"] = known.get(f"{name}: {unit}", 0.0) + number
    if seat.encoder is not None:
        return known
    weights = rank_weights(config.model, config.vision, layout, seat.pipeline, config.training.train)
    held = zero2_bytes(weights, layout, precision=config.training.precision)
    parameters = weights.shared + weights.experts + weights.frozen
    return known | {"parameters": parameters} | {f"bytes held: {part}": nbytes for part, nbytes in held.items()}
