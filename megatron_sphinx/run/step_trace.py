"""Writes what one rank does in some steps as a trace of torch's profiler, which Perfetto and chrome://tracing open."""

from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_sphinx.console import say
from megatron_sphinx.device import Platform
from megatron_sphinx.errors import writing
from megatron_sphinx.liveness.progress import Activity
from megatron_sphinx.training.profile import ProfileConfig


class StepTrace:
    """Profiles a rank from the beginning of one step to the end of another; hears of both from the rank's `Progress`.

    In the trace each step is a range `step <number>`, and inside it lies a range for each `Activity`. Nothing that is
    computed changes.

    Args:
        config: which steps and ranks are recorded.
        folder: the run folder.
        rank: number of this rank in the job.
        platform: what the rank computes on.
    """

    def __init__(self, config: ProfileConfig, folder: Path, rank: int, platform: Platform) -> None:
        self._is_mine = config.steps > 0 and rank in config.ranks
        self._first, self._stop = config.start, config.start + config.steps
        self._folder, self._rank, self._platform = folder, rank, platform
        self._profile: profile | None = None
        self._step, self._last = ExitStack(), config.start
        self._activity = ExitStack()

    def step(self, number: int) -> None:
        """Hear that the rank begins a step; begin or end the profile where it is time to."""
        if not self._is_mine:
            return
        self._leave_step()
        if number >= self._stop:
            self.close()
        elif number >= self._first:
            if self._profile is None:
                self._begin(number)
            self._last = number
            self._step.enter_context(record_function(f"step {number}"))

    def activity(self, doing: Activity) -> None:
        """Hear what the rank does from now on."""
        if self._profile is not None:
            self._activity.close()
            self._activity.enter_context(record_function(doing.value))

    def close(self) -> None:
        """End the profile, if it goes on, and write it.

        Raises:
            FolderError: the trace cannot be written.
        """
        self._leave_step()
        if self._profile is None:
            return
        self._platform.synchronize()
        self._profile.stop()
        path = self._folder / "profile" / f"rank_{self._rank}_steps_{self._began}-{self._last}.json.gz"
        with writing(self._folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(path))
        say(f"steps {self._began} to {self._last} of rank {self._rank} are profiled in {path}")
        self._profile, self._is_mine = None, False

    def _begin(self, number: int) -> None:
        """Start the profiler before a step; on CUDA that takes a second or two, which no step is charged with."""
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._platform.is_cuda else [])
        self._platform.synchronize()
        self._profile, self._began = torch.profiler.profile(activities=kinds), number
        self._profile.start()

    def _leave_step(self) -> None:
        """End the ranges that are open."""
        self._activity.close()
        self._step.close()
