"""DeepSpeed's ZeRO-2 optimizer made from our groups and AdamW; the one module that imports deepspeed."""

import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_sphinx.device import Platform
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.training.gradients import PartitionedGroup
from megatron_sphinx.training.optimizer import EXPERTS


def partition(model: SphinxModel, optimizer: torch.optim.Optimizer, groups: ProcessGroups, platform: Platform) -> Any:
    """Cut the trained weights of a model into the parts that replicas update; every language rank calls this, together.

    DeepSpeed lays the weights of each of the optimizer's groups one behind the other, keeps fp32 values of this rank's
    part, updates those and gathers all parts. Gradients come to it from PartitionedGradients, not by its own hooks.

    Args:
        model: this rank's shard.
        optimizer: updates the model's trainable weights.
        groups: the rank's process groups.
        platform: what the rank computes on.

    Returns:
        A DeepSpeedZeroOptimizer around the optimizer.
    """
    import deepspeed
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import NoopTimer

    class PartitionedOptimizer(DeepSpeedZeroOptimizer):  # type: ignore[misc]
        """Takes gradients that are reduced and partitioned already."""

        def create_gradient_handling_hooks(self) -> None:
            """Leave the gradients to whoever hands them over."""

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not platform.is_cuda:
        deepspeed.ops.__compatible_ops__ = {}  # none is needed here; looking for them would run a compiler
    deepspeed.comm.init_distributed(dist_init_required=False)
    has_experts = False
    for group in optimizer.param_groups:
        for weight in group["params"] if group.get("moe") else ():
            weight.group_name, has_experts = EXPERTS, True
    return PartitionedOptimizer(
        optimizer,
        {weight: name for name, weight in model.named_parameters()},
        timers=NoopTimer(),
        optimizer_params={},
        dp_process_group=groups.data,
        expert_parallel_group={EXPERTS: groups.expert} if has_experts else None,
        expert_data_parallel_group={EXPERTS: groups.expert_data} if has_experts else None,
        has_moe_layers=has_experts,
        communication_data_type=torch.float32,
        check_grad_overflow=False,  # the Engine looks at the norm
        compute_grad_norm=False,  # so is clipping
    )


def cuts_of(optimizer: Any) -> list[PartitionedGroup]:
    """Tell how a DeepSpeedZeroOptimizer has cut each of its groups."""
    return [
        PartitionedGroup(weights, offsets, int(part), copies)
        for weights, offsets, part, copies in zip(
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.partition_size,
            optimizer.real_dp_process_group,
            strict=True,
        )
    ]


def hand_over(optimizer: Any, gradients: list[Tensor]) -> None:
    """Give a DeepSpeedZeroOptimizer this rank's part of each group's gradient, which its step takes as it is."""
    for group, gradient in enumerate(gradients):
        optimizer.averaged_gradients[group] = SimpleNamespace(flat_partition=gradient)
