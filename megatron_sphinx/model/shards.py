"""Which part of which whole weight a rank holds: what makes a weight the same thing in every layout."""

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
# The same of an expert's matrix, for the expert-tensor ranks; the experts themselves lie along dimension 0.
SHARDED_EXPERTS = {"experts.weight1": (0, 2), "experts.weight2": (1, 1)}
# transformer-engine holds norms inside the matrices behind them.
_FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Block:
    """A box of a whole weight.

    Attributes:
        offset: its first corner in the whole.
        shape: its sizes.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightShard:
    """A rank's part of a weight.

    Attributes:
        name: of the whole weight, the same in every layout.
        whole: shape of the whole weight.
        blocks: boxes of the whole that lie one behind the other in the rank's memory.
        is_first_copy: whether no other tensor rank before this one holds the same.
        is_expert: whether it is a weight of experts.
    """

    name: str
    whole: tuple[int, ...]
    blocks: tuple[Block, ...]
    is_first_copy: bool
    is_expert: bool

    def boxes(self, start: int, count: int) -> Iterator[tuple[Block, int]]:
        """Elements `start` to `start + count` of the rank's memory as boxes of the whole, each with its own start."""
        behind = 0
        for block in self.blocks:
            size = prod(block.shape)
            first, last = max(start, behind), min(start + count, behind + size)
            if first < last:
                for offset, shape, at in boxes_of(block.shape, first - behind, last - behind):
                    corner = tuple(a + b for a, b in zip(block.offset, offset, strict=True))
                    yield Block(corner, shape), behind + at
            behind += size


def boxes_of(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Elements `start` to `stop` of a contiguous tensor as boxes: (offset, shape, first element)."""
    if len(shape) <= 1:
        yield ((start,), (stop - start,), start) if shape else ((), (), 0)
        return
    inner = prod(shape[1:])
    row, at = divmod(start, inner)
    if at or stop - start < inner:  # part of one row
        end = min(stop, (row + 1) * inner)
        for offset, box, first in boxes_of(shape[1:], at, end - row * inner):
            yield (row, *offset), (1, *box), row * inner + first
        if end < stop:
            yield from boxes_of(shape, end, stop)
        return
    rows = (stop - start) // inner
    yield (row, *(0,) * (len(shape) - 1)), (rows, *shape[1:]), start
    if start + rows * inner < stop:
        yield from boxes_of(shape, start + rows * inner, stop)


def shards_of(model: nn.Module, config: LanguageConfig, groups: "ProcessGroups") -> dict[str, WeightShard]:
    """The shard of every weight of a rank's model, by the weight's name there."""
    sizes = groups.layout.config
    first_layer = sum(sizes.stage_layers(config.layers)[: groups.seat.pipeline])
    return {name: _shard(name, weight, config, groups, first_layer) for name, weight in model.named_parameters()}


def _shard(name: str, weight: Tensor, config: LanguageConfig, groups: "ProcessGroups", first_layer: int) -> WeightShard:
    sizes, seat = groups.layout.config, groups.seat
    suffix, shape = ".".join(name.split(".")[-2:]), tuple(weight.shape)
    whole_name = whole_weight(name, first_layer)
    if suffix in SHARDED_EXPERTS:
        here, (dim, stride) = shape[0], SHARDED_EXPERTS[suffix]
        matrix, parts = _parts(shape[1:], dim, stride, sizes.expert_tensor, seat.expert_tensor)
        first = seat.expert * here
        if stride == 1:  # all experts are one box
            blocks = [Block((first, *parts[0].offset), (here, *parts[0].shape))]
        else:
            blocks = [Block((first + e, *p.offset), (1, *p.shape)) for e in range(here) for p in parts]
        return WeightShard(whole_name, (config.experts, *matrix), tuple(blocks), is_first_copy=True, is_expert=True)
    if suffix in SHARDED:
        whole, parts = _parts(shape, *SHARDED[suffix], sizes.tensor, seat.tensor)
        return WeightShard(whole_name, whole, tuple(parts), is_first_copy=True, is_expert=False)
    block = Block((0,) * len(shape), shape)
    return WeightShard(whole_name, shape, (block,), is_first_copy=seat.tensor == 0, is_expert=False)


def whole_weight(name: str, first_layer: int) -> str:
    """A weight's name in the whole model, from its name on a stage whose layers begin with number `first_layer`."""
    name = re.sub(r"(?<=\.layers\.)\d+", lambda found: str(int(found[0]) + first_layer), name)
    for fused, plain in _FUSED.items():
        name = name.replace(fused, plain)
    return name


def _parts(shape: Sequence[int], dim: int, stride: int, size: int, place: int) -> tuple[tuple[int, ...], list[Block]]:
    """Shape of the whole, and the boxes of it that the rank at `place` of `size` has stacked in its `shape`."""
    whole, box = list(shape), list(shape)
    whole[dim] *= size
    box[dim] //= stride
    blocks = []
    for matrix in range(stride):
        offset = [0] * len(shape)
        offset[dim] = matrix * whole[dim] // stride + place * box[dim]
        blocks.append(Block(tuple(offset), tuple(box)))
    return tuple(whole), blocks
