"""Gradients, optimizer state and update by DeepSpeed ZeRO-2; the one module that imports deepspeed."""

import logging
import os
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.platform import Platform
from megatron_sphinx.training.optimizer import OptimizerConfig, parameter_groups

_SAVED = ("base_optimizer_state", "single_partition_of_fp32_groups")


def _mpu(groups: ProcessGroups) -> SimpleNamespace:
    """The groups under the names that DeepSpeed asks for; "model" is one whole replica."""
    answers: dict[str, Any] = {}
    for axis, group in (("model", groups.model), ("tensor_model", groups.tensor), ("data", groups.data)):
        answers[f"get_{axis}_parallel_group"] = partial(_same, group)
        answers[f"get_{axis}_parallel_rank"] = partial(dist.get_rank, group)
        answers[f"get_{axis}_parallel_world_size"] = partial(dist.get_world_size, group)
    return SimpleNamespace(**answers)


def _same(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return group


class Engine:
    """A model whose gradients are summed and whose optimizer is partitioned over the data-parallel ranks.

    Gradients are reduced and partitioned after every micro-batch, in fp32. The number of micro-batches may differ from
    step to step; the caller says when a step ends.
    """

    def __init__(
        self, model: nn.Module, groups: ProcessGroups, platform: Platform, config: OptimizerConfig, *, precision: str
    ) -> None:
        if not platform.is_cuda:
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        warnings.filterwarnings("ignore", message=".*_into_tensor. is deprecated", category=FutureWarning)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=platform.is_cuda,
        )
        self._replicas = groups.layout.data
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=_deepspeed_config(config, is_cuda=platform.is_cuda, precision=precision),
            mpu=_mpu(groups),
            dist_init_required=False,
        )
        self.model = model

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the sum over the replicas of `loss`; every rank calls this as often, together."""
        self._engine.backward(loss * self._replicas)  # DeepSpeed averages over the replicas

    def rescale(self, factor: float) -> None:
        """Multiply the gradient so far; every rank calls this together, or none does."""
        optimizer = self._engine.optimizer
        for group in range(len(optimizer.bit16_groups)):
            kept = optimizer.averaged_gradients.get(group)  # bf16 weights: one flat fp32 buffer a group
            for gradient in [kept.flat_partition] if kept else optimizer.all_grad_tensors[group]:
                gradient.mul_(factor)

    def update(self, rate: float) -> float:
        """Clip, change the weights, clear the gradient.

        Returns:
            The global L2 norm of the gradient before clipping.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def state(self) -> dict[str, Any]:
        """This rank's part of the optimizer: fp32 master weights and moments."""
        state = self._engine.optimizer.state_dict()
        return {name: state[name] for name in _SAVED}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned on this rank, the model's weights being loaded already."""
        optimizer = self._engine.optimizer
        whole = optimizer.state_dict() | state
        optimizer.load_state_dict([whole] * self._replicas, load_optimizer_states=True, load_from_fp32_weights=True)


def _deepspeed_config(config: OptimizerConfig, *, is_cuda: bool, precision: str) -> dict[str, Any]:
    """DeepSpeed's own configuration; everything in it follows from ours."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.gradient_clip,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": is_cuda,
            "contiguous_gradients": True,
            "reduce_scatter": True,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
