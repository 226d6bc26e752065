"""What a step or a validation leaves in the run folder: lines of metrics.jsonl, and of skipped.jsonl."""

import hashlib
from collections.abc import Sequence
from math import isfinite
from typing import Any

from torch import Tensor

from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.model.experts import IMAGE, TEXT
from megatron_sphinx.training.step import StepReport
from megatron_sphinx.training.sums import Sums


def metrics_of(plan: StepPlan, report: StepReport) -> dict[str, Any]:
    """Tell what a step computed on, and what came of it; the clock's part and the machine's are the loop's to add."""
    sums = report.sums
    line: dict[str, Any] = {
        "step": plan.step,
        "loss": _finite(report.loss),
        "loss_pairs": _mean(sums.loss_pairs, sums.targets_pairs),
        "loss_text": _mean(sums.loss_text, sums.targets_text),
        "target_tokens_pairs": round(sums.targets_pairs),
        "target_tokens_text": round(sums.targets_text),
        "gradient_norm": _finite(report.gradient_norm),
        "skipped": report.fault or None,
        "sample_ids": plan.digest,
        "pairs": len(plan.samples),
        "bad_pairs": round(sums.bad_pairs),
        "captions_cut": plan.captions_cut,
        "fill": plan.fill,
        "padding_share": plan.padding_share,
        "imbalance": plan.imbalance,
        "text_tokens": sum(tokens for _, _, tokens in plan.text),
        "exposed_encoder_seconds": sums.exposed_encoder_seconds,
        "data_wait_seconds": sums.data_wait_seconds,
        "data_wait_rank": round(sums.data_wait_rank),
        "feature_bytes": round(sums.feature_bytes),
    }
    if report.expert_load is not None:
        line["balance_loss"] = _finite(sums.balance)
        line |= _shares_of_experts(report.expert_load)
    return line


def validation_of(
    step: int, plans: Sequence[StepPlan], sums: Sums, *, text_weight: float, seconds: float
) -> dict[str, Any]:
    """Tell what a validation computed on, and what came of it.

    Args:
        step: of the training, that was done last.
        plans: what it computed on.
        sums: losses and targets of all of it.
        text_weight: what a target of text weighs; one of a pair weighs 1.
        seconds: that it took.
    """
    return {
        "step": step,
        "validation_loss": _mean(
            sums.loss_pairs + text_weight * sums.loss_text, sums.targets_pairs + text_weight * sums.targets_text
        ),
        "validation_loss_pairs": _mean(sums.loss_pairs, sums.targets_pairs),
        "validation_loss_text": _mean(sums.loss_text, sums.targets_text),
        "validation_target_tokens_pairs": round(sums.targets_pairs),
        "validation_target_tokens_text": round(sums.targets_text),
        "validation_bad_pairs": round(sums.bad_pairs),
        "validation_sample_ids": hashlib.sha256("".join(plan.digest for plan in plans).encode()).hexdigest()[:16],
        "validation_seconds": seconds,
    }


def _mean(total: float, count: float) -> float | None:
    """Divide a sum of losses by the number of its targets; None where there are none or it is not finite."""
    return _finite(total / count) if count else None


def _shares_of_experts(load: Tensor) -> dict[str, list[list[float]]]:
    """Divide the tokens that each expert took by those of its layer: by kind of token, a list for each layer."""
    shares = load / load.sum(-1, keepdim=True).clamp(min=1)
    return {
        f"expert_load_{name}": [[round(share, 6) for share in layer] for layer in shares[:, kind].tolist()]
        for kind, name in ((TEXT, "text"), (IMAGE, "image"))
    }


def skipped_of(plan: StepPlan, report: StepReport) -> dict[str, Any]:
    """Tell why a step was skipped, and which samples were in it."""
    pairs, documents = report.samples
    return {
        "step": plan.step,
        "reason": report.fault,
        "loss": _finite(report.loss),
        "gradient_norm": _finite(report.gradient_norm),
        "sample_ids": plan.digest,
        "pairs": pairs,
        "documents": documents,
    }


def _finite(value: float) -> float | None:
    """Return the value, or None for what JSON cannot hold."""
    return value if isfinite(value) else None
