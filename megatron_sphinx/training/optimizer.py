"""AdamW: which weights decay, and the learning rate of each step."""

import math
from dataclasses import dataclass
from typing import Any

from megatron_sphinx.errors import ConfigError

EXPERTS = "experts"  # the name of the group of MoE experts' weights


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule, counted in optimizer steps.

    Attributes:
        learning_rate: the highest learning rate, reached after the warm-up.
        minimum_learning_rate: learning rate at the last step, where the cosine ends.
        warmup_steps (steps): length of the warm-up, in which the learning rate rises linearly from 0.
        warmup_epochs (passes): length of the warm-up in passes over the pairs or conversations; is added to
            optimizer.warmup_steps.
        weight_decay: decay of AdamW, on matrices only; norms, biases and tags have none.
        beta1: decay rate of AdamW's mean of the gradient.
        beta2: decay rate of AdamW's mean of the squared gradient.
        epsilon: number that AdamW adds to the root of the mean squared gradient before it divides by that root.
        gradient_clip: largest global norm of the gradient, above which it is scaled down; 0 for no limit.

    Source: SPHINX, arXiv:2311.07575, section 4.1.
    """

    learning_rate: float = 5e-5
    minimum_learning_rate: float = 5e-6
    warmup_steps: int = 2000
    warmup_epochs: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        rates = ("learning_rate", "minimum_learning_rate", "weight_decay", "gradient_clip")
        for name in (*rates, "warmup_steps", "warmup_epochs"):
            if not (value := getattr(self, name)) >= 0:
                raise ConfigError(f"optimizer.{name}={value}: must be at least 0")


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Compute the rate of step `step` (counted from 0) of `steps`: linear warm-up, then half a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    height = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.minimum_learning_rate + (config.learning_rate - config.minimum_learning_rate) * height


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
