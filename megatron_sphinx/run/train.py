"""From a configuration to a rank at work: what each role builds, and how a job starts and ends."""

import json
import os
import traceback
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megatron_sphinx.checkpoint.keymap import Model
from megatron_sphinx.checkpoint.pieces import WEIGHTS
from megatron_sphinx.checkpoint.store import CheckpointStore, Chosen, load_weights
from megatron_sphinx.checkpoint.weights import SKIP_TOKEN, VISION, Weights
from megatron_sphinx.config import Config
from megatron_sphinx.console import complain, say, say_of_ranks
from megatron_sphinx.data.content import Memory, Scan
from megatron_sphinx.data.loader import (
    BatchBuilder,
    BatchLoader,
    PixelLoader,
    Sources,
    make_planner,
    numbered_rounds,
    open_sources,
    rounds,
)
from megatron_sphinx.data.plan import Planner, StepPlan
from megatron_sphinx.device import Platform
from megatron_sphinx.errors import ConfigError, SphinxError, writing
from megatron_sphinx.liveness.lifeline import Lifeline
from megatron_sphinx.liveness.progress import Doing, Progress
from megatron_sphinx.liveness.stop import STOPPED, StopSignal
from megatron_sphinx.lock import Hold
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.language import build_language, draw_weights
from megatron_sphinx.model.shards import shards_of
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.model.vision import VisualProjection
from megatron_sphinx.parallel import devices
from megatron_sphinx.parallel.groups import ProcessGroups, agree
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.parallel.seeding import random_state, restore_random_state, seed_rank
from megatron_sphinx.run.provenance import about, changes, identity, keep_config, require_trained_as, sizes_of
from megatron_sphinx.stage.channel import ColocatedEncoders, FeatureReceiver, FeatureSender, FeatureSource
from megatron_sphinx.stage.producer import produce
from megatron_sphinx.training.deepspeed_engine import Engine
from megatron_sphinx.training.divergence import Watch
from megatron_sphinx.training.loop import Loop
from megatron_sphinx.training.memory import rank_weights, zero2_bytes
from megatron_sphinx.training.metrics import Reporter
from megatron_sphinx.training.optimizer import learning_rate

_AGREEMENTS = 3  # of all ranks in _resume
_MARGIN_SECONDS = 60.0  # a stall is reported by name before a collective gives up


@dataclass(frozen=True)
class RankContext:
    """What every rank of a running job has."""

    config: Config
    platform: Platform
    groups: ProcessGroups
    sources: Sources
    planner: Planner
    progress: Progress = field(default_factory=Progress)
    stop: StopSignal = field(default_factory=StopSignal)
    hold: Hold | None = None
    scan: Scan | None = None  # on the first rank: what the loop lets read the data that nothing is known of

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.folder)

    def pixels(self) -> PixelLoader | None:
        """Where this rank reads images, if the run has any."""
        if self.sources.pairs is None:
            return None
        data = self.config.data
        quarantine = self.folder / "quarantine.jsonl"
        return PixelLoader(self.sources.pairs, self.config.vision, workers=data.workers, quarantine=quarantine)

    def encoders(self) -> FrozenEncoders:
        """The frozen encoders, in bf16 where that is fast."""
        dtype = torch.bfloat16 if self.platform.is_bf16_fast else torch.float32
        return FrozenEncoders(self.config.vision, device=self.platform.device, dtype=dtype, seed=self.config.run.seed)


class Observer(Protocol):
    """Watches one rank of a run. Such a run begins anew and keeps no checkpoint."""

    def begin(self, job: RankContext) -> None:
        """Called on all ranks together, before the first step."""

    def step(self, plan: StepPlan, seconds: float, data_seconds: float, feature_seconds: float) -> None:
        """Called on language ranks after each step, see Loop.observe."""

    def micro_batch(self, views: int, read_seconds: float, encode_seconds: float, send_seconds: float) -> None:
        """Called on encoder ranks after each micro-batch, see produce."""

    def end(self) -> None:
        """Called after the last step."""


def train(config: Config, stop: StopSignal | None = None, observer: Observer | None = None) -> int:
    """Train on this rank; the exit status of the process.

    Args:
        config: of the run.
        stop: hears of signals since the process began; without it none is heard of.
        observer: watches this rank.

    Raises:
        SphinxError: the user's mistake, on a job of one rank or before the ranks have met.
    """
    rank, world = _place()
    layout = ParallelLayout(world=world, config=config.parallel)
    seat = layout.seat(rank)
    stop, hold = stop or StopSignal(), Hold(Path(config.run.folder), rank)
    timeouts = config.run.timeout, config.run.storage_timeout
    for_steps, for_files = (timedelta(seconds=seconds + _MARGIN_SECONDS) for seconds in timeouts)
    here = join(config.run.device, for_files.total_seconds())
    progress = Progress(
        timeout=config.run.timeout,
        storage_timeout=config.run.storage_timeout,
        probe=here.probe_seconds,
        probe_interval=config.run.straggler_interval,
    )
    name, ratio = f"{seat.role} rank {rank}", config.run.straggler_ratio
    lifeline = Lifeline.connect(name, progress=progress, stop=stop, straggler_ratio=ratio)
    stop.has_met()
    try:
        groups = ProcessGroups.create(layout, here.backend, for_steps, for_files)
        job = replace(_open(config, here, groups, progress, hold), stop=stop, hold=hold)
        is_done = not _is_stopping(job) and (
            _language(job, observer) if seat.encoder is None else _encoder(job, observer)
        )
        if is_done and observer:
            observer.end()
        if is_done:
            progress.at(Doing.ENDING)
            dist.barrier()  # encoder ranks are done first, and stay to hear how the job ends
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        if world == 1:
            lifeline.close()
            hold.give_back(error.exit_status if isinstance(error, SphinxError) else 1)
            raise
        status = _report(error, lifeline)
        hold.give_back(status)
        lifeline.leave(status, str(error))
    hold.give_back(0 if is_done else STOPPED)
    if not is_done:
        if world > 1:
            lifeline.leave(STOPPED, "it was asked to stop; the state is saved")
        lifeline.close()
        return STOPPED
    lifeline.close()
    dist.destroy_process_group()
    return 0


def alone(config: Config) -> RankContext:
    """A job of this one process, to evaluate in: the data opened, nothing trained."""
    os.environ["WORLD_SIZE"] = "1"
    _, world = _place()
    here = join(config.run.device, config.run.timeout)
    layout = ParallelLayout(world=world, config=config.parallel)
    return _open(config, here, ProcessGroups.create(layout, here.backend), Progress())


def newest_weights(job: RankContext, encoders: FrozenEncoders) -> dict[str, torch.Tensor]:
    """The trained fp32 weights of the newest checkpoint of the run folder, saved in any layout.

    Args:
        job: of the run's configuration.
        encoders: that the weights are used with.

    Raises:
        CheckpointError: there is none, or it was trained with another model, tokenizer or other encoders.
    """
    require_trained_as(job.folder, job.config, job.sources.tokenizer.identity.sha256, encoders.sha256)
    return load_weights(job.folder / "checkpoints")


def join(device: str, timeout_seconds: float) -> Platform:
    """Meet the other ranks, agree with them on what to compute on, and join the job's process group.

    Args:
        device: run.device.
        timeout_seconds: how long a rank may wait for others, here and in collectives of the world.

    Raises:
        ConfigError: a rank lacks the device; on all ranks.
    """
    world = int(os.environ["WORLD_SIZE"])
    rank = int(os.environ["RANK"]) if world > 1 else 0
    timeout = timedelta(seconds=timeout_seconds)
    store: Store = HashStore() if world == 1 else next(rendezvous("env://", timeout=timeout))[0]
    here, note = devices.choose(device, store, rank, world)
    if note and rank == 0:
        say(note)
    if not dist.is_initialized():
        place = PrefixStore("default_pg", store)
        dist.init_process_group(here.backend, store=place, rank=rank, world_size=world, timeout=timeout)
    return here


def _place() -> tuple[int, int]:
    """Rank and world, as torchrun says them, or srun, or alone; set for the libraries that read them again.

    Raises:
        ConfigError: Slurm has started several ranks that do not know of each other.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))
    if tasks > 1 and not {"MASTER_ADDR", "WORLD_SIZE"} & os.environ.keys():
        raise ConfigError(
            f"SLURM_NTASKS={tasks}: the ranks have nowhere to meet, each would train alone; start them by "
            f"slurm/train.sbatch or torchrun, or export MASTER_ADDR and MASTER_PORT; for one rank set WORLD_SIZE=1"
        )
    names = {"RANK": ("SLURM_PROCID", "0"), "WORLD_SIZE": ("SLURM_NTASKS", "1"), "LOCAL_RANK": ("SLURM_LOCALID", "0")}
    for name, (of_slurm, alone) in names.items():
        os.environ.setdefault(name, os.environ.get(of_slurm, alone) if "MASTER_ADDR" in os.environ else alone)
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _report(error: Exception, lifeline: Lifeline) -> int:
    """Say on stderr what ended this rank, unless another rank has said it or will; the exit status."""
    if isinstance(error, SphinxError):
        is_mine = lifeline.is_first_rank if error.is_shared else lifeline.announce(error.exit_status, str(error))
        if is_mine:
            complain(f"megatron-sphinx train: {error}")
        return error.exit_status
    end = lifeline.why_broken() if _is_of_connection(error) else lifeline.ended()
    if end is not None and end["by"] == lifeline.name:  # its watcher did, and has said so
        return int(end["status"])
    if end is not None:
        complain(f"[{lifeline.name}] leaves: {end['by']} ended the job ({end['reason']})")
        return int(end["status"])
    text = "".join(traceback.format_exception(error))
    complain(f"[{lifeline.name}] failed:\n{text}")
    return 1


def _is_of_connection(error: Exception) -> bool:
    """Whether an error says no more than that another rank does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _open(
    config: Config, here: Platform, groups: ProcessGroups, progress: Progress, hold: Hold | None = None
) -> RankContext:
    """Take the run folder and open the data; the first rank also compares the files with their indexes."""

    def work() -> RankContext:
        if hold:
            hold.take()
        sources = open_sources(config.data, config.model)
        scan = None
        if groups.seat.rank == 0:
            memory = Memory(Path(config.run.folder) / "content")
            sources.check(memory)
            scan = sources.scan(memory)
        counted = config.with_epochs_in_steps(sources.pairs.bounds[-1] if sources.pairs else 0)
        planner = make_planner(
            config.data, sources, config.model, config.vision,
            replicas=groups.layout.data, seed=config.run.seed, multiple=config.parallel.token_multiple,
        )  # fmt: skip
        return RankContext(counted, here, groups, sources, planner, progress, scan=scan)

    return agree(work)


def _encoder(job: RankContext, observer: Observer | None) -> bool:
    """The whole life of an encoder rank; whether it began its steps: how they end it hears from the language ranks."""
    config, seat = job.config, job.groups.seat
    assert seat.encoder is not None
    encoders = agree(job.encoders)
    _say_start(job, encoders.sha256, language_bytes=0, encoder_bytes=_bytes_of(encoders))
    for _ in range(_AGREEMENTS):
        agree(lambda: None)  # that the language ranks could check and load their checkpoint
    start = _agree_on_start(job, None)
    if _is_stopping(job):
        return False
    if observer:
        observer.begin(job)
    lookahead = config.stage.lookahead
    produce(
        numbered_rounds(job.planner, start, config.training.steps),
        encoder=seat.encoder,
        encoder_count=config.parallel.encoder,
        encoders=encoders,
        pixels=job.pixels(),
        sender=FeatureSender(job.groups, lookahead),
        lookahead=lookahead,
        progress=job.progress,
        observe=observer.micro_batch if observer else None,
    )
    return True


def _language(job: RankContext, observer: Observer | None) -> bool:
    """The whole life of a language rank; whether it did all steps."""
    config, groups, here = job.config, job.groups, job.platform
    encoders = agree(lambda: None if config.parallel.encoder else job.encoders())
    seed_rank(config.run.seed, groups.seat)
    model = build_model(config, groups, here)
    marks = _say_start(
        job, encoders.sha256 if encoders else {}, language_bytes=_bytes_of(model), encoder_bytes=_bytes_of(encoders)
    )
    engine = Engine(
        model,
        shards_of(model, config.model, groups),
        groups,
        here,
        config.optimizer,
        precision=config.training.precision,
    )
    store = CheckpointStore(
        job.folder / "checkpoints",
        groups,
        keep=config.checkpoint.keep,
        identity=lambda: identity(config, job.sources, marks),
        about=about(config, groups.layout, marks),
        progress=job.progress,
        guard=job.hold.require if job.hold else lambda: None,
    )
    start, bad_pairs, divergence = _resume(job, store, engine)
    watch = Watch(config.divergence, divergence)
    _agree_on_start(job, start)
    if _is_stopping(job):
        return False
    if observer:
        observer.begin(job)
    reporter = None
    if groups.seat.rank == 0:
        with writing(job.folder):
            if earlier := keep_config(job.folder, config):
                say(f"the configuration of the run before this one is kept as {earlier}")
            (job.folder / "encoders.json").write_text(json.dumps(marks, indent=1))
            reporter = Reporter(
                job.folder, start=start, steps=config.training.steps, interval=config.run.print_interval,
                guard=job.hold.look if job.hold else lambda: None,
            )  # fmt: skip
    features = _feature_source(job, encoders, start)
    loop = make_loop(job, engine, store, features, reporter, job.stop, watch, bad_pairs, observer)
    how = "failed"
    try:
        is_done = loop.run(start, config.training.steps)
        how = "done" if is_done else f"stopped by {_why_stopped(job)}"
        return is_done
    finally:
        if reporter:
            reporter.close()
        if job.hold:
            job.hold.end = _how_it_ended(job, how, store, loop.done)


def _how_it_ended(job: RankContext, how: str, store: CheckpointStore, done: int) -> str:
    """The last line of a run: how it ended, why, and where to look."""
    plot = job.folder / "loss.png"
    drawn = f", plot {plot}" if plot.is_file() else ""
    on = _way_on(job) if how.startswith("stopped") else ""
    return f"{how} after {done} of {job.config.training.steps} steps; checkpoint {store.newest or 'none'}{drawn}{on}"


def _why_stopped(job: RankContext) -> str:
    """Which signal has come, and to which rank if not to the first one; every language rank calls this, together."""
    seat, mine = job.groups.seat, job.stop.reason
    if mine and seat.rank:
        mine = f"{mine} to {seat.role} rank {seat.rank}"
    reasons = [mine] * job.groups.layout.language
    dist.all_gather_object(reasons, mine, group=job.groups.language)
    return next(filter(None, reasons), "a signal")


def _way_on(job: RankContext) -> str:
    """How to go on with a run that was stopped."""
    is_same = job.config.checkpoint.resume == "auto"
    return "; the same command goes on" if is_same else "; go on with checkpoint.resume=auto"


def make_loop(
    job: RankContext,
    engine: Engine,
    store: CheckpointStore,
    features: FeatureSource | None,
    reporter: Reporter | None,
    stop: StopSignal,
    watch: Watch,
    bad_pairs: int = 0,
    observer: Observer | None = None,
) -> Loop:
    """The steps of this language rank, ready to run."""
    config, groups = job.config, job.groups
    builder = BatchBuilder(config.data, job.sources, config.vision, job.planner.multiple)

    def save(step: int) -> None:
        if observer is None:
            store.save(
                step,
                engine.pieces(of_copies=False),
                {"random": random_state()},
                bad_pairs=loop.bad_pairs,
                divergence=watch.state(),
            )

    loop = Loop(
        engine=engine,
        planner=job.planner,
        batches=BatchLoader(job.planner, builder, groups.seat.data),
        features=features,
        groups=groups,
        platform=job.platform,
        reporter=reporter,
        stop=stop,
        store=store,
        save=save,
        say_memory=lambda: _say_memory(job, engine),
        rate=lambda step: learning_rate(config.optimizer, step, config.training.steps),
        watch=watch,
        progress=job.progress,
        step_flops=lambda plan: sum(map(job.planner.cost, plan.rows)),
        peak_flops=_peak_flops(job),
        text_weight=config.loss.text_weight,
        max_bad_share=config.data.max_bad_share,
        save_interval=config.checkpoint.interval,
        layers=config.model.layers if config.model.experts else 0,
        scan=None if observer else job.scan,
        bad_pairs=bad_pairs,
        observe=observer.step if observer else None,
    )
    return loop


def build_model(config: Config, groups: ProcessGroups, here: Platform) -> SphinxModel:
    """This rank's shard of the trainable model, its weights drawn from the run's seed."""
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    language = build_language(
        config.model,
        groups,
        dtype=dtype,
        sequence_length=config.data.sequence_length,
        recompute=config.training.activation_checkpointing,
        recompute_layers=config.training.checkpointed_layers,
    )
    vision = None
    if groups.is_first_stage:
        vision = VisualProjection(config.vision, config.model.hidden, dtype=dtype, device=here.device)
    model = SphinxModel(language, vision, groups)
    draw_weights(model, config.model, groups, config.run.seed)
    model.freeze(config.training.train)
    return model


def _feature_source(job: RankContext, encoders: FrozenEncoders | None, start: int) -> FeatureSource | None:
    """Where this language rank's features come from; None where it needs none and encodes none."""
    config, ahead = job.config, rounds(job.planner, start, job.config.training.steps)
    if encoders is not None:
        return ColocatedEncoders(ahead, job.groups, encoders, job.pixels(), config.stage.lookahead)
    if not job.groups.is_first_stage:
        return None
    return FeatureReceiver(
        ahead,
        job.groups,
        values=config.vision.feature_values,
        lookahead=config.stage.lookahead,
    )


def _bytes_of(module: torch.nn.Module | None) -> int:
    return sum(weight.nbytes for weight in module.parameters()) if module else 0


def _say_start(job: RankContext, marks: dict[str, str], *, language_bytes: int, encoder_bytes: int) -> dict[str, str]:
    """Check that each role holds its own weights only, print what every rank holds; the marks of the encoders."""
    config, seat = job.config, job.groups.seat
    assert seat.encoder is None or not language_bytes, "an encoder rank holds language weights"
    assert seat.encoder is not None or not (config.parallel.encoder and encoder_bytes), "a language rank holds encoders"
    mine = (seat.role, language_bytes, encoder_bytes, marks)
    everyone: list[tuple[str, int, int, dict[str, str]]] = [mine] * job.groups.layout.world
    dist.all_gather_object(everyone, mine)
    marks = next(found for *_, found in everyone if found)
    if seat.rank == 0:
        layout, device = job.groups.layout, job.platform.device.type
        say(f"{layout} = {layout.world} ranks, {device}, {config.training.precision}")
        say_of_ranks(
            [
                f"{role}, language weights {language:,} bytes, encoder weights {encoder:,} bytes"
                for role, language, encoder, _ in everyone
            ]
        )
        plan = job.planner.step(0)
        say(f"step 0: {len(plan.rows)} rows, {plan.fill:.1%} full; costliest replica {plan.imbalance:.3f} of the mean")
        if plan.imbalance > 1.05 and config.data.row_multiple % layout.data:
            say(f"the replicas' work is uneven: data.row_multiple={layout.data} would divide it better")
        views = sum(len(piece.views) for row in plan.rows for piece in row)
        values = config.vision.feature_values
        if config.parallel.encoder:
            total = views * values * 2
            say(f"step 0: {views} views x {values} values x 2 bytes = {total:,} bytes of features cross, 0 come back")
    return marks


def _is_stopping(job: RankContext) -> bool:
    """Whether the first rank was asked to stop, or has heard that another one was, before the first step."""
    found = [(job.stop.has_come, job.stop.reason)]
    dist.broadcast_object_list(found, src=0)
    has_come, reason = found[0]
    if has_come and job.hold:
        job.stop.ask(reason)
        job.hold.end = f"stopped by {reason} before the first step; nothing new to save{_way_on(job)}"
    return has_come


def _agree_on_start(job: RankContext, start: int | None) -> int:
    """The step to begin at, as the first language rank found it."""
    found = [start]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def _say_memory(job: RankContext, engine: Engine) -> None:
    """Print what each language rank holds for weights, gradients and optimizer beside what ZeRO-2 needs at least."""
    config, groups = job.config, job.groups
    needed = zero2_bytes(
        rank_weights(config.model, config.vision, groups.layout, groups.seat.pipeline, config.training.train),
        groups.layout,
        precision=config.training.precision,
    )
    mine = (engine.held, needed)
    everyone = [mine] * groups.layout.language
    dist.all_gather_object(everyone, mine, group=groups.language)
    if groups.seat.rank == 0:
        parts = [[f"{name} {held[name]:,} (formula {known[name]:,})" for name in known] for held, known in everyone]
        say_of_ranks([f"bytes of {', '.join(part)}" for part in parts])


def _resume(job: RankContext, store: CheckpointStore, engine: Engine) -> tuple[int, int, dict[str, Any] | None]:
    """Load the checkpoint to go on from, if there is one, or else the weights to begin with.

    Returns:
        Steps done, bad pairs so far, and what the run remembers to judge its losses.
    """
    weights = job.config.model.weights

    def load() -> Chosen | Weights | None:
        if chosen := store.choose(job.config.checkpoint.resume):
            return chosen
        return Weights.open(Path(weights), _model(job.config), store) if weights else None

    found = agree(load)

    def fill() -> tuple[int, int, dict[str, Any] | None]:
        if isinstance(found, Chosen):
            return _go_on(job, store, engine, found)
        if found is not None:
            _begin_with(job, store, engine, found)
        return 0, 0, None

    def clear() -> None:
        if job.groups.seat.rank == 0:
            for line in store.clear_the_way():
                say(line)

    begun = agree(fill)
    agree(clear)  # when nothing can fail any more: until then all stays as it is
    return begun


def _begin_with(job: RankContext, store: CheckpointStore, engine: Engine, weights: Weights) -> None:
    """Take the weights of a checkpoint, and nothing else of it."""
    engine.prepare_state(0)
    pieces = engine.pieces(of_copies=True)
    weights.load((piece for piece in pieces if piece.name.startswith(WEIGHTS)), store)
    engine.take_state()
    if job.groups.seat.rank == 0:
        new = {VISION: ", new projections and tags", SKIP_TOKEN: ", a new skip token"}
        say(f"begins with the weights of {weights.path}{new.get(weights.drawn, '')}")
        for change in weights.changes:
            say(f"  changed: {change}")


def _go_on(
    job: RankContext, store: CheckpointStore, engine: Engine, chosen: Chosen
) -> tuple[int, int, dict[str, Any] | None]:
    """Take the whole state of a checkpoint; what `_resume` returns."""
    manifest = chosen.manifest
    step, divergence = int(manifest["step"]), manifest.get("divergence")
    engine.prepare_state(step - (divergence["skipped"] if divergence else 0))
    objects = store.load(chosen.path, engine.pieces(of_copies=True), ["random"])
    engine.take_state()
    layout = sizes_of(job.config, job.groups.layout)
    if manifest["layout"] == layout and "random" in objects:
        restore_random_state(objects["random"])
    if job.scan:
        job.scan.then = store.require_same_data
    if job.groups.seat.rank == 0:
        moved = "" if manifest["layout"] == layout else f", from layout {manifest['layout']}"
        say(f"resumed after step {step} from {chosen.path}{moved}")
        for change in changes(chosen.path, manifest, job.config):
            say(f"  changed: {change}")
    return step, int(manifest["bad_pairs"]), divergence


def _model(config: Config) -> Model:
    """What the weights of this run are of."""
    vision = config.vision
    queries = vision.qformer.channels if vision.qformer else 0
    return Model(config.model, vision.channels, queries, has_skip_token=vision.has_skip_token)


def _peak_flops(job: RankContext) -> float:
    """FLOP/s that the language ranks reach together on a large matrix product."""
    dtype = torch.bfloat16 if job.config.training.precision == "bf16" else torch.float32
    peak = torch.tensor(job.platform.measure_peak_flops(dtype), dtype=torch.float64, device=job.platform.device)
    dist.all_reduce(peak, group=job.groups.language)
    return float(peak)
