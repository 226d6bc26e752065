"""SPHINX: features of pictures placed among the token embeddings of a language model."""

from dataclasses import dataclass

from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.model.attention import PackedRows
from megatron_sphinx.model.vision import VisualProjection


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one replica computes at once: documents and pairs, one behind the other in one row, sorted by length.

    Attributes:
        tokens: int64 [tokens]; 0 at the positions of views.
        targets: int64 [tokens], -100 where no loss is taken.
        lengths: length of each document or pair, ascending; attention stays inside it.
        pair_of_token: int64 [tokens], index into `pairs` for tokens of a pair, -1 for text.
        view_positions: int64 [views * tokens_per_view], view by view.
        pair_of_view: int64 [views], index into `pairs`.
        pairs: ids of the pairs, in the order in which their views come.
        documents: ids of the text documents.
    """

    tokens: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    pair_of_token: Tensor
    view_positions: Tensor
    pair_of_view: Tensor
    pairs: tuple[int, ...]
    documents: tuple[int, ...]


class SphinxModel(nn.Module):
    """The trainable part of SPHINX on one language rank: projections, tags and a shard of the language model."""

    def __init__(self, language: GPTModel, vision: VisualProjection) -> None:
        super().__init__()
        self.language = language
        self.vision = vision

    def forward(self, batch: MicroBatch, features: Tensor) -> Tensor:
        """Token losses of a micro-batch.

        Args:
            batch: tokens [tokens] and where the views sit among them.
            features: [views, feature_values], in the batch's order of views.

        Returns:
            Cross entropy in nats, fp32 [tokens]; what stands at positions without a target means nothing.

        Source: SPHINX, arXiv:2311.07575, section 3; the view blocks stand right behind BOS.
        """
        tokens = batch.tokens[None]
        text = self.language.embedding(input_ids=tokens, position_ids=None)
        embeddings = place_views(text[:, 0], self.vision(features), batch.view_positions)
        losses: Tensor = self.language(
            input_ids=tokens,
            position_ids=None,
            attention_mask=None,
            decoder_input=embeddings[:, None],
            labels=batch.targets.clamp(min=0)[None],
            packed_seq_params=PackedRows.of(batch.lengths, tokens.device),
        )
        return losses[0]


def place_views(text: Tensor, blocks: Tensor, positions: Tensor) -> Tensor:
    """Put the blocks of views into a row of token embeddings.

    Args:
        text: [tokens, hidden]; what stands at a view's positions is ignored.
        blocks: [views, tokens_per_view, hidden].
        positions: int64 [views * tokens_per_view], view by view.

    Returns:
        [tokens, hidden]; gradients reach `text` and `blocks`, neither is changed.

    Raises:
        SphinxError: there are more or fewer positions than block tokens.
    """
    flat = blocks.flatten(0, 1)
    if len(flat) != len(positions):
        raise SphinxError(f"{len(flat)} tokens of views for {len(positions)} positions; plan and encoders disagree")
    return text.index_copy(0, positions, flat.to(text.dtype))
