"""Observes one rank of a measured run, and writes what it has seen to `ranks/<rank>.json` in the run folder."""

import json
import os
import socket
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

from megatron_sphinx.benchmark.communication import seconds_by_axis
from megatron_sphinx.benchmark.summary import PROFILED
from megatron_sphinx.data.packing import views_in
from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.run.job import RankContext


class RankObserver:
    """Observes a rank of a run of `warmup + steps + PROFILED` steps, as run.observer says when.

    The last steps are profiled, so that no profiler slows what is measured. An encoder rank is ahead of the others;
    what it does for a step counts for that step, whenever it does it.

    Args:
        warmup: steps before the measured ones.
        steps: measured steps.
    """

    def __init__(self, *, warmup: int, steps: int) -> None:
        # Torch reads it when it makes its first process group; without it no flight recorder knows the operations.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200000")
        self._first, self._stop = warmup, warmup + steps
        self._observed: dict[str, Any] = {}
        self._steps: dict[str, list[float]] = {"seconds": [], "data_wait_seconds": [], "exposed_encoder_seconds": []}
        self._plans: list[StepPlan] = []
        self._before = 0.0
        self._profile: torch.profiler.profile | None = None
        self._profiled_seconds = self._profiled_exposed = 0.0
        self._micro_batches: list[tuple[int, float, float, float]] = []

    def begin(self, context: RankContext) -> None:
        """Note what the rank is and has, and measure the peak FLOP/s of all ranks at once."""
        self._context, platform, seat = context, context.platform, context.groups.seat
        config = context.config
        precision = config.training.precision if seat.encoder is None else config.vision.precision
        dist.barrier(group=context.groups.control)
        self._observed = {
            "rank": seat.rank,
            "role": seat.role,
            "seat": asdict(seat),
            "layout": str(context.groups.layout),
            "host": socket.gethostname(),
            "device": platform.model,
            "threads": torch.get_num_threads(),
            "backend": platform.backend,
            "peak_flops": platform.measure_peak_flops(torch.bfloat16 if precision == "bf16" else torch.float32),
        }
        dist.barrier(group=context.groups.control)

    def step(self, plan: StepPlan, seconds: float, data_seconds: float, feature_seconds: float) -> None:
        """Note the seconds of a step of a language rank; begin and end the profile.

        Args:
            plan: what was in the step.
            seconds: of the whole step.
            data_seconds: of it, waiting for token rows.
            feature_seconds: waiting for features since the run has begun, or encoding where there are no encoder ranks.
        """
        exposed, self._before = feature_seconds - self._before, feature_seconds
        if self._first <= plan.step < self._stop:
            for name, value in zip(self._steps, (seconds, data_seconds, exposed), strict=True):
                self._steps[name].append(value)
            self._plans.append(plan)
        if plan.step >= self._stop:
            self._profiled_seconds += seconds
            self._profiled_exposed += exposed
        if plan.step == self._stop - 1:
            self._begin_profile()
        elif plan.step == self._stop + PROFILED - 1:
            self._end_profile()

    def micro_batch(self, views: int, read_seconds: float, encode_seconds: float, send_seconds: float) -> None:
        """Note a micro-batch of an encoder rank: its views, and three sums of seconds since the run has begun."""
        self._micro_batches.append((views, read_seconds, encode_seconds, send_seconds))

    def end(self) -> None:
        """Write what was observed to `ranks/<rank>.json` in the run folder."""
        self._observed["peak_memory_bytes"] = self._context.platform.peak_memory_bytes()
        is_encoder = self._context.groups.seat.encoder is not None
        self._observed |= self._encoder_facts() if is_encoder else self._language_facts()
        folder = self._context.folder / "ranks"
        folder.mkdir(exist_ok=True)
        (folder / f"{self._observed['rank']}.json").write_text(json.dumps(self._observed, indent=1))

    def _language_facts(self) -> dict[str, Any]:
        """What a language rank has done: the means of what is in a step, the seconds of each, and communication."""
        count = len(self._plans)
        work = {
            "positions": sum(plan.positions for plan in self._plans) / count,
            "pairs": sum(len(plan.samples) for plan in self._plans) / count,
            "text_tokens": sum(tokens for plan in self._plans for _, _, tokens in plan.text) / count,
            "targets": sum(plan.targets(of_samples=side) for plan in self._plans for side in (True, False)) / count,
            "views": sum(len(views_in(plan.rows)) for plan in self._plans) / count,
            "language_flops": sum(self._context.planner.cost(row) for plan in self._plans for row in plan.rows) / count,
        }
        return {"steps": self._steps, "work": work, "communication": self._observed.pop("communication")}

    def _encoder_facts(self) -> dict[str, Any]:
        """What an encoder rank has done for the measured steps: views of a step, and seconds of all."""
        rounds = [len(self._context.planner.step(step).micro_batches) for step in range(self._stop)]
        first, stop = sum(rounds[: self._first]), sum(rounds)
        before = self._micro_batches[first - 1] if first else (0, 0.0, 0.0, 0.0)
        spent = [end - begin for begin, end in zip(before[1:], self._micro_batches[stop - 1][1:], strict=True)]
        views = sum(views for views, *_ in self._micro_batches[first:stop]) / (self._stop - self._first)
        names = ("read_seconds", "encode_seconds", "send_seconds")
        waits = {"features": spent[2] / sum(spent)}
        return {"views_per_step": views, **dict(zip(names, spent, strict=True)), "communication": waits}

    def _begin_profile(self) -> None:
        """Begin to profile this rank."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self._context.platform.is_cuda else []
        self._profile_begin = time.time_ns()
        self._profile = torch.profiler.profile(activities=kinds, record_shapes=True)
        self._profile.start()

    def _end_profile(self) -> None:
        """End the profile, and note which share of its steps each axis communicated."""
        assert self._profile is not None
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        # Private, for torch has no public way to read the flight recorder of a backend that may be gloo.
        recorder = json.loads(_dump_fr_trace_json(True, False))
        entries = recorder.get("entries", [])  # none where no message was sent
        recorded = [entry for entry in entries if entry["time_created_ns"] >= self._profile_begin]
        seconds = seconds_by_axis(events, recorded, language=self._context.groups.layout.language)
        shares = {axis: value / self._profiled_seconds for axis, value in seconds.items()}
        if self._context.config.parallel.encoder:
            shares["features"] = self._profiled_exposed / self._profiled_seconds
        self._observed["communication"] = shares
