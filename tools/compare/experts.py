"""Our mixture of experts beside megatron-core's loop over experts and transformers' Mixtral, in turn, in one process.

    tools/compare/experts.py [--experts 8] [--hidden 128] [--ffn 352] [--tokens 256 512 1024] [--dtype bf16]

Each computes one layer, router and experts, forward and backward, from the same weights on the same tokens; that they
give the same output is checked first. The sizes are examples/demo_moe.yaml's. Prints a table (in brackets: our speed
over it) and, as the last line, one JSON object; `ratios` are geometric means over the rows. Needs transformers.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import geometric_mean, median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from megatron_sphinx.device import current_platform
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.model.experts import RowMoE, RowRouter
from megatron_sphinx.model.language import build_language, draw_weights
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout


class ExpertLoop(SequentialMLP):
    """megatron-core's experts, computed one after the other."""

    def __init__(self, count: int, config: Any, *, pg_collection: Any, **_: Any) -> None:
        linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(count, config, linear, pg_collection=pg_collection)


def build(config: LanguageConfig) -> dict[str, nn.Module]:
    """Build the three layers, with the same weights."""
    platform = current_platform()
    if not dist.is_initialized():
        dist.init_process_group(platform.backend, store=HashStore(), rank=0, world_size=1)
    groups = ProcessGroups.create(ParallelLayout(world=1, config=ParallelConfig()), platform.backend)
    language = build_language(config, groups, dtype=torch.float32, sequence_length=64)
    draw_weights(language, config, groups, seed=1)
    ours: RowMoE = language.decoder.layers[0].mlp
    router = partial(RowRouter, balance=0.0, z_loss=0.0)
    loop = MoELayer(ours.config, MoESubmodules(experts=ExpertLoop, router=router), 1, groups.collection)
    theirs = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=config.hidden,
            intermediate_size=config.ffn,
            num_local_experts=config.experts,
            num_experts_per_tok=config.experts_per_token,
        )
    ).to(platform.device)
    with torch.no_grad():
        loop.router.weight.copy_(ours.router.weight)
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(ours.experts.weight1)
        theirs.experts.down_proj.copy_(ours.experts.weight2)
        for number, expert in enumerate(loop.experts.local_experts):
            expert.linear_fc1.weight.copy_(ours.experts.weight1[number])
            expert.linear_fc2.weight.copy_(ours.experts.weight2[number])
    return {"ours": ours, "loop": loop, "transformers": theirs}


def step(layer: nn.Module, tokens: Tensor, gradient: Tensor) -> Tensor:
    """Compute forward and backward of a layer; return its output [tokens, 1, hidden]."""
    layer.zero_grad(set_to_none=True)
    tokens.grad = None
    out: Any = layer(tokens)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(gradient)
    return out


def check(layers: dict[str, nn.Module], tokens: Tensor, gradient: Tensor) -> None:
    """Make sure that all layers give the same output and the same gradient of the tokens."""
    results = {}
    for name, layer in layers.items():
        out = step(layer, tokens, gradient)
        results[name] = (out.detach(), tokens.grad)
    for name, result in results.items():
        torch.testing.assert_close(result, results["ours"], rtol=1e-4, atol=1e-5, msg=f"{name} computes something else")


def seconds(work: Callable[[], object]) -> float:
    """Time some work on the device, in seconds."""
    current_platform().synchronize()
    begin = time.perf_counter()
    work()
    current_platform().synchronize()
    return time.perf_counter() - begin


def compare(layers: dict[str, nn.Module], count: int, repeats: int, dtype: torch.dtype) -> dict[str, float]:
    """Measure the tokens per second of each layer, forward and backward, medians of steps taken in turn."""
    shape = (count, 1, next(layers["ours"].parameters()).shape[-1])
    tokens, gradient = (torch.randn(shape, dtype=dtype, device=current_platform().device) for _ in range(2))
    work = {name: partial(step, layer, tokens.requires_grad_(), gradient) for name, layer in layers.items()}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range(repeats + 2):
        for name in layers:
            elapsed = seconds(work[name])
            if repeat >= 2:  # the first ones warm up
                times[name].append(elapsed)
    return {name: count / median(measured) for name, measured in times.items()}


def main() -> int:
    """Run the comparison, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"experts": 8, "hidden": 128, "ffn": 352, "repeats": 30}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024], help="of a micro-batch")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    config = LanguageConfig(
        layers=1, hidden=args.hidden, ffn=args.ffn, heads=1, groups=1, vocabulary=128, experts=args.experts
    )
    layers, device = build(config), current_platform().device
    tokens, gradient = (torch.randn(256, 1, args.hidden, device=device) for _ in range(2))
    check(layers, tokens.requires_grad_(), gradient)
    layers = {name: layer.to(dtype) for name, layer in layers.items()}
    print(f"{'tokens':>8}" + "".join(f"{name + ' tokens/s':>24}" for name in layers))
    rows = []
    for count in args.tokens:
        speed = compare(layers, count, args.repeats, dtype)
        rows.append({"tokens": count, "tokens_per_second": speed})
        print(f"{count:8}" + "".join(f"{value:17,.0f} ({speed['ours'] / value:.2f})" for value in speed.values()))
    peers = [name for name in layers if name != "ours"]
    speeds = [row["tokens_per_second"] for row in rows]
    ratios = {peer: geometric_mean(speed["ours"] / speed[peer] for speed in speeds) for peer in peers}
    print(json.dumps({"ratios": ratios, "rows": rows, **vars(args)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
