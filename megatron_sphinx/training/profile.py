"""Which steps of a run are profiled, and on which ranks."""

from dataclasses import dataclass
from typing import Annotated

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.ranges import Range, check_ranges

_STEPS = Range(least=0, most=99_999_999, why="steps are counted from 0")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """The steps that torch's profiler records; a run that `benchmark` measures has its own profile, and writes none.

    Attributes:
        start: number of the first step that is recorded, counted from 0 as in metrics.jsonl.
        steps (steps): how many steps are recorded, one after the other; 0 for none.
        ranks: numbers of the ranks that write a trace each, rank_<rank>_steps_<first>-<last>.json.gz in profile/ of the
            run folder; an encoder rank records how it encodes those steps.
    """

    start: Annotated[int, _STEPS] = 0
    steps: Annotated[int, _STEPS] = 0
    ranks: Annotated[tuple[int, ...], Range(least=0, most=999_999, why="ranks are counted from 0")] = (0,)

    def __post_init__(self) -> None:
        check_ranges(self, "training.profile.")
        if not self.ranks:
            raise ConfigError("training.profile.ranks=[]: names no rank; name some, or set training.profile.steps=0")

    def check_steps(self, steps: int) -> None:
        """Refuse steps that a run does not have.

        Args:
            steps: length of the whole run in optimizer steps.

        Raises:
            ConfigError: the run ends before the last profiled step.
        """
        if self.steps and self.start + self.steps > steps:
            raise ConfigError(
                f"training.profile.start={self.start}: with training.profile.steps={self.steps} the profile ends after "
                f"the run, whose last step is {steps - 1}; let it end by then"
            )

    def check_ranks(self, world: int) -> None:
        """Refuse ranks that a job does not have.

        Args:
            world: how many ranks the job has.

        Raises:
            ConfigError: a rank is none of the job's.
        """
        if self.steps and (strange := [rank for rank in self.ranks if not 0 <= rank < world]):
            raise ConfigError(
                f"training.profile.ranks={list(self.ranks)}: the job has no rank {strange[0]}; "
                f"name some from 0 to {world - 1}"
            )
