"""What ranks add up of a step: each number says in its field how those of all ranks become one."""

from dataclasses import dataclass, field, fields
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sphinx.parallel.groups import ProcessGroups


class Reduction(Enum):
    """How the numbers of all language ranks become one."""

    SUM_OF_REPLICAS = "added up over the first tensor ranks, since all of a tensor group know the same"
    SUM_OF_RANKS = "added up over all ranks"
    MAX = "the largest of all ranks"
    RANK_OF_MAX = "the rank that has the largest of another field"


def reduced(how: Reduction, by: str = "") -> float:
    """Declare a field that begins at 0, and how it is reduced over ranks.

    Args:
        how: the reduction.
        by: for RANK_OF_MAX, the field whose largest value decides which rank it is.
    """
    number: float = field(default=0.0, metadata={"reduction": how, "by": by})
    return number


@dataclass
class Sums:
    """What a step's micro-batches and replicas come to.

    Attributes:
        loss_pairs, loss_text: sums of losses, in nats.
        targets_pairs, targets_text: how many targets those are of.
        bad_pairs: pairs whose image could not be read.
        feature_bytes: bytes of features that came from encoder ranks.
        balance: the balance loss of the routers, before its coefficient.
        stop: ranks that were asked to stop.
        failed: ranks whose last save has failed.
        bad_data: ranks whose scan of the data has found something.
        exposed_encoder_seconds: seconds that the rank which waited longest has waited for features.
        data_wait_seconds: the same for data.
        data_wait_rank: the rank that has waited longest for data.
    """

    loss_pairs: float = reduced(Reduction.SUM_OF_REPLICAS)
    loss_text: float = reduced(Reduction.SUM_OF_REPLICAS)
    targets_pairs: float = reduced(Reduction.SUM_OF_REPLICAS)
    targets_text: float = reduced(Reduction.SUM_OF_REPLICAS)
    bad_pairs: float = reduced(Reduction.SUM_OF_REPLICAS)
    feature_bytes: float = reduced(Reduction.SUM_OF_REPLICAS)
    balance: float = reduced(Reduction.SUM_OF_RANKS)
    stop: float = reduced(Reduction.SUM_OF_RANKS)
    failed: float = reduced(Reduction.SUM_OF_RANKS)
    bad_data: float = reduced(Reduction.SUM_OF_REPLICAS)
    exposed_encoder_seconds: float = reduced(Reduction.MAX)
    data_wait_seconds: float = reduced(Reduction.MAX)
    data_wait_rank: float = reduced(Reduction.RANK_OF_MAX, by="data_wait_seconds")

    def over_ranks(self, groups: ProcessGroups, device: torch.device) -> "Sums":
        """Reduce over all language ranks; the result is the same on each: they must agree on what to do next."""
        own = torch.tensor([self.contribution(is_first=groups.seat.tensor == 0)], dtype=torch.float64, device=device)
        everyone = torch.empty(groups.layout.language, own.shape[1], dtype=torch.float64, device=device)
        dist.all_gather_into_tensor(everyone, own, group=groups.language)
        return reduce_sums(everyone)

    def contribution(self, *, is_first: bool) -> list[float]:
        """List what this rank adds, field by field; `is_first` says whether it is the first of its tensor group."""
        numbers = fields(self)
        is_told = [is_first or number.metadata["reduction"] is not Reduction.SUM_OF_REPLICAS for number in numbers]
        return [getattr(self, number.name) if told else 0.0 for number, told in zip(numbers, is_told, strict=True)]


def reduce_sums(everyone: Tensor) -> Sums:
    """Make one `Sums` of what all ranks contribute: float64 [ranks, fields], fields in the order of `Sums`."""
    names = [number.name for number in fields(Sums)]
    values = {
        Reduction.SUM_OF_REPLICAS: everyone.sum(0).tolist(),
        Reduction.MAX: everyone.amax(0).tolist(),
        Reduction.RANK_OF_MAX: everyone.argmax(0).tolist(),
    }
    values[Reduction.SUM_OF_RANKS] = values[Reduction.SUM_OF_REPLICAS]  # they differ in what ranks contribute
    whole = Sums()
    for number in fields(Sums):
        by = number.metadata["by"] or number.name
        setattr(whole, number.name, values[number.metadata["reduction"]][names.index(by)])
    return whole
