"""The kernels of the language model outside its matrix products and its attention: torch's own, or liger-kernel's."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sphinx.device import Platform, is_imported
from megatron_sphinx.errors import ConfigError

_PACKAGES = {"torch": "torch", "liger": "liger-kernel", "transformer_engine": "transformer-engine"}


@dataclass(frozen=True)
class Kernels:
    """What the language model's modules compute with; chosen once for a run, by `choose`.

    Attributes:
        name: torch, liger or transformer_engine, as `model.kernels` names them.
        swiglu: of a tensor [..., 2 width] that holds gate and up side by side, SiLU(gate) times up: [..., width].
        rotate: of queries [tokens, heads, head width], keys [tokens, groups, head width], and cosine and sine
            [tokens, 1, head width / 2], the rotated queries and keys.
        norm: of a tensor [..., hidden], a weight [hidden] and an epsilon, the weighted root-mean-square norm.
        cross_entropy: of logits [targets, 1, this rank's part of the vocabulary], the right tokens, int64 [targets, 1],
            and the tensor ranks' group, the losses in nats, fp32 [targets, 1]; None for megatron-core's own.
    """

    name: str
    swiglu: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    norm: Callable[[Tensor, Tensor, float], Tensor]
    cross_entropy: Callable[[Tensor, Tensor, Any], Tensor] | None = None

    @property
    def is_transformer_engine(self) -> bool:
        """Whether the decoder is built of transformer-engine's layers, which rotate, norm and attend themselves."""
        return self.name == "transformer_engine"

    def __str__(self) -> str:
        """Name the kernels with the version of their package."""
        try:
            return f"{self.name} {metadata.version(_PACKAGES[self.name])}"
        except metadata.PackageNotFoundError:
            return f"{self.name} of unknown version"


def choose(choice: str, platform: Platform) -> Kernels:
    """Find the kernels that `model.kernels` asks for on this platform.

    `auto` is liger where liger_kernel imports on a GPU, else torch: never transformer_engine.

    Raises:
        ConfigError: they need a GPU, or their package does not import.
    """
    if choice == "auto":
        choice = "liger" if platform.is_cuda and is_imported("liger_kernel") else "torch"
    if choice == "torch":
        return torch_kernels()
    if not platform.is_cuda:
        raise ConfigError(f"model.kernels={choice}: runs on GPUs only, and this rank is on the CPU; use auto or torch")
    if choice == "transformer_engine":
        if not is_imported("transformer_engine"):
            raise ConfigError(
                "model.kernels=transformer_engine: transformer_engine does not import; install transformer-engine, or "
                "use auto"
            )
        return replace(torch_kernels(), name="transformer_engine")  # for MoE experts, which stay our own
    if not is_imported("liger_kernel"):
        raise ConfigError(
            "model.kernels=liger: liger_kernel does not import; pip install 'megatron-sphinx[cuda]', or use auto"
        )
    return liger_kernels()


def describe(choice: str, platform: Platform, precision: str) -> tuple[str, str]:
    """Say what a run computes with on this platform: its kernels with their version, and its attention.

    Args:
        choice: `model.kernels`.
        platform: what it computes on.
        precision: of its activations, fp32 or bf16.

    Raises:
        ConfigError: as `choose` does.
    """
    kernels = choose(choice, platform)
    if kernels.is_transformer_engine:
        return str(kernels), "transformer-engine's"
    is_varlen = platform.is_cuda and precision == "bf16"
    return str(kernels), "torch's varlen attention" if is_varlen else "torch's scaled_dot_product_attention"


def torch_kernels() -> Kernels:
    """The kernels that torch itself has."""
    return Kernels("torch", swiglu=_swiglu, rotate=_rotate, norm=_norm)


def liger_kernels() -> Kernels:
    """The Triton kernels of liger-kernel.

    Its cross entropy is the one for a divided vocabulary: its losses are fp32, and its backward multiplies each row by
    the gradient of its own loss before it is rounded. Neither holds for its plain cross entropy, which keeps losses in
    the type of the logits. The one that is fused with the output layer is exact too, but with a weight for each target
    it computes the logits a second time in backward, and asks the device for the number of targets, which lets the host
    wait: its saving is a few bytes for each logit, and those are there once, not for each layer.

    Source: Hsu et al., Liger Kernel, arXiv:2410.10989.
    """
    from liger_kernel.ops import (
        LigerFusedGateUpSiLUMulFunction,
        LigerRMSNormFunction,
        LigerRopeFunction,
        LigerVocabParallelCEFunction,
    )

    plain = torch_kernels()  # for tensors without elements, which no Triton kernel is started for

    def swiglu(both: Tensor) -> Tensor:
        """Its backward gives a matrix, whatever the shape that forward was given: hence one goes in."""
        if not both.numel():
            return plain.swiglu(both)
        out: Tensor = LigerFusedGateUpSiLUMulFunction.apply(both.flatten(0, -2)).unflatten(0, both.shape[:-1])
        return out

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """It turns contiguous tensors in place, and a copy of others: queries and keys are parts of one tensor."""
        width = query.shape[-1]
        query, key = (part.transpose(0, 1)[None] for part in (query, key))  # [1, heads, tokens, head width]
        cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)  # [1, tokens, head width / 2]
        query, key = LigerRopeFunction.apply(query, key, cos, sin, None, 1, width)
        return query[0].transpose(0, 1), key[0].transpose(0, 1)

    def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Computed in fp32 and rounded once, as torch does it; the gradient takes the place of the one that comes."""
        out: Tensor = LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "gemma", True)
        return out

    def cross_entropy(logits: Tensor, targets: Tensor, group: Any) -> Tensor:
        if not logits.numel():
            return logits.float().sum(-1)
        options = (-100, 0.0, "megatron", "partition")  # what is ignored; no label smoothing
        losses: Tensor = LigerVocabParallelCEFunction.apply(logits, targets, group, *options)
        return losses

    return Kernels("liger", swiglu=swiglu, rotate=rotate, norm=norm, cross_entropy=cross_entropy)


def _swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    if x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), weight, epsilon)
    out: Tensor = _NormOnCpu.apply(x, weight, epsilon)
    return out


class _Rotate(torch.autograd.Function):
    """Rotates the two halves of each head against each other; backward turns the gradients by the opposite angle.

    It saves cosine and sine only, while autograd's own would keep both products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate [tokens, heads, head width] by the angles of `rotation`."""
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Rotate the gradients back."""
        cos, sin = ctx.saved_tensors
        return rotated(gradients[0], cos, -sin), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of a head's first and second half: [tokens, heads, head width] to a new tensor like it."""
    out = torch.empty_like(x)
    (first, second), (left, right) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out


def norm_in_fp32(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Norm over the last dimension of [..., hidden], in fp32.

    Returns:
        The weighted norm in the type of `x`, and what each row was scaled by, fp32 [..., 1].
    """
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight.float()).to(x.dtype), scale


class _NormOnCpu(torch.autograd.Function):
    """The norm computed in fp32; on CPUs it takes half the time and memory of torch's own, which is several kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Norm over the last dimension of [..., hidden], computed in fp32 and returned in the type of `x`."""
        out, scale = norm_in_fp32(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
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
