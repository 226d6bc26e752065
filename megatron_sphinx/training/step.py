"""One optimizer step: every micro-batch forward and backward, one global count of tokens, one update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.liveness.progress import Doing, Progress
from megatron_sphinx.model.experts import Routing
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.sphinx import routing_of
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.stage.channel import FeatureSource
from megatron_sphinx.training.deepspeed_engine import Engine


@dataclass
class Sums:
    """What is summed over the micro-batches and replicas of a step.

    Losses are in nats; `stop`, `failed` and `bad_data` count ranks; the seconds are those of the rank that waited
    longest; `data_wait_rank` is the one that waited longest for data.
    """

    loss_pairs: float = 0.0
    loss_text: float = 0.0
    targets_pairs: float = 0.0
    targets_text: float = 0.0
    bad_pairs: float = 0.0
    feature_bytes: float = 0.0
    balance: float = 0.0
    stop: float = 0.0
    failed: float = 0.0
    bad_data: float = 0.0
    exposed_encoder_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    data_wait_rank: float = 0.0

    def over(self, groups: ProcessGroups, device: torch.device) -> "Sums":
        """The sums over all replicas, the same on every language rank: the ranks must agree on what to do next.

        The tensor ranks of a replica know the same, so the first speaks for all; but a signal may have come to any,
        and each waits and routes for itself.
        """
        own = ("balance", "stop", "failed", "exposed_encoder_seconds", "data_wait_seconds")
        names = [field.name for field in fields(self)]
        mine = [getattr(self, name) if groups.seat.tensor == 0 or name in own else 0.0 for name in names]
        everyone = torch.empty(groups.layout.language, len(mine), dtype=torch.float64, device=device)
        dist.all_gather_into_tensor(
            everyone, torch.tensor([mine], dtype=torch.float64, device=device), group=groups.language
        )
        sums, most = everyone.sum(0).tolist(), everyone.amax(0).tolist()
        whole = Sums(**{name: most[n] if name.endswith("seconds") else sums[n] for n, name in enumerate(names)})
        whole.data_wait_rank = int(everyone[:, names.index("data_wait_seconds")].argmax())
        return whole


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


@dataclass
class Forward:
    """Computes micro-batches one after the other, on one stage of the pipeline, and keeps what they report.

    Attributes:
        planned: what the loss is divided by: the step's target tokens, text ones by `text_weight`.
        weight: of a token in the routers' losses.
        sums: loss of pairs and of text, their targets, bad pairs: float64 [5]; zeros before the last stage.
        suspects: micro-batches, each with its loss.
    """

    engine: Engine
    features: FeatureSource | None
    groups: ProcessGroups
    device: torch.device
    text_weight: float
    planned: float
    weight: float
    has_experts: bool
    progress: Progress
    sums: Tensor = field(init=False)
    suspects: list[tuple[MicroBatch, Tensor]] = field(default_factory=list)
    routings: list[Routing] = field(default_factory=list)
    _number: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=self.device)

    def __call__(self, batch: MicroBatch) -> Tensor:
        """This stage's output; on the last stage the loss, so divided that those of all micro-batches add up."""
        self._number += 1
        self.progress.at(Doing.COMPUTING, self._number)
        features, bad = None, torch.empty(len(batch.samples), dtype=torch.bool, device=self.device)
        if self.groups.is_first_stage:
            assert self.features is not None
            features, bad = mask_bad(batch, self.features.next())
        self._tell_last_stage(bad)
        routing = routing_of(batch, self.weight) if self.has_experts else None
        if routing is not None:
            self.routings.append(routing)
        out: Tensor = self.engine.model(batch, features, routing)
        return self._loss(batch, out, bad) if self.groups.is_last_stage else out

    def _tell_last_stage(self, bad: Tensor) -> None:
        """Hand what the first stage knows of bad pairs to the last one."""
        stages = self.groups.layout.config.pipeline
        if stages == 1 or not len(bad):
            return
        seat, layout = self.groups.seat, self.groups.layout
        if self.groups.is_first_stage:
            flags = bad.to(torch.uint8)
            last = layout.rank_of(data=seat.data, tensor=seat.tensor, pipeline=stages - 1)
            self.engine.keep(dist.isend(flags, last, group=self.groups.flags), flags)
        elif self.groups.is_last_stage:
            flags = torch.empty_like(bad, dtype=torch.uint8)
            dist.recv(flags, layout.rank_of(data=seat.data, tensor=seat.tensor), group=self.groups.flags)
            bad.copy_(flags)

    def _loss(self, batch: MicroBatch, losses: Tensor, bad: Tensor) -> Tensor:
        is_bad = torch.cat([bad, bad.new_zeros(1)])  # text points at the last, never bad
        pair = batch.sample_of_token[batch.target_positions]
        of_pairs, of_text = (pair >= 0) & ~is_bad[pair], pair < 0
        pairs, text = losses.where(of_pairs, 0.0).sum(), losses.where(of_text, 0.0).sum()
        counts = [pairs.detach(), text.detach(), of_pairs.sum(), of_text.sum(), bad.sum()]
        self.sums += torch.stack([value.double() for value in counts])
        self.suspects.append((batch, (pairs + text).detach()))
        return (pairs + self.text_weight * text) / self.planned

    def balance(self) -> float:
        """This rank's part of the balance loss of its layers, before the coefficient."""
        found = [value for routing in self.routings for value in routing.balance.values()]
        return float(torch.stack(found).sum()) if found else 0.0

    def load(self, layers: int) -> Tensor | None:
        """Tokens that each expert took in this step, over all ranks: int64 [layers, text and image, experts]."""
        if not self.has_experts:
            return None
        load: Tensor | None = None
        for routing in self.routings:
            for layer, counts in routing.load.items():
                load = (
                    torch.zeros(layers, *counts.shape, dtype=torch.int64, device=self.device) if load is None else load
                )
                load[layer - 1] += counts
        assert load is not None
        dist.all_reduce(load, group=self.groups.language)
        return load


def train_step(
    engine: Engine,
    plan: StepPlan,
    batches: Sequence[MicroBatch],
    features: FeatureSource | None,
    groups: ProcessGroups,
    *,
    text_weight: float,
    rate: float,
    device: torch.device,
    fault: Callable[[float, float], str],
    progress: Progress,
    layers: int = 0,
    known: Sums | None = None,
) -> StepReport:
    """Update the weights once from the step's micro-batches, unless `fault` finds one in loss and gradient norm.

    Each target token of the step weighs the same (text ones by `text_weight`), wherever it is computed: token losses
    are summed and divided once, by a count that follows from the plan. Where images could not be read, the gradient
    is scaled afterwards to the count that is left.

    `layers` are those of the whole model where it has experts, else 0; `known` is what this rank knows already:
    whether it was asked to stop, how long it waited for data. It notes in `progress` what it is at.
    """
    planned = plan.targets(of_samples=True) + text_weight * plan.targets(of_samples=False)
    waited, received = (features.waiting.seconds, features.received_bytes) if features else (0.0, 0)
    weight = engine.loss_scale / plan.positions
    forward = Forward(engine, features, groups, device, text_weight, planned, weight, layers > 0, progress)
    if features is not None:
        features.prepare(len(batches))
    engine.backward(forward, batches)
    progress.at(Doing.COUNTING)
    names = ("loss_pairs", "loss_text", "targets_pairs", "targets_text", "bad_pairs")
    mine = replace(known or Sums(), **dict(zip(names, forward.sums.tolist(), strict=True)), balance=forward.balance())
    if features is not None:
        mine.feature_bytes = features.received_bytes - received
        mine.exposed_encoder_seconds = features.waiting.seconds - waited
    whole = mine.over(groups, device)
    actual = whole.targets_pairs + text_weight * whole.targets_text
    loss = (whole.loss_pairs + text_weight * whole.loss_text) / max(actual, 1.0)
    factor = planned / actual if whole.bad_pairs and actual else 1.0
    norm = engine.gradient_norm() * factor
    progress.at(Doing.UPDATING)
    samples: tuple[list[int], list[int]] = ([], [])
    if found := fault(loss, norm):
        engine.discard()
        samples = _suspects(forward.suspects, groups, is_spike=isfinite(norm))
    else:
        engine.update(rate, norm, factor)
    whole.balance /= engine.loss_scale * max(layers, 1)
    return StepReport(loss, whole, norm, forward.load(layers), found, samples)


def _suspects(
    losses: Sequence[tuple[MicroBatch, Tensor]], groups: ProcessGroups, *, is_spike: bool
) -> tuple[list[int], list[int]]:
    """Pairs and text documents of the micro-batch with the highest loss, or else of all whose loss is not finite."""
    mine = [
        (float(loss) / max(int((batch.targets >= 0).sum()), 1), batch.samples, batch.documents)
        for batch, loss in losses
    ]
    everyone = [mine] * groups.layout.language
    dist.all_gather_object(everyone, mine, group=groups.language)
    found = [item for part in everyone for item in part]
    suspects = [max(found)] if is_spike else [item for item in found if not isfinite(item[0])]
    return sorted({p for _, pairs, _ in suspects for p in pairs}), sorted({d for *_, own in suspects for d in own})
