"""AdamW: which weights decay, and the learning rate of each step."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.ranges import Range, check_ranges

EXPERTS = "experts"  # the name of the group of MoE experts' weights
_WARMUP_SHARE, _MOST_WARMUP = 0.05, 2000  # where optimizer.warmup_steps is null
_RATE = Range(least=0, most=1e30, why="weights move against the gradient, by about the rate in each step")


_MEAN = Range(least=0, below=1, why="a running mean that keeps all of the past never sees the present")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule, counted in optimizer steps.

    Attributes:
        learning_rate: the highest learning rate, reached after the warm-up.
        minimum_learning_rate: learning rate at the last step, where the cosine ends; null for a tenth of
            optimizer.learning_rate.
        warmup_steps (steps): length of the warm-up, in which the learning rate rises linearly from 0; null for a
            twentieth of the run's steps, at most 2,000. A run that ends before its warm-up does is refused.
        warmup_epochs (passes): length of the warm-up in passes over the pairs or conversations; is added to
            optimizer.warmup_steps, which is then 0 where it is null.
        weight_decay: decay of AdamW, on matrices only; norms, biases and tags have none.
        beta1: decay rate of AdamW's mean of the gradient.
        beta2: decay rate of AdamW's mean of the squared gradient.
        epsilon: number that AdamW adds to the root of the mean squared gradient before it divides by that root.
        gradient_clip: largest global norm of the gradient, above which it is scaled down; 0 for no limit.

    Source: SPHINX, arXiv:2311.07575, section 4.1.
    """

    learning_rate: Annotated[float, _RATE] = 5e-5
    minimum_learning_rate: Annotated[float | None, _RATE] = None
    warmup_steps: Annotated[int | None, Range(least=0, most=99_999_999, why="0 is for none")] = None
    warmup_epochs: Annotated[float, Range(least=0, most=1_000_000)] = 0.0
    weight_decay: Annotated[float, Range(least=0, most=1000, why="a negative one would make weights grow")] = 0.1
    beta1: Annotated[float, _MEAN] = 0.9
    beta2: Annotated[float, _MEAN] = 0.95
    epsilon: Annotated[
        float, Range(above=0, most=1, why="it keeps a weight without a gradient from a division by 0")
    ] = 1e-8
    gradient_clip: Annotated[float, Range(least=0, most=1e30, why="0 is for no limit")] = 1.0

    def __post_init__(self) -> None:
        check_ranges(self, "optimizer.")
        if self.least_rate > self.learning_rate:
            raise ConfigError(
                f"optimizer.minimum_learning_rate={self.minimum_learning_rate}: is above "
                f"optimizer.learning_rate={self.learning_rate}; give less, or null for a tenth of it"
            )

    @property
    def least_rate(self) -> float:
        """Learning rate at the last step."""
        return self.learning_rate / 10 if self.minimum_learning_rate is None else self.minimum_learning_rate

    def warmup_of(self, steps: int) -> int:
        """Return how many of a run's steps are the warm-up, epochs of it not counted."""
        return min(_MOST_WARMUP, round(_WARMUP_SHARE * steps)) if self.warmup_steps is None else self.warmup_steps


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Compute the rate of step `step` (counted from 0) of `steps`: linear warm-up, then half a cosine."""
    warmup = config.warmup_of(steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    height = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.least_rate + (config.learning_rate - config.least_rate) * height


def parameter_groups(model: Any, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Sort the trainable weights into groups: matrices, which decay, vectors, which do not, and MoE experts' matrices.

    Experts have fewer or more copies than other weights; DeepSpeed knows their group by `moe` and its name.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    shared = [weight for weight in weights if getattr(weight, "allreduce", True)]
    experts = [weight for weight in weights if not getattr(weight, "allreduce", True)]
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in shared if weight.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [weight for weight in shared if weight.ndim < 2], "weight_decay": 0.0},
    ]
    if experts:
        groups.append({"params": experts, "weight_decay": config.weight_decay, "moe": True, "name": EXPERTS})
    return groups
