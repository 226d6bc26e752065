"""What the first rank orders of the MoE experts of all ranks, and what a rank tells of them; plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.model.expert_choice import ExpertChoice


@dataclass(frozen=True)
class Restrict:
    """Answer with the experts of a choice from now on.

    Attributes:
        choice: the experts, as `ExpertChoice.fitting` gives them.
    """

    choice: ExpertChoice


@dataclass(frozen=True)
class Watch:
    """Record the choices of the routers from now on.

    Attributes:
        keep: sizes of subsets of experts, of each of which the error is summed up, too; each rank must have all
            experts whole for that. None unless given.
    """

    keep: tuple[int, ...] = ()


@dataclass(frozen=True)
class Collect:
    """Tell what has been recorded since this was ordered last."""


ExpertOrder = Restrict | Watch | Collect


@dataclass(frozen=True)
class Choices:
    """What the routers chose for the tokens of one prompt and its answer.

    Attributes:
        experts: int16 [layers, tokens, experts of a token]: numbers of the chosen experts, the likeliest first.
        first_weight: fp32 [layers, tokens]: the weight of the first one in the layer's output.
    """

    experts: NDArray[np.int16]
    first_weight: NDArray[np.float32]

    @classmethod
    def joined(cls, parts: Sequence["Choices"], axis: int) -> "Choices":
        """Put parts together, layers along axis 0 or tokens along axis 1."""
        experts = np.concatenate([one.experts for one in parts], axis)
        return cls(experts, np.concatenate([one.first_weight for one in parts], axis))


@dataclass(frozen=True)
class WatchedExperts:
    """What a rank has recorded.

    Attributes:
        layers: numbers of its layers, counted from 0.
        prompts: the choices of these layers, by the marks of the prompts.
        errors: by layer and subset, the squared difference that keeping this subset of experts alone makes to the
            layer's output, summed over tokens; empty where nobody asked.
        norms: by layer, the squared norm of the layer's output, summed over these tokens.
    """

    layers: tuple[int, ...]
    prompts: Mapping[int, Choices]
    errors: Mapping[int, Mapping[tuple[int, ...], float]]
    norms: Mapping[int, float]
