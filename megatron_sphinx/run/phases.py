"""The start of a run as a list of phases, which the ranks of all roles take together, one after the other.

Every phase is a method of `Role`. All ranks take it, wait for each other, fail together where one of them fails, and
hear what each has to tell. A role for which a phase means nothing inherits a method that does nothing: so no role
can miss a collective, whatever is added to the list.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_sphinx.data.validation import HeldOut
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.parallel.groups import agree
from megatron_sphinx.run import banner
from megatron_sphinx.run.banner import Holding
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.run.observer import Observer


class StopNews(NamedTuple):
    """Whether a rank knows that the job was asked to stop, and by what."""

    has_come: bool
    reason: str


class Role(ABC):
    """The life of one rank: the phases of its start, then `run`.

    Each phase returns what this rank tells all others, small and picklable.

    Args:
        context: what the rank has.
        observer: watches the rank.

    Attributes:
        told: by phase, what each rank told in it, in the order of ranks.
        loading: the encoders that this rank is loading; None where it loads none.
    """

    loading: Future[FrozenEncoders] | None = None

    def __init__(self, context: RankContext, observer: Observer | None = None) -> None:
        self.context, self.observer = context, observer
        self.told: dict[str, list[Any]] = {}

    @abstractmethod
    def run(self) -> bool:
        """Do the work of the rank once the start is done; tell whether it came to its end as far as this rank knows."""

    # the phases

    def hear_of_stop(self) -> StopNews:
        """Tell whether this rank was asked to stop; what the first rank has heard holds for all."""
        return StopNews(self.context.stop.has_come, self.context.stop.reason)

    def begin_encoders(self) -> Any:
        """Begin to load the frozen encoders beside the phases to come, where this rank encodes."""

    def build_model(self) -> Any:
        """Build the shard of the language model that this rank has."""

    def build_engine(self) -> Any:
        """Put the model under its optimizer."""

    def load_encoders(self) -> Any:
        """Wait for the frozen encoders, where this rank encodes."""

    @abstractmethod
    def introduce(self) -> Holding:
        """Tell what this rank is for, and what weights it holds."""

    def say_start(self) -> Any:
        """Say on the first rank what everyone holds, and what the first step is made of."""
        if self.context.is_first_rank:
            banner.say_start(self.context, self.told["introduce"])

    def choose_state(self) -> Any:
        """Find what the run goes on from, or begins with, and check that it fits."""

    def load_state(self) -> Any:
        """Load what was found."""

    def clear_the_way(self) -> Any:
        """Move what stands in the way of the steps to come."""

    def tell_first_step(self) -> int | None:
        """Tell the step that the run begins at, where this rank knows it."""
        return None

    def tell_owed_validation(self) -> bool:
        """Tell whether an earlier job has not finished the validation behind the last step; the first rank knows."""
        return False

    def begin_observing(self) -> Any:
        """Let the observer, if there is one, begin on all ranks together."""
        if self.observer:
            self.observer.begin(self.context)

    def open_reports(self) -> Any:
        """Open the files that the steps are reported in."""

    def tell_seconds(self) -> dict[str, float]:
        """Tell how long this rank took for each phase so far."""
        return self.context.clock.seconds

    def report_start(self) -> Any:
        """Say on the first rank how long the start took, and keep it in the run folder."""
        if self.context.is_first_rank:
            banner.report_start(self.context, self.told["tell_seconds"])

    # what phases share

    def loaded_encoders(self) -> FrozenEncoders:
        """Wait for the encoders that `begin_encoders` began to load, and note what each expert's weights took."""
        assert self.loading is not None, "this rank loads no encoders"
        encoders = self.loading.result()
        for name, seconds in encoders.load_seconds.items():
            self.context.clock.note(f"expert {name}", seconds)
        return encoders

    # what was told

    @property
    def first_step(self) -> int:
        """The step that the run begins at, as the first rank told it."""
        step: int = self.told["tell_first_step"][0]
        return step

    @property
    def held_out(self) -> HeldOut | None:
        """What is validated on; None in a run without validations, and in one that is watched."""
        return None if self.observer else self.context.held_out

    @property
    def is_validation_owed(self) -> bool:
        """Whether there is a validation before the first step, as the first rank told it."""
        is_owed: bool = self.told["tell_owed_validation"][0]
        return is_owed

    @property
    def encoder_digests(self) -> dict[str, str]:
        """What identifies the weights of each visual expert, by its name, from a rank that holds them."""
        return next(holding.encoders for holding in self.told["introduce"] if holding.encoders)

    @property
    def stop_news(self) -> StopNews:
        """What the first rank has last told of being asked to stop; by then it has heard of the others' signals."""
        news: StopNews = self.told.get("hear_of_stop", [StopNews(False, "")])[0]
        return news


START: tuple[Callable[[Any], Any], ...] = (
    Role.hear_of_stop,
    Role.begin_encoders,
    Role.build_model,
    Role.build_engine,
    Role.load_encoders,  # until here they load beside the rest
    Role.introduce,
    Role.say_start,
    Role.choose_state,
    Role.load_state,
    Role.clear_the_way,  # when nothing can fail any more: until then all stays as it is
    Role.tell_first_step,
    Role.tell_owed_validation,
    Role.hear_of_stop,  # once more: what is before it may take minutes
    Role.begin_observing,
    Role.open_reports,
    Role.tell_seconds,
    Role.report_start,
)


def start(role: Role) -> bool:
    """Take all phases of the start; False where the job was asked to stop meanwhile.

    Raises:
        TypeError: the role lacks a phase; before the first one, since others would wait for this rank in it.
        SphinxError: a phase failed for the user's reasons, on any rank.
    """
    names = [phase.__name__ for phase in START]
    if lacking := [name for name in names if not hasattr(role, name)]:
        raise TypeError(f"{type(role).__name__} lacks {lacking} of the phases of a start; give Role a default")
    for name in names:  # a role's own method of that name, where it has one
        role.told[name] = take(role.context.clock.timed(name, getattr(role, name)), role.context.groups.control)
        if role.stop_news.has_come:
            role.context.stop.ask(role.stop_news.reason)
            banner.note_early_stop(role.context, role.stop_news.reason)
            return False
    return True


def take(phase: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Take a phase together with all other ranks.

    Args:
        phase: this rank's part.
        group: every rank of the job, the one to talk over.

    Returns:
        What each rank tells, in the order of ranks.

    Raises:
        SphinxError: the phase failed for the user's reasons, on any rank.
    """
    own = agree(phase, group)
    everyone = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own, group=group)
    return everyone
