"""The steps of a run on one language rank: read, train, report, save, stop when asked to."""

import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.console import say
from megatron_sphinx.data.batches import BatchBuilder, BatchLoader
from megatron_sphinx.data.content import Scan
from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.errors import CheckpointError, DataError, OtherDataError, SphinxError
from megatron_sphinx.liveness.progress import Activity
from megatron_sphinx.parallel.seeding import random_state
from megatron_sphinx.run import banner
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.run.observer import Observer
from megatron_sphinx.run.validator import Validator
from megatron_sphinx.training.gpu_busy import GpuBusy
from megatron_sphinx.training.metrics import Reporter
from megatron_sphinx.training.optimizer import learning_rate
from megatron_sphinx.training.step import StepReport, Trainer
from megatron_sphinx.training.step_lines import metrics_of, skipped_of
from megatron_sphinx.training.sums import Sums


@dataclass
class Loop:
    """One language rank's run over the steps.

    Attributes:
        context: configuration, plan, groups and liveness of the rank.
        trainer: computes the steps.
        store: where the state is kept.
        reporter: writes metrics; on the first rank.
        peak_flops: FLOP/s that all language ranks reach together.
        bad_pairs: pairs so far whose image could not be read.
        observer: watches the steps; a run that is watched keeps no checkpoint and reads nothing in the background.
        validator: computes the loss of held-out data; None for a run without validations.
        done: steps done so far.
    """

    context: RankContext
    trainer: Trainer
    store: CheckpointStore
    reporter: Reporter | None
    peak_flops: float
    bad_pairs: int = 0
    observer: Observer | None = None
    validator: Validator | None = None
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        context = self.context
        builder = BatchBuilder(context.config.data, context.sources, context.config.vision, context.planner.multiple)
        self._batches = BatchLoader(context.planner, builder, context.groups.seat.data)
        self._busy = GpuBusy.of(context.platform) if self.reporter else None

    def run(self, start: int, steps: int) -> bool:
        """Train steps `start` to `steps`; whether all of them were done (else a signal came and the state is saved).

        Raises:
            CheckpointError: a checkpoint could not be written.
            DataError: more pairs than `data.max_bad_share` could not be read, or data holds a token id that the model
                does not have: this rank met it in a row, or the first rank's scan, which all are told.
            OtherDataError: the scan found that the data is not what the run went on from; what was saved since is moved
                aside.
            DivergedError: a loss or the gradient is not finite or spikes, and the run may not go on.
        """
        try:
            with self._scanning():
                return self._train(start, steps)
        except SphinxError as error:
            self.context.progress.note(Activity.SAVING)
            with suppress(CheckpointError):  # the state before the mistake is what one resumes from
                self.store.finish()
            if isinstance(error, OtherDataError) and self.reporter:  # on the first rank: what was saved since is none
                for line in self.store.clear_the_way():
                    say(line)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """End what watches the GPU; further steps know nothing of it."""
        if self._busy is not None:
            self._busy.close()

    @property
    def _scan(self) -> Scan | None:
        """What reads data of unknown content while the steps go on; on the first rank, in a run that nobody watches."""
        return None if self.observer else self.context.scan

    def _scanning(self) -> AbstractContextManager[Any]:
        """Let the scan read as long as the steps go on, if there is one."""
        return self._scan or nullcontext()

    def _train(self, start: int, steps: int) -> bool:
        """Take the steps, and after each one save, stop or give up where the ranks have agreed to."""
        config = self.context.config
        self.done = start  # also where nothing is left to do
        is_stopping = self._validate()  # one that is owed
        while self.done < steps and not is_stopping:
            sums = self.take_step(self.done).sums
            self.context.progress.note(Activity.SAVING)
            if sums.failed:
                self.store.finish()
            if self.done == start + 1:
                banner.say_memory(self.context, self.trainer.engine)
                banner.report_first_step(self.context)
            self._check_bad()
            if sums.bad_data:
                self._raise_from_scan()
            is_stopping = sums.stop > 0
            if is_kept := is_stopping or self.done % config.checkpoint.interval == 0 or self.done == steps:
                self.save()
            if self.validator and self.validator.is_owed_after(self.done) and not is_stopping:
                is_stopping = self._validate()
                if is_stopping and not is_kept:
                    self.save()
        self.store.finish()
        self._raise_from_scan()  # it may have ended since
        return self.done >= steps and not (self.validator and self.validator.is_owed)

    def take_step(self, step: int) -> StepReport:
        """Read a step's data, train on it and report; every language rank calls this, together.

        Raises:
            DataError: data holds a token id that the model does not have.
            DivergedError: the loss or the gradient is not finite or spikes, and the run may not go on.
        """
        context, trainer = self.context, self.trainer
        context.progress.begin(step)
        begin = time.perf_counter()
        batches = [batch.to(context.platform.device) for batch in self._batches.step(step)]
        waited = time.perf_counter() - begin
        plan = context.planner.step(step)
        rate = learning_rate(context.config.optimizer, step, context.config.training.steps)
        report = trainer.step(plan, batches, rate=rate, known=self._known(waited))
        context.platform.synchronize()
        seconds = time.perf_counter() - begin
        trainer.watch.settle(step, report.loss, report.gradient_norm, report.fault, report.samples)
        context.progress.note(Activity.REPORTING)
        self.done = step + 1
        self.bad_pairs += round(report.sums.bad_pairs)
        if self.reporter:
            if report.fault:
                self.reporter.write_skipped(skipped_of(plan, report))
            self.reporter.write(self._line(plan, report, rate, seconds))
        if self.observer:
            self.observer.step(plan, seconds, waited, trainer.feature_wait_seconds)
        return report

    def _validate(self) -> bool:
        """Validate if that is owed; whether the job is to stop."""
        if self.validator is None or not self.validator.is_owed:
            return False
        is_stopping = self.validator.run(self.done, self._known)
        self.context.progress.note(Activity.SAVING)
        return is_stopping

    def save(self) -> None:
        """Begin to keep the state after the steps done; every language rank calls this, together.

        A run that is watched keeps none.
        """
        if self.observer is None:
            self.store.save(
                self.done,
                self.trainer.engine.state.slices(with_copies=False),
                {"random": random_state()},
                bad_pairs=self.bad_pairs,
                divergence=self.trainer.watch.state(),
            )

    def _known(self, waited: float) -> Sums:
        """Tell what this rank knows before it computes a step, for whose data it has waited so many seconds."""
        return Sums(
            stop=self.context.stop.has_come,
            failed=self.store.has_failed,
            bad_data=self._scan is not None and self._scan.error is not None,
            data_wait_seconds=waited,
        )

    def _check_bad(self) -> None:
        """Refuse to go on where too many of the pairs so far could not be read.

        Raises:
            DataError: on all language ranks.
        """
        step, share = self.done - 1, self.context.config.data.max_bad_share
        seen = self.done * len(self.context.planner.step(step).samples)
        if self.bad_pairs > share * seen:
            error = DataError(
                f"data.max_bad_share={share}: {self.bad_pairs} of the {seen} pairs up to "
                f"step={step} could not be read; see quarantine.jsonl in run.folder; mend them or raise the share"
            )
            error.is_shared = True
            raise error

    def _raise_from_scan(self) -> None:
        """Raise what the first rank's scan has ended with, if it has failed, on all language ranks."""
        errors = [self._scan.error if self._scan is not None else None]
        dist.broadcast_object_list(errors, src=0, group=self.context.groups.language)
        [error] = errors
        if error is None:
            return
        if isinstance(error, SphinxError):
            error.is_shared = True
        raise error

    def _line(self, plan: StepPlan, report: StepReport, rate: float, seconds: float) -> dict[str, Any]:
        """Make the step's line of metrics.jsonl."""
        waited, self.store.waiting_seconds = self.store.waiting_seconds, 0.0
        flops = sum(map(self.context.planner.cost, plan.rows))
        return metrics_of(plan, report) | {
            "learning_rate": rate,
            "step_seconds": seconds,
            "tokens_per_second": plan.positions / seconds,
            "stragglers": self.context.progress.stragglers,
            "checkpoint_wait_seconds": waited,
            "model_flops_utilization": flops / seconds / self.peak_flops,
            "peak_memory_bytes": self.context.platform.peak_memory_bytes(),
            "gpu_busy_share": self._busy.share() if self._busy else None,
        }
