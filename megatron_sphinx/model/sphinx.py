"""SPHINX: features of pictures placed among the token embeddings of a language model."""

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch import Tensor, nn

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.model.attention import PackedRows
from megatron_sphinx.model.experts import IMAGE, PADDING, TEXT, Routing
from megatron_sphinx.model.language import TargetGPT
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.vision import VisualProjection
from megatron_sphinx.parallel.groups import ProcessGroups


class SphinxModel(nn.Module):
    """SPHINX on one language rank, without the encoders: a shard of the language model.

    The first pipeline stage also has the projections and tags; only the last one computes losses.

    Attributes:
        language: this rank's shard of the decoder.
        vision: projections and tags; None after the first stage.
        groups: the groups it computes in.
    """

    def __init__(self, language: TargetGPT, vision: VisualProjection | None, groups: ProcessGroups) -> None:
        super().__init__()
        self.language = language
        self.vision = vision
        self.groups = groups
        self.config, self.model_type = language.config, language.model_type  # megatron-core's schedules ask for them

    def freeze(self, train: str) -> None:
        """Let gradients reach only what is trained.

        Args:
            train: what is trained: all, projections (with tags and skip token) or language.
        """
        self.language.requires_grad_(train != "projections")
        if self.vision is not None:
            self.vision.requires_grad_(train != "language")

    def set_input_tensor(self, hidden: Tensor) -> None:
        """Take what the stage before this one has computed; megatron-core's schedules call this before `forward`."""
        self.language.set_input_tensor(hidden)

    def forward(self, batch: MicroBatch, features: Tensor | None, routing: Routing | None = None) -> Tensor:
        """Compute the losses of a micro-batch's targets, or what the next pipeline stage goes on from.

        Args:
            batch: tokens [tokens] and where the views sit among them.
            features: [views, feature_values], in the batch's order of views; None after the first stage.
            routing: what the routers must know; with MoE experts only.

        Returns:
            Cross entropy in nats, fp32 [targets], in the order of `target_positions`. Before the last stage: hidden
            states [tokens of this rank, 1, hidden].

        Source: SPHINX, arXiv:2311.07575, section 3; the view blocks stand right after BOS.
        """
        tokens = batch.tokens[None]
        out: Tensor = self.language(
            input_ids=tokens,
            position_ids=None,
            attention_mask=None,
            decoder_input=None if features is None else self._embed(batch, features),
            labels=batch.targets[batch.target_positions][None] if self.groups.is_last_stage else None,
            packed_seq_params=PackedRows.of(
                batch.lengths,
                tokens.device,
                routing=routing,
                target_positions=batch.target_positions,
                rotation=self.language.rotation(batch.lengths),
            ),
        )
        return out[0] if self.groups.is_last_stage else out

    def embed(self, tokens: Tensor, pictures: Tensor | None, positions: Tensor | None) -> Tensor:
        """Embed new tokens, on the first pipeline stage: [tokens, hidden].

        Args:
            tokens: int64 [tokens].
            pictures: embeddings of pictures, [positions, hidden]; None where there are none.
            positions: which tokens they stand for, int64 [positions].
        """
        text = self._embed_text(tokens)
        return text if pictures is None or positions is None else place_views(text, pictures, positions)

    def decode(self, hidden: Tensor, rows: PackedRows) -> Tensor:
        """Compute this stage's layers of new tokens by the modules that train, and behind the last one the logits.

        Args:
            hidden: on the first stage the embeddings of all tokens, [tokens, hidden]; else what the stage before gave.
            rows: their documents; logits are those of `target_positions`.

        Returns:
            [targets, padded vocabulary] on every tensor rank. Before the last stage: hidden states [tokens of this
            rank, hidden].
        """
        hidden, is_first = hidden[:, None], self.groups.is_first_stage
        if not is_first:
            self.language.set_input_tensor(hidden)
        out: Tensor = self.language(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=self._scattered(hidden) if is_first else None,
            packed_seq_params=rows,
            runtime_gather_output=True,
        )
        return out[0] if self.groups.is_last_stage else out[:, 0]

    def embed_picture(self, features: Tensor, encoded: Sequence[int]) -> Tensor:
        """Make the embeddings of a picture's positions, as they stand behind BOS: [positions, hidden].

        Args:
            features: of its encoded views, [views, feature_values].
            encoded: their numbers, ascending; in the place of the others stands the skip token.
        """
        assert self.vision is not None
        blocks: dict[int, Tensor] = dict(zip(encoded, self.vision(features), strict=True))
        if self.vision.skip_token is not None:
            skipped = set(range(self.vision.config.views)) - set(encoded)
            blocks |= dict.fromkeys(skipped, self.vision.skip_token[None])
        return torch.cat([blocks[view] for view in sorted(blocks)])

    def _embed(self, batch: MicroBatch, features: Tensor) -> Tensor:
        """Embed tokens and views: [tokens of this rank, 1, hidden]."""
        assert self.vision is not None
        blocks, positions = self.vision(features).flatten(0, 1), batch.view_positions
        if self.vision.skip_token is not None:
            skipped = self.vision.skip_token.expand(len(batch.skip_positions), -1)
            blocks, positions = torch.cat([blocks, skipped]), torch.cat([positions, batch.skip_positions])
        return self._scattered(place_views(self._embed_text(batch.tokens), blocks, positions)[:, None])

    def _scattered(self, embeddings: Tensor) -> Tensor:
        """Keep this tensor rank's part of the tokens, where tensor ranks share them: [its tokens, 1, hidden]."""
        if self.groups.layout.config.sequence:
            embeddings = scatter_to_sequence_parallel_region(embeddings, group=self.groups.tensor)
        return embeddings

    def _embed_text(self, tokens: Tensor) -> Tensor:
        """Embed tokens [tokens]: [tokens, hidden]."""
        embeddings: Tensor = self.language.embedding(input_ids=tokens[None], position_ids=None)
        return embeddings[:, 0]


def routing_of(batch: MicroBatch, weight: float) -> Routing:
    """Describe a micro-batch to the routers.

    Args:
        batch: the micro-batch.
        weight: of every token in the routers' losses.
    """
    row = batch.row_of_token
    images = torch.cat([batch.view_positions, batch.skip_positions])
    kind = torch.full_like(row, TEXT).index_fill(0, images, IMAGE).masked_fill(row < 0, PADDING)
    row = row.where(row >= 0, batch.rows)
    lengths = row.new_zeros(batch.rows + 1).index_add_(0, row, torch.ones_like(row))  # bincount would ask the device
    return Routing(row, kind, lengths[:-1], weight)


def place_views(text: Tensor, blocks: Tensor, positions: Tensor) -> Tensor:
    """Put the embeddings that stand for views into a row of token embeddings.

    Args:
        text: embeddings of all tokens, [tokens, hidden]; those at a view's positions are ignored.
        blocks: embeddings that stand for views, [positions, hidden].
        positions: where they go in the row, int64 [positions].

    Returns:
        [tokens, hidden]; gradients reach `text` and `blocks`, neither is changed.

    Raises:
        SphinxError: there are more or fewer positions than block tokens.
    """
    if len(blocks) != len(positions):
        raise SphinxError(f"{len(blocks)} tokens of views for {len(positions)} positions; plan and encoders disagree")
    return text.index_copy(0, positions, blocks.to(text.dtype))
