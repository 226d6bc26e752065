"""The pipeline's schedule: one forward, one backward, as megatron-core orders them, with shapes that the plan knows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from torch import Tensor

from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.parallel.groups import ProcessGroups


def run_schedule(
    model: SphinxModel,
    groups: ProcessGroups,
    forward: Callable[[MicroBatch], Tensor],
    batches: Sequence[MicroBatch],
    *,
    is_forward_only: bool = False,
) -> None:
    """Compute the whole gradient of a step's micro-batches on this stage; all stages of a replica call this together.

    Args:
        model: this rank's stage.
        groups: the rank's process groups.
        forward: computes a micro-batch on this stage; on the last one, its loss.
        batches: the replica's micro-batches, the same on every stage.
        is_forward_only: whether only the losses are computed, and no gradient.
    """

    def as_loss(output: Tensor) -> tuple[Tensor, Tensor, None]:
        """Give the last stage's output as what megatron-core asks for: loss, a count of tokens, something to log."""
        # the count is not used: the loss is divided by the plan's
        return output, torch.zeros([], dtype=torch.int, device=output.device), None

    def step(remaining: Iterator[MicroBatch], _model: SphinxModel) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Compute the next micro-batch, as megatron-core's schedule asks for it."""
        return forward(next(remaining)), as_loss

    config, sizes = model.config, groups.layout.config
    width = sizes.tensor if sizes.sequence else 1
    shapes = [(len(batch.tokens) // width, 1, config.hidden_size) for batch in batches]
    forward_backward_pipelining_without_interleaving(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        forward_only=is_forward_only,
        seq_length=1,  # the planned shapes are the true ones
        micro_batch_size=1,
        p2p_communicator=_PlannedCommunicator(groups.pipeline, config, shapes),
        pg_collection=groups.collection,
    )


class _PlannedCommunicator(P2PCommunicator):  # type: ignore[misc]
    """Takes the shapes of what comes from the plan: no stage has to tell the next one.

    Args:
        shapes: of the hidden states of each micro-batch; their gradients have the same, in the same order.
    """

    def __init__(self, group: Any, config: Any, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__(group, config)
        self._forward, self._backward = iter(shapes), iter(shapes)

    def _communicate_shapes(self, _next: Any, _previous: Any, recv_prev: bool, recv_next: bool) -> tuple[Any, Any]:
        """Give the shapes of what comes next from the stage before and from the one behind."""
        # megatron-core sends every shape ahead of its tensor, one more round trip, and has no public way to know it
        return next(self._forward) if recv_prev else None, next(self._backward) if recv_next else None
