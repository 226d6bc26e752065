"""A rank from its launch to its exit status: how it meets the others, and what is said and done when it fails."""

from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from megatron_sphinx.config import Config
from megatron_sphinx.device import Platform, be_deterministic
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.liveness.lifeline import Lifeline
from megatron_sphinx.liveness.progress import Activity, Listener, Progress
from megatron_sphinx.liveness.stop import STOPPED, StopSignal
from megatron_sphinx.lock import Hold
from megatron_sphinx.model.kernels import choose
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.parallel.place import find_place
from megatron_sphinx.run.automatic import Fit
from megatron_sphinx.run.encoder_rank import EncoderRank
from megatron_sphinx.run.failure import report
from megatron_sphinx.run.job import join, open_run
from megatron_sphinx.run.language_rank import LanguageRank
from megatron_sphinx.run.observer import Observer
from megatron_sphinx.run.phases import start
from megatron_sphinx.run.start_clock import StartClock, process_seconds
from megatron_sphinx.run.step_trace import StepTrace
from megatron_sphinx.training.profile import ProfileConfig

_MARGIN_SECONDS = 60.0  # a stall is reported by name before a collective gives up


def train(
    config: Config,
    stop: StopSignal | None = None,
    observer: Observer | None = None,
    fit: Fit | None = None,
    *,
    is_profiled: bool = False,
    store: Store | None = None,
) -> int:
    """Train on this rank; the exit status of the process.

    Args:
        config: of the run.
        stop: hears of signals since the process began; without it none is heard of.
        observer: watches this rank.
        fit: takes what fits into memory where a value is auto; without it the least is taken.
        is_profiled: whether the first rank prints how long each phase of the start took.
        store: where the ranks have met already; without it they meet here.

    Raises:
        SphinxError: the user's mistake, on a job of one rank or before the ranks have met.
    """
    clock = StartClock(is_profiled=is_profiled)
    clock.note("imports", process_seconds())
    rank, world = find_place()
    layout = ParallelLayout(world=world, config=config.parallel)
    seat = layout.seat(rank)
    config.training.profile.check_ranks(world)
    stop, hold = stop or StopSignal(), Hold(Path(config.run.folder), rank)
    for_steps, for_files = (
        timedelta(seconds=seconds + _MARGIN_SECONDS) for seconds in (config.run.timeout, config.run.storage_timeout)
    )
    platform = clock.timed("join", partial(_join, config, for_files.total_seconds(), store))()
    trace = StepTrace(ProfileConfig() if observer else config.training.profile, Path(config.run.folder), rank, platform)
    progress = _progress(config, platform, trace)
    ratio = config.run.straggler_ratio
    lifeline = Lifeline.connect(f"{seat.role} rank {rank}", progress=progress, stop=stop, straggler_ratio=ratio)
    stop.has_met()
    try:
        choose(config.model.kernels, platform)  # refused here, before anything large is read
        make_groups = partial(ProcessGroups.create, layout, platform.backend, for_steps, for_files)
        groups = clock.timed("make_groups", make_groups)()
        opening = partial(open_run, config, platform, groups, progress=progress, stop=stop, fit=fit)
        context = clock.timed("open_data", partial(opening, hold=hold, clock=clock))()
        role = (LanguageRank if seat.encoder is None else EncoderRank)(context, observer)
        is_done = start(role) and role.run()
        trace.close()
        if is_done:
            _wait_for_end(progress, observer, groups)
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        if world == 1:
            lifeline.close()
            hold.give_back(error.exit_status if isinstance(error, SphinxError) else 1)
            raise
        status = report(error, lifeline, "train")
        hold.give_back(status)
        lifeline.leave(status, str(error))
    hold.give_back(0 if is_done else STOPPED)
    return _end(lifeline, world, is_done=is_done)


def _join(config: Config, timeout_seconds: float, store: Store | None) -> Platform:
    """Join the job, on a device that computes as the configuration says."""
    if config.training.deterministic:
        be_deterministic()
    return join(config.run.device, timeout_seconds, store)


def _progress(config: Config, platform: Platform, listener: Listener) -> Progress:
    """Make what a rank notes in what it is at, and how long it may take."""
    return Progress(
        timeout=config.run.timeout,
        storage_timeout=config.run.storage_timeout,
        probe=platform.probe_seconds,
        probe_interval=config.run.straggler_interval,
        listener=listener,
    )


def _wait_for_end(progress: Progress, observer: Observer | None, groups: ProcessGroups) -> None:
    """Wait for the other ranks: encoder ranks are done first, and stay to hear how the job ends."""
    if observer:
        observer.end()
    progress.note(Activity.ENDING)
    dist.barrier(group=groups.control)


def _end(lifeline: Lifeline, world: int, *, is_done: bool) -> int:
    """Leave the job, which is done or was stopped; the exit status."""
    if not is_done:
        if world > 1:
            lifeline.leave(STOPPED, "it was asked to stop; the state is saved")
        lifeline.close()
        return STOPPED
    lifeline.close()
    dist.destroy_process_group()
    return 0
