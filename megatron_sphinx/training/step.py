"""One optimizer step: every micro-batch forward and backward, one global count of tokens, one update."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.liveness.progress import Activity, Progress
from megatron_sphinx.model.experts import Routing
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.sphinx import routing_of
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.stage.channel import FeatureSource
from megatron_sphinx.training.divergence import Watch
from megatron_sphinx.training.engine import Engine
from megatron_sphinx.training.sums import Sums


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        loss: weighted mean over the step's target tokens, in nats.
        sums: what it is made of.
        gradient_norm: global norm before clipping.
        fault: why the step changed no weight; empty where it did.
        samples: ids of pairs and of text documents that the fault may lie in.
        expert_load: tokens that each expert took: int64 [layers, text and image, experts]; None without experts.
    """

    loss: float
    sums: Sums
    gradient_norm: float
    expert_load: Tensor | None
    fault: str = ""
    samples: tuple[list[int], list[int]] = ([], [])


def mask_bad(batch: MicroBatch, features: Tensor) -> tuple[Tensor, Tensor]:
    """Find the pairs of a micro-batch whose image could not be read (their features are NaN).

    Returns:
        Features without NaN, and for each pair whether it is bad, bool [pairs].
    """
    bad_views = features[:, 0].isnan()
    counts = torch.zeros(len(batch.samples), dtype=torch.int32, device=features.device)
    bad_pairs = counts.index_add(0, batch.sample_of_view, bad_views.int()) > 0
    return features.masked_fill(bad_views[:, None], 0.0), bad_pairs


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What every step of one language rank is computed with.

    Attributes:
        engine: holds the model, its gradient and its optimizer.
        features: where the pictures' features come from; None on a rank that needs none.
        groups: the rank's process groups.
        device: where the rank computes.
        watch: judges losses and gradient norms.
        progress: where the rank notes what it is at.
        text_weight: what a target of text weighs; one of a pair weighs 1.
        moe_layers: layers of the whole model where these have MoE experts, else 0.
    """

    engine: Engine
    features: FeatureSource | None
    groups: ProcessGroups
    device: torch.device
    watch: Watch
    progress: Progress
    text_weight: float
    moe_layers: int

    @property
    def feature_wait_seconds(self) -> float:
        """Seconds that this rank has waited for features so far."""
        return self.features.waiting.seconds if self.features else 0.0

    def step(
        self, plan: StepPlan, batches: Sequence[MicroBatch], *, rate: float, known: Sums | None = None
    ) -> StepReport:
        """Update the weights once from a step's micro-batches, unless there is a fault in loss or gradient norm.

        Each target token of the step weighs the same (text ones by `text_weight`), wherever it is computed: token
        losses are summed and divided once, by a count that follows from the plan. Where images could not be read, the
        gradient is scaled afterwards to the count that is left.

        Args:
            plan: what the step is made of.
            batches: this replica's micro-batches, on the device.
            rate: the learning rate.
            known: what this rank knows already: whether it was asked to stop, how long it waited for data.
        """
        engine, planned = self.engine, self._targets(plan.targets(of_samples=True), plan.targets(of_samples=False))
        waited, received = self.feature_wait_seconds, self.features.received_bytes if self.features else 0
        forward = Forward(self, planned, 1 / plan.positions)
        if self.features is not None:
            self.features.prepare(len(batches))
        engine.backward(forward, batches)
        self.progress.note(Activity.COUNTING)
        own = replace(known or Sums(), **forward.loss_sums(), balance=forward.balance())
        if self.features is not None:
            own.feature_bytes = self.features.received_bytes - received
            own.exposed_encoder_seconds = self.feature_wait_seconds - waited
        whole = own.over_ranks(self.groups, self.device)
        targets = self._targets(whole.targets_pairs, whole.targets_text)
        loss = (whole.loss_pairs + self.text_weight * whole.loss_text) / max(targets, 1.0)
        factor = planned / targets if whole.bad_pairs and targets else 1.0
        norm = engine.gradient_norm() * factor
        self.progress.note(Activity.UPDATING)
        samples: tuple[list[int], list[int]] = ([], [])
        if fault := self.watch.fault(loss, norm):
            engine.discard()
            samples = _suspects(forward.suspects, self.groups, is_spike=isfinite(norm))
        else:
            engine.update(rate, norm, factor)
        whole.balance /= max(self.moe_layers, 1)
        return StepReport(loss, whole, norm, forward.load(), fault, samples)

    def evaluate(self, plan: StepPlan, batches: Sequence[MicroBatch], known: Sums) -> Sums:
        """Compute the losses of micro-batches as `step` does, and change nothing.

        Args:
            plan: what the micro-batches are of.
            batches: this replica's micro-batches, on the device.
            known: what this rank knows already.

        Returns:
            The losses and their targets, over all ranks; nothing else of it is told.
        """
        planned = self._targets(plan.targets(of_samples=True), plan.targets(of_samples=False))
        forward = Forward(self, max(planned, 1.0), 1 / plan.positions, Activity.VALIDATING)
        if self.features is not None:
            self.features.prepare(len(batches))
        self.engine.evaluate(forward, batches)
        self.progress.note(Activity.COUNTING)
        return replace(known, **forward.loss_sums()).over_ranks(self.groups, self.device)

    def take_features(self, count: int) -> list[Tensor]:
        """Take the features of the next micro-batches, bf16 [views, feature_values] each; none behind the first stage.

        Every rank of a replica calls this, together.
        """
        if self.features is None:
            return []
        self.features.prepare(count)
        return [self.features.next() for _ in range(count)] if self.groups.is_first_stage else []

    def _targets(self, pairs: float, text: float) -> float:
        """Count targets of both streams, text ones by their weight."""
        return pairs + self.text_weight * text


@dataclass
class Forward:
    """Computes micro-batches one after the other, on one stage of the pipeline, and keeps what they report.

    Attributes:
        trainer: what the step is computed with.
        planned: what the loss is divided by: the step's target tokens, text ones by their weight.
        router_weight: what each token weighs in the routers' losses.
        doing: what the rank notes that it is at.
        sums: loss of pairs and of text, their targets, bad pairs: float64 [5]; zeros before the last stage.
        suspects: micro-batches, each with its loss.
        routings: what the routers have found, micro-batch by micro-batch.
    """

    trainer: Trainer
    planned: float
    router_weight: float
    doing: Activity = Activity.COMPUTING
    sums: Tensor = field(init=False)
    suspects: list[tuple[MicroBatch, Tensor]] = field(default_factory=list, init=False)
    routings: list[Routing] = field(default_factory=list, init=False)
    _number: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=self.trainer.device)

    def __call__(self, batch: MicroBatch) -> Tensor:
        """Compute this stage's output; on the last one the loss, so divided that those of all micro-batches add up."""
        trainer, groups = self.trainer, self.trainer.groups
        self._number += 1
        trainer.progress.note(self.doing, self._number)
        features, bad = None, torch.empty(len(batch.samples), dtype=torch.bool, device=trainer.device)
        if groups.is_first_stage:
            assert trainer.features is not None
            with record_function("features"):
                features, bad = mask_bad(batch, trainer.features.next())
        self._tell_last_stage(bad)
        routing = routing_of(batch, self.router_weight) if trainer.moe_layers else None
        if routing is not None:
            self.routings.append(routing)
        with record_function("forward"):
            out: Tensor = trainer.engine.model(batch, features, routing)
            return self._loss(batch, out, bad) if groups.is_last_stage else out

    def _tell_last_stage(self, bad: Tensor) -> None:
        """Hand what the first stage knows of bad pairs to the last one."""
        groups = self.trainer.groups
        seat, layout, stages = groups.seat, groups.layout, groups.layout.config.pipeline
        if stages == 1 or not len(bad):
            return
        if groups.is_first_stage:
            flags = bad.to(torch.uint8)
            last = layout.rank_of(data=seat.data, tensor=seat.tensor, pipeline=stages - 1)
            self.trainer.engine.keep(dist.isend(flags, last, group=groups.flags), flags)
        elif groups.is_last_stage:
            flags = torch.empty_like(bad, dtype=torch.uint8)
            dist.recv(flags, layout.rank_of(data=seat.data, tensor=seat.tensor), group=groups.flags)
            bad.copy_(flags)

    def _loss(self, batch: MicroBatch, losses: Tensor, bad: Tensor) -> Tensor:
        """Add up the losses of a micro-batch, those of bad pairs left out."""
        is_bad = torch.cat([bad, bad.new_zeros(1)])  # text points at the last, never bad
        pair = batch.sample_of_token[batch.target_positions]
        of_pairs, of_text = (pair >= 0) & ~is_bad[pair], pair < 0
        pairs, text = losses.where(of_pairs, 0.0).sum(), losses.where(of_text, 0.0).sum()
        counts = [pairs.detach(), text.detach(), of_pairs.sum(), of_text.sum(), bad.sum()]
        self.sums += torch.stack([value.double() for value in counts])
        self.suspects.append((batch, (pairs + text).detach()))
        return (pairs + self.trainer.text_weight * text) / self.planned

    def loss_sums(self) -> dict[str, float]:
        """Give what `sums` holds by the names that `Sums` has for it."""
        names = ("loss_pairs", "loss_text", "targets_pairs", "targets_text", "bad_pairs")
        return dict(zip(names, self.sums.tolist(), strict=True))

    def balance(self) -> float:
        """Add up the balance losses of this rank's layers, before the coefficient."""
        losses = [value for routing in self.routings for value in routing.balance.values()]
        return float(torch.stack(losses).sum()) if losses else 0.0

    def load(self) -> Tensor | None:
        """Count the tokens that each expert took in this step, over all ranks: int64 [layers, text and image, experts].

        None without experts.
        """
        trainer, load = self.trainer, None
        if not trainer.moe_layers:
            return None
        for routing in self.routings:
            for layer, counts in routing.load.items():
                if load is None:
                    load = torch.zeros(trainer.moe_layers, *counts.shape, dtype=torch.int64, device=trainer.device)
                load[layer - 1] += counts
        assert load is not None
        dist.all_reduce(load, group=trainer.groups.language)
        return load


def _suspects(
    losses: Sequence[tuple[MicroBatch, Tensor]], groups: ProcessGroups, *, is_spike: bool
) -> tuple[list[int], list[int]]:
    """List pairs and text documents of the micro-batch with the highest loss, or else of all whose loss is not finite.

    Every language rank calls this, together.
    """
    mine = [
        (float(loss) / max(int((batch.targets >= 0).sum()), 1), batch.samples, batch.documents)
        for batch, loss in losses
    ]
    everyone = [mine] * groups.layout.language
    dist.all_gather_object(everyone, mine, group=groups.language)
    batches = [batch for of_rank in everyone for batch in of_rank]
    suspects = [max(batches)] if is_spike else [batch for batch in batches if not isfinite(batch[0])]
    return sorted({p for _, pairs, _ in suspects for p in pairs}), sorted({d for *_, own in suspects for d in own})
