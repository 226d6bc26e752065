"""Measures the steps of the table: ours in one process, the peer in others, so that each has all of the memory."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.device import Platform, current_platform
from megatron_sphinx.gpu_check import trace
from megatron_sphinx.gpu_check.findings import Finding, Note, Values
from megatron_sphinx.gpu_check.peaks import peak_of
from megatron_sphinx.gpu_check.peer import Llama, WithDeepSpeed, padded_batches
from megatron_sphinx.gpu_check.scales import KINDS, Scale
from megatron_sphinx.gpu_check.workload import Features, OurSteps, configure, open_job, targets_of
from megatron_sphinx.model.vision import VisualProjection
from megatron_sphinx.run import assembly
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.sizing.counts import TrainingSetup
from megatron_sphinx.sizing.memory import EncoderCost, language_rank
from megatron_sphinx.sizing.step_time import step_time
from megatron_sphinx.sizing.work import Work
from megatron_sphinx.training.engine import Engine

_TOO_LARGE = "does not fit into the GPU's memory"
_NO_ENCODERS = EncoderCost(0, 0.0, 0.0, ())  # features come from memory


def timed(step: Callable[[int], object], count: int, platform: Platform) -> list[float]:
    """Take steps from 0, each from an idle device to an idle device; the seconds of each."""
    seconds = []
    for number in range(count):
        platform.synchronize()
        begin = time.perf_counter()
        step(number)
        platform.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


def ours(scale: Scale, folder: Path, note: Note, *, has_rows: bool, has_profile: bool) -> None:
    """Measure our step of each kind with each micro-batch; then profile a mixed one.

    Args:
        scale: sizes.
        folder: where the data is.
        note: hears of each row.
        has_rows: whether rows are measured.
        has_profile: whether a step is profiled.
    """
    engine: Engine | None = None
    for kind in KINDS if has_rows else ():
        for rows in scale.micro_batch_rows if kind == "mixed" else scale.micro_batch_rows[-1:]:
            job = open_job(configure(scale, kind, rows, folder), folder)
            side = OurSteps(job, engine)
            engine = side.loop.trainer.engine
            try:
                note(_our_row(scale, job, side, kind, rows))
            except torch.OutOfMemoryError:
                note(Finding(section="fast", name=f"ours {kind} {rows}", absent=_TOO_LARGE))
                return  # the engine holds half a step
            finally:
                side.close()
    if has_profile:
        rows = scale.micro_batch_rows[-1]
        job = open_job(configure(scale, "mixed", rows, folder), folder)
        _profile(scale, job, OurSteps(job, engine), note)


def _our_row(scale: Scale, job: RankContext, side: OurSteps, kind: str, rows: int) -> Finding:
    """Measure one kind of step with one micro-batch, and what it was predicted to take."""
    if job.platform.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(side, scale.warmup + scale.steps, job.platform)
    plan, peak = job.planner.step(scale.warmup), peak_of(job.platform)
    values: Values = {
        "kind": kind,
        "micro_batch_rows": rows,
        "seconds": seconds,
        "warmup": scale.warmup,
        "targets": targets_of(plan),
        "positions": plan.positions,
        "flops": sum(map(job.planner.cost, plan.rows)),
        "peak_flops": peak.flops,
        "peak_source": peak.source,
    }
    if job.platform.is_cuda:
        values["memory_bytes"] = torch.cuda.max_memory_allocated()
    if peak.hardware is not None:
        work = Work.of_plan(plan, job.planner.lengths)
        setup, layout = TrainingSetup.ours(job.config, is_cuda=True), job.groups.layout
        held = language_rank(job.config, layout, 0, work, peak.hardware, _NO_ENCODERS)
        values["predicted_seconds"] = step_time(setup, layout, work, peak.hardware, ranks_per_node=1).language
        values["predicted_memory_bytes"] = held["total"] - held["process"] - held["encoders"]
    return Finding(section="fast", name=f"ours {kind} {rows}", values=values)


def _profile(scale: Scale, job: RankContext, side: OurSteps, note: Note) -> None:
    """Profile one mixed step after the warm-up: its heaviest kernels, the busy share, the share of gradients."""
    timed(side, scale.warmup, job.platform)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if job.platform.is_cuda else [])
    with torch.profiler.profile(activities=kinds) as profile, record_function(trace.STEP):
        side(scale.warmup)
        job.platform.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = trace.read(path)
    for number, kernel in enumerate(trace.heaviest(events), 1):
        note(Finding(section="profile", name=f"kernel {number}", values=kernel))
    note(Finding(section="profile", name="mixed step", values=trace.shares(events)))


def peer(
    scale: Scale, folder: Path, note: Note, *, sizes: Mapping[str, Sequence[Sequence[int]]], warmup: int, steps: int
) -> None:
    """Measure the peer's step of some kinds, with micro-batches of some sizes; ends where one does not fit.

    Args:
        scale: sizes of the model and the step.
        folder: where the data is.
        note: hears of each row.
        sizes: by kind, pairs of samples and rows of text at once, in ascending order.
        warmup: steps of each that do not count.
        steps: steps of each that do.
    """
    platform = current_platform()
    job = open_job(configure(scale, "mixed", 1, folder), folder)
    side = WithDeepSpeed(job, _peer_model(job), {})
    for kind, pairs in sizes.items():
        job = open_job(configure(scale, kind, 1, folder), folder)
        plans = [job.planner.step(step) for step in range(warmup + steps)]
        features = Features(job)
        for size in pairs:
            name = f"peer {kind} {size[0]} {size[1]}"
            batches = [padded_batches(job, plan, (size[0], size[1]), features) for plan in plans]
            try:
                seconds = timed(partial(_peer_step, side, batches, plans), len(plans), platform)
            except torch.OutOfMemoryError:
                note(Finding(section="fast", name=name, absent=_TOO_LARGE))
                return  # what DeepSpeed holds of a step that ended in its middle is of no use
            padded = sum(tokens.numel() for tokens, _, _ in batches[warmup])
            values = {"kind": kind, "size": list(size), "seconds": seconds, "warmup": warmup}
            values |= {"padded_positions": padded, "targets": targets_of(plans[warmup])}
            note(Finding(section="fast", name=name, values=values))


def _peer_step(side: WithDeepSpeed, batches: Sequence[Any], plans: Sequence[StepPlan], step: int) -> None:
    """Take one step of the peer."""
    side.step(batches[step], targets_of(plans[step]))


def _peer_model(job: RankContext) -> Llama:
    """Build transformers' LLaMA on the device, its weights drawn there."""
    dtype, device = assembly.dtype_of(job.config), job.platform.device
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            vision = VisualProjection(job.config.vision, job.config.model.hidden, dtype=dtype, device=device)
            return Llama(job.config, vision)
    finally:
        torch.set_default_dtype(before)


def middle(turns: Sequence[Mapping[str, Any]]) -> tuple[float, float, int]:
    """Sum up turns of steps: the median behind each turn's warm-up, the worst of those over it, and their number."""
    counted = [value for turn in turns for value in turn["seconds"][turn["warmup"] :]]
    center = median(counted)
    return center, max(counted) / center, len(counted)
