"""The ranks of a model that answers: how each is built, and what those do that only follow the first."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from megatron_sphinx.checkpoint.collective import all_or_none
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.device import Platform
from megatron_sphinx.errors import ConfigError, SphinxError, nearest
from megatron_sphinx.generation.executor import LanguageRankExecutor, serve_encoder
from megatron_sphinx.generation.expert_orders import ExpertOrder, WatchedExperts
from megatron_sphinx.generation.requests import Picture
from megatron_sphinx.generation.runner import ModelRunner, cache_places
from megatron_sphinx.generation.ticks import Outcome, Tick
from megatron_sphinx.liveness.lifeline import Lifeline
from megatron_sphinx.liveness.progress import Activity, Progress
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.expert_choice import ExpertChoice, KeptExperts
from megatron_sphinx.model.experts import restrict_experts
from megatron_sphinx.model.language import build_language
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.model.vision import VisualProjection
from megatron_sphinx.parallel.groups import ProcessGroups, agree
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.parallel.place import find_place
from megatron_sphinx.ranges import Range, check_ranges
from megatron_sphinx.run.failure import is_of_connection, report
from megatron_sphinx.run.job import join
from megatron_sphinx.run.provenance import require_trained_as
from megatron_sphinx.serving.source import ModelSource

_BLOCK = 16  # tokens of a block of the cache
_MEETING_SECONDS = 1800.0
_SILENT_SECONDS = 120.0  # without a sign of life, after which a rank is gone where nobody waits for it
_FOREVER = timedelta(days=365)  # ranks wait for the next request, however long it takes
_CPU_SHARE, _GPU_SHARE = 0.25, 0.9  # of the memory that is free, for the cache
_MOST_SEQUENCES = 256  # longest sequences that the cache has room for, where memory is plenty

T = TypeVar("T")


class RankLostError(SphinxError):
    """A rank of the model is gone, and no request can be answered any more."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        parallel: how the ranks of the job divide the model; replicas take what is left.
        config: a configuration or the name of a preset, for a checkpoint that does not tell how pictures are shown.
        tokenizer: its tokenizer, where it neither lies beside the weights nor is named by the configuration.
        device: auto, cpu or cuda, as run.device.
        precision: bf16 or fp32; None for that of its training, else bf16 on GPUs and fp32 on CPUs.
        positions: tokens of the longest sequence; None for that of its training.
        cache_bytes: memory of each rank's key-value cache; None for most of a GPU's that is left, or for a quarter of
            the machine's.
        choice: the MoE experts that compute a token; given by `active_experts`, a number, and `keep_experts`, which
            `KeptExperts.of` reads.
        command: what the ranks run, by the name that their messages have.
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    config: Path | None = None
    tokenizer: Path | None = None
    device: str = "auto"
    precision: str | None = None
    positions: Annotated[int | None, Range(least=2, most=2**24)] = None
    cache_bytes: Annotated[int | None, Range(least=1, most=2**50)] = None
    choice: ExpertChoice = field(default_factory=ExpertChoice)
    command: str = "load"

    @classmethod
    def of(cls, **given: Any) -> "LoadOptions":
        """Make options of attributes, those of `parallel` given by themselves.

        Raises:
            ConfigError: one is not known, or out of its range.
        """
        active, kept = given.pop("active_experts", None), given.pop("keep_experts", None)
        if active is not None or kept is not None:
            given["choice"] = ExpertChoice(active, None if kept is None else KeptExperts.of(kept))
        known, sizes = {item.name for item in fields(cls)}, {item.name for item in fields(ParallelConfig)}
        if unknown := sorted(given.keys() - known - sizes):
            raise ConfigError(
                f"{unknown[0]}={given[unknown[0]]}: unknown; {nearest(unknown[0], sorted(known | sizes))}"
            )
        given |= {name: Path(given[name]) for name in ("config", "tokenizer") if given.get(name) is not None}
        parallel = {name: given.pop(name) for name in list(given) if name in sizes}
        options = cls(**given)
        return replace(options, parallel=ParallelConfig(**parallel)) if parallel else options

    def __post_init__(self) -> None:
        check_ranges(self, "")
        if self.parallel.sequence:
            raise ConfigError("parallel.sequence=true: a token at a time cannot be divided; set it to false")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device={self.device}: must be auto, cpu or cuda")
        if self.precision not in (None, "bf16", "fp32"):
            raise ConfigError(f"precision={self.precision}: must be bf16 or fp32")


class JobExecutor:
    """The executor of a rank, which says which rank is gone where a connection to one breaks.

    Args:
        executor: computes.
        lifeline: knows who is gone.

    Attributes:
        replicas: see Executor, as are the next ones.
        stages: see above.
        places: see above.
        block: see above.
        positions: see above.
    """

    def __init__(self, executor: LanguageRankExecutor, lifeline: Lifeline) -> None:
        self._executor, self._lifeline = executor, lifeline
        self.replicas, self.stages = executor.replicas, executor.stages
        self.places, self.block, self.positions = executor.places, executor.block, executor.positions

    def tick(self, tick: Tick) -> Sequence[Sequence[Outcome]] | None:
        """Compute a tick; see Executor."""
        return self._named(lambda: self._executor.tick(tick))

    def encode(self, picture: Picture, replica: int) -> None:
        """Begin to encode a picture; see Executor."""
        self._named(lambda: self._executor.encode(picture, replica))

    def encoded(self) -> Sequence[tuple[str, int]]:
        """Return the pictures that are ready; see Executor."""
        return self._named(self._executor.encoded)

    def order_experts(self, order: ExpertOrder) -> list[WatchedExperts]:
        """Have all ranks obey an order about MoE experts; see LanguageRankExecutor."""
        return self._named(lambda: self._executor.order_experts(order))

    def follow(self) -> None:
        """Do what the first rank says, until that closes."""
        self._executor.follow()

    def close(self) -> None:
        """Let all other ranks go."""
        self._named(self._executor.close)

    def _named(self, work: Callable[[], T]) -> T:
        """Do something; where a connection breaks in it, wait until it is known whose."""
        try:
            return work()
        except Exception as error:
            end = self._lifeline.why_broken() if is_of_connection(error) else None
            if end is None:
                raise
            is_own = end["by"] == self._lifeline.name  # its watcher has found out who is gone
            raise RankLostError(
                end["reason"] if is_own else f"{end['by']} ended the job ({end['reason']}); load it again"
            ) from error


@dataclass(frozen=True)
class Job:
    """A rank of a loaded model.

    Attributes:
        executor: computes ticks; on the first rank it is told to.
        source: what was loaded.
        precision: bf16 or fp32, what it computes in.
        cache_bytes: of this rank's key-value cache.
        choice: the MoE experts that it was loaded with.
        command: what the ranks run, by the name that their messages have.
    """

    executor: JobExecutor
    source: ModelSource
    precision: str
    cache_bytes: int
    choice: ExpertChoice
    command: str
    _lifeline: Lifeline
    _groups: ProcessGroups

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self._groups.layout.world == 1

    def check(self) -> None:
        """Raise a RankLostError where the job has ended; any thread may call this, at any time."""
        if not self.is_alone and (end := self._lifeline.ended()) is not None:
            raise RankLostError(end["reason"])

    def close(self) -> None:
        """Let the other ranks go, and leave the job; a process without others keeps its group for another model."""
        if not self.is_alone:
            try:
                self.executor.close()
                dist.barrier(group=self._groups.control)
            except Exception as error:
                self.leave(error)
            dist.destroy_process_group()
        self._lifeline.close()

    def leave(self, error: Exception) -> NoReturn:
        """End the process and the job, whose ranks cannot go on."""
        cause = error.__cause__ if isinstance(error, RankLostError) else None  # which report knows to tell apart
        status = report(cause if isinstance(cause, Exception) else error, self._lifeline, self.command)
        self._lifeline.leave(status, str(error))


def start(path: Path, options: LoadOptions) -> Job:
    """Load a model on all ranks of the job; returns on the first one alone.

    The other ranks compute what the first one says, and end their process when that closes.

    Args:
        path: see `serving.model.load`.
        options: how it is loaded.

    Raises:
        SphinxError: the user's mistake.
    """
    rank, world = find_place()
    layout = ParallelLayout(world=world, config=options.parallel)
    platform = join(options.device, _MEETING_SECONDS)
    progress, name = Progress(), f"{layout.seat(rank).role} rank {rank}"
    lifeline = Lifeline.connect(
        name, progress=progress, silence=_SILENT_SECONDS, command=options.command, remedy="load it again"
    )
    try:
        groups = ProcessGroups.create(layout, platform.backend, _FOREVER, _FOREVER)
        job = _load(path, options, groups, platform, lifeline, progress)
        if job is not None and rank == 0:
            return job
        if job is not None:
            job.executor.follow()
        dist.barrier(group=groups.control)  # a connection that is closed drops what it still has to send
    except Exception as error:
        if world == 1:
            lifeline.close()
            raise
        lifeline.leave(report(error, lifeline, options.command), str(error))
    lifeline.close()
    dist.destroy_process_group()
    sys.exit(0)


def _load(
    path: Path,
    options: LoadOptions,
    groups: ProcessGroups,
    platform: Platform,
    lifeline: Lifeline,
    progress: Progress,
) -> Job | None:
    """Load this rank's part of the model; an encoder rank encodes with it until the first rank closes."""

    def opened() -> ModelSource:
        source = ModelSource.open(path, options.config, options.tokenizer)
        options.choice.fitting(source.language)  # which refuses experts that there are not
        return source

    source = agree(opened, groups.control)
    encoders = _encoders(source, groups, platform)
    if groups.seat.encoder is not None:
        assert encoders is not None, "an encoder rank without encoders"
        progress.note(Activity.ANSWERING)
        serve_encoder(encoders, groups)
        return None
    positions = options.positions or source.positions
    precision = options.precision or source.precision or ("bf16" if platform.is_cuda else "fp32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = build_model(source, groups, platform, dtype, positions)
    restrict_experts(model, options.choice.fitting(source.language))
    places = _places(model, groups, platform, positions, options.cache_bytes)
    runner = ModelRunner(model, places=places, vocabulary=source.language.vocabulary)
    executor = LanguageRankExecutor(runner, groups, encoders, places=places, block=_BLOCK, positions=positions)
    progress.note(Activity.ANSWERING)
    return Job(
        JobExecutor(executor, lifeline), source, precision, runner.cache_bytes, options.choice, options.command,
        lifeline, groups,
    )  # fmt: skip


def _encoders(source: ModelSource, groups: ProcessGroups, platform: Platform) -> FrozenEncoders | None:
    """Load the frozen encoders on the ranks that encode, and make sure that they are those of the training."""
    vision, seat = source.vision, groups.seat
    is_encoder = seat.encoder is not None or (not groups.layout.config.encoder and groups.is_first_stage)

    def load() -> FrozenEncoders | None:
        if vision is None and groups.layout.config.encoder:
            raise ConfigError(
                f"parallel.encoder={groups.layout.config.encoder}: {source.name} has no projections of pictures, so "
                f"there is nothing to encode; use 0"
            )
        if vision is None or not is_encoder:
            return None
        dtype = platform.encoder_dtype(vision.precision)
        one_picture = replace(vision, batch_views=vision.views)  # pictures come one at a time
        encoders = FrozenEncoders(one_picture, device=platform.device, dtype=dtype, seed=source.seed)
        if source.run is not None:
            digest = Tokenizer(source.tokenizer).identity.sha256
            require_trained_as(source.checkpoint.folder, source.run, digest, encoders.sha256)
        return encoders

    return agree(load, groups.control)


def build_model(
    source: ModelSource, groups: ProcessGroups, platform: Platform, dtype: torch.dtype, positions: int
) -> SphinxModel:
    """Build a language rank's shard, filled with the weights; its layers are the portable ones, whatever imports.

    Args:
        source: what is loaded.
        groups: the rank's process groups.
        platform: what it computes on.
        dtype: of weights and activations.
        positions: tokens of the longest sequence.
    """
    language = build_language(source.for_generation(), groups, dtype=dtype, sequence_length=positions)
    vision = None
    if groups.is_first_stage and source.vision is not None:
        vision = VisualProjection(source.vision, source.language.hidden, dtype=dtype, device=platform.device)
    model = SphinxModel(language, vision, groups)
    all_or_none(groups, lambda: source.fill(model, groups))
    model.requires_grad_(False)
    return model.eval()


def _places(
    model: SphinxModel, groups: ProcessGroups, platform: Platform, positions: int, cache_bytes: int | None
) -> int:
    """Choose how many tokens the caches have room for: as many on every rank, whole blocks.

    Raises:
        ConfigError: there is no room for one sequence of the longest length.
    """
    given = cache_bytes
    if given is None:
        given = int(platform.free_memory_bytes() * (_GPU_SHARE if platform.is_cuda else _CPU_SHARE))
        given //= 1 if platform.is_cuda else int(groups.layout.language)
    own = min(cache_places(model, given), _MOST_SEQUENCES * positions)
    least = torch.tensor(own)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=groups.storage)
    places = int(least) // _BLOCK * _BLOCK
    if places < positions:
        raise ConfigError(
            f"cache of {given} bytes a rank: has room for {places} tokens, and a sequence may have {positions}; give "
            f"more, or a smaller number of positions"
        )
    return places
