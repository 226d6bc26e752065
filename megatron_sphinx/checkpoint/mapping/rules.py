"""What the tensors of a checkpoint mean: each is a box of the weights of a whole model, its dimensions written as axes.

A format is a table of rules, one for each kind of tensor that it stores: how it is called, and which axes lie in it in
which order. Both sides of a conversion are thus boxes of the same weights, and every layout is a matter of copying
where boxes overlap: no rule knows another format, nothing is computed, every bit stays.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import prod

from megatron_sphinx.checkpoint.mapping.axes import CANONICAL_AXES, STACKED, STACKING_AXES, Box, Model
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.tensors.layout import Layout


@dataclass(frozen=True)
class Rule:
    """How a format stores a kind of tensor.

    Attributes:
        name: the tensor's name; {layer} and {expert} stand for the number of its layer and expert.
        axes: the axes of its dimensions, the slowest first, those of one dimension in brackets; `*` is where weights
            are stacked.
        weights: names of CANONICAL_AXES, in the order in which they are stacked.
        shard: the axis that tensor ranks share; empty where each rank holds all of it.
    """

    name: str
    axes: str
    weights: tuple[str, ...]
    shard: str = ""

    @cached_property
    def dimensions(self) -> list[list[str]]:
        """The axes of each dimension."""
        groups: list[list[str]] = []
        is_open = False
        for word in self.axes.replace("(", "( ").replace(")", " )").split():
            if word == "(":
                groups.append([])
            elif word != ")":
                groups[-1].append(word) if is_open else groups.append([word])
            is_open = word == "(" or (is_open and word != ")")
        return groups

    @cached_property
    def flat_axes(self) -> list[str]:
        """The axes of all dimensions, one behind the other."""
        return [axis for axes in self.dimensions for axis in axes]

    @property
    def numbered(self) -> list[str]:
        """The axes of which the tensor holds one index, which stands in its name."""
        return [axis for axis in ("layer", "expert") if f"{{{axis}}}" in self.name]


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor in one file is.

    Attributes:
        file: name of the file.
        name: the tensor's key there.
        rule: how it is stored.
        box: which box of the weights it holds, for the axes of which it holds less than all, `*` among them; may reach
            over the end of the vocabulary, which is padding.
        sizes: sizes of all axes, the vocabulary unpadded.
    """

    file: str
    name: str
    rule: Rule
    box: Box
    sizes: Mapping[str, int] = field(repr=False)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in the file."""
        return tuple(prod(self.size(axis) for axis in axes) for axes in self.rule.dimensions)

    def size(self, axis: str) -> int:
        """Return how many indices of an axis the tensor holds."""
        if axis == STACKED and axis not in self.box:
            return sum(self.size(STACKING_AXES[weight]) for weight in self.rule.weights)
        start, stop = self.box.get(axis) or (0, self.sizes[axis])
        return stop - start

    def split(self, max_elements: int) -> Iterator["TensorSpec"]:
        """Divide the tensor into pieces that lie one behind the other in its memory, in order.

        Args:
            max_elements: elements of a piece, unless one index of the tensor's last axis has more.
        """
        if prod(self.shape) <= max_elements:
            yield self
            return
        axis = next((axis for axis in self.rule.flat_axes if self.size(axis) > 1), None)
        if axis is None:
            yield self
        elif axis == STACKED:
            for weight in self.rule.weights:
                axes = self.rule.axes.replace(STACKED, STACKING_AXES[weight])
                yield from replace(self, rule=Rule(self.rule.name, axes, (weight,))).split(max_elements)
        else:
            start, stop = self.box.get(axis, (0, self.sizes[axis]))
            step = max(1, max_elements * (stop - start) // prod(self.shape))
            for first in range(start, stop, step):
                piece = replace(self, box=self.box | {axis: (first, min(first + step, stop))})
                yield from piece.split(max_elements) if step == 1 else [piece]

    def regions(self, layout: Layout | None = None) -> Iterator[tuple[str, Box, Layout]]:
        """List what the tensor holds of each weight, without padding.

        Args:
            layout: how the tensor, of `shape`, lies in memory or in a file; row by row unless given.

        Yields:
            The weight's name, the box of the weight, and its layout in the order of the weight's axes.
        """
        whole = layout or Layout.contiguous(self.shape)
        divided = whole.divided([[self.size(axis) for axis in axes] for axes in self.rule.dimensions])
        end = 0  # of the weights so far along the axis where they are stacked
        for weight in self.rule.weights:
            start, end = end, end + (self.size(STACKING_AXES[weight]) if STACKED in self.rule.flat_axes else 0)
            region = self._region(weight, divided, (start, end))
            if region is not None:
                yield weight, *region

    def _region(self, weight: str, layout: Layout, span: tuple[int, int]) -> tuple[Box, Layout] | None:
        """Cut a weight out of a tensor whose dimensions are single axes; None where the tensor holds none of it.

        Args:
            weight: its name.
            layout: of the tensor, one dimension an axis.
            span: first and last index of the weight along the axis where weights are stacked, in a whole tensor.
        """
        axes, axes_left = CANONICAL_AXES[weight].split(), list(self.rule.flat_axes)
        box = {axis: self.box.get(axis, (0, self.sizes[axis])) for axis in axes}
        if STACKED in axes_left:
            place, own = axes_left.index(STACKED), STACKING_AXES[weight]
            start, stop = self.box.get(STACKED, (0, span[1]))
            first, last = max(span[0], start), min(span[1], stop)
            if first >= last:
                return None
            layout = layout.narrowed(place, first - start, last - first)
            axes_left[place], box[own] = own, (first - span[0], last - span[0])
        if "vocabulary" in axes:
            start, stop = box["vocabulary"]
            stop = max(start, min(stop, self.sizes["vocabulary"]))
            box["vocabulary"] = (start, stop)
            layout = layout.narrowed(axes_left.index("vocabulary"), 0, stop - start)
        if missing := [axis for axis in axes if axis not in axes_left and box[axis][1] - box[axis][0] != 1]:
            raise CheckpointError(f"{self.name}: has no place for axis {missing[0]} of {weight}")
        return box, layout.ordered([axes_left.index(axis) if axis in axes_left else None for axis in axes])


def canonical_rules(names: Iterable[str], prefix: str = "") -> tuple[Rule, ...]:
    """Make rules by which weights are stored whole under their canonical names, behind a prefix."""
    return tuple(Rule(prefix + name, CANONICAL_AXES[name], (name,)) for name in names)


def specs_of(
    rules: Iterable[Rule], model: Model, file: str, *, rank: int = 0, ranks: int = 1, vocabulary: int | None = None
) -> Iterator[TensorSpec]:
    """List the tensors that a rank's file holds by the rules of its format.

    Args:
        rules: the table of the format; rules for weights that the model lacks are passed over.
        model: what is stored.
        file: the file's name.
        rank: which of the tensor ranks it belongs to.
        ranks: how many tensor ranks there are.
        vocabulary: rows of the embedding, if they are padded.

    Raises:
        CheckpointError: an axis cannot be divided by the ranks.
    """
    sizes = model.sizes
    for rule in rules:
        if not model.weights.issuperset(rule.weights):
            continue
        shared: Box = {"vocabulary": (0, vocabulary)} if vocabulary and "vocabulary" in rule.flat_axes else {}
        if rule.shard:
            size = shared.get(rule.shard, (0, sizes[rule.shard]))[1]
            shared[rule.shard] = _range_of_rank(rule, size, rank, ranks)
        ranges = [range(*shared.get(axis, (0, sizes[axis]))) for axis in rule.numbered]
        for indices in product(*ranges):
            numbers = dict(zip(rule.numbered, indices, strict=True))
            box = shared | {axis: (number, number + 1) for axis, number in numbers.items()}
            yield TensorSpec(file, rule.name.format(**numbers), rule, box, sizes)


def _range_of_rank(rule: Rule, size: int, rank: int, ranks: int) -> tuple[int, int]:
    if size % ranks:
        counted = {"group": "key-value heads", "ffn": "channels of feed-forward layers", "expert": "experts"}
        what = counted.get(rule.shard, "rows")
        raise CheckpointError(f"{ranks} tensor ranks: cannot share {size} {what} of {rule.name}; use a divisor")
    return size // ranks * rank, size // ranks * (rank + 1)
