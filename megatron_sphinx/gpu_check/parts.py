"""Measures parts of a step alone: the MoE experts beside a loop, and each visual expert."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sphinx.device import Platform, current_platform
from megatron_sphinx.gpu_check.findings import Finding, Note
from megatron_sphinx.gpu_check.peaks import peak_of
from megatron_sphinx.gpu_check.scales import Scale, is_judged
from megatron_sphinx.gpu_check.steps import timed
from megatron_sphinx.model.architecture import LEAST_BATCH_VIEWS, MOST_BATCH_VIEWS, VisionConfig
from megatron_sphinx.model.drawing import in_threads
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.experts import GroupedExperts
from megatron_sphinx.model.kernels import choose
from megatron_sphinx.model.visual_experts import import_libraries
from megatron_sphinx.sizing.sizes import expert_cost
from megatron_sphinx.values import build

EXPERTS = 8
ENCODER_SHARE = 0.40  # of the peak, that the encoders reach together
_WARMUP, _REPEATS = 3, 5


def seconds_of(work: Callable[[], object], platform: Platform) -> float:
    """Time some work on the device; the median of a few repetitions, in seconds."""
    return median(timed(lambda _: work(), _WARMUP + _REPEATS, platform)[_WARMUP:])


def moe(scale: Scale, note: Note) -> None:
    """Measure our MoE experts beside a loop over them, forward and backward, on tokens that routers spread unevenly."""
    platform, peak = current_platform(), peak_of(current_platform())
    hidden, ffn = scale.moe_hidden, scale.moe_ffn
    shape: Any = SimpleNamespace(
        params_dtype=torch.bfloat16, moe_ffn_hidden_size=ffn, expert_tensor_parallel_size=1, hidden_size=hidden
    )
    layer = GroupedExperts(EXPERTS, shape, kernels=choose("auto", platform))
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    for tokens in scale.moe_tokens:
        counts = [tokens * (number + 5) // 68 for number in range(EXPERTS - 1)]  # 5 to 11 parts of 68, and the rest
        counts.append(tokens - sum(counts))
        rows = torch.randn(tokens, hidden, device=platform.device, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.rand(tokens, device=platform.device, requires_grad=True)
        sides: dict[str, Callable[[], Tensor]] = {
            "grouped": partial(_grouped, layer, rows, counts, weights),
            "loop": partial(_loop, layer, rows, counts, weights),
        }
        for name, forward in sides.items():
            taken = seconds_of(partial(_both_ways, forward, layer), platform)
            flops = 18 * hidden * ffn * tokens / taken
            values = {"milliseconds": taken * 1e3, "tflops": flops / 1e12, "peak_share": flops / peak.flops}
            note(Finding(section="fast", name=f"MoE experts {name}, {tokens} tokens", values=values))


def _both_ways(forward: Callable[[], Tensor], layer: GroupedExperts) -> None:
    """Compute forward and backward once."""
    layer.zero_grad(set_to_none=True)
    out = forward()
    out.backward(torch.ones_like(out))


def _grouped(layer: GroupedExperts, rows: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    """Compute the experts as training does."""
    out: Tensor = layer(rows, torch.tensor(counts), weights)[0]
    return out


def _loop(layer: GroupedExperts, rows: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    """Compute the experts one after the other, as a loop in plain torch does."""
    out = []
    parts = zip(rows.split(counts), weights.split(counts), layer.weight1, layer.weight2, strict=True)
    for part, weight, first, second in parts:
        gate, up = (part @ first.t()).chunk(2, -1)
        out.append((F.silu(gate) * up) @ second.t() * weight[:, None].to(part.dtype))
    return torch.cat(out)


def encoders(scale: Scale, note: Note) -> None:
    """Measure each visual expert by the views that it encodes at once, and the mixture at the default."""
    platform, peak = current_platform(), peak_of(current_platform())
    dtype = torch.bfloat16 if platform.is_bf16_fast else torch.float32
    default = MOST_BATCH_VIEWS if platform.is_cuda else LEAST_BATCH_VIEWS  # what auto takes where memory has room
    total_seconds = total_flops = 0.0
    visions = [
        build(VisionConfig, {"grid": scale.grid, "experts": [{"name": name, "weights": "random"}]})
        for name in scale.experts
    ]
    import_libraries([item.expert for vision in visions for item in vision.experts])
    draw = partial(FrozenEncoders, device=platform.device, dtype=dtype, seed=1)
    for name, vision, alone in zip(scale.experts, visions, in_threads(draw, visions), strict=True):
        flops = expert_cost(name).flops
        for size in (None, *scale.views):
            alone.config = replace(vision, batch_views=default if size is None else size)
            count = max(scale.views)
            views = {
                side: torch.zeros(count, 3, side, side, dtype=torch.uint8, device=platform.device)
                for side in vision.sides
            }
            seconds = seconds_of(partial(alone, views), platform) / count
            if size is None:
                total_seconds, total_flops = total_seconds + seconds, total_flops + flops
            values = {"milliseconds_a_view": seconds * 1e3, "peak_share": flops / seconds / peak.flops}
            batch = "the default" if size is None else f"{size}"
            note(Finding(section="fast", name=f"encoder {name}, {batch} at once", values=values))
    values = {"milliseconds_a_view": total_seconds * 1e3, "peak_share": total_flops / total_seconds / peak.flops}
    if is_judged(scale, platform.device.type):
        is_fast = values["peak_share"] >= ENCODER_SHARE
        bounded = values | {"bound": ENCODER_SHARE}
        note(Finding(section="fast", name="encoders together", values=bounded, is_right=is_fast))
    else:
        note(Finding(section="fast", name="encoders together", values=values))
