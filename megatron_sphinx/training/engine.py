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
from megatron_sphinx.training.deepspeed_setup import cuts_of, hand_over, partition
from megatron_sphinx.training.gradients import PartitionedGradients
from megatron_sphinx.training.optimizer import OptimizerConfig, parameter_groups
from megatron_sphinx.training.pipeline import run_schedule
from megatron_sphinx.training.zero_state import Fragment, ZeroState


class Engine:
    """A model whose gradients are summed and whose optimizer is partitioned over the data-parallel ranks.

    Without a pipeline, gradients are reduced and partitioned in every backward, in fp32. In a pipeline they stay whole
    on each rank until the schedule has ended. The number of micro-batches may differ from step to step.

    Args:
        model: this rank's shard of the model.
        shards: which region of a whole weight this rank has, by the weight's name in the model.
        groups: the rank's process groups.
        platform: what the rank computes on.
        config: of AdamW.

    Attributes:
        state: this rank's share of fp32 weights and moments.
        reduced: this rank's share of the gradient.
        held: bytes of weights, gradients and optimizer on this rank, as the first step found them.
    """

    def __init__(
        self,
        model: SphinxModel,
        shards: dict[str, WeightShard],
        groups: ProcessGroups,
        platform: Platform,
        config: OptimizerConfig,
    ) -> None:
        warnings.filterwarnings("ignore", message=".*_into_tensor. is deprecated", category=FutureWarning)
        self.model, self.groups = model, groups
        self._config, self._platform = config, platform
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        adamw = torch.optim.AdamW(
            parameter_groups(model, config),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        self._optimizer = partition(model, adamw, groups, platform)
        self.held = {"weights": sum(weight.nbytes for weight in model.parameters())}
        self.state = ZeroState(self._optimizer, model, shards, groups, platform)
        self.reduced = PartitionedGradients(cuts_of(self._optimizer), platform.device)
        if not self.is_pipeline:
            self.reduced.take_in_backward()

    @property
    def is_pipeline(self) -> bool:
        """Whether the model is divided into stages."""
        return self.groups.layout.config.pipeline > 1

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of weights with their settings, as torch's optimizers have them."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    # gradients

    def backward(self, forward: Callable[[MicroBatch], Tensor], batches: Sequence[MicroBatch]) -> None:
        """Add the gradient of the sum of the losses of all micro-batches and replicas; every rank calls this together.

        Args:
            forward: computes a micro-batch on this pipeline stage; on the last one, its loss.
            batches: of this replica.
        """
        whole = 0
        if self.is_pipeline:
            self.run_pipeline(forward, batches)
            whole = sum(weight.grad.nbytes for weight in self.model.parameters() if weight.grad is not None)
            self.reduced.take_all()
        else:
            for batch in batches:
                loss = forward(batch)
                with record_function("backward"):
                    loss.backward()
        self.reduced.finish()
        if self._is_first_step:
            self.held["gradients"] = whole + sum(part.nbytes for part in self.reduced.parts())
        self._wait_for_sent()

    def evaluate(self, forward: Callable[[MicroBatch], Tensor], batches: Sequence[MicroBatch]) -> None:
        """Compute the losses of all micro-batches, and nothing that a step depends on; every rank calls this together.

        Args:
            forward: computes a micro-batch on this pipeline stage.
            batches: of this replica.
        """
        self.model.eval()
        with torch.no_grad():
            if self.is_pipeline:
                run_schedule(self.model, self.groups, forward, batches, is_forward_only=True)
            else:
                for batch in batches:
                    forward(batch)
        self.model.train()
        self._wait_for_sent()

    def _wait_for_sent(self) -> None:
        """Wait until all that `keep` holds has gone."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def run_pipeline(self, forward: Callable[[MicroBatch], Tensor], batches: Sequence[MicroBatch]) -> None:
        """Take the micro-batches through all stages and back; their gradients lie beside their weights then."""
        run_schedule(self.model, self.groups, forward, batches)

    def keep(self, work: dist.Work | None, sent: Tensor) -> None:
        """Hold a tensor that is being sent until it has gone, at the latest at the end of the step."""
        assert work is not None
        self._sent.append((work, sent))

    def gradients(self) -> Iterator[tuple[Fragment, Tensor]]:
        """Give the gradient of what this rank updates, after `backward`: by fragment, flat, to be changed in place."""
        parts = self.reduced.parts()
        for fragment in self.state.fragments:
            yield fragment, parts[fragment.group].narrow(0, fragment.offset, fragment.count)

    def gradient_norm(self) -> float:
        """Compute the global L2 norm of the gradient, each weight counted once; every rank calls this together."""
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
            torch._foreach_mul_(self.reduced.parts(), factor)
        for group in self.parameter_groups:
            group["lr"] = rate
        self._step()
        self._note_optimizer()

    def discard(self) -> None:
        """Clear the gradient; weights and the optimizer's state stay as they are, to the bit."""
        if not self.state.moment_bytes():
            self.state.prepare(0)
        self.reduced.clear()
        self._note_optimizer()

    def _step(self) -> None:
        """Change the weights by the gradient as it is, and clear it."""
        hand_over(self._optimizer, self.reduced.parts())
        self.reduced.clear()
        self._optimizer.step()

    def _note_optimizer(self) -> None:
        """Note what the optimizer holds, the first time."""
        if self._is_first_step:
            moments = self.state.moment_bytes()
            self.held["optimizer"] = moments + moments // 2

    @property
    def _is_first_step(self) -> bool:
        """Whether `held` is still to be found."""
        return "optimizer" not in self.held
