"""What a `points/<name>.json` of a benchmark must hold, so that reports of it can be written."""

from dataclasses import dataclass
from typing import Annotated, Any

from megatron_sphinx.ranges import Range

_COUNT, _AMOUNT = Range(least=0, most=2**53), Range(least=0, most=1e300)


@dataclass(frozen=True, kw_only=True)
class PointFile:
    """What every point has, one that failed too.

    Attributes:
        name: of the point.
        ranks: how many it ran on.
        steps: how many were measured in each run.
        warmup: how many came before them.
        repeats: runs of the point.
        is_synthetic: whether its data was made up.
        environment: versions, machine and command.
        config: the configuration; None where it could not be read.
        launcher: what started the ranks; None for torchrun.
        error: why it failed; None where it did not.
    """

    name: str
    ranks: Annotated[int, Range(least=1, most=1_000_000)]
    steps: Annotated[int, _COUNT]
    warmup: Annotated[int, _COUNT]
    repeats: Annotated[int, _COUNT]
    is_synthetic: bool
    environment: dict[str, Any]
    config: dict[str, Any] | None = None
    launcher: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a role and a rank of a point have in common.

    Attributes:
        flops_per_second, peak_flops: FLOP/s that were reached, and that a large matrix product reaches.
        utilization: the one over the other.
        peak_memory_bytes: the most memory.
        communication: share of a step in which each axis communicated.
    """

    flops_per_second: Annotated[float, _AMOUNT]
    peak_flops: Annotated[float, _AMOUNT]
    utilization: Annotated[float, _AMOUNT]
    peak_memory_bytes: Annotated[float, _AMOUNT]
    communication: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RankRow(Row):
    """What a rank of a point has.

    Attributes:
        rank: its number.
        role, host, device, backend: what it does, where, on what, and by which it communicates.
        threads: of PyTorch.
    """

    rank: Annotated[int, _COUNT]
    role: str
    host: str
    device: str
    backend: str
    threads: Annotated[int, _COUNT]


@dataclass(frozen=True, kw_only=True)
class RoleRow(Row):
    """What a role of a point has: how many ranks, and their sums and means."""

    ranks: Annotated[int, _COUNT]


@dataclass(frozen=True, kw_only=True)
class MeasuredPointFile(PointFile):
    """What a point has beside that where it did not fail.

    Attributes:
        layout: how the ranks divided the model.
        hosts: how many ranks each host had.
        samples: digest of the samples that it trained on.
        work: sums of a step.
        step_seconds, step_seconds_p95: median and 95th percentile.
        tokens_per_second, tokens_per_second_per_rank, samples_per_second: medians.
        exposed_encoder_share, data_wait_share: shares of a step in which features and data are waited for.
        feature_bytes_per_step: bytes of features.
        roles: by the role's name.
        per_rank: rank by rank.
    """

    layout: str
    hosts: dict[str, int]
    samples: str
    work: dict[str, Any]
    step_seconds: Annotated[float, _AMOUNT]
    step_seconds_p95: Annotated[float, _AMOUNT]
    tokens_per_second: Annotated[float, _AMOUNT]
    tokens_per_second_per_rank: Annotated[float, _AMOUNT]
    samples_per_second: Annotated[float, _AMOUNT]
    exposed_encoder_share: Annotated[float, _AMOUNT]
    data_wait_share: Annotated[float, _AMOUNT]
    feature_bytes_per_step: Annotated[float, _AMOUNT]
    roles: dict[str, RoleRow]
    per_rank: tuple[RankRow, ...]
