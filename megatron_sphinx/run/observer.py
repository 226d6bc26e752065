"""Who watches a rank of a run: the benchmark, which is told of each step and of each micro-batch."""

from typing import Protocol

from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.stage.producer import MicroBatchObserver


class Observer(MicroBatchObserver, Protocol):
    """Watches one rank of a run. Such a run begins anew and keeps no checkpoint."""

    def begin(self, context: RankContext) -> None:
        """Hear on all ranks together that the first step is about to begin."""

    def step(self, plan: StepPlan, seconds: float, data_seconds: float, feature_seconds: float) -> None:
        """Hear on a language rank of a step that is done.

        Args:
            plan: what the step was made of.
            seconds: that the step took.
            data_seconds: that this rank waited for data in the step.
            feature_seconds: that this rank has waited for features since the run began.
        """

    def end(self) -> None:
        """Hear that the last step is done."""
