"""Attention inside the documents of packed rows, and the norm: what the decoder's layers are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from inspect import signature
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_sphinx.device import current_platform
from megatron_sphinx.model.experts import Routing
from megatron_sphinx.model.kernels import Kernels

_VARLEN_WIDTH = 256  # the widest head of flash attention
_CUDNN_WIDTH = 128  # the widest head that cuDNN's backward takes on every GPU
_CUDNN_FROM = 2048  # tokens of a document; an H100 took 3.5 % less for a step of such documents, shorter ones untried


class Past(Protocol):
    """What the documents' earlier tokens left behind, where only the new ones are computed."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Let each new token see its document up to itself.

        Args:
            layer: number of the layer.
            query: of the new tokens, [tokens, heads, head width], rotated, as are the keys.
            key: [tokens, groups, head width].
            value: [tokens, groups, head width].
            scale: what scores are multiplied by; None for 1 / sqrt(head width).

        Returns:
            [tokens, heads, head width].
        """


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
        past: keys and values of the documents' earlier tokens; None where the documents are whole.
    """

    runs: tuple[tuple[int, int], ...] = ()
    routing: Routing | None = None
    target_positions: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    past: Past | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, **known: Any) -> "PackedRows":
        """Describe documents of these lengths.

        Args:
            lengths: tokens of each document, in the order in which they lie.
            device: where the boundaries are needed.
            known: the attributes `routing`, `target_positions`, `rotation` and `past`, where they are not None.
        """
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        ends = ends.to(device, non_blocking=True)  # else the host would wait until the device is idle
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


class Path(StrEnum):
    """How the attention of a micro-batch is computed; the value is what a run says of it.

    Attributes:
        RUNS: neighbouring documents of one length as one batch of scaled_dot_product_attention.
        VARLEN: one call of torch's varlen attention for all documents, whatever their lengths.
        WHOLE: each document by scaled_dot_product_attention alone, and by cuDNN's kernel where that takes it.
    """

    RUNS = "torch's scaled_dot_product_attention"
    VARLEN = "torch's varlen attention"
    WHOLE = "cuDNN's attention"


def attention_path(
    runs: Sequence[tuple[int, int]], longest: int, *, is_cuda: bool, dtype: torch.dtype, head_width: int
) -> Path:
    """Choose how the attention of a micro-batch is computed.

    cuDNN's kernel is set up anew, for a second or so, for every shape that it has not met. So it is taken only for
    documents of the longest length that there can be, one by one: they all have one shape. There it is the fastest, but
    its backward does not give equal bits each time.

    Args:
        runs: neighbouring documents of one length: how many, and their length.
        longest: tokens of the longest document that there can be.
        is_cuda: whether it is computed on a GPU.
        dtype: of queries, keys and values; the varlen attention takes 16-bit types only.
        head_width: channels of a head.
    """
    if not is_cuda or dtype not in (torch.bfloat16, torch.float16) or head_width % 8 or head_width > _VARLEN_WIDTH:
        return Path.RUNS
    is_whole = all(length == longest for _, length in runs) and not torch.are_deterministic_algorithms_enabled()
    return Path.WHOLE if is_whole and longest >= _CUDNN_FROM and head_width <= _CUDNN_WIDTH else Path.VARLEN


class PackedAttention(nn.Module):
    """RoPE and causal attention inside each document of a packed row; a megatron-core `core_attention`.

    No mask, no score matrix, and no work for pairs of positions that may not see each other; `attention_path` says how.

    Args:
        kernels: what RoPE is computed with.
        longest: tokens of the longest document that there can be.
        layer_number: of the layer, counted from 1 over all pipeline stages.
        softmax_scale: what scores are multiplied by; None for 1 / sqrt(head width).
    """

    def __init__(
        self,
        *_: Any,
        kernels: Kernels,
        longest: int,
        layer_number: int = 1,
        softmax_scale: float | None = None,
        **__: Any,
    ) -> None:
        super().__init__()
        self.kernels, self.longest, self.layer_number, self.softmax_scale = (
            kernels,
            longest,
            layer_number,
            softmax_scale,
        )

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
        rows = packed_seq_params
        if rows.rotation is not None:
            query, key = self.kernels.rotate(query, key, *rows.rotation)
        if rows.past is not None:
            return rows.past.attend(self.layer_number, query, key, value, self.softmax_scale).flatten(1)
        path = attention_path(
            rows.runs, self.longest, is_cuda=query.is_cuda, dtype=query.dtype, head_width=query.shape[-1]
        )
        attend = {Path.RUNS: attend_by_runs, Path.VARLEN: attend_at_once, Path.WHOLE: attend_to_whole}[path]
        out = attend(query, key, value, rows, self.softmax_scale)
        if torch.are_deterministic_algorithms_enabled() and out.requires_grad:
            _make_backward_strict(query, out)
        return out.flatten(1)


def _make_backward_strict(query: Tensor, out: Tensor) -> None:
    """Let the backward between two tensors, and nothing else, be refused where it has no kernel of equal bits.

    Attention has one, but while torch only warns it takes the faster one, whose bits differ, and warns.
    """
    out.register_hook(lambda _: torch.use_deterministic_algorithms(True))
    query.register_hook(lambda _: torch.use_deterministic_algorithms(True, warn_only=True))


def attend_by_runs(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scale: float | None) -> Tensor:
    """Attend inside each document, those of one length at once.

    Args:
        query: [tokens, heads, head width].
        key: [tokens, groups, head width].
        value: [tokens, groups, head width].
        rows: the documents.
        scale: what scores are multiplied by; None for 1 / sqrt(head width).

    Returns:
        [tokens, heads, head width].
    """
    return _attend_in_batches(query, key, value, rows.runs, scale)


def attend_to_whole(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scale: float | None) -> Tensor:
    """Attend inside each document, one after the other, by cuDNN's kernel where it takes them, else by flash's.

    Backward needs no such permission: it follows from the operation that forward has recorded. Arguments and result
    are those of `attend_by_runs`.
    """
    one_by_one = [(1, length) for documents, length in rows.runs for _ in range(documents)]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return _attend_in_batches(query, key, value, one_by_one, scale)


def _attend_in_batches(
    query: Tensor, key: Tensor, value: Tensor, batches: Sequence[tuple[int, int]], scale: float | None
) -> Tensor:
    """Attend inside each document; `batches` says how many neighbours of which length are computed at once."""
    sizes = [documents * length for documents, length in batches]
    out = []
    for q, k, v, (documents, _length) in zip(
        query.split(sizes), key.split(sizes), value.split(sizes), batches, strict=True
    ):
        q, k, v = (x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out.append(mixed.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def attend_at_once(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scale: float | None) -> Tensor:
    """Attend inside all documents by one call of flash attention, which takes strided values without a copy.

    Arguments and result are those of `attend_by_runs`.
    """
    attend, knows_groups = _varlen_attention()
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if knows_groups:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    ends, longest = (rows.cu_seqlens_q, rows.cu_seqlens_kv), (rows.max_seqlen_q, rows.max_seqlen_kv)
    # a window that reaches as far back as there are tokens, and none ahead
    out: Tensor = attend(query, key, value, *ends, *longest, scale=scale, window_size=(-1, 0), **options)
    return out


@cache
def _varlen_attention() -> tuple[Callable[..., Any], bool]:
    """Import torch's varlen attention, and find out whether it knows of key groups; that of older torches does not.

    It is imported where it is needed only: it brings torch's compiler with it, which takes seconds.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in signature(varlen_attn).parameters


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
    device, total = frequencies.device, sum(lengths)
    sizes = torch.tensor(lengths).to(device, non_blocking=True)
    positions = torch.arange(total, device=device)
    positions -= (sizes.cumsum(0) - sizes).repeat_interleave(sizes, output_size=total)  # the host knows the sum
    return rotation_at(positions, frequencies, dtype)


def rotation_at(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine of the rotation of tokens at these positions, int64 [tokens]; see `rotation`."""
    angles = positions[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, no bias; a megatron-core norm module.

    Source: Zhang and Sennrich, arXiv:1910.07467.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, *, kernels: Kernels, **_: Any) -> None:
        super().__init__()
        self.eps, self.kernels = eps, kernels
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=current_platform().device)
        self.weight = nn.Parameter(ones)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root of the mean square over the last dimension, and weigh."""
        return self.kernels.norm(x, self.weight, self.eps)
