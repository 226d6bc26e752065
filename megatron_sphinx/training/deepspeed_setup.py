"""DeepSpeed's engine made from our groups and optimizer; the one module that imports deepspeed."""

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_sphinx.device import Platform
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.training.memory import REDUCE_BUCKET
from megatron_sphinx.training.optimizer import EXPERTS


def initialize(
    model: SphinxModel, optimizer: torch.optim.Optimizer, groups: ProcessGroups, platform: Platform, *, precision: str
) -> Any:
    """Make DeepSpeed's engine around a model and its optimizer; every language rank calls this, together.

    Args:
        model: this rank's shard.
        optimizer: updates the model's trainable weights.
        groups: the rank's process groups.
        platform: what the rank computes on.
        precision: fp32 or bf16.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not platform.is_cuda:
        deepspeed.ops.__compatible_ops__ = {}  # none is needed here; looking for them would run a compiler
    experts = [weight for weight in model.parameters() if not getattr(weight, "allreduce", True)]
    if experts:
        _register_experts(experts, groups)

    class EngineWithExperts(DeepSpeedEngine):  # type: ignore[misc]
        """Knows of megatron-core's experts; DeepSpeed looks for a layer class of its own."""

        def _configure_distributed_model(self, module: Any) -> None:
            """Set what DeepSpeed would have found out from its own layer class, before it divides the weights."""
            if any(weight.requires_grad for weight in experts):
                self.has_moe_layers, self.num_experts = True, [module.config.num_moe_experts]
            super()._configure_distributed_model(module)

    deepspeed.comm.init_distributed(dist_init_required=False)
    settings = _settings(is_cuda=platform.is_cuda, precision=precision, is_pipeline=groups.layout.config.pipeline > 1)
    mpu = _groups_by_name(groups)
    return EngineWithExperts(
        args=SimpleNamespace(device_rank=platform.device.index or 0),  # it would take GPU LOCAL_RANK, seen or not
        model=model,
        optimizer=optimizer,
        mpu=mpu,
        dist_init_required=False,
        config=settings,
        config_class=DeepSpeedConfig(settings, mpu),
    )


def _register_experts(experts: list[torch.nn.Parameter], groups: ProcessGroups) -> None:
    """Give DeepSpeed the groups of the experts' weights; it would make some of its own, of other ranks than ours."""
    from deepspeed.utils import groups as deepspeed_groups

    for weight in experts:
        weight.group_name = EXPERTS  # type: ignore[attr-defined]
    deepspeed_groups._EXPERT_PARALLEL_GROUP[EXPERTS] = groups.expert
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = groups.expert_data
    ranks = dist.get_process_group_ranks(groups.expert_data)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[EXPERTS] = ranks


def _groups_by_name(groups: ProcessGroups) -> SimpleNamespace:
    """Offer the groups under the names that DeepSpeed asks for; "model" is one whole replica."""
    answers: dict[str, Any] = {}
    for axis, group in (("model", groups.model), ("tensor_model", groups.tensor), ("data", groups.data)):
        answers[f"get_{axis}_parallel_group"] = partial(_give, group)
        answers[f"get_{axis}_parallel_rank"] = partial(dist.get_rank, group)
        answers[f"get_{axis}_parallel_world_size"] = partial(dist.get_world_size, group)
    return SimpleNamespace(**answers)


def _give(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the group itself, where DeepSpeed wants a function to call."""
    return group


def _settings(*, is_cuda: bool, precision: str, is_pipeline: bool) -> dict[str, Any]:
    """Fill DeepSpeed's own configuration; everything in it follows from ours. Norm and clipping are the Engine's."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": is_pipeline,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},  # the Engine looks at the norm
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": is_cuda,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": REDUCE_BUCKET,
            "compute_grad_norm": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
