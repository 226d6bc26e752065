"""A validation on one language rank: the loss of held-out data, computed between two steps, and nothing changed."""

import time
from collections.abc import Callable

from megatron_sphinx.data.batches import BatchBuilder, BatchLoader
from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.data.validation import HeldOut
from megatron_sphinx.liveness.progress import Activity
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.run.questions import Answerer, questions_of
from megatron_sphinx.training.metrics import Reporter
from megatron_sphinx.training.sample_book import SampleBook
from megatron_sphinx.training.step import Trainer
from megatron_sphinx.training.step_lines import validation_of
from megatron_sphinx.training.sums import Sums

_ADDED = ("loss_pairs", "loss_text", "targets_pairs", "targets_text", "bad_pairs")


class Validator:
    """Computes the loss of what is held out, the same in every layout: token losses are summed and divided once.

    Args:
        context: of the rank.
        trainer: computes the losses as those of a step.
        held_out: what is validated on.
        reporter: writes metrics; on the first rank.
        answerer: answers the samples that are to be; None where none are.
        is_owed: whether an earlier job has not finished the validation behind the step that it ended with.

    Attributes:
        is_owed: whether the validation that was due last is not finished.
    """

    def __init__(
        self,
        context: RankContext,
        trainer: Trainer,
        held_out: HeldOut,
        reporter: Reporter | None,
        answerer: Answerer | None = None,
        *,
        is_owed: bool,
    ) -> None:
        self._context, self._trainer, self._held_out, self._reporter = context, trainer, held_out, reporter
        self.is_owed = is_owed
        builder = BatchBuilder(
            held_out.planner.config, held_out.sources, context.config.vision, held_out.planner.multiple
        )
        self._batches = BatchLoader(held_out.planner, builder, context.groups.seat.data)
        self._answerer = answerer
        self._questions = questions_of(held_out.sources, held_out.samples) if answerer else []
        self._book: SampleBook | None = None
        if reporter and answerer:
            self._book = SampleBook(context.folder, reporter.start, [question.shown for question in self._questions])

    def is_owed_after(self, done: int) -> bool:
        """Note that so many steps are done; whether a validation is due now."""
        self.is_owed = self._held_out.is_due(done)
        return self.is_owed

    def run(self, done: int, known: Callable[[float], Sums]) -> bool:
        """Validate after so many steps, unless the job is asked to stop meanwhile; every language rank calls this.

        Args:
            done: steps that are done.
            known: tells what this rank knows, given the seconds that it has waited for data.

        Returns:
            Whether the job was asked to stop; then the validation is made by the next job, unless it was at its end.

        Raises:
            DataError: data holds a token id that the model does not have.
        """
        begin, total, held_out = time.perf_counter(), Sums(), self._held_out
        plans: list[StepPlan] = []
        is_stopping = False
        for number, plan in enumerate(held_out.plans):
            if is_stopping:
                return True
            plans.append(plan)
            self._context.progress.note(Activity.VALIDATING)
            batches = self._batches.step(number, (number + 1) % held_out.steps)
            on_device = [batch.to(self._context.platform.device) for batch in batches]
            sums = self._trainer.evaluate(plan, on_device, known(0.0))
            for name in _ADDED:
                setattr(total, name, getattr(total, name) + getattr(sums, name))
            is_stopping = sums.stop > 0
        if self._answerer is not None:
            if is_stopping:
                return True
            self._answer(self._answerer, done - 1)
        self.is_owed = False
        if self._reporter:
            seconds = time.perf_counter() - begin
            weight = self._trainer.text_weight
            line = validation_of(done - 1, plans, total, text_weight=weight, seconds=seconds)
            self._reporter.write_validation(line)
        return is_stopping

    def _answer(self, answerer: Answerer, step: int) -> None:
        """Let the samples be answered, and write down what comes of it."""
        self._context.progress.note(Activity.VALIDATING)
        seat, layout = self._context.groups.seat, self._context.groups.layout
        features = self._trainer.take_features(len(self._held_out.sample_rounds))
        numbers = range(seat.data, len(self._questions), layout.data)
        answers = answerer.answer(self._questions, dict(zip(numbers, features, strict=False)))
        if self._book and self._reporter:
            self._book.write(step, answers, self._reporter.board)
