"""One optimizer step: every micro-batch forward and backward, one global count of tokens, one update."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.errors import DivergedError
from megatron_sphinx.model.sphinx import MicroBatch
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.stage.channel import FeatureSource
from megatron_sphinx.training.deepspeed_engine import Engine


@dataclass
class Sums:
    """What is summed over the micro-batches and replicas of a step. Losses are in nats; `stop` counts ranks."""

    loss_pairs: float = 0.0
    loss_text: float = 0.0
    targets_pairs: float = 0.0
    targets_text: float = 0.0
    bad_pairs: float = 0.0
    feature_bytes: float = 0.0
    stop: float = 0.0

    def over(self, groups: ProcessGroups, device: torch.device) -> "Sums":
        """The sums over all replicas, the same on every language rank: the ranks must agree on what to do next.

        The tensor ranks of a replica know the same, so the first speaks for all; but a signal may have come to any.
        """
        names = [field.name for field in fields(self)]
        speaks = groups.seat.tensor == 0
        mine = [getattr(self, name) if speaks or name == "stop" else 0.0 for name in names]
        values = torch.tensor(mine, dtype=torch.float64, device=device)
        dist.all_reduce(values, group=groups.language)
        return Sums(**dict(zip(names, values.tolist(), strict=True)))


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        loss: weighted mean over the step's target tokens, in nats.
        sums: what it is made of.
        gradient_norm: global norm before clipping.
        exposed_encoder_seconds: how long this rank waited for features.
    """

    loss: float
    sums: Sums
    gradient_norm: float
    exposed_encoder_seconds: float


def mask_bad(batch: MicroBatch, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take out of a micro-batch the pairs whose image could not be read (their features are NaN).

    Returns:
        Features without NaN, targets without those pairs, and how many pairs there were of them.
    """
    bad_views = features[:, 0].isnan()
    counts = torch.zeros(len(batch.pairs) + 1, dtype=torch.int32, device=features.device)
    bad_pairs = counts.index_add(0, batch.pair_of_view, bad_views.int()) > 0
    targets = batch.targets.masked_fill(bad_pairs[batch.pair_of_token], -100)  # text points at the last, never bad
    return features.masked_fill(bad_views[:, None], 0.0), targets, bad_pairs.sum()


def train_step(
    engine: Engine,
    plan: StepPlan,
    batches: Sequence[MicroBatch],
    features: FeatureSource,
    groups: ProcessGroups,
    *,
    text_weight: float,
    rate: float,
    device: torch.device,
    is_stopping: bool,
) -> StepReport:
    """Update the weights once from the step's micro-batches.

    Each target token of the step weighs the same (text ones by `text_weight`), wherever it is computed: token losses
    are summed and divided once, by a count that follows from the plan. Where images could not be read, the gradient
    is scaled afterwards to the count that is left.

    Raises:
        DivergedError: a loss is not finite; names the samples. The weights have not been changed.
    """
    planned = plan.targets(of_pairs=True) + text_weight * plan.targets(of_pairs=False)
    sums, waited = torch.zeros(5, dtype=torch.float64, device=device), features.waiting.seconds
    received, suspects = features.received_bytes, []
    for batch in batches:
        clean, targets, bad = mask_bad(batch, features.next())
        losses = engine.model(replace(batch, targets=targets), clean)
        is_target, is_text = targets >= 0, batch.pair_of_token < 0
        of_pairs, of_text = is_target & ~is_text, is_target & is_text
        pairs, text = losses.where(of_pairs, 0.0).sum(), losses.where(of_text, 0.0).sum()
        engine.backward((pairs + text_weight * text) / planned)
        counts = [pairs.detach(), text.detach(), of_pairs.sum(), of_text.sum(), bad]
        sums += torch.stack([value.double() for value in counts])
        suspects.append((pairs + text).detach())
    mine = Sums(*sums.tolist(), features.received_bytes - received, is_stopping)  # type: ignore[call-arg]
    whole = mine.over(groups, device)
    actual = whole.targets_pairs + text_weight * whole.targets_text
    loss = (whole.loss_pairs + text_weight * whole.loss_text) / max(actual, 1.0)
    if not torch.tensor(loss).isfinite():
        raise DivergedError(_diverged(plan.step, loss, batches, suspects, groups))
    if whole.bad_pairs and actual:
        engine.rescale(planned / actual)
    norm = engine.update(rate)
    return StepReport(loss, whole, norm, features.waiting.seconds - waited)


def _diverged(
    step: int, loss: float, batches: Sequence[MicroBatch], losses: Sequence[Tensor], groups: ProcessGroups
) -> str:
    """One line that names the step and the samples of the micro-batches whose loss is not finite."""
    bad = [batch for batch, value in zip(batches, losses, strict=True) if not value.isfinite()]
    mine = (sorted({p for b in bad for p in b.pairs}), sorted({d for b in bad for d in b.documents}))
    found: list[tuple[list[int], list[int]]] = [mine] * groups.layout.data
    dist.all_gather_object(found, mine, group=groups.data)
    pairs, documents = (sorted({item for part in found for item in part[side]}) for side in (0, 1))
    return (
        f"step={step}: loss is {loss}; weights unchanged; samples in it: pairs {pairs}, text documents {documents}; "
        f"look at them, or resume with a lower optimizer.learning_rate"
    )
