"""Portable attention and norm: torch's own kernels where transformer-engine is not installed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from megatron_sphinx import platform
from megatron_sphinx.model.experts import Routing


@dataclass
class PackedRows(PackedSeqParams):  # type: ignore[misc]
    """Documents that lie one behind the other, best sorted by length; none sees another.

    Attributes:
        runs: (documents, length of each), in the order they lie.
        routing: what routers must know of the same tokens; None without experts.
    """

    runs: tuple[tuple[int, int], ...] = ()
    routing: Routing | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, routing: Routing | None = None) -> "PackedRows":
        """The boundaries of documents of these lengths."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            runs=tuple((len(list(same)), length) for length, same in groupby(lengths)),
            routing=routing,
        )


class PackedAttention(nn.Module):
    """Causal attention inside each document of a packed row; a megatron-core `core_attention`.

    Documents of one length go through scaled_dot_product_attention as one batch: no mask, no score matrix, and no work
    for pairs of positions that may not see each other.
    """

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackedRows,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [tokens, heads, head width].
            key: [tokens, groups, head width]; each serves heads / groups neighbouring query heads.
            value: like `key`.
            attention_mask: not used; the boundaries say all.
            packed_seq_params: the boundaries.

        Returns:
            [tokens, heads * head width].
        """
        sizes = [documents * length for documents, length in packed_seq_params.runs]
        out = []
        for q, k, v, (documents, _length) in zip(
            query.split(sizes), key.split(sizes), value.split(sizes), packed_seq_params.runs, strict=True
        ):
            q, k, v = (x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (q, k, v))
            mixed = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            out.append(mixed.transpose(1, 2).flatten(0, 1))
        return torch.cat(out).flatten(1)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, no bias; a megatron-core norm module.

    Source: Zhang and Sennrich, arXiv:1910.07467.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=platform.current().device)
        self.weight = nn.Parameter(ones)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
