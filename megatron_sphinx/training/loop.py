"""The steps of a run on one language rank: read, train, report, save, stop when asked to."""

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch.distributed as dist

from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.console import say
from megatron_sphinx.data.batches import BatchLoader
from megatron_sphinx.data.content import Scan
from megatron_sphinx.data.plan import Planner, StepPlan
from megatron_sphinx.device import Platform
from megatron_sphinx.errors import CheckpointError, DataError, OtherDataError, SphinxError
from megatron_sphinx.liveness.progress import Doing, Progress
from megatron_sphinx.liveness.stop import StopSignal
from megatron_sphinx.model.experts import IMAGE, TEXT
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.stage.channel import FeatureSource
from megatron_sphinx.training.deepspeed_engine import Engine
from megatron_sphinx.training.divergence import Watch
from megatron_sphinx.training.metrics import Reporter
from megatron_sphinx.training.step import StepReport, Sums, train_step


@dataclass
class Loop:
    """One language rank's run over the steps.

    Attributes:
        store: where the state is kept.
        save: begins to keep the state after so many steps, together with the other language ranks.
        say_memory: reports, after the first step, what each rank holds.
        layers: of the whole model, where it has experts; else 0.
        rate: learning rate of a step.
        watch: judges losses and gradient norms.
        progress: where this rank notes what it is at.
        scan: reads data whose content nothing knows while the steps go on; on the first rank.
        bad_pairs: pairs so far whose image could not be read.
        done: steps done so far.
        peak_flops: of all language ranks together.
        step_flops: of a step's language model, forward and backward.
        observe: is told after each step of its plan, and the seconds that it took, that this rank waited for data, and
            that it has waited for features so far.
    """

    engine: Engine
    planner: Planner
    batches: BatchLoader
    features: FeatureSource | None
    groups: ProcessGroups
    platform: Platform
    reporter: Reporter | None
    stop: StopSignal
    store: CheckpointStore
    save: Callable[[int], None]
    say_memory: Callable[[], None]
    rate: Callable[[int], float]
    watch: Watch
    progress: Progress
    step_flops: Callable[[StepPlan], float]
    peak_flops: float
    text_weight: float
    max_bad_share: float
    save_interval: int
    layers: int
    scan: Scan | None = None
    bad_pairs: int = 0
    done: int = 0
    observe: Callable[[StepPlan, float, float, float], None] | None = None

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
            with self.scan or nullcontext():
                return self._train(start, steps)
        except SphinxError as error:
            self.progress.at(Doing.SAVING)
            with suppress(CheckpointError):  # the state before the mistake is what one resumes from
                self.store.finish()
            if isinstance(error, OtherDataError) and self.reporter:  # on the first rank: what was saved since is none
                for line in self.store.clear_the_way():
                    say(line)
            raise

    def _train(self, start: int, steps: int) -> bool:
        step, self.done = steps - 1, start  # where nothing is left to do
        for step in range(start, steps):
            self.progress.begin(step)
            begin = time.perf_counter()
            batches = [batch.to(self.platform.device) for batch in self.batches.step(step)]
            waited = time.perf_counter() - begin
            plan, rate = self.planner.step(step), self.rate(step)
            known = Sums(
                stop=self.stop.has_come,
                failed=self.store.has_failed,
                bad_data=self.scan is not None and self.scan.error is not None,
                data_wait_seconds=waited,
            )
            report = train_step(
                self.engine, plan, batches, self.features, self.groups,
                text_weight=self.text_weight, rate=rate, device=self.platform.device, fault=self.watch.fault,
                progress=self.progress, layers=self.layers, known=known,
            )  # fmt: skip
            self.platform.synchronize()
            seconds = time.perf_counter() - begin
            self.watch.settle(step, report.loss, report.gradient_norm, report.fault, report.samples)
            self.progress.at(Doing.REPORTING)
            self.done = step + 1
            self.bad_pairs += round(report.sums.bad_pairs)
            if self.reporter:
                if report.fault:
                    self.reporter.write_skipped(_skipped_line(plan, report))
                self.reporter.write(self._line(plan, report, rate, seconds))
            if self.observe:
                self.observe(plan, seconds, waited, self.features.waiting.seconds if self.features else 0.0)
            self.progress.at(Doing.SAVING)
            if report.sums.failed:
                self.store.finish()
            if step == start:
                self.say_memory()
            self._check_bad(plan)
            if report.sums.bad_data:
                self._raise_from_scan()
            is_stopping = report.sums.stop > 0
            if is_stopping or (step + 1) % self.save_interval == 0 or step + 1 == steps:
                self.save(step + 1)
            if is_stopping and step + 1 < steps:
                break
        self.store.finish()
        self._raise_from_scan()  # it may have ended since
        return step + 1 == steps

    def _check_bad(self, plan: StepPlan) -> None:
        seen = (plan.step + 1) * len(plan.samples)
        if self.bad_pairs > self.max_bad_share * seen:
            error = DataError(
                f"data.max_bad_share={self.max_bad_share}: {self.bad_pairs} of the {seen} pairs up to "
                f"step={plan.step} could not be read; see quarantine.jsonl in run.folder; mend them or raise the share"
            )
            error.is_shared = True
            raise error

    def _raise_from_scan(self) -> None:
        """Raise what the first rank's scan has ended with, if it has failed, on all language ranks."""
        found = [self.scan.error if self.scan is not None else None]
        dist.broadcast_object_list(found, src=0, group=self.groups.language)
        [error] = found
        if error is None:
            return
        if isinstance(error, SphinxError):
            error.is_shared = True
        raise error

    def _line(self, plan: StepPlan, report: StepReport, rate: float, seconds: float) -> dict[str, Any]:
        """The step's line of metrics.jsonl."""
        sums, tokens, waited_for_saves = report.sums, plan.positions, self.store.waiting_seconds
        self.store.waiting_seconds = 0.0
        line: dict[str, Any] = {
            "step": plan.step,
            "loss": _finite(report.loss),
            "loss_pairs": _finite(sums.loss_pairs / sums.targets_pairs) if sums.targets_pairs else None,
            "loss_text": _finite(sums.loss_text / sums.targets_text) if sums.targets_text else None,
            "target_tokens_pairs": round(sums.targets_pairs),
            "target_tokens_text": round(sums.targets_text),
            "learning_rate": rate,
            "gradient_norm": _finite(report.gradient_norm),
            "skipped": report.fault or None,
            "sample_ids": plan.digest,
            "pairs": len(plan.samples),
            "bad_pairs": round(sums.bad_pairs),
            "captions_cut": plan.captions_cut,
            "fill": plan.fill,
            "padding_share": plan.padding_share,
            "imbalance": plan.imbalance,
            "text_tokens": sum(tokens for _, _, tokens in plan.text),
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "exposed_encoder_seconds": sums.exposed_encoder_seconds,
            "data_wait_seconds": sums.data_wait_seconds,
            "data_wait_rank": round(sums.data_wait_rank),
            "stragglers": self.progress.stragglers,
            "checkpoint_wait_seconds": waited_for_saves,
            "feature_bytes": round(sums.feature_bytes),
            "model_flops_utilization": self.step_flops(plan) / seconds / self.peak_flops,
            "peak_memory_bytes": self.platform.peak_memory_bytes(),
        }
        if report.expert_load is not None:
            line["balance_loss"] = _finite(sums.balance)
            shares = report.expert_load / report.expert_load.sum(-1, keepdim=True).clamp(min=1)
            for kind, name in ((TEXT, "text"), (IMAGE, "image")):  # a list for each layer: the share of each expert
                line[f"expert_load_{name}"] = [
                    [round(share, 6) for share in layer] for layer in shares[:, kind].tolist()
                ]
        return line


def _skipped_line(plan: StepPlan, report: StepReport) -> dict[str, Any]:
    """The step's line of skipped.jsonl."""
    pairs, documents = report.samples
    return {
        "step": plan.step,
        "reason": report.fault,
        "loss": _finite(report.loss),
        "gradient_norm": _finite(report.gradient_norm),
        "sample_ids": plan.digest,
        "pairs": pairs,
        "documents": documents,
    }


def _finite(value: float) -> float | None:
    """None for what JSON cannot hold."""
    return value if isfinite(value) else None
