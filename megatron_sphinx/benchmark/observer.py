"""What one rank of a measured run sees, written to `ranks/<rank>.json` in the run folder when it ends."""

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
from megatron_sphinx.data.loader import views_in
from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.run.job import RankContext

PROFILED = 3  # steps behind the measured ones


class RankObserver:
    """Watches a rank of a run of `warmup + steps + PROFILED` steps; see `run.observer`.

    The last steps are profiled, so that no profiler slows what is measured. An encoder rank is ahead of the others;
    what it does for a step counts for that step, whenever it does it.
    """

    def __init__(self, *, warmup: int, steps: int) -> None:
        # read when torch makes its first process group
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200000")
        self._first, self._stop = warmup, warmup + steps
        self._found: dict[str, Any] = {}
        self._steps: dict[str, list[float]] = {"seconds": [], "data_wait_seconds": [], "exposed_encoder_seconds": []}
        self._plans: list[StepPlan] = []
        self._before = 0.0
        self._profile: torch.profiler.profile | None = None
        self._profiled_seconds = self._profiled_exposed = 0.0
        self._micro_batches: list[tuple[int, float, float, float]] = []

    def begin(self, context: RankContext) -> None:
        """See Observer; measures the peak of all ranks at once."""
        self._job, here, is_encoder = context, context.platform, context.groups.seat.encoder is not None
        is_bf16 = here.is_bf16_fast if is_encoder else context.config.training.precision == "bf16"
        dist.barrier()
        self._found = {
            "rank": context.groups.seat.rank,
            "role": context.groups.seat.role,
            "seat": asdict(context.groups.seat),
            "layout": str(context.groups.layout),
            "host": socket.gethostname(),
            "device": here.model,
            "threads": torch.get_num_threads(),
            "backend": here.backend,
            "peak_flops": here.measure_peak_flops(torch.bfloat16 if is_bf16 else torch.float32),
        }
        dist.barrier()

    def step(self, plan: StepPlan, seconds: float, data_seconds: float, feature_seconds: float) -> None:
        """See Observer."""
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
        """See Observer."""
        self._micro_batches.append((views, read_seconds, encode_seconds, send_seconds))

    def end(self) -> None:
        """See Observer; writes what was found."""
        self._found["peak_memory_bytes"] = self._job.platform.peak_memory_bytes()
        self._found |= self._of_encoder() if self._job.groups.seat.encoder is not None else self._of_language()
        folder = self._job.folder / "ranks"
        folder.mkdir(exist_ok=True)
        (folder / f"{self._found['rank']}.json").write_text(json.dumps(self._found, indent=1))

    def _of_language(self) -> dict[str, Any]:
        """Means over the steps of what a step is, and the seconds of each."""
        count = len(self._plans)
        work = {
            "positions": sum(plan.positions for plan in self._plans) / count,
            "pairs": sum(len(plan.pairs) for plan in self._plans) / count,
            "text_tokens": sum(tokens for plan in self._plans for _, _, tokens in plan.text) / count,
            "targets": sum(plan.targets(of_pairs=side) for plan in self._plans for side in (True, False)) / count,
            "views": sum(len(views_in(plan.rows)) for plan in self._plans) / count,
            "language_flops": sum(self._job.planner.cost(row) for plan in self._plans for row in plan.rows) / count,
        }
        return {"steps": self._steps, "work": work, "communication": self._found.pop("communication")}

    def _of_encoder(self) -> dict[str, Any]:
        """Views and seconds of the measured steps."""
        rounds = [len(self._job.planner.step(step).micro_batches) for step in range(self._stop)]
        first, stop = sum(rounds[: self._first]), sum(rounds)
        before = self._micro_batches[first - 1] if first else (0, 0.0, 0.0, 0.0)
        spent = [end - begin for begin, end in zip(before[1:], self._micro_batches[stop - 1][1:], strict=True)]
        views = sum(views for views, *_ in self._micro_batches[first:stop]) / (self._stop - self._first)
        names = ("read_seconds", "encode_seconds", "send_seconds")
        waits = {"features": spent[2] / sum(spent)}
        return {"views_per_step": views, **dict(zip(names, spent, strict=True)), "communication": waits}

    def _begin_profile(self) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self._job.platform.is_cuda else []
        self._profile_begin = time.time_ns()
        self._profile = torch.profiler.profile(activities=kinds, record_shapes=True)
        self._profile.start()

    def _end_profile(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        recorder = json.loads(_dump_fr_trace_json(True, False))
        entries = recorder.get("entries", [])  # none where no message was sent
        recorded = [entry for entry in entries if entry["time_created_ns"] >= self._profile_begin]
        seconds = seconds_by_axis(events, recorded, language=self._job.groups.layout.language)
        shares = {axis: value / self._profiled_seconds for axis, value in seconds.items()}
        if self._job.config.parallel.encoder:
            shares["features"] = self._profiled_exposed / self._profiled_seconds
        self._found["communication"] = shares
