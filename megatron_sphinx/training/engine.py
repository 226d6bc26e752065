"""A model under DeepSpeed ZeRO-2: gradients of any number of micro-batches, their norm, and one update."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from megatron_sphinx.device import Platform
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.shards import WeightShard
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.training.deepspeed_setup import initialize
from megatron_sphinx.training.optimizer import OptimizerConfig, parameter_groups
from megatron_sphinx.training.pipeline import run_schedule
from megatron_sphinx.training.zero_state import Fragment, ZeroState


class Engine:
    """A model whose gradients are summed and whose optimizer is partitioned over the data-parallel ranks.

    Without a pipeline, gradients are reduced and partitioned after every micro-batch, in fp32. In a pipeline they stay
    whole on each rank until the schedule has ended. The number of micro-batches may differ from step to step.

    Args:
        model: this rank's shard of the model.
        shards: which region of a whole weight this rank has, by the weight's name in the model.
        groups: the rank's process groups.
        platform: what the rank computes on.
        config: of AdamW.
        precision: fp32 or bf16.

    Attributes:
        loss_scale: what every loss is multiplied by, since DeepSpeed averages over replicas.
        state: this rank's share of gradients, fp32 weights and moments.
        held: bytes of weights, gradients and optimizer on this rank, as the first step found them.
    """

    def __init__(
        self,
        model: SphinxModel,
        shards: dict[str, WeightShard],
        groups: ProcessGroups,
        platform: Platform,
        config: OptimizerConfig,
        *,
        precision: str,
    ) -> None:
        warnings.filterwarnings("ignore", message=".*_into_tensor. is deprecated", category=FutureWarning)
        self.model, self.groups, self.loss_scale = model, groups, groups.layout.data
        self._config, self._platform = config, platform
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._optimizer = _AdamW(
            parameter_groups(model, config),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        self._engine = initialize(model, self._optimizer, groups, platform, precision=precision)
        self.held = {"weights": sum(weight.nbytes for weight in model.parameters()), "gradients": 0}
        self.state = ZeroState(self._engine.optimizer, model, shards, groups, platform)

    @property
    def is_pipeline(self) -> bool:
        """Whether the model is divided into stages."""
        return self.groups.layout.config.pipeline > 1

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of weights with their settings, as torch's optimizers have them."""
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    # gradients

    def backward(self, forward: Callable[[MicroBatch], Tensor], batches: Sequence[MicroBatch]) -> None:
        """Add the gradient of the sum of the losses of all micro-batches and replicas; every rank calls this together.

        Args:
            forward: computes a micro-batch on this pipeline stage; on the last one, its loss.
            batches: of this replica.
        """
        if not self.is_pipeline:
            for batch in batches:
                loss = forward(batch) * self.loss_scale
                with record_function("backward"):
                    self._engine.backward(loss)
            return
        with self._engine.coalesce_grad_reduction():
            self.run_pipeline(forward, batches)
            if self._is_first_step:
                whole = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
                self.held["gradients"] += sum(gradient.nbytes for gradient in whole)
        self._engine.set_gradient_accumulation_boundary(True)
        while self._sent:
            self._sent.popleft()[0].wait()

    def run_pipeline(self, forward: Callable[[MicroBatch], Tensor], batches: Sequence[MicroBatch]) -> None:
        """Take the micro-batches through all stages and back; their gradients are summed up later, all at once."""
        run_schedule(self.model, self.groups, forward, batches, loss_scale=self.loss_scale)

    def keep(self, work: dist.Work | None, sent: Tensor) -> None:
        """Hold a tensor that is being sent until it has gone, at the latest at the end of the step."""
        assert work is not None
        self._sent.append((work, sent))

    def gradients(self) -> Iterator[tuple[Fragment, Tensor]]:
        """Give the gradient of what this rank updates, after `backward`: by fragment, flat, to be changed in place."""
        return self.state.gradients()

    def gradient_norm(self) -> float:
        """Compute the global L2 norm of the gradient; every rank calls this together.

        DeepSpeed's own does not count experts rightly.
        """
        norms = [part for fragment, part in self.gradients() if fragment.shard.is_first_copy]
        squared = torch.zeros([], dtype=torch.float64, device=self._platform.device)
        if norms:
            squared += torch.stack(torch._foreach_norm(norms)).double().square().sum()
        dist.all_reduce(squared, group=self.groups.language)
        return float(squared.sqrt())

    # the update

    def update(self, rate: float, norm: float, factor: float = 1.0) -> None:
        """Multiply the gradient by `factor`, clip it, change the weights, clear it.

        Args:
            rate: the learning rate.
            norm: of the gradient once it is multiplied.
            factor: of the gradient.
        """
        clip = self._config.gradient_clip
        if clip and norm > clip:
            factor *= clip / norm
        if factor != 1.0:
            torch._foreach_mul_([part for _, part in self.gradients()], factor)
        for group in self.parameter_groups:
            group["lr"] = rate
        self._step()

    def discard(self) -> None:
        """Clear the gradient; weights and the optimizer's state stay as they are, to the bit."""
        if not self._optimizer.state:
            self.state.prepare(0)
        self._optimizer.is_idle = True
        self._step()
        self._optimizer.is_idle = False

    def _step(self) -> None:
        """Let DeepSpeed take its step; the first time, note what it holds before and after."""
        partition = self.state.gradient_bytes() if self._is_first_step else 0
        self._engine.step()
        if self._is_first_step:
            moments = self.state.moment_bytes()
            self.held |= {"gradients": self.held["gradients"] + partition, "optimizer": moments + moments // 2}

    @property
    def _is_first_step(self) -> bool:
        """Whether `held` is still to be found."""
        return "optimizer" not in self.held


class _AdamW(torch.optim.AdamW):
    """Lets a step pass while it is idle; all that DeepSpeed does around a step is done nevertheless."""

    is_idle = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the weights, unless the optimizer is idle."""
        return None if self.is_idle else super().step(closure)
