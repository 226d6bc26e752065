"""Checks single parts on the device against arithmetic that cannot be wrong: attention, and the encoders' features."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_sphinx.device import current_platform
from megatron_sphinx.gpu_check.findings import Finding, Note
from megatron_sphinx.gpu_check.scales import Scale
from megatron_sphinx.model.architecture import VisionConfig
from megatron_sphinx.model.attention import PackedAttention, PackedRows
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.kernels import choose
from megatron_sphinx.values import build

ROUNDINGS = 4.0  # how many roundings to bf16 a position's result may be off
_BF16_ROUNDING = 2.0**-8  # the largest relative error of one
_HEADS = 4
_VARLEN_CAPABILITY = (8, 0)  # of the GPU, that torch's kernel for rows of several documents needs

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def explicit(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attend in fp32 with an explicit mask of who sees whom: causal, inside each document.

    Args:
        query: [tokens, heads, head width].
        key: [tokens, groups, head width].
        value: [tokens, groups, head width].
        lengths: tokens of each document.

    Returns:
        [tokens, heads, head width].
    """
    times = query.shape[1] // key.shape[1]
    query, key, value = (part.float() for part in (query, key, value))
    key, value = (part.repeat_interleave(times, 1) for part in (key, value))
    document = torch.arange(len(lengths), device=query.device).repeat_interleave(
        torch.tensor(lengths, device=query.device)
    )
    sees = (document[:, None] == document) & torch.ones(len(query), len(query), device=query.device).tril().bool()
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, float("-inf")).softmax(-1), value)


def training_path(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attend by what training takes on this device; see `explicit` for the shapes."""
    rows = PackedRows.of(lengths, query.device)
    attention = PackedAttention(kernels=choose("auto", current_platform()), longest=max(lengths))
    out: Tensor = attention(query, key, value, None, packed_seq_params=rows)
    return out.view_as(query)


def document_path(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attend by scaled_dot_product_attention, document by document; see `explicit` for the shapes."""
    out = []
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends):
        for q, k, v in zip(*(part.split(list(lengths)) for part in (query, key, value)), strict=True):
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            out.append(mixed[0].transpose(0, 1))
    return torch.cat(out)


def varlen_path(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attend by torch's kernel for rows of several documents; see `explicit` for the shapes."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)
    times = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(times, 1) for part in (key, value))  # torch 2.11 knows no groups there
    out = varlen_attn(query, key, value, ends, ends, max(lengths), max(lengths), window_size=(-1, 0))
    return cast(Tensor, out)  # it gives more only where more is asked for


def _why_no_varlen() -> str:
    """Say why torch's kernel for rows of several documents cannot be taken here; empty where it can."""
    if not current_platform().is_cuda:
        return "torch's varlen attention runs on CUDA only"
    if torch.cuda.get_device_capability() < _VARLEN_CAPABILITY:
        return "torch's varlen attention needs a GPU of compute capability 8.0"
    return ""


def roundings_off(path: Attend, tensors: Sequence[Tensor], lengths: Sequence[int]) -> dict[str, float]:
    """Compare a way to attend with `explicit`, forward and backward.

    Args:
        path: the way.
        tensors: query, key, value and the gradient of the result, bf16; see `explicit` for the shapes.
        lengths: tokens of each document.

    Returns:
        For the result and each gradient: at the worst position, the norm of the difference over what is right there and
        on average (the first position of a document has no gradient of its query), in roundings to bf16 (2 ** -8 each).
    """
    *inputs, of_out = tensors
    found: list[list[Tensor]] = []
    for attend in (path, explicit):
        leaves = [part.detach().requires_grad_() for part in inputs]
        out = attend(leaves[0], leaves[1], leaves[2], lengths)
        gradients = torch.autograd.grad(out, leaves, of_out.to(out.dtype))
        found.append([part.double().flatten(1) for part in (out.detach(), *gradients)])
    names = ("out", "query", "key", "value")
    worst = {}
    for name, got, right in zip(names, *found, strict=True):
        norms = right.norm(dim=1)
        off = (got - right).norm(dim=1) / (norms + norms.square().mean().sqrt())
        worst[name] = float(off.max() / _BF16_ROUNDING)
    return worst


def attention(scale: Scale, note: Note) -> None:
    """Check every way to attend, with one and with several heads a group, and heads of 64 and 128 numbers."""
    generator = torch.Generator().manual_seed(0)
    row = scale.length
    shapes = {"documents": [row // 3, row // 3, row // 5, row // 16, 1, 7], "full row": [row]}
    paths: dict[str, Attend] = {"as trained": training_path, "by document": document_path, "varlen": varlen_path}
    for name, path in paths.items():
        if name == "varlen" and (reason := _why_no_varlen()):
            note(Finding(section="right", name=f"attention {name}", absent=reason))
            continue
        for shape, lengths in shapes.items():
            worst = 0.0
            for width in (64, 128):
                for groups in (_HEADS, 1):
                    tensors = list(_drawn(sum(lengths), (_HEADS, groups, groups, _HEADS), width, generator))
                    worst = max(worst, *roundings_off(path, tensors, lengths).values())
            values = {"bf16_roundings_off": worst, "bound": ROUNDINGS}
            note(
                Finding(
                    section="right",
                    name=f"attention {name}, {shape}",
                    values=values,
                    is_right=worst <= ROUNDINGS,
                    is_required=True,
                )
            )


def _drawn(tokens: int, heads: Sequence[int], width: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw tensors of these heads, equal on every device: bf16 [tokens, heads, width]."""
    for count in heads:
        yield torch.randn(tokens, count, width, generator=generator).to(current_platform().device, torch.bfloat16)


def features(scale: Scale, note: Note) -> None:
    """Check that a view's features have equal bits in any batch and at any place in it."""
    platform = current_platform()
    experts = [{"name": name, "weights": "random"} for name in ("efficientnet_lite0", "dinov2_small")]
    vision = build(VisionConfig, {"grid": 4, "experts": experts})
    dtype = torch.bfloat16 if platform.is_bf16_fast else torch.float32
    encoders = FrozenEncoders(vision, device=platform.device, dtype=dtype, seed=1)
    generator, count = torch.Generator().manual_seed(0), 2 * scale.right_pairs + 3
    views = {side: torch.randint(256, (count, 3, side, side), generator=generator) for side in vision.sides}

    def encoded(order: Sequence[int]) -> Tensor:
        chosen: Mapping[int, Tensor] = {side: pixels[list(order)].to(torch.uint8) for side, pixels in views.items()}
        return encoders(chosen)  # type: ignore[no-any-return]

    together = encoded(range(count))
    numbers = range(count)
    orders = {"alone": numbers[-1:], "backwards": numbers[::-1], "the second half": numbers[count // 2 :]}
    wrong = [name for name, order in orders.items() if not torch.equal(encoded(order), together[list(order)])]
    values = {"views": count, "orders": len(orders), "differ": ", ".join(wrong) or "none"}
    note(
        Finding(
            section="right",
            name="bits of features in other batches",
            values=values,
            is_right=not wrong,
            is_required=True,
        )
    )
