"""Every layout of a job: which fit, how fast each would be, and why the others are refused. Arithmetic only."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sphinx.config import Config
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout, divisors
from megatron_sphinx.sizing.automatic import settle
from megatron_sphinx.sizing.counts import TrainingSetup
from megatron_sphinx.sizing.hardware import Hardware
from megatron_sphinx.sizing.memory import EncoderCost, heaviest, peak
from megatron_sphinx.sizing.step_time import StepSeconds, step_time, tokens_per_second
from megatron_sphinx.sizing.work import Work

_MICRO_BATCH_ROWS = (1, 2, 4, 8, 16)
_EXPERT_TENSOR_SIZES = (1, 2, 4, 8)
_CHECKPOINTING = ("none", "selective", "full")


class PlanError(ConfigError):
    """No layout fits, or the one that is asked for does not."""


class TooLargeError(PlanError):
    """A rank would hold more than it has memory for."""


@dataclass(frozen=True, kw_only=True)
class SizingRequest:
    """What is to be laid out, and on what.

    Attributes:
        config: the run; its `parallel` is what a search replaces.
        nodes: how many nodes the job has.
        ranks_per_node: GPUs of each node.
        hardware: what each rank computes with.
        work: the rows of a step.
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
        """How many ranks the job has."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Candidate:
    """A layout that can be run.

    Attributes:
        config: the run with this layout.
        layout: how its ranks are divided.
        memory: bytes of each role, by what holds them, as memory.peak counts them.
        seconds: what a step takes.
    """

    config: Config
    layout: ParallelLayout
    memory: dict[str, dict[str, float]]
    seconds: StepSeconds

    @property
    def overrides(self) -> list[str]:
        """The layout as `key=value` for the command line."""
        sizes, data, training = self.config.parallel, self.config.data, self.config.training
        keys = ("tensor", "sequence", "pipeline", "expert", "expert_tensor", "encoder")
        overrides = [f"parallel.{key}={str(getattr(sizes, key)).lower()}" for key in keys]
        overrides.append(f"data.micro_batch_rows={data.micro_batch_rows}")
        return [*overrides, f"training.activation_checkpointing={training.activation_checkpointing}"]


@dataclass
class RefusedLayouts:
    """Layouts that cannot be run, counted by the reason.

    Attributes:
        counts: for each reason, how many layouts are refused for it.
        examples: for each reason, the error of one of them.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """Count one more layout, whose error is `example`."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.examples.setdefault(reason, example)


def evaluate(request: SizingRequest, config: Config) -> Candidate:
    """Predict the memory and time of one layout.

    Args:
        request: the job and its hardware.
        config: the run with the layout, `request.config` or a variation of it. Where a value is auto, the candidate has
            what a run would take.

    Raises:
        ConfigError: the sizes do not fit the job or the model.
        TooLargeError: a rank would hold more than there is.
        PlanError: a replica would have nothing to do.
    """
    layout = ParallelLayout(world=request.world, config=config.parallel)
    if layout.data > request.work.rows:
        raise PlanError(
            f"data.pairs_per_step={config.data.pairs_per_step}: makes {request.work.rows} rows a step for "
            f"{layout.data} data-parallel replicas, some would compute nothing; take fewer ranks, or more tensor or "
            f"pipeline ranks"
        )
    config = settle(config, layout, request.work, request.hardware, request.encoders).config
    memory = peak(config, layout, request.work, request.hardware, request.encoders)
    role, needed = heaviest(memory)
    if needed > request.hardware.usable_bytes:
        largest = sorted(((size, name) for name, size in memory[role].items() if name != "total"), reverse=True)[:3]
        held = ", ".join(f"{name} {size / 1e9:.1f} GB" for size, name in largest)
        raise TooLargeError(
            f"{layout}: {role} needs {needed / 1e9:.1f} GB of {request.hardware.usable_bytes / 1e9:.1f} GB ({held}); "
            f"divide the model further, or compute fewer rows at once or activations again"
        )
    setup = TrainingSetup.ours(config, is_cuda=request.hardware.is_cuda)
    seconds = step_time(
        setup, layout, request.work, request.hardware, ranks_per_node=request.ranks_per_node, encoders=request.encoders
    )
    return Candidate(config, layout, memory, seconds)


def search(request: SizingRequest) -> tuple[list[Candidate], RefusedLayouts]:
    """Find all layouts that can be run, the fastest first, and count why the others cannot."""
    refusals, candidates = RefusedLayouts(), []
    for parallel in layouts(request, refusals):
        replicas = (request.world - parallel.encoder) // (parallel.tensor * parallel.pipeline)
        for rows in _MICRO_BATCH_ROWS:
            if rows > max(1, -(-request.work.rows // replicas)):
                break  # a replica does not have so many
            for checkpointing in _CHECKPOINTING:
                training = replace(
                    request.config.training, activation_checkpointing=checkpointing, checkpointed_layers=None
                )
                data = replace(request.config.data, micro_batch_rows=rows)
                try:
                    config = replace(request.config, parallel=parallel, data=data, training=training)
                    candidates.append(evaluate(request, config))
                except ConfigError as error:
                    refusals.add(_reason(error), str(error))
    return sorted(candidates, key=lambda candidate: candidate.seconds.total), refusals


def layouts(request: SizingRequest, refusals: RefusedLayouts) -> Iterator[ParallelConfig]:
    """Yield the sizes of all axes that divide the job and the model; count others in `refusals`."""
    model, per_node = request.config.model, request.ranks_per_node
    for encoder in _encoder_counts(request):
        language = request.world - encoder
        for tensor in divisors(language):
            if tensor > per_node:
                refusals.add("tensor ranks span nodes", f"parallel.tensor={tensor}: more than the {per_node} of a node")
                break
            for pipeline in divisors(language // tensor):
                if pipeline > model.layers:
                    break
                if unfit := _unfit(request.config, tensor):
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
    """Return the error of a model that so many tensor ranks do not divide, or None where they do."""
    sizes = ParallelConfig(tensor=tensor, sequence=tensor > 1)
    try:
        replace(config, parallel=sizes)
    except ConfigError as error:
        return str(error)
    return None


def _encoder_counts(request: SizingRequest) -> list[int]:
    """List numbers of encoder ranks worth trying: 0, and up to twice the encoders' share of all FLOPs."""
    views = request.work.views * request.work.rows
    if not views or request.world == 1:
        return [0]
    encoding = views * request.encoders.flops
    language = request.work.rows * request.work.language_flops(request.config.model)
    largest = min(request.world - 1, max(2, round(2 * request.world * encoding / (encoding + language))))
    step = max(1, largest // 32)
    return [0, *range(step, largest + 1, step)]


def _expert_sizes(experts: int, stage: int) -> list[tuple[int, int]]:
    """List the sizes of the expert and the expert-tensor axis that divide the ranks of a stage and the experts."""
    if not experts:
        return [(1, 1)]
    sizes = [(expert, inner) for expert in divisors(experts) for inner in _EXPERT_TENSOR_SIZES]
    return [(expert, inner) for expert, inner in sizes if stage % (expert * inner) == 0]


def _reason(error: ConfigError) -> str:
    """Name the reason that a refused layout is counted under, from its error."""
    if isinstance(error, TooLargeError):
        return "out of memory"
    if isinstance(error, PlanError):
        return "a replica without rows"
    return f"{str(error).split('=', 1)[0]} does not divide the model or the job"


def summary(request: SizingRequest, candidate: Candidate) -> dict[str, Any]:
    """Describe a layout in plain values, as JSON takes them."""
    seconds, work = candidate.seconds, request.work
    _, peak_bytes = heaviest(candidate.memory)
    flops = work.rows * work.language_flops(request.config.model)
    precision = request.config.training.precision
    peak_flops = request.world * getattr(request.hardware.flops, precision)
    return {
        "layout": str(candidate.layout),
        "overrides": candidate.overrides,
        "step_seconds": seconds.total,
        "tokens_per_second": tokens_per_second(work, seconds),
        "model_flops_utilization": flops / seconds.total / peak_flops,
        "seconds": {name: value for name, value in vars(seconds).items() if value},
        "encoder_over_language": seconds.encoder / seconds.language if seconds.encoder else None,
        "bytes": candidate.memory,
        "peak_bytes": peak_bytes,
    }


def table(request: SizingRequest, candidates: list[Candidate], refusals: RefusedLayouts, *, shown: int = 8) -> str:
    """Format the best `shown` layouts as a table, one a line, with the reasons that others are refused for below."""
    head = (
        f"{'T':>3}{'S':>2}{'P':>4}{'E':>3}{'ET':>3}{'data':>5}{'enc':>4}{'rows':>5} {'recompute':9} {'s/step':>8}"
        f"{'tokens/s':>11} {'MFU':>5} {'GB':>6} {'enc GB':>6} {'enc:lang':>8}  most of the time"
    )
    lines = [head]
    for candidate in candidates[:shown]:
        sizes, values = candidate.config.parallel, summary(request, candidate)
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
            + ", ".join(f"{name} {value / candidate.seconds.total:.0%}" for name, value in largest)
        )
    refused = sum(refusals.counts.values())
    lines.append(f"{len(candidates)} layouts can be run, {refused} cannot:")
    for reason, count in sorted(refusals.counts.items(), key=lambda item: -item[1]):
        lines.append(f"{count:8}  {reason}, e.g. {refusals.examples[reason]}")
    return "\n".join(lines)


def report(
    request: SizingRequest, candidates: list[Candidate], refusals: RefusedLayouts, *, shown: int = 8
) -> dict[str, Any]:
    """Describe the best `shown` layouts and the refused ones in plain values, as JSON takes them."""
    return {
        "ranks": request.world,
        "hardware": request.hardware.source,
        "work": vars(request.work),
        "best": [summary(request, candidate) for candidate in candidates[:shown]],
        "accepted": len(candidates),
        "refused": {
            reason: {"count": count, "example": refusals.examples[reason]} for reason, count in refusals.counts.items()
        },
    }
