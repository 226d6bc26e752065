"""What ZeRO-2 leaves on a rank: its share of fp32 weights and of moments, as parts of whole weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sphinx.checkpoint.slices import TensorSlice
from megatron_sphinx.device import Platform
from megatron_sphinx.model.shards import WeightShard
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.parallel.groups import ProcessGroups

STATES = ("master", "exp_avg", "exp_avg_sq")  # fp32: weights, first and second moments


@dataclass(frozen=True)
class Fragment:
    """A run of elements of a weight that this rank updates.

    Attributes:
        shard: this rank's part of the weight.
        start: the first element, in that part.
        count: how many elements.
        group: number of the optimizer's group that it is in.
        offset: where it begins in this rank's flat partition of the group.
    """

    shard: WeightShard
    start: int
    count: int
    group: int
    offset: int


@dataclass(frozen=True)
class FrozenWeight:
    """A weight that is not trained. Its fp32 values, which checkpoints hold, are partitioned like an optimizer's.

    Attributes:
        shard: which part of the weight this rank has.
        weight: that part, as the model computes with it.
        start: the first element of it that this rank keeps in fp32.
        master: fp32 values of those that it keeps, on the CPU.
    """

    shard: WeightShard
    weight: Tensor
    start: int
    master: Tensor


class ZeroState:
    """The partition of one rank, read and written where DeepSpeed's optimizer has it: nothing is copied.

    DeepSpeed has no public way to its partitions, so this class reads attributes that are internal there.

    Args:
        optimizer: DeepSpeed's ZeRO-2 optimizer around the model's AdamW.
        model: this rank's shard of the model.
        shards: which region of a whole weight this rank has, by the weight's name in the model.
        groups: the rank's process groups.
        platform: what the rank computes on.

    Attributes:
        fragments: what this rank updates.
        frozen: what nobody updates.
    """

    def __init__(
        self,
        optimizer: Any,
        model: SphinxModel,
        shards: dict[str, WeightShard],
        groups: ProcessGroups,
        platform: Platform,
    ) -> None:
        self._optimizer, self._platform = optimizer, platform
        self.fragments = list(self._find_fragments(model, shards))
        named = model.named_parameters()
        self.frozen = [_freeze(shards[name], weight, groups) for name, weight in named if not weight.requires_grad]
        self._loaded: list[Tensor] = []  # of each frozen weight, all of this rank's part

    def _find_fragments(self, model: SphinxModel, shards: dict[str, WeightShard]) -> Iterator[Fragment]:
        """Find what of which weight lies in this rank's partitions."""
        names = {weight: name for name, weight in model.named_parameters()}
        for group, weights in enumerate(self._optimizer.params_in_partition):
            for weight in weights:
                # DeepSpeed's own note on where the elements of this rank lie: in the weight, and in the flat partition
                in_weight, in_partition = weight._hp_mapping.lp_fragment_address, weight._hp_mapping.hp_fragment_address
                yield Fragment(shards[names[weight]], in_weight.start, in_weight.numel, group, in_partition.start)

    # weights and moments

    def slices(self, *, with_copies: bool) -> Iterator[TensorSlice]:
        """Give what must be kept of what this rank updates: fp32 weights and moments, `master/...`, `exp_avg/...`.

        The values are the optimizer's own memory. For frozen weights there are fp32 values only.

        Args:
            with_copies: for loading: also parts that a tensor rank before this one holds as well, and all of this
                rank's part of frozen weights.
        """
        yield from self._frozen_to_load() if with_copies else self._frozen_to_save()
        for fragment in self.fragments:
            if not (with_copies or fragment.shard.is_first_copy):
                continue
            flat = self._optimizer.single_partition_of_fp32_groups[fragment.group]
            states = {"master": flat.detach()} | self._optimizer.optimizer.state[flat]
            for state in STATES:
                values = states[state].narrow(0, fragment.offset, fragment.count)
                yield from _slices(state, fragment.shard, fragment.start, values)

    def _frozen_to_save(self) -> Iterator[TensorSlice]:
        """Give the fp32 values of frozen weights that this rank keeps."""
        for frozen in self.frozen:
            if frozen.shard.is_first_copy:
                yield from _slices("master", frozen.shard, frozen.start, frozen.master)

    def _frozen_to_load(self) -> Iterator[TensorSlice]:
        """Make room for all of this rank's part of frozen weights: no other rank will hand any of it over."""
        self._loaded = [frozen.weight.detach().flatten().float().cpu().clone() for frozen in self.frozen]
        for frozen, whole in zip(self.frozen, self._loaded, strict=True):
            yield from _slices("master", frozen.shard, 0, whole)

    def prepare(self, steps: int) -> None:
        """Make room for a state after so many updates; then write into what `slices` gives, and call `take`."""
        device = self._platform.device if self._platform.is_cuda else torch.device("cpu")
        for flat in self._optimizer.single_partition_of_fp32_groups:
            self._optimizer.optimizer.state[flat] = {
                "step": torch.tensor(float(steps), device=device),
                "exp_avg": torch.zeros_like(flat.detach()),
                "exp_avg_sq": torch.zeros_like(flat.detach()),
            }

    def take(self) -> None:
        """Set the model's weights from the state, on all replicas."""
        self._optimizer.update_lp_params()
        for frozen, whole in zip(self.frozen, self._loaded, strict=True):
            frozen.weight.data.copy_(whole.view(frozen.weight.shape))
            frozen.master.copy_(whole[frozen.start :][: len(frozen.master)])
        self._loaded = []

    def moment_bytes(self) -> int:
        """Count the bytes of the two moments, which are there from the first update on."""
        states = self._optimizer.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if value.ndim)


def _freeze(shard: WeightShard, weight: Tensor, groups: ProcessGroups) -> FrozenWeight:
    """Keep this rank's share of the fp32 values of a weight that is not trained."""
    copies = groups.expert_data if shard.is_expert else groups.data
    place, size = dist.get_rank(copies), dist.get_world_size(copies)
    start, stop = (weight.numel() * part // size for part in (place, place + 1))
    return FrozenWeight(shard, weight, start, weight.detach().view(-1)[start:stop].float().cpu().clone())


def _slices(state: str, shard: WeightShard, start: int, values: Tensor) -> Iterator[TensorSlice]:
    """Cut a run of elements of a rank's part of a weight into boxes of the whole weight."""
    for block, first in shard.boxes(start, len(values)):
        part = values.narrow(0, first - start, prod(block.shape)).view(block.shape)
        yield TensorSlice(f"{state}/{shard.name}", shard.whole, block, part)
