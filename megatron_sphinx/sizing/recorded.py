"""The engine and the features of a rank as a dry run has them: with a word for what each memory is for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_sphinx.device import Stopwatch
from megatron_sphinx.model.experts import Routing, RowRouter
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.sizing.recorder import HOST, Recorder
from megatron_sphinx.stage.channel import FeatureSource
from megatron_sphinx.training.engine import Engine


class RecordedEngine(Engine):
    """Says which memory holds weights, gradients and optimizer state."""

    def __init__(self, recorder: Recorder, model: SphinxModel, *args: Any, **kwargs: Any) -> None:
        self.recorder = recorder
        super().__init__(model, *args, **kwargs)
        for group in self.parameter_groups:
            group["fused"] = True  # as on CUDA, where the update copies nothing
        self.state.prepare(0)  # moments, as they are there in every step but the first
        recorder.name("weights", *model.parameters())
        recorder.name("optimizer", *(part.values for part in self.state.slices(with_copies=True)))
        recorder.name(HOST, *(frozen.master for frozen in self.state.frozen))
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_hook(self._name_gradient)

    def _name_gradient(self, gradient: Tensor) -> None:
        """Name a gradient as soon as it is there, and what carries earlier ones to their ranks."""
        self.recorder.name("gradients", gradient)
        self.recorder.name("reduction", *self.reduced.buffers())

    def backward(self, forward: Callable[[MicroBatch], Tensor], batches: Sequence[MicroBatch]) -> None:
        """Compute gradients; in a pipeline all reduction comes behind the schedule."""
        with self.recorder.memory_for("reduction" if self.is_pipeline else "activations"):
            super().backward(forward, batches)

    def run_pipeline(self, forward: Callable[[MicroBatch], Tensor], batches: Sequence[MicroBatch]) -> None:
        """Take the micro-batches through the stages; what is asked for on the way are activations."""
        with self.recorder.memory_for("activations"):
            super().run_pipeline(forward, batches)

    def update(self, rate: float, norm: float, factor: float = 1.0) -> None:
        """Change the weights; what is asked for on the way is the update's."""
        self.recorder.name("gradients", *(part for _, part in self.gradients()))
        with self.recorder.memory_for("update"):
            super().update(rate, norm, factor)


class RecordedFeatures:
    """A FeatureSource whose memory is known as that of features."""

    def __init__(self, recorder: Recorder, source: FeatureSource) -> None:
        self.recorder, self.source = recorder, source

    @property
    def waiting(self) -> Stopwatch:
        """The source's own watch."""
        return self.source.waiting

    @property
    def received_bytes(self) -> int:
        """The source's own count of bytes."""
        return self.source.received_bytes

    def prepare(self, count: int) -> None:
        """Let the source prepare a step of so many micro-batches."""
        with self.recorder.memory_for("features"):
            self.source.prepare(count)

    def next(self) -> Tensor:
        """Take the features of the source's next micro-batch."""
        with self.recorder.memory_for("features"):
            return self.source.next()


class BalancedRouter(RowRouter):
    """Sends every expert as many tokens, as a router that nobody has trained cannot be asked to."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weigh the experts as RowRouter does, and choose them evenly."""
        weights, chosen = super().routing(logits, padding_mask)
        return weights, self._even(chosen)

    def _losses(self, logits: Tensor, chosen: Tensor, batch: Routing) -> Tensor:
        """Compute the routers' losses of the even choice."""
        return super()._losses(logits, self._even(chosen), batch)

    def _even(self, chosen: Tensor) -> Tensor:
        """Choose experts in turn, for as many tokens as were chosen for: bool [tokens, experts]."""
        tokens, experts = chosen.shape
        choice = (torch.arange(tokens * self.topk) % experts).view(tokens, self.topk)
        return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, choice, True)
