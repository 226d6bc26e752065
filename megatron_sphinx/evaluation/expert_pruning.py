"""Which experts of each layer to keep: at random, by how much they are used, or by what the layer would lack.

Source: SPHINX-X, arXiv:2402.05935, appendix A.1.3, for random ones; arXiv:2402.14800, section 3.2, for the last.
"""

from collections.abc import Mapping
from enum import StrEnum
from math import comb

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model.expert_choice import KeptExperts

_MOST_SUBSETS = 10_000


class Pruning(StrEnum):
    """By what the experts to keep are chosen.

    Attributes:
        RANDOM: by a seed, in each layer anew.
        USAGE: those that compute most tokens.
        RECONSTRUCTION: those without whose fellows the layer's output differs least.
    """

    RANDOM = "random"
    USAGE = "usage"
    RECONSTRUCTION = "reconstruction"


def check_keep(keep: int, experts: int, method: Pruning) -> None:
    """Refuse a number of experts that cannot be kept.

    Args:
        keep: experts that each layer keeps.
        experts: that each layer has.
        method: by what they are chosen.

    Raises:
        ConfigError: there are no fewer experts to keep, or too many subsets to compare.
    """
    if keep >= experts:
        raise ConfigError(f"--keep={keep}: the model has {experts} experts in each layer; keep fewer")
    if method is Pruning.RECONSTRUCTION and comb(experts, keep) > _MOST_SUBSETS:
        raise ConfigError(
            f"--keep={keep}: there are {comb(experts, keep):,} subsets of {experts} experts, at most {_MOST_SUBSETS:,} "
            f"are compared; prune by usage"
        )


def random_experts(layers: int, experts: int, keep: int, seed: int) -> KeptExperts:
    """Keep random experts in each layer."""
    rng = np.random.default_rng(seed)
    drawn = [sorted(rng.choice(experts, keep, replace=False).tolist()) for _ in range(layers)]
    return KeptExperts(tuple(map(tuple, drawn)))


def most_used(assignments: NDArray[np.int64], keep: int) -> KeptExperts:
    """Keep the experts that compute most tokens, of equal ones that of the lower number.

    Args:
        assignments: how many tokens each expert computes, [layers, experts].
        keep: experts that each layer keeps.
    """
    order = np.argsort(-assignments, axis=1, kind="stable")[:, :keep]
    return KeptExperts(tuple(tuple(sorted(row)) for row in order.tolist()))


def least_error(errors: Mapping[int, Mapping[tuple[int, ...], float]], keep: int) -> KeptExperts:
    """Keep in each layer the experts that alone make its output differ least.

    Args:
        errors: by layer and subset.
        keep: experts that each layer keeps.
    """
    layers = [
        {subset: error for subset, error in errors[layer].items() if len(subset) == keep} for layer in sorted(errors)
    ]
    return KeptExperts(tuple(min(layer, key=layer.__getitem__) for layer in layers))
