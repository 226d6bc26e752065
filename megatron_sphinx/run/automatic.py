"""Values of `auto` that a run takes when it begins: the same on all ranks, and kept for as long as the run goes on."""

import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_sphinx.checkpoint.steps import complete
from megatron_sphinx.config import Config, load
from megatron_sphinx.console import say
from megatron_sphinx.data.plan import Planner
from megatron_sphinx.device import Platform
from megatron_sphinx.model.architecture import LEAST_BATCH_VIEWS
from megatron_sphinx.parallel.groups import ProcessGroups, agree
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.run.provenance import earlier_config

T = TypeVar("T")
KEYS = ("data.micro_batch_rows", "vision.batch_views", "vision.precision")


class Fitted(Protocol):
    """A configuration without any `auto`, and how it fits into memory."""

    @property
    def config(self) -> Config:
        """The configuration with a number in place of each auto."""

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory that it needs."""

    @property
    def reason(self) -> str:
        """What is needed of what there is, in a line."""


class Fit(Protocol):
    """Takes what fits into memory by the plan."""

    def __call__(
        self, config: Config, layout: ParallelLayout, planner: Planner, memory_bytes: float, *, is_cuda: bool
    ) -> Fitted:
        """Take a value for each `auto`, and leave numbers as they are.

        Args:
            config: of the run.
            layout: how it is divided.
            planner: plans its steps.
            memory_bytes: of the rank that has least.
            is_cuda: whether that is a GPU's.
        """


class RankFacts(NamedTuple):
    """What a rank tells all others of its machine.

    Attributes:
        host: the machine's name.
        memory_bytes: memory of its GPU, or of the machine.
        is_bf16_fast: whether bf16 matrix products beat fp32 ones on it.
    """

    host: str
    memory_bytes: int
    is_bf16_fast: bool


def settle(
    config: Config, platform: Platform, groups: ProcessGroups, plan: Callable[[Config], Planner], fit: Fit | None
) -> Config:
    """Take a value for each `auto`, the same on all ranks, which call this together; the first rank says which.

    A run that goes on from a checkpoint keeps what it had before, on whatever machine.

    Args:
        config: of the run.
        platform: what this rank computes on.
        groups: of this rank.
        plan: makes a planner of a configuration that names a number of rows.
        fit: takes what fits into memory; without it the least is taken.
    """
    asked = [key for key in KEYS if _get(config, key) == "auto"]
    if not asked:
        return config
    everyone = _gather(RankFacts(socket.gethostname(), platform.memory_bytes(), platform.is_bf16_fast), groups)

    def take() -> dict[str, Any]:
        """Decide for all ranks."""
        if groups.seat.rank:
            return {}
        before = _earlier(config)
        kept = {key: before[key] for key in asked if before.get(key) not in (None, "auto")}
        known = _with_precision(_with(config, kept), everyone[groups.layout.language :] or everyone, platform)
        fitted = None
        if fit is not None and (platform.is_cuda or "data.micro_batch_rows" in asked):
            planner = plan(_with(known, {"data.micro_batch_rows": 1}))
            fitted = fit(known, groups.layout, planner, _memory_bytes(everyone, platform), is_cuda=platform.is_cuda)
        taken = {key: _get(fitted.config if fitted else _with_least(known), key) for key in asked}
        values = " ".join(f"{key}={value}" for key, value in taken.items())
        before_now = f"; {' and '.join(kept)} as the run took before" if kept else ""
        reason = f"; {fitted.reason}" if fitted and not (fitted.fits and len(kept) == len(asked)) else ""
        say(f"auto: {values}{before_now}{reason}")
        return taken

    return _with(config, _gather(agree(take, groups.control), groups)[0])


def with_taken(config: Config, folder: Path) -> Config:
    """Return a configuration with what a run of it has taken where it says auto, as the run's folder tells it."""
    path = folder / "config.yaml"
    taken = load(path) if path.is_file() else config
    return _with(config, {key: _get(taken, key) for key in KEYS if _get(config, key) == "auto"})


def _with_precision(config: Config, encoding: Sequence[RankFacts], platform: Platform) -> Config:
    """Take the encoders' precision where it is auto: bf16 where that is fast on all ranks that encode."""
    slowest = replace(platform, is_bf16_fast=all(facts.is_bf16_fast for facts in encoding))
    dtype = slowest.encoder_dtype(config.vision.precision)
    return _with(config, {"vision.precision": "bf16" if dtype is torch.bfloat16 else "fp32"})


def _with_least(config: Config) -> Config:
    """Take the least that a run can take."""
    least = {"data.micro_batch_rows": 1, "vision.batch_views": LEAST_BATCH_VIEWS}
    return _with(config, {key: value for key, value in least.items() if _get(config, key) == "auto"})


def _memory_bytes(everyone: Sequence[RankFacts], platform: Platform) -> float:
    """Memory of the rank that has least: of its GPU, or its share of its machine's."""
    ranks = Counter(facts.host for facts in everyone)
    return min(facts.memory_bytes / (1 if platform.is_cuda else ranks[facts.host]) for facts in everyone)


def _earlier(config: Config) -> dict[str, Any]:
    """Find what the run has taken before, key by key; nothing where it begins anew."""
    resume = config.checkpoint.resume
    steps = complete(Path(config.run.folder) / "checkpoints") if resume == "auto" else [Path(resume)]
    earlier = earlier_config(steps[-1]) if steps and resume != "none" else {}
    sections = (key.split(".") for key in KEYS)
    return {f"{section}.{name}": earlier.get(section, {}).get(name) for section, name in sections}


def _gather(own: T, groups: ProcessGroups) -> list[T]:
    """Return what every rank has, in the order of ranks."""
    everyone = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own, group=groups.control)
    return everyone


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _with(config: Config, values: dict[str, Any]) -> Config:
    """Return a configuration with other values, by their keys."""
    for key, value in values.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config
