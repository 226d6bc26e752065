"""What the tensors of a checkpoint mean: each is a box of the weights of a whole model, its dimensions written as axes.

The weights of a model are the entries of WEIGHTS, layers and experts stacked, in one fixed order of axes. A format is a
table of rules, one for each kind of tensor that it stores: how it is called, and which axes lie in it in which order.
Both sides of a conversion are thus boxes of the same weights, and every layout is a matter of copying where boxes meet:
no rule knows another format, nothing is computed, every bit stays.

Axes: l layers, v vocabulary, i width of the residual stream, g key-value heads, p query heads of each, r the two halves
of a head that rotary embeddings turn against each other, h half a head, e experts, f width of a feed-forward layer,
c channels of the visual features, d channels of the Q-Former; o and u are 1.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import prod

from torch import Tensor

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig

WEIGHTS = {
    "embedding": "v i",
    "attention_norm": "l i",
    "q": "l g p r h i",
    "k": "l g o r h i",
    "v": "l g o r h i",
    "o": "l i g p r h",
    "ffn_norm": "l i",
    "router": "l e i",
    "gate": "l e u f i",
    "up": "l e u f i",
    "down": "l e i f",
    "norm": "i",
    "output": "v i",
    "visual_proj.0.weight": "i c",
    "visual_proj.0.bias": "i",
    "visual_proj.1.weight": "i",
    "visual_proj.1.bias": "i",
    "qformer_proj.0.weight": "i d",
    "qformer_proj.0.bias": "i",
    "qformer_proj.1.weight": "i",
    "qformer_proj.1.bias": "i",
    "start_tag": "i",
    "end_tag": "i",
    "skip_token": "i",
}
_SLOTS = {"q": "p", "k": "o", "v": "o", "gate": "u", "up": "u"}  # the axis along which weights are stacked in a tensor

Box = dict[str, tuple[int, int]]  # for each axis, the first index and the one behind the last


@dataclass(frozen=True)
class Rule:
    """How a format stores a kind of tensor.

    Attributes:
        name: of the tensor; {l} and {e} stand for the number of its layer and expert.
        axes: of its dimensions, the slowest first, those of one dimension in brackets; `*`: where weights are stacked.
        weights: of WEIGHTS, in the order in which they are stacked.
        shard: the axis that tensor ranks share; empty where each holds all.
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

    @property
    def indexed(self) -> list[str]:
        """The axes of which the tensor holds one place, which its name tells."""
        return [axis for axis in "le" if f"{{{axis}}}" in self.name]


@dataclass(frozen=True)
class Stored:
    """One tensor in one file.

    Attributes:
        file: name of the file.
        name: its key there.
        rule: what it is.
        box: which part of the weights it holds, for the axes where that is not all, `*` among them; may reach over the
            end of the vocabulary, which is padding.
        sizes: of all axes, the vocabulary unpadded.
    """

    file: str
    name: str
    rule: Rule
    box: Box
    sizes: Mapping[str, int] = field(repr=False)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return tuple(prod(self.size(axis) for axis in axes) for axes in self.rule.dimensions)

    def size(self, axis: str) -> int:
        """How much of an axis it holds."""
        if axis == "*" and axis not in self.box:
            return sum(self.size(_SLOTS[weight]) for weight in self.rule.weights)
        start, stop = self.box.get(axis) or (0, self.sizes[axis])
        return stop - start

    def pieces(self, most: int) -> Iterator["Stored"]:
        """The same tensor in pieces that lie one behind the other in its memory, in order.

        Args:
            most: elements of a piece, unless one place of its last axis has more.
        """
        if prod(self.shape) <= most:
            yield self
            return
        axis = next((axis for axes in self.rule.dimensions for axis in axes if self.size(axis) > 1), None)
        if axis is None:
            yield self
        elif axis == "*":
            for weight in self.rule.weights:
                axes = self.rule.axes.replace("*", _SLOTS[weight])
                yield from replace(self, rule=Rule(self.rule.name, axes, (weight,))).pieces(most)
        else:
            start, stop = self.box.get(axis, (0, self.sizes[axis]))
            step = max(1, most * (stop - start) // prod(self.shape))
            for first in range(start, stop, step):
                piece = replace(self, box=self.box | {axis: (first, min(first + step, stop))})
                yield from piece.pieces(most) if step == 1 else [piece]

    def parts(self, values: Tensor) -> Iterator[tuple[str, Box, Tensor]]:
        """The weights in it: name, box, and a view of `values` in the order of the weight's axes; no padding."""
        flat = [axis for axes in self.rule.dimensions for axis in axes]
        values = values.view([self.size(axis) for axis in flat])
        at = 0
        for weight in self.rule.weights:
            axes, part, here = WEIGHTS[weight].split(), values, list(flat)
            box = {axis: self.box.get(axis, (0, self.sizes[axis])) for axis in axes}
            if "*" in here:
                place, slot = here.index("*"), _SLOTS[weight]
                begin, at = at, at + self.size(slot)
                start, stop = self.box.get("*", (0, at))
                first, last = max(begin, start), min(at, stop)
                if first >= last:
                    continue
                part = part.narrow(place, first - start, last - first)
                here[place], box[slot] = slot, (first - begin, last - begin)
            if "v" in axes:
                start, stop = box["v"]
                stop = max(start, min(stop, self.sizes["v"]))
                box["v"], part = (start, stop), part.narrow(here.index("v"), 0, stop - start)
            if odd := [axis for axis in axes if axis not in here and box[axis][1] - box[axis][0] != 1]:
                raise CheckpointError(f"{self.name}: has no place for axis {odd[0]} of {weight}")
            for axis in [axis for axis in here if axis not in axes]:  # of size 1
                part = part.squeeze(here.index(axis))
                here.remove(axis)
            part = part.permute([here.index(axis) for axis in axes if axis in here])
            for place, axis in enumerate(axes):
                if axis not in here:
                    part = part.unsqueeze(place)
            yield weight, box, part


def meeting(one: Box, other: Box) -> Box | None:
    """The box where two boxes of a weight meet; None where they do not."""
    found = {}
    for axis, (start, stop) in one.items():
        first, last = max(start, other[axis][0]), min(stop, other[axis][1])
        if first >= last:
            return None
        found[axis] = (first, last)
    return found


def inside(values: Tensor, box: Box, part: Box) -> Tensor:
    """The part of a box's values that lies in another box, which lies in it."""
    for place, (axis, (start, stop)) in enumerate(part.items()):
        values = values.narrow(place, start - box[axis][0], stop - start)
    return values


@dataclass(frozen=True)
class Model:
    """What a checkpoint holds.

    Attributes:
        language: shape of the language model.
        channels: of the visual features that are projected; 0 where there are no projections.
        queries: channels of the Q-Former; 0 without one.
        has_skip_token: whether a view can be skipped.
    """

    language: LanguageConfig
    channels: int = 0
    queries: int = 0
    has_skip_token: bool = False

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Of all axes."""
        shape = self.language
        return {
            "l": shape.layers,
            "v": shape.vocabulary,
            "i": shape.hidden,
            "g": shape.groups,
            "p": shape.heads // shape.groups,
            "r": 2,
            "h": shape.hidden // shape.heads // 2,
            "e": shape.experts or 1,
            "f": shape.ffn,
            "c": self.channels,
            "d": self.queries,
            "o": 1,
            "u": 1,
        }

    @cached_property
    def weights(self) -> set[str]:
        """The names of what it holds."""
        absent = set() if self.language.experts else {"router"}
        absent |= {name for name in WEIGHTS if name.startswith("visual") and not self.channels}
        absent |= {name for name in WEIGHTS if name.startswith("qformer") and not self.queries}
        absent |= set() if self.channels else {"start_tag", "end_tag"}
        return set(WEIGHTS) - absent - (set() if self.has_skip_token else {"skip_token"})


def stored(
    rules: Iterable[Rule], model: Model, file: str, *, rank: int = 0, ranks: int = 1, vocabulary: int | None = None
) -> Iterator[Stored]:
    """The tensors that a rank's file holds by the rules of its format.

    Args:
        rules: of the format; those for weights that the model lacks are passed over.
        model: what is stored.
        file: the file's name.
        rank: which of the tensor ranks it belongs to.
        ranks: how many there are.
        vocabulary: rows of the embedding, if they are padded.

    Raises:
        CheckpointError: an axis cannot be divided by the ranks.
    """
    sizes = model.sizes
    for rule in rules:
        if not model.weights.issuperset(rule.weights):
            continue
        whole: Box = {"v": (0, vocabulary)} if vocabulary and "v" in rule.axes.split() else {}
        if rule.shard:
            whole[rule.shard] = _share(rule, whole.get(rule.shard, (0, sizes[rule.shard]))[1], rank, ranks)
        places = [range(*whole.get(axis, (0, sizes[axis]))) for axis in rule.indexed]
        for place in product(*places):
            numbers = dict(zip(rule.indexed, place, strict=True))
            box = whole | {axis: (number, number + 1) for axis, number in numbers.items()}
            yield Stored(file, rule.name.format(**numbers), rule, box, sizes)


def _share(rule: Rule, size: int, rank: int, ranks: int) -> tuple[int, int]:
    if size % ranks:
        what = {"g": "key-value heads", "f": "channels of feed-forward layers", "e": "experts"}.get(rule.shard, "rows")
        raise CheckpointError(f"{ranks} tensor ranks: cannot share {size} {what} of {rule.name}; use a divisor")
    return size // ranks * rank, size // ranks * (rank + 1)
