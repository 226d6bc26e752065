"""Portable attention and norm: torch's own kernels where transformer-engine is not installed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from megatron_sphinx.device import current_platform
from megatron_sphinx.model.experts import Routing


@dataclass
class PackedRows(PackedSeqParams):  # type: ignore[misc]
    """Documents that lie one after the other, best sorted by length; none sees another.

    It is how a micro-batch reaches the layers: megatron-core hands its `packed_seq_params` on to each of them, so what
    else the layers need to know of the tokens goes with it.

    Attributes:
        runs: neighbouring documents of one length: how many, and their length; in the order in which they lie.
        routing: what routers must know of the same tokens; None without MoE experts.
        target_positions: int64 [targets], the tokens whose logits are wanted; None for all.
        rotation: cosine and sine of each token's position in its document, [tokens, 1, head width / 2]; None for no
            RoPE, or where megatron-core rotates.
    """

    runs: tuple[tuple[int, int], ...] = ()
    routing: Routing | None = None
    target_positions: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, **known: Any) -> "PackedRows":
        """Describe documents of these lengths.

        Args:
            lengths: tokens of each document, in the order in which they lie.
            device: where the boundaries are needed.
            known: the attributes `routing`, `target_positions` and `rotation`, where they are not None.
        """
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            runs=tuple((len(list(same)), length) for length, same in groupby(lengths)),
            **known,
        )


class PackedAttention(nn.Module):
    """RoPE and causal attention inside each document of a packed row; a megatron-core `core_attention`.

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
        """Rotate queries and keys, and attend inside each document.

        Args:
            query: [tokens, heads, head width].
            key: [tokens, groups, head width]; each serves heads / groups neighbouring query heads.
            value: [tokens, groups, head width].
            attention_mask: not used, since the documents' boundaries say what sees what.
            packed_seq_params: the documents.

        Returns:
            [tokens, heads * head width].
        """
        if packed_seq_params.rotation is not None:
            query, key = (_Rotate.apply(part, *packed_seq_params.rotation) for part in (query, key))
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


def rotation(lengths: Sequence[int], frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine of the rotation of each token, once for all layers.

    Args:
        lengths: tokens of each document; positions are counted anew in each.
        frequencies: fp32 [head width / 2].
        dtype: type of the result.

    Returns:
        Cosine and sine, [tokens, 1, head width / 2] each.

    Source: Su et al., arXiv:2104.09864, section 3.2.2.
    """
    sizes = torch.tensor(lengths)
    positions = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    angles = positions.to(frequencies.device)[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


class _Rotate(torch.autograd.Function):
    """Rotates the two halves of each head against each other; backward turns the gradients by the opposite angle.

    It saves cosine and sine only, while autograd's own would keep both products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate [tokens, heads, head width] by the angles of `rotation`."""
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Rotate the gradients back."""
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of a head's first and second half: [tokens, heads, head width] to a new tensor like it."""
    out = torch.empty_like(x)
    (first, second), (left, right) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, no bias; a megatron-core norm module.

    Source: Zhang and Sennrich, arXiv:1910.07467.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=current_platform().device)
        self.weight = nn.Parameter(ones)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root of the mean square over the last dimension, and weigh."""
        if x.is_cuda:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        out: Tensor = _NormOnCpu.apply(x, self.weight, self.eps)
        return out


class _NormOnCpu(torch.autograd.Function):
    """The norm computed in fp32; on CPUs it takes half the time and memory of torch's own, which is several kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Norm over the last dimension of [..., hidden], computed in fp32 and returned in the type of `x`."""
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        out: Tensor = (wide * scale).mul_(weight.float()).to(x.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Compute the gradients of `x` and the weight in fp32, and return them in their types."""
        x, weight, scale = ctx.saved_tensors
        wide, of_out = (part.flatten(0, -2).float() for part in (x, gradients[0]))
        scale, product = scale.flatten(0, -2), wide * of_out
        of_weight = (scale.t() @ product)[0]
        shared = (product @ weight.float()[:, None]).mul_(scale**3).div_(x.shape[-1])
        of_x = (of_out * weight.float()).mul_(scale).addcmul_(wide, shared, value=-1)
        return of_x.to(x.dtype).view(x.shape), of_weight.to(weight.dtype), None
