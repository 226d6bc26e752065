"""Every layout of a job: which fit, how fast each would be, and why the others are refused. Arithmetic only."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sphinx.config import Config
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.sizing.counts import TrainingSetup
from megatron_sphinx.sizing.hardware import Hardware
from megatron_sphinx.sizing.memory import EncoderCost, heaviest, peak
from megatron_sphinx.sizing.step_time import Timing, step_time
from megatron_sphinx.sizing.work import Work

_MICRO_BATCH_ROWS = (1, 2, 4, 8, 16)
_CHECKPOINTING = ("none", "selective", "full")


class PlanError(ConfigError):
    """No layout fits, or the one that is asked for does not."""


@dataclass(frozen=True, kw_only=True)
class SizingRequest:
    """What is to be planned.

    Attributes:
        config: the run.
        nodes: of the job.
        ranks_per_node: GPUs of each.
        hardware: of each rank.
        work: of a step.
        encoders: what it takes to encode.
    """

    config: Config
    nodes: int
    ranks_per_node: int
    hardware: Hardware
    work: Work
    encoders: EncoderCost

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Candidate:
    """A layout that can be run.

    Attributes:
        config: the run with this layout.
        layout: how its ranks are divided.
        memory: bytes of each role, by what holds them.
        timing: of a step.
    """

    config: Config
    layout: ParallelLayout
    memory: dict[str, dict[str, float]]
    timing: Timing

    @property
    def overrides(self) -> list[str]:
        """The layout as `key=value` for the command line."""
        sizes, data, training = self.config.parallel, self.config.data, self.config.training
        keys = ("tensor", "sequence", "pipeline", "expert", "expert_tensor", "encoder")
        found = [f"parallel.{key}={str(getattr(sizes, key)).lower()}" for key in keys]
        found.append(f"data.micro_batch_rows={data.micro_batch_rows}")
        return [*found, f"training.activation_checkpointing={training.activation_checkpointing}"]


@dataclass
class Refusals:
    """Why layouts cannot be run: for each reason how many, and one of them in words."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """Count one more."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.examples.setdefault(reason, example)


def evaluate(job: SizingRequest, config: Config) -> Candidate:
    """The memory and time of one layout.

    Raises:
        ConfigError: the sizes do not fit the job or the model.
        PlanError: a rank would hold more than there is, or a replica would have nothing to do.
    """
    layout = ParallelLayout(world=job.world, config=config.parallel)
    if layout.data > job.work.rows:
        raise PlanError(
            f"data.pairs_per_step={config.data.pairs_per_step}: makes {job.work.rows} rows a step for {layout.data} "
            f"data-parallel replicas, some would compute nothing; take fewer ranks, or more tensor or pipeline ranks"
        )
    found = peak(config, layout, job.work, job.hardware, job.encoders)
    role, most = heaviest(found)
    if most > job.hardware.usable_bytes:
        parts = sorted(((size, name) for name, size in found[role].items() if name != "total"), reverse=True)[:3]
        held = ", ".join(f"{name} {size / 1e9:.1f} GB" for size, name in parts)
        raise PlanError(
            f"{layout}: {role} needs {most / 1e9:.1f} GB of {job.hardware.usable_bytes / 1e9:.1f} GB ({held}); divide "
            f"the model further, or compute fewer rows at once or activations again"
        )
    run = TrainingSetup.ours(config, is_cuda=job.hardware.is_cuda)
    timing = step_time(run, layout, job.work, job.hardware, ranks_per_node=job.ranks_per_node, encoders=job.encoders)
    return Candidate(config, layout, found, timing)


def search(job: SizingRequest) -> tuple[list[Candidate], Refusals]:
    """All layouts that can be run, the fastest first, and why the others cannot."""
    refusals, found = Refusals(), []
    for parallel in layouts(job, refusals):
        replicas = (job.world - parallel.encoder) // (parallel.tensor * parallel.pipeline)
        for rows in _MICRO_BATCH_ROWS:
            if rows > max(1, -(-job.work.rows // replicas)):
                break  # a replica does not have so many
            for checkpointing in _CHECKPOINTING:
                training = replace(
                    job.config.training, activation_checkpointing=checkpointing, checkpointed_layers=None
                )
                data = replace(job.config.data, micro_batch_rows=rows)
                try:
                    config = replace(job.config, parallel=parallel, data=data, training=training)
                    found.append(evaluate(job, config))
                except ConfigError as error:
                    refusals.add(_reason(error), str(error))
    return sorted(found, key=lambda candidate: candidate.timing.total), refusals


def layouts(job: SizingRequest, refusals: Refusals) -> Iterator[ParallelConfig]:
    """Sizes of all axes that divide the job and the model; the rest is counted as refused."""
    model, per_node = job.config.model, job.ranks_per_node
    for encoder in _encoder_counts(job):
        language = job.world - encoder
        for tensor in _divisors(language):
            if tensor > per_node:
                refusals.add("tensor ranks span nodes", f"parallel.tensor={tensor}: more than the {per_node} of a node")
                break
            for pipeline in _divisors(language // tensor):
                if pipeline > model.layers:
                    break
                if unfit := _unfit(job.config, tensor):
                    refusals.add("tensor ranks do not divide the model", unfit)
                    continue
                stage = language // pipeline
                for expert, expert_tensor in _expert_sizes(model.experts, stage):
                    for sequence in (False, True) if tensor > 1 else (False,):
                        if model.experts and tensor > 1 and not sequence:
                            continue
                        yield ParallelConfig(
                            tensor=tensor, pipeline=pipeline, sequence=sequence, expert=expert,
                            expert_tensor=expert_tensor, encoder=encoder,
                        )  # fmt: skip


def _unfit(config: Config, tensor: int) -> str | None:
    """Why so many tensor ranks do not divide the model, if they do not."""
    sizes = ParallelConfig(tensor=tensor, sequence=tensor > 1)
    try:
        replace(config, parallel=sizes)
    except ConfigError as error:
        return str(error)
    return None


def _encoder_counts(job: SizingRequest) -> list[int]:
    """Encoder ranks worth trying: none, and up to twice their share of the work, every count or every node's."""
    views = job.work.views * job.work.rows
    if not views or job.world == 1:
        return [0]
    encoding = views * job.encoders.flops
    language = job.work.rows * job.work.language_flops(job.config.model)
    most = min(job.world - 1, max(2, round(2 * job.world * encoding / (encoding + language))))
    step = max(1, most // 32)
    return [0, *range(step, most + 1, step)]


def _expert_sizes(experts: int, stage: int) -> list[tuple[int, int]]:
    if not experts:
        return [(1, 1)]
    found = [(expert, inner) for expert in _divisors(experts) for inner in (1, 2, 4, 8)]
    return [(expert, inner) for expert, inner in found if stage % (expert * inner) == 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _reason(error: ConfigError) -> str:
    """What a refusal is counted under."""
    text = str(error)
    if not isinstance(error, PlanError):
        return f"{text.split('=', 1)[0]} does not divide the model or the job"
    return "out of memory" if " needs " in text else "a replica without rows"


def summary(job: SizingRequest, candidate: Candidate) -> dict[str, Any]:
    """A layout in plain values."""
    timing, work = candidate.timing, job.work
    _, most = heaviest(candidate.memory)
    flops = work.rows * work.language_flops(job.config.model)
    precision = job.config.training.precision
    peak_flops = job.world * getattr(job.hardware.flops, precision)
    return {
        "layout": str(candidate.layout),
        "overrides": candidate.overrides,
        "step_seconds": timing.total,
        "tokens_per_second": work.rows * work.positions / timing.total,
        "model_flops_utilization": flops / timing.total / peak_flops,
        "seconds": {name: value for name, value in vars(timing).items() if value},
        "encoder_over_language": timing.encoder / timing.language if timing.encoder else None,
        "bytes": candidate.memory,
        "peak_bytes": most,
    }


def table(job: SizingRequest, found: list[Candidate], refusals: Refusals, *, shown: int = 8) -> str:
    """The best layouts, one a line, and the reasons of the others."""
    head = (
        f"{'T':>3}{'S':>2}{'P':>4}{'E':>3}{'ET':>3}{'data':>5}{'enc':>4}{'rows':>5} {'recompute':9} {'s/step':>8}"
        f"{'tokens/s':>11} {'MFU':>5} {'GB':>6} {'enc GB':>6} {'enc:lang':>8}  most of the time"
    )
    lines = [head]
    for candidate in found[:shown]:
        sizes, values = candidate.config.parallel, summary(job, candidate)
        parts = {name: value for name, value in values["seconds"].items() if name != "encoder"}
        largest = sorted(parts.items(), key=lambda item: -item[1])[:4]
        language = max(role["total"] for name, role in candidate.memory.items() if name != "encoder") / 1e9
        encoder = candidate.memory.get("encoder", {}).get("total", 0.0) / 1e9
        balance = values["encoder_over_language"]
        lines.append(
            f"{sizes.tensor:3}{'y' if sizes.sequence else '-':>2}{sizes.pipeline:4}{sizes.expert:3}"
            f"{sizes.expert_tensor:3}{candidate.layout.data:5}{sizes.encoder:4}"
            f"{candidate.config.data.micro_batch_rows:5} {candidate.config.training.activation_checkpointing:9} "
            f"{values['step_seconds']:8.3f}{values['tokens_per_second']:11,.0f} "
            f"{values['model_flops_utilization']:5.1%} "
            f"{language:6.1f} {f'{encoder:.1f}' if encoder else '-':>6} "
            f"{f'{balance:.2f}' if balance else '-':>8}  "
            + ", ".join(f"{name} {value / candidate.timing.total:.0%}" for name, value in largest)
        )
    refused = sum(refusals.counts.values())
    lines.append(f"{len(found)} layouts can be run, {refused} cannot:")
    for reason, count in sorted(refusals.counts.items(), key=lambda item: -item[1]):
        lines.append(f"{count:8}  {reason}, e.g. {refusals.examples[reason]}")
    return "\n".join(lines)


def report(job: SizingRequest, found: list[Candidate], refusals: Refusals, *, shown: int = 8) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "ranks": job.world,
        "hardware": job.hardware.source,
        "work": vars(job.work),
        "best": [summary(job, candidate) for candidate in found[:shown]],
        "accepted": len(found),
        "refused": {
            reason: {"count": count, "example": refusals.examples[reason]} for reason, count in refusals.counts.items()
        },
    }
