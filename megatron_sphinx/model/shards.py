"""Which shard of which whole weight a rank holds: what makes a weight the same thing in every layout."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from megatron_sphinx.model.architecture import LanguageConfig

if TYPE_CHECKING:  # megatron-core takes seconds and memory to import; tools do without
    from megatron_sphinx.parallel.groups import ProcessGroups

# Which dimension of a weight the tensor ranks share, and how many matrices are stacked in it (gate over up).
SHARDED = {
    "word_embeddings.weight": (0, 1),
    "linear_qkv.weight": (0, 1),
    "linear_proj.weight": (1, 1),
    "linear_fc1.weight": (0, 2),
    "linear_fc2.weight": (1, 1),
    "output_layer.weight": (0, 1),
}
# Likewise of a MoE expert's matrix, for the expert-tensor ranks; the experts themselves lie along dimension 0.
SHARDED_MOE_EXPERTS = {"experts.weight1": (0, 2), "experts.weight2": (1, 1)}
# transformer-engine holds norms inside the matrices behind them.
_FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Block:
    """A box of a whole weight.

    Attributes:
        offset: the box's first corner in the whole weight.
        shape: the box's sizes.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightShard:
    """What a rank holds of a weight.

    Attributes:
        name: name of the whole weight, the same in every layout.
        whole: shape of the whole weight.
        blocks: boxes of the whole that lie one behind the other in the rank's memory.
        is_first_copy: whether no other tensor rank before this one holds the same.
        is_expert: whether it is a weight of MoE experts.
    """

    name: str
    whole: tuple[int, ...]
    blocks: tuple[Block, ...]
    is_first_copy: bool
    is_expert: bool

    def boxes(self, start: int, count: int) -> Iterator[tuple[Block, int]]:
        """Divide a range of the rank's memory into boxes of the whole weight.

        Args:
            start: first element of the range.
            count: elements of the range.

        Yields:
            A box, and the element of the rank's memory that it begins with.
        """
        prefix = 0  # elements of the blocks before
        for block in self.blocks:
            size = prod(block.shape)
            first, last = max(start, prefix), min(start + count, prefix + size)
            if first < last:
                for offset, shape, element in boxes_of(block.shape, first - prefix, last - prefix):
                    corner = tuple(a + b for a, b in zip(block.offset, offset, strict=True))
                    yield Block(corner, shape), prefix + element
            prefix += size


def boxes_of(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Divide elements `start` to `stop` of a contiguous tensor into boxes: (offset, shape, first element)."""
    if len(shape) <= 1:
        yield ((start,), (stop - start,), start) if shape else ((), (), 0)
        return
    inner = prod(shape[1:])
    row, column = divmod(start, inner)
    if column or stop - start < inner:  # part of one row
        end = min(stop, (row + 1) * inner)
        for offset, box, first in boxes_of(shape[1:], column, end - row * inner):
            yield (row, *offset), (1, *box), row * inner + first
        if end < stop:
            yield from boxes_of(shape, end, stop)
        return
    rows = (stop - start) // inner
    yield (row, *(0,) * (len(shape) - 1)), (rows, *shape[1:]), start
    if start + rows * inner < stop:
        yield from boxes_of(shape, start + rows * inner, stop)


def shards_of(model: nn.Module, config: LanguageConfig, groups: "ProcessGroups") -> dict[str, WeightShard]:
    """Return the shard of every weight of a rank's model, by the weight's name there."""
    sizes = groups.layout.config
    first_layer = sum(sizes.stage_layers(config.layers)[: groups.seat.pipeline])
    return {name: _shard(name, weight, config, groups, first_layer) for name, weight in model.named_parameters()}


def _shard(name: str, weight: Tensor, config: LanguageConfig, groups: "ProcessGroups", first_layer: int) -> WeightShard:
    sizes, seat = groups.layout.config, groups.seat
    suffix, shape = ".".join(name.split(".")[-2:]), tuple(weight.shape)
    whole_name = whole_weight(name, first_layer)
    if suffix in SHARDED_MOE_EXPERTS:
        count, (dim, stride) = shape[0], SHARDED_MOE_EXPERTS[suffix]
        matrix, regions = _blocks_of_rank(shape[1:], dim, stride, sizes.expert_tensor, seat.expert_tensor)
        first = seat.expert * count
        if stride == 1:  # all experts are one box
            blocks = [Block((first, *regions[0].offset), (count, *regions[0].shape))]
        else:
            blocks = [Block((first + e, *one.offset), (1, *one.shape)) for e in range(count) for one in regions]
        return WeightShard(whole_name, (config.experts, *matrix), tuple(blocks), is_first_copy=True, is_expert=True)
    if suffix in SHARDED:
        whole, regions = _blocks_of_rank(shape, *SHARDED[suffix], sizes.tensor, seat.tensor)
        return WeightShard(whole_name, whole, tuple(regions), is_first_copy=True, is_expert=False)
    block = Block((0,) * len(shape), shape)
    return WeightShard(whole_name, shape, (block,), is_first_copy=seat.tensor == 0, is_expert=False)


def whole_weight(name: str, first_layer: int) -> str:
    """Return a weight's name in the whole model.

    Args:
        name: its name on a pipeline stage.
        first_layer: number of the stage's first layer in the whole model.
    """
    name = re.sub(r"(?<=\.layers\.)\d+", lambda number: str(int(number[0]) + first_layer), name)
    for fused, plain in _FUSED.items():
        name = name.replace(fused, plain)
    return name


def _blocks_of_rank(
    shape: Sequence[int], dim: int, stride: int, ranks: int, rank: int
) -> tuple[tuple[int, ...], list[Block]]:
    """Shape of the whole, and the boxes of it that a rank has stacked.

    Args:
        shape: what the rank holds.
        dim: the dimension that the ranks share.
        stride: how many matrices are stacked along it.
        ranks: how many ranks share it.
        rank: which of them it is.
    """
    whole, box = list(shape), list(shape)
    whole[dim] *= ranks
    box[dim] //= stride
    blocks = []
    for matrix in range(stride):
        offset = [0] * len(shape)
        offset[dim] = matrix * whole[dim] // stride + rank * box[dim]
        blocks.append(Block(tuple(offset), tuple(box)))
    return tuple(whole), blocks
