"""What one replica computes at once, as tensors; apart from the model, so that reading data needs no megatron-core."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Segments of documents and samples, one behind the other, sorted by length, then padding.

    Attributes:
        tokens: int64 [tokens]; 0 at the positions of views.
        targets: int64 [tokens], -100 where no loss is taken.
        target_positions: int64 [targets], where loss is taken, ascending: with it no device must be asked how many.
        lengths: length of each segment, ascending; attention stays inside it.
        sample_of_token: int64 [tokens], index into `samples` for tokens of a sample, -1 for text and padding.
        row_of_token: int64 [tokens], number of the planned row among those of the micro-batch, -1 for padding.
        rows: how many planned rows the micro-batch has.
        view_positions: int64 [views * tokens_per_view], positions of the encoded views, view by view.
        skip_positions: int64 [skipped views], the position of each.
        sample_of_view: int64 [views], index into `samples`.
        samples: numbers of the samples, in the order in which their views come.
        documents: numbers of the text documents.
    """

    tokens: Tensor
    targets: Tensor
    target_positions: Tensor
    lengths: tuple[int, ...]
    sample_of_token: Tensor
    row_of_token: Tensor
    rows: int
    view_positions: Tensor
    skip_positions: Tensor
    sample_of_view: Tensor
    samples: tuple[int, ...]
    documents: tuple[int, ...]

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro-batch with every tensor on a device; copies to it may still be under way."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})  # type: ignore[arg-type]

    def spread(self, losses: Tensor) -> Tensor:
        """Lay losses of the targets out over all positions: [targets] to [tokens], 0 where no loss is taken."""
        return losses.new_zeros(self.tokens.shape).index_copy(0, self.target_positions, losses)
