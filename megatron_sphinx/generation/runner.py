"""One rank's part of a tick: its layers over the new tokens of several sequences, their pasts in its cache."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sphinx.generation.expert_watch import ExpertWatch
from megatron_sphinx.generation.ticks import Piece
from megatron_sphinx.model.attention import PackedRows, rotation_at
from megatron_sphinx.model.cache import CachedDocuments, Extent, KeyValueCache, bytes_per_token
from megatron_sphinx.model.inference import InferenceDecoder
from megatron_sphinx.model.sphinx import SphinxModel

Decode = Callable[[Tensor, PackedRows], Tensor]


class ModelRunner:
    """Computes pieces on this rank's shard of the model.

    A replica that shares experts with others must compute in every tick, and tensor ranks that share the tokens must
    have as many each: for that, tokens are computed that nobody asked for, in a place behind all others.

    Args:
        model: this rank's shard; it must be in eval mode, and without sequence parallelism. Its decoder's matrices are
            taken over: see InferenceDecoder.
        places: how many tokens the cache has room for.
        vocabulary: token ids; logits of the vocabulary's padding are cut off.
        decode: computes the layers, as InferenceDecoder does; None for that, which takes over the model's matrices.

    Attributes:
        cache_bytes: what the cache takes on this rank.
        experts: obeys what is ordered of the MoE experts.
        feature_values: numbers of a view's features; 0 where the model has no eyes, and after the first stage.
    """

    def __init__(self, model: SphinxModel, *, places: int, vocabulary: int, decode: Decode | None = None) -> None:
        self._model, self._vocabulary, self._places = model, vocabulary, places
        config, groups = model.language.config, model.groups
        self._dtype: torch.dtype = config.params_dtype
        self._device = next(model.parameters()).device
        self._cache = KeyValueCache(
            [layer.layer_number for layer in model.language.decoder.layers],
            groups=config.num_query_groups // groups.layout.config.tensor,
            width=config.kv_channels,
            places=places + 1,
            dtype=self._dtype,
            device=self._device,
        )
        self.cache_bytes = self._cache.bytes
        self.feature_values = model.vision.config.feature_values if model.vision is not None else 0
        self._decode = decode or InferenceDecoder(model.language, groups)
        self._is_shared = groups.layout.config.expert > 1
        self._multiple = groups.layout.config.token_multiple
        self.experts = ExpertWatch(model.language)
        self._pictures: dict[str, Tensor] = {}
        self._sending: list[tuple[dist.Work | None, Tensor]] = []

    @torch.inference_mode()
    def add_picture(self, key: str, features: Tensor, encoded: Sequence[int]) -> None:
        """Keep the embeddings of a picture until it is forgotten; on the first stage.

        Args:
            key: what pieces name it by.
            features: of its encoded views, [views, feature_values].
            encoded: their numbers, ascending.
        """
        self._pictures[key] = self._model.embed_picture(features.to(self._device), encoded)

    def forget(self, key: str) -> None:
        """Let go of a picture's embeddings."""
        del self._pictures[key]

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> Tensor | None:
        """Compute the new tokens of some sequences.

        Every rank of a stage calls this with the pieces of its replica; a stage gets what the one before it computed
        from these pieces in an earlier call.

        Args:
            pieces: those of this rank's replica; none at all is fine.

        Returns:
            On the last stage fp32 logits [rows, vocabulary]: for each piece, those behind its scored tokens, and behind
            its last token where one is drawn, in this order. None before the last stage.
        """
        idle = Piece(tokens=(0,), start=0, segments=((self._places, 1),))
        wanted = sum(len(piece.tokens) for piece in pieces)
        computed = max(wanted, int(self._is_shared))
        computed += -computed % self._multiple
        if not computed:
            return None
        logits = self._compute([*pieces, *[idle] * (computed - wanted)])
        return logits[:, : self._vocabulary].float() if pieces and logits is not None else None

    def _compute(self, pieces: Sequence[Piece]) -> Tensor | None:
        """Compute pieces; see `run`. The logits are those of the padded vocabulary, in the model's type."""
        groups, language = self._model.groups, self._model.language
        tokens = self._sent([token for piece in pieces for token in piece.tokens])
        places = self._sent([piece.start + number for piece in pieces for number in range(len(piece.tokens))])
        rows = PackedRows.of(
            [len(piece.tokens) for piece in pieces],
            self._device,
            target_positions=self._sent(_wanted(pieces)),
            rotation=rotation_at(places, language.frequencies, self._dtype),
            past=CachedDocuments(
                self._cache, [Extent(piece.start, len(piece.tokens), piece.segments) for piece in pieces], self._device
            ),
        )
        hidden = (
            self._model.embed(tokens, *self._placed(pieces)) if groups.is_first_stage else self._received(len(tokens))
        )
        self.experts.begin(pieces)
        out = self._decode(hidden, rows)
        self.experts.end()
        if groups.is_last_stage:
            return out
        self._send_on(out)
        return None

    def _placed(self, pieces: Sequence[Piece]) -> tuple[Tensor | None, Tensor | None]:
        """Return the embeddings of the pictures' positions among the new tokens, and where those are."""
        embeddings, positions = [], []
        begins = accumulate((len(piece.tokens) for piece in pieces), initial=0)
        for piece, begin in zip(pieces, begins, strict=False):
            if piece.picture is None:
                continue
            picture = self._pictures[piece.picture]
            first, last = max(piece.start, 1), min(piece.start + len(piece.tokens), 1 + len(picture))
            if first < last:
                embeddings.append(picture[first - 1 : last - 1])
                positions += [begin + place - piece.start for place in range(first, last)]
        return (torch.cat(embeddings), self._sent(positions)) if embeddings else (None, None)

    def _sent(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self._device, non_blocking=True)

    def _received(self, tokens: int) -> Tensor:
        """Take what the stage before this one has computed: [tokens, hidden]."""
        groups = self._model.groups
        tokens //= self._multiple
        hidden = torch.empty(tokens, self._model.language.config.hidden_size, dtype=self._dtype, device=self._device)
        dist.recv(hidden, group=groups.pipeline, group_src=groups.seat.pipeline - 1)
        return hidden

    def _send_on(self, hidden: Tensor) -> None:
        """Begin to send hidden states to the next stage, which takes them in its next tick."""
        for work, _ in self._sending:
            if work is not None:
                work.wait()
        groups = self._model.groups
        work = dist.isend(hidden, group=groups.pipeline, group_dst=groups.seat.pipeline + 1)
        self._sending = [(work, hidden)]


def _wanted(pieces: Sequence[Piece]) -> list[int]:
    """List the new tokens behind which logits are wanted, in the order of `ModelRunner.run`."""
    wanted, begin = [], 0
    for piece in pieces:
        wanted += [begin + number for number in piece.scored]
        begin += len(piece.tokens)
        wanted += [begin - 1] if piece.draw is not None else []
    return wanted


def cache_places(model: SphinxModel, memory: int) -> int:
    """Count the tokens for which a rank's cache has room.

    Args:
        model: its shard.
        memory: bytes for the cache.
    """
    config, tensor = model.language.config, model.groups.layout.config.tensor
    layers, groups = len(model.language.decoder.layers), config.num_query_groups // tensor
    return memory // bytes_per_token(layers, groups, config.kv_channels, config.params_dtype)
