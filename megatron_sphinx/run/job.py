"""How the ranks of a job meet, and what each of them has from then on: platform, groups, data, plan, liveness."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from megatron_sphinx.config import Config
from megatron_sphinx.console import say
from megatron_sphinx.data.content import Memory, Scan
from megatron_sphinx.data.pixels import PixelLoader
from megatron_sphinx.data.plan import Planner
from megatron_sphinx.data.sources import Sources, make_planner, open_sources
from megatron_sphinx.data.validation import HeldOut, open_held_out, plan_validation, refuse_trained
from megatron_sphinx.device import Platform
from megatron_sphinx.liveness.progress import Progress
from megatron_sphinx.liveness.stop import StopSignal
from megatron_sphinx.lock import Hold
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.visual_experts import import_libraries
from megatron_sphinx.parallel import devices
from megatron_sphinx.parallel.groups import ProcessGroups, agree
from megatron_sphinx.parallel.meeting import meet
from megatron_sphinx.parallel.place import find_place
from megatron_sphinx.run.automatic import Fit, settle
from megatron_sphinx.run.start_clock import StartClock


@dataclass(frozen=True)
class RankContext:
    """What every rank of a running job has.

    Attributes:
        config: of the run, its epochs counted in steps.
        platform: what the rank computes on.
        groups: the rank's process groups.
        sources: the opened data.
        planner: plans every step, the same on every rank.
        held_out: what is validated on; None for a run without validations.
        progress: where the rank notes what it is at.
        stop: whether the job was asked to stop.
        hold: the run folder in this job's hands; None where nothing is written there.
        scan: on the first rank, what reads data whose content nothing knows, while the steps go on.
        clock: measures the start of the rank.
    """

    config: Config
    platform: Platform
    groups: ProcessGroups
    sources: Sources
    planner: Planner
    held_out: HeldOut | None = None
    progress: Progress = field(default_factory=Progress)
    stop: StopSignal = field(default_factory=StopSignal)
    hold: Hold | None = None
    scan: Scan | None = None
    clock: StartClock = field(default_factory=StartClock)

    @property
    def folder(self) -> Path:
        """The run folder, as the configuration names it."""
        return Path(self.config.run.folder)

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.groups.seat.rank == 0

    def pixels(self, sources: Sources | None = None) -> PixelLoader | None:
        """Open what reads the images of the training, or of other sources; None where there are none."""
        samples = (sources or self.sources).samples
        if samples is None:
            return None
        data = self.config.data
        quarantine = self.folder / "quarantine.jsonl"
        return PixelLoader(
            samples, self.config.vision, workers=data.workers, quarantine=quarantine,
            is_pinned=self.platform.is_cuda,
        )  # fmt: skip

    def encoders(self) -> FrozenEncoders:
        """Load the frozen encoders, compiled where that is asked for."""
        vision, seat = self.config.vision, self.groups.seat
        dtype = self.platform.encoder_dtype(vision.precision)
        encoders = FrozenEncoders(vision, device=self.platform.device, dtype=dtype, seed=self.config.run.seed)
        if vision.compile:
            seconds = encoders.compile_experts()
            if seat.encoder == 0 or (seat.encoder is None and not seat.rank):
                say(f"vision.compile=true: compiling {len(vision.experts)} experts took {seconds:.1f} s")
        return encoders

    def begin_encoders(self) -> Future[FrozenEncoders]:
        """Begin to load the frozen encoders; what goes wrong is raised by the result.

        For a GPU they are loaded on a thread of their own, while the start goes on; on the CPU at once.

        Raises:
            ConfigError: the library that builds one of them is not installed.
        """
        import_libraries([item.expert for item in self.config.vision.experts])
        pool = ThreadPoolExecutor(1, "encoders", self.platform.enter_thread)
        loading = pool.submit(self.encoders)
        if not self.platform.is_cuda:
            wait([loading])
        pool.shutdown(wait=False)
        return loading


def join(device: str, timeout_seconds: float, store: Store | None = None) -> Platform:
    """Agree with the other ranks on what to compute on, and join the job's process group.

    Args:
        device: run.device.
        timeout_seconds: how long a rank may wait for others, here and in collectives of the world.
        store: what `meet` has returned; without it the ranks meet here.

    Raises:
        MeetingError: the ranks cannot meet.
        ConfigError: a rank lacks the device; on all ranks.
    """
    place = find_place()
    store = store if store is not None else meet(place, timeout_seconds)
    platform, note = devices.choose(device, store, place.rank, place.world)
    if note and place.rank == 0:
        say(note)
    if not dist.is_initialized():
        world_store = PrefixStore("default_pg", store)
        dist.init_process_group(
            platform.backend,
            store=world_store,
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=platform.device if platform.is_cuda else None,
        )
    return platform


def open_run(
    config: Config,
    platform: Platform,
    groups: ProcessGroups,
    *,
    progress: Progress | None = None,
    stop: StopSignal | None = None,
    hold: Hold | None = None,
    clock: StartClock | None = None,
    fit: Fit | None = None,
) -> RankContext:
    """Take the run folder, open the data and settle each value of auto, on all ranks or on none.

    The first rank also compares the data's files with their indexes. `fit` says which values fit into memory.

    Raises:
        SphinxError: another job holds the folder, or data is missing or damaged; on all ranks.
    """

    def open_data() -> tuple[Config, Sources, Sources | None, Scan | None]:
        """Do what may fail on one rank alone."""
        if hold:
            hold.take()
        sources = open_sources(config.data, config.model)
        held_out = open_held_out(config.validation, sources) if config.validation.is_on else None
        scan = None
        if groups.seat.rank == 0:
            memory = Memory(Path(config.run.folder) / "content")
            sources.check(memory)
            scan = sources.scan(memory)
            if held_out is not None:
                held_out.check(memory)
                refuse_trained(held_out, sources)
        counted = config.with_epochs_in_steps(sources.samples.bounds[-1] if sources.samples else 0)
        return counted, sources, held_out, scan

    counted, sources, held_out, scan = agree(open_data, groups.control)

    def plan(config: Config) -> Planner:
        """Make the planner of the run with this configuration."""
        return make_planner(
            config.data, sources, config.model, config.vision,
            replicas=groups.layout.data, seed=config.run.seed, multiple=config.parallel.token_multiple,
        )  # fmt: skip

    settled = settle(counted, platform, groups, plan, fit)

    def plan_all() -> tuple[Planner, HeldOut | None]:
        """Plan the training and its validations."""
        if held_out is None:
            return plan(settled), None
        return plan(settled), plan_validation(
            settled.validation, settled.data, held_out, settled.model, settled.vision, replicas=groups.layout.data,
            multiple=settled.parallel.token_multiple, last_step=settled.training.steps,
        )  # fmt: skip

    planner, validated = agree(plan_all, groups.control)
    progress, stop = progress or Progress(), stop or StopSignal()
    clock = clock or StartClock()
    return RankContext(settled, platform, groups, sources, planner, validated, progress, stop, hold, scan, clock)
