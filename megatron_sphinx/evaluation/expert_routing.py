"""What routers chose, as counts by data set, picture and kind of token, and the figures that follow from them.

Source: SPHINX-X, arXiv:2402.05935, appendix A.1.2; Mixtral, arXiv:2401.04088, section 5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb, log

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.generation.expert_orders import Choices
from megatron_sphinx.generation.requests import Picture
from megatron_sphinx.model.architecture import VisionConfig

TEXT, SKIP, GENERATED = "text", "skip token", "generated"
REPLICATES = 500
_QUANTILES = (2.5, 97.5)
_CHANCE = 95  # percentile of what divergence comes to between groups that are drawn from one

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]


def kinds_of(views: int) -> list[str]:
    """Return the kinds of tokens, in the order of the axis `kinds` of all counts.

    Args:
        views: of a picture; 0 for a model that reads text only.
    """
    return [TEXT, GENERATED, SKIP, *(f"view {number}" for number in range(views))]


def kinds_of_tokens(
    picture: Picture | None, vision: VisionConfig | None, prompt: int, tokens: int
) -> NDArray[np.int64]:
    """Return the kind of each token of a prompt and its answer, int64 [tokens], as places in `kinds_of`.

    The tags of a view count as tokens of the view.

    Args:
        picture: of the prompt.
        vision: how pictures are shown.
        prompt: how many tokens are the prompt's; those behind it are generated.
        tokens: how many there are.
    """
    kinds, first_view = [0], 3
    if picture is not None and vision is not None:
        for view in range(vision.views):
            is_encoded = view in picture.encoded
            kinds += [first_view + view] * vision.tokens_per_view if is_encoded else [2]
    kinds += [0] * (prompt - len(kinds))
    return np.array(kinds + [1] * (tokens - prompt))[:tokens]


@dataclass(frozen=True)
class RoutingCounts:
    """What the routers chose for the tokens of a data set.

    Attributes:
        name: of the data set.
        kinds: names of the kinds of tokens.
        assignments: [units, kinds, layers, choices, experts]: how often an expert was a token's first, second, ...
            choice; a unit is what is drawn with repetition for intervals: a picture, or a question without one.
        pairs: [2, layers, 3]: of tokens behind each other that are text (0) or of one view (1), how many pairs there
            are, in how many the first choice is repeated, and in how many any choice is.
        first_weight: [kinds, layers]: the weight of the first choice, summed over tokens.
        together: [layers, experts, experts]: how many tokens two experts computed together.
    """

    name: str
    kinds: Sequence[str]
    assignments: Counts
    pairs: Counts
    first_weight: Shares
    together: Counts

    @cached_property
    def choices(self) -> int:
        """How many experts compute a token."""
        return int(self.assignments.shape[3])

    @cached_property
    def experts(self) -> int:
        """How many experts a layer has."""
        return int(self.assignments.shape[4])

    def of_kinds(self, kinds: Sequence[str]) -> Counts:
        """Return how often each expert was chosen for tokens of some kinds: [units, layers, experts]."""
        places = [place for place, kind in enumerate(self.kinds) if kind in kinds]
        found: Counts = self.assignments[:, places].sum((1, 3))
        return found

    def by_choice(self, kinds: Sequence[str]) -> Counts:
        """Return how often each expert was which choice of tokens of some kinds: [choices, layers, experts]."""
        places = [place for place, kind in enumerate(self.kinds) if kind in kinds]
        found: Counts = self.assignments[:, places].sum((0, 1)).swapaxes(0, 1)
        return found

    @property
    def groups(self) -> dict[str, list[str]]:
        """The kinds by what the paper's figure 5 calls them, text and images together last."""
        images = [kind for kind in self.kinds if kind not in (TEXT, GENERATED)]
        return {"image": images, "text": [TEXT, GENERATED], "both": list(self.kinds)}


class RoutingCounter:
    """Counts the choices of a data set, prompt by prompt.

    Args:
        name: of the data set.
        views: of a picture; 0 for a model that reads text only.
    """

    def __init__(self, name: str, views: int) -> None:
        self._name, self._kinds = name, kinds_of(views)
        self._units: dict[str, Counts] = {}
        self._rest: tuple[Counts, Shares, Counts] | None = None

    def add(self, unit: str, kinds: NDArray[np.int64], choices: Choices, experts: int) -> None:
        """Count what was chosen for a prompt and its answer.

        Args:
            unit: the picture; empty for a question that is a unit by itself.
            kinds: of the tokens.
            choices: of all layers.
            experts: that a layer has.
        """
        chosen = choices.experts.astype(np.int64)  # [layers, tokens, choices]
        layers, _, number = chosen.shape
        is_chosen = np.arange(experts) == chosen[..., None]  # [layers, tokens, choices, experts]
        counts = np.zeros((len(self._kinds), layers, number, experts), np.int64)
        weights = np.zeros((len(self._kinds), layers))
        for kind in np.unique(kinds):
            counts[kind] = is_chosen[:, kinds == kind].sum(1)
            weights[kind] = choices.first_weight[:, kinds == kind].sum(1, dtype=np.float64)
        unit = unit or f"question {len(self._units)}"
        self._units[unit] = self._units.get(unit, 0) + counts
        either = is_chosen.any(2).astype(np.int64)
        together = np.einsum("lte,ltf->lef", either, either)
        rest = (_pairs(kinds, chosen, either), weights, together)
        known = self._rest
        self._rest = rest if known is None else (known[0] + rest[0], known[1] + rest[1], known[2] + rest[2])

    @property
    def counts(self) -> RoutingCounts | None:
        """What has been counted; None where nothing was."""
        if self._rest is None:
            return None
        return RoutingCounts(self._name, self._kinds, np.stack(list(self._units.values())), *self._rest)


def _pairs(kinds: NDArray[np.int64], chosen: Counts, either: Counts) -> Counts:
    """Count repetitions between tokens behind each other; see RoutingCounts.pairs."""
    classes = np.where(kinds <= 1, 0, kinds)  # generated text goes on from text
    is_same: NDArray[np.bool_] = np.equal(classes[1:], classes[:-1])
    is_text: NDArray[np.bool_] = is_same & np.equal(classes[1:], 0)
    is_view: NDArray[np.bool_] = is_same & np.greater(classes[1:], 2)
    is_first: NDArray[np.bool_] = np.equal(chosen[:, 1:, 0], chosen[:, :-1, 0])
    is_any = np.asarray(np.any(either[:, 1:] & either[:, :-1], axis=2))
    return np.stack([
        np.stack([np.full(len(chosen), some.sum()), is_first[:, some].sum(1), is_any[:, some].sum(1)], 1)
        for some in (is_text, is_view)
    ])  # fmt: skip


@dataclass(frozen=True)
class Uniform:
    """What a router gives that chooses at random, all experts alike.

    Attributes:
        share: of the assignments of an expert, and of repeated first choices.
        any_repeated: share of pairs of tokens that have a choice in common.
    """

    share: float
    any_repeated: float

    @classmethod
    def of(cls, experts: int, choices: int) -> "Uniform":
        """Compute it for a number of experts and of choices of a token.

        Source: Mixtral, arXiv:2401.04088, table 5: 12.5 % and 46 % of eight experts, two for a token.
        """
        return cls(1 / experts, 1 - comb(experts - choices, choices) / comb(experts, choices))


def shares_of(counts: Counts) -> Shares:
    """Return counts [..., experts] as shares of their sum; nan where it is 0."""
    total = counts.sum(-1, keepdims=True)
    found: Shares = np.divide(counts, total, where=total > 0, out=np.full(counts.shape, np.nan))
    return found


def evenness(shares: Shares) -> Shares:
    """Return the entropy of shares [..., experts] over that of equal shares: 1 where all experts have as much."""
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    found: Shares = -(shares * logs).sum(-1) / log(shares.shape[-1])
    return found


def divergence(one: Shares, other: Shares) -> Shares:
    """Return the Jensen-Shannon divergence of shares [..., experts], in bits: 0 for equal ones, 1 for disjoint ones."""
    middle = (one + other) / 2
    halves = []
    for part in (one, other):
        ratio = np.divide(part, middle, where=part > 0, out=np.ones_like(part))
        halves.append((part * np.log2(ratio)).sum(-1))
    found: Shares = (halves[0] + halves[1]) / 2
    return np.maximum(found, 0)


@dataclass(frozen=True)
class Divergence:
    """How much two groups of tokens differ in the experts that compute them, layer by layer, in bits.

    Attributes:
        value: [layers].
        low: [layers]: 2.5 % of the bootstrap draws are below.
        high: [layers]: 2.5 % of them are above.
        chance: [layers]: 95 % of the divergences are below where the units of both groups are shuffled, so that there
            is no difference between them but by chance.
    """

    value: Shares
    low: Shares
    high: Shares
    chance: Shares

    @classmethod
    def between(cls, one: Counts, other: Counts, *, seed: int = 0, replicates: int = REPLICATES) -> "Divergence":
        """Compare the counts of two groups, [units, layers, experts] each.

        Args:
            one: of the first group.
            other: of the second one.
            seed: of the draws.
            replicates: how many draws and shuffles there are.
        """
        rng = np.random.default_rng(seed)
        value = divergence(shares_of(one.sum(0)), shares_of(other.sum(0)))
        both, drawn, shuffled = np.concatenate([one, other]), [], []
        for _ in range(replicates):
            parts = [group[rng.integers(len(group), size=len(group))].sum(0) for group in (one, other)]
            drawn.append(divergence(shares_of(parts[0]), shares_of(parts[1])))
            order = rng.permutation(len(both))
            mixed = [both[places].sum(0) for places in (order[: len(one)], order[len(one) :])]
            shuffled.append(divergence(shares_of(mixed[0]), shares_of(mixed[1])))
        low, high = np.nanpercentile(drawn, _QUANTILES, axis=0)
        return cls(value, low, high, np.nanpercentile(shuffled, _CHANCE, axis=0))


def figures_of(counts: RoutingCounts) -> dict[str, object]:
    """Return all figures of a data set as plain values; a list over layers, or over layers and experts, for each."""
    uniform = Uniform.of(counts.experts, counts.choices)
    groups: Mapping[str, Sequence[str]] = {kind: [kind] for kind in counts.kinds} | counts.groups
    shares = {name: shares_of(counts.of_kinds(kinds).sum(0)) for name, kinds in groups.items()}
    shares = {name: share for name, share in shares.items() if not np.isnan(share).all()}
    by_choice = {name: shares_of(counts.by_choice(groups[name])).tolist() for name in shares}
    tokens = counts.assignments.sum((0, 3, 4)) / counts.choices  # [kinds, layers]
    weights = counts.first_weight.sum(0) / tokens.sum(0)
    return {
        "units": len(counts.assignments),
        "tokens": {kind: int(tokens[place, 0]) for place, kind in enumerate(counts.kinds)},
        "uniform": {"share": uniform.share, "any_repeated": uniform.any_repeated},
        "share": {name: share.tolist() for name, share in shares.items()},
        "share_by_choice": by_choice,
        "evenness": {name: evenness(share).tolist() for name, share in shares.items()},
        "first_repeated": {name: _ratio(counts.pairs[place], 1) for place, name in enumerate(("text", "image"))},
        "any_repeated": {name: _ratio(counts.pairs[place], 2) for place, name in enumerate(("text", "image"))},
        "first_weight": weights.tolist(),
        "together": counts.together.tolist(),
    }


def _ratio(pairs: Counts, place: int) -> list[float | None]:
    """Return a share of pairs for each layer; None where there are none."""
    return [float(row[place] / row[0]) if row[0] else None for row in pairs]
