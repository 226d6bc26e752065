"""The weights of a whole model, each an array with named axes, layers and experts stacked.

They are what all formats have in common: a format says how its tensors are cut and ordered out of them.
"""

from dataclasses import dataclass
from functools import cached_property

from megatron_sphinx.model.architecture import LanguageConfig

# The axes: `hidden` is the width of the residual stream, `group` a key-value head, `query` a query head of one group,
# `half` one of the two halves of a head that rotary embeddings turn against each other, `pair` a channel of such a
# half, `ffn` a channel of a feed-forward layer, `channel` one of the visual features, `qformer` one of the Q-Former's
# features, `1` an axis of size 1.
CANONICAL_AXES = {
    "embedding": "vocabulary hidden",
    "attention_norm": "layer hidden",
    "q": "layer group query half pair hidden",
    "k": "layer group 1 half pair hidden",
    "v": "layer group 1 half pair hidden",
    "o": "layer hidden group query half pair",
    "ffn_norm": "layer hidden",
    "router": "layer expert hidden",
    "gate": "layer expert 1 ffn hidden",
    "up": "layer expert 1 ffn hidden",
    "down": "layer expert hidden ffn",
    "norm": "hidden",
    "output": "vocabulary hidden",
    "visual_proj.0.weight": "hidden channel",
    "visual_proj.0.bias": "hidden",
    "visual_proj.1.weight": "hidden",
    "visual_proj.1.bias": "hidden",
    "qformer_proj.0.weight": "hidden qformer",
    "qformer_proj.0.bias": "hidden",
    "qformer_proj.1.weight": "hidden",
    "qformer_proj.1.bias": "hidden",
    "start_tag": "hidden",
    "end_tag": "hidden",
    "skip_token": "hidden",
}
VISION_WEIGHTS = tuple(  # what SPHINX has beside a language model: projections and tags of the pictures
    name for name in CANONICAL_AXES if name.startswith(("visual", "qformer", "start", "end", "skip"))
)
STACKED = "*"  # the axis of a tensor along which several weights are stacked
# The axis of each weight that can be stacked, along which it is.
STACKING_AXES = {"q": "query", "k": "1", "v": "1", "gate": "1", "up": "1"}

Box = dict[str, tuple[int, int]]  # for each axis, the first index and the one behind the last


@dataclass(frozen=True)
class Model:
    """The weights that a checkpoint or a run has.

    Attributes:
        language: shape of the language model.
        channels: channels of the visual features that are projected; 0 where there are no projections.
        queries: channels of the Q-Former; 0 without one.
        has_skip_token: whether a view can be skipped.
    """

    language: LanguageConfig
    channels: int = 0
    queries: int = 0
    has_skip_token: bool = False

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes of all axes."""
        shape = self.language
        return {
            "layer": shape.layers,
            "vocabulary": shape.vocabulary,
            "hidden": shape.hidden,
            "group": shape.groups,
            "query": shape.heads // shape.groups,
            "half": 2,
            "pair": shape.hidden // shape.heads // 2,
            "expert": shape.experts or 1,
            "ffn": shape.ffn,
            "channel": self.channels,
            "qformer": self.queries,
            "1": 1,
        }

    @cached_property
    def weights(self) -> set[str]:
        """The names of its weights, as CANONICAL_AXES has them."""
        absent = set() if self.language.experts else {"router"}
        absent |= {name for name in CANONICAL_AXES if name.startswith("visual") and not self.channels}
        absent |= {name for name in CANONICAL_AXES if name.startswith("qformer") and not self.queries}
        absent |= set() if self.channels else {"start_tag", "end_tag"}
        return set(CANONICAL_AXES) - absent - (set() if self.has_skip_token else {"skip_token"})


def intersect(one: Box, other: Box) -> Box | None:
    """Return the box where two boxes of a weight overlap; None where they do not."""
    common = {}
    for axis, (start, stop) in one.items():
        first, last = max(start, other[axis][0]), min(stop, other[axis][1])
        if first >= last:
            return None
        common[axis] = (first, last)
    return common
