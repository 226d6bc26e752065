"""The key-value cache: keys and values of tokens that have been computed, so that a new token is computed alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sphinx.model.attention import PackedRows, Path, attend_at_once, attention_path


def bytes_per_token(layers: int, groups: int, width: int, dtype: torch.dtype) -> int:
    """Count the bytes that a token takes in the cache.

    Args:
        layers: of the stage.
        groups: key-value groups of this rank.
        width: channels of a head.
        dtype: of keys and values.
    """
    return 2 * layers * groups * width * dtype.itemsize


class KeyValueCache:
    """Keys and values of the layers of one rank, in places that are numbered; who lies where is not its concern.

    Keys are stored rotated. All its memory is taken when it is made.

    Args:
        layers: numbers of the layers.
        groups: key-value groups of this rank.
        width: channels of a head.
        places: how many tokens have room.
        dtype: of keys and values.
        device: where they are.
    """

    def __init__(
        self, layers: Sequence[int], *, groups: int, width: int, places: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers = {
            layer: torch.empty(2, groups, places, width, dtype=dtype, device=device).unbind() for layer in layers
        }
        self.bytes = places * bytes_per_token(len(layers), groups, width, dtype)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, [groups, places, head width] each."""
        keys, values = self._layers[layer]
        return keys, values


@dataclass(frozen=True)
class Extent:
    """New tokens of a document, and where all of it lies in the cache.

    Attributes:
        start: how many tokens of the document the cache has.
        tokens: how many are new.
        segments: (first place, tokens) of each stretch of the document, in order: of the old tokens, then the new ones.
    """

    start: int
    tokens: int
    segments: tuple[tuple[int, int], ...]

    @property
    def new_places(self) -> list[int]:
        """Places of the new tokens."""
        places: list[int] = []
        old = self.start
        for first, count in self.segments:
            places += range(first + min(old, count), first + count)
            old -= min(old, count)
        return places


class CachedDocuments:
    """The documents whose new tokens a forward pass computes; a `Past`.

    Args:
        cache: of this rank.
        extents: of the documents, in the order in which their new tokens lie.
        device: where the cache is.
    """

    def __init__(self, cache: KeyValueCache, extents: Sequence[Extent], device: torch.device) -> None:
        self._cache, self._extents, self._device = cache, extents, device
        places = [place for extent in extents for place in extent.new_places]
        self._places = torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Store the new keys and values, and let each new token see its document up to itself; see `Past`."""
        keys, values = self._cache[layer]
        keys.index_copy_(1, self._places, key.transpose(0, 1))
        values.index_copy_(1, self._places, value.transpose(0, 1))
        path = attention_path((), 0, is_cuda=query.is_cuda, dtype=query.dtype, head_width=query.shape[-1])
        if path is not Path.RUNS:
            return attend_at_once(query, self._gathered(keys), self._gathered(values), self._rows, scale)
        single, others = self._split
        if single is not None and not others:
            return single.attend(query, keys, values, scale)
        out = torch.empty_like(query)
        for extent, new in others:
            if extent.start:
                seen, known = _joined(keys, extent.segments), _joined(values, extent.segments)
            else:
                seen, known = key[new].transpose(0, 1), value[new].transpose(0, 1)
            out[new] = _attend(query[new], seen, known, scale)
        if single is not None:
            out[single.tokens] = single.attend(query[single.tokens], keys, values, scale)
        return out

    @cached_property
    def _split(self) -> "tuple[_SingleTokens | None, list[tuple[Extent, slice]]]":
        """Tell the documents with one new token each, on a CPU, from the others, whose new tokens are given."""
        single, tokens, others = [], [], []
        begin = 0
        for extent in self._extents:
            if extent.start and extent.tokens == 1 and self._device.type == "cpu":
                single.append(extent)
                tokens.append(begin)
            else:
                others.append((extent, slice(begin, begin + extent.tokens)))
            begin += extent.tokens
        return (_SingleTokens(tokens, [extent.segments for extent in single]) if single else None), others

    @cached_property
    def _rows(self) -> PackedRows:
        """Describe queries and keys to the varlen attention, which lines them up by their ends."""
        totals = [extent.start + extent.tokens for extent in self._extents]
        rows = PackedRows.of([extent.tokens for extent in self._extents], self._device)
        keys = PackedRows.of(totals, self._device)
        rows.cu_seqlens_kv, rows.max_seqlen_kv = keys.cu_seqlens_q, keys.max_seqlen_q
        return rows

    @cached_property
    def _all_places(self) -> Tensor:
        places = [torch.arange(first, first + count) for extent in self._extents for first, count in extent.segments]
        return torch.cat(places).to(self._device, non_blocking=True)

    def _gathered(self, cached: Tensor) -> Tensor:
        """Lay the documents' keys or values side by side: [tokens, groups, head width]."""
        return cached.index_select(1, self._all_places).transpose(0, 1)


def _joined(cached: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    """Return keys or values of a document, [groups, tokens, head width]; one stretch is not copied."""
    parts = [cached[:, first : first + count] for first, count in segments]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """Let the last tokens of one document see it up to themselves.

    Args:
        query: [new tokens, heads, head width].
        keys: [groups, tokens, head width], the new ones last.
        values: [groups, tokens, head width].
        scale: see `Past.attend`.

    Returns:
        [new tokens, heads, head width].
    """
    new, total = len(query), keys.shape[1]
    is_causal = new == total and new > 1
    mask = None
    if not is_causal and new > 1:
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril_(total - new)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != len(keys),
    )
    return out[0].transpose(0, 1)


class _SingleTokens:
    """New tokens on a CPU, one of each document; attends to each stretch of the cache in place, and joins the parts.

    A picture's tokens are one stretch of every question about it, which is read once for all of them. Each stretch's
    softmax comes with the logarithm of its denominator, by which the parts of a document are weighed.

    Args:
        tokens: their numbers among all new tokens.
        segments: of each document, see `Extent`.

    Attributes:
        tokens: see above.
    """

    def __init__(self, tokens: list[int], segments: Sequence[tuple[tuple[int, int], ...]]) -> None:
        self.tokens = tokens
        self._readers: dict[tuple[int, int], list[int]] = {}
        for document, stretches in enumerate(segments):
            for stretch in stretches:
                self._readers.setdefault(stretch, []).append(document)
        parts: list[list[int]] = [[] for _ in segments]
        readers = [document for documents in self._readers.values() for document in documents]
        for part, document in enumerate(readers):
            parts[document].append(part)
        most = max(len(own) for own in parts)
        self._is_joined = len(readers) > len(segments)
        self._parts = torch.tensor([own + [len(readers)] * (most - len(own)) for own in parts])

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        """Let each token see its document.

        Args:
            query: [documents, heads, head width].
            keys: of the cache, [groups, places, head width].
            values: of the cache.
            scale: see `Past.attend`.

        Returns:
            [documents, heads, head width].
        """
        rows = query.unflatten(1, (len(keys), -1))  # [documents, groups, heads of a group, head width]
        alone, keys, values = rows.split(1), keys[None], values[None]
        outs, weights = [], []
        for (first, count), documents in self._readers.items():
            several = len(documents) > 1
            asking = rows[documents].transpose(0, 1).flatten(1, 2)[None] if several else alone[documents[0]]
            out, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                asking, keys.narrow(2, first, count), values.narrow(2, first, count), scale=scale
            )
            if several:
                out, weight = (x[0].unflatten(1, (len(documents), -1)).transpose(0, 1) for x in (out, weight))
            outs.append(out)
            weights.append(weight)
        if not self._is_joined:
            return torch.cat(outs).flatten(1, 2)
        nothing = torch.full_like(weights[0][:1], -torch.inf)  # the part that documents of fewer parts have
        share = torch.cat([*weights, nothing])[self._parts].softmax(1)[..., None]
        joined = (torch.cat([*outs, torch.zeros_like(outs[0][:1])])[self._parts] * share).sum(1)
        return joined.to(query.dtype).flatten(1, 2)
