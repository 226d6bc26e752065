"""Compare liger's kernels with torch's inside the decoder, on a CPU: `python liger_on_cpu.py`, by Triton's interpreter.

In a process of its own, since Triton must be told before it is imported. Two things that the interpreter lacks are
given to it here: it does not make fp32 of numbers, as a start on a GPU does, and has no libdevice.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from liger_kernel.ops import rms_norm
from test_model import groups
from torch import Tensor
from triton.runtime import interpreter

from megatron_sphinx.model import experts, language
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.model.attention import PackedRows
from megatron_sphinx.model.experts import Routing
from megatron_sphinx.model.kernels import Kernels, liger_kernels, torch_kernels

CPU = torch.device("cpu")
LENGTHS = [2, 5, 5, 9]
TARGETS = torch.tensor([0, 3, 4, 11, 12, 20])
_convert = interpreter._implicit_cvt


def convert(argument: Any) -> Any:
    """Make a tensor of fp32 of a number."""
    if not isinstance(argument, float):
        return _convert(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)


@triton.jit
def rsqrt(x):
    """What libdevice has."""
    return tl.rsqrt(x)


def compute(kernels: Kernels, config: LanguageConfig, hidden: Tensor, targets: Tensor) -> list[Tensor]:
    """Losses of some targets and, for their sum with a weight each, the gradients of the input and all weights."""
    here = groups()
    language.choose = lambda *_: kernels
    model = language.build_language(config, here, dtype=torch.float32, sequence_length=max(LENGTHS))
    language.draw_weights(model, config, here, seed=4)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    row = torch.zeros(sum(LENGTHS), dtype=torch.int64)
    routing = Routing(row, row, torch.tensor([len(row)]), 0.1) if config.experts else None
    rows = PackedRows.of(LENGTHS, CPU, routing=routing, target_positions=targets, rotation=model.rotation(LENGTHS))
    hidden = hidden.clone().requires_grad_()
    losses = model(
        input_ids=row[None], position_ids=None, attention_mask=None, decoder_input=hidden,
        labels=(targets * 7 % config.vocabulary)[None], packed_seq_params=rows,
    )  # fmt: skip
    weights = [weight for name, weight in model.named_parameters() if not name.startswith("embedding")]
    loss = (losses[0] * torch.arange(1.0, len(targets) + 1)).sum() + 0 * hidden.sum()
    return [losses, *torch.autograd.grad(loss, [hidden, *weights], allow_unused=True)]


def compare(config: LanguageConfig, targets: Tensor) -> None:
    """Compare both decoders: the same losses and gradients to the rounding of fp32."""
    hidden = torch.randn(sum(LENGTHS), 1, config.hidden)
    found, wanted = (compute(kernels, config, hidden, targets) for kernels in (liger_kernels(), torch_kernels()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-5)
    assert found[0].dtype == torch.float32


def count_calls(calls: dict[str, int]) -> Callable[[], Kernels]:
    """Let liger's kernels be counted by their names."""
    plain = liger_kernels()

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return getattr(plain, name)(*args)

        return call

    names = ("swiglu", "rotate", "norm", "cross_entropy")
    return lambda: Kernels("liger", **{name: counted(name) for name in names})


def main() -> None:
    """Compare dense decoders with and without key groups, MoE experts, and a micro-batch without targets."""
    interpreter._implicit_cvt = convert
    rms_norm.rsqrt = rsqrt
    experts._MOST_PADDING = 0.0  # grouped products, as on a GPU
    calls: dict[str, int] = {}
    globals()["liger_kernels"] = count_calls(calls)
    shape = {"layers": 2, "hidden": 48, "ffn": 40, "vocabulary": 100, "init_std": 0.2}
    for heads, key_groups, extra in ((6, 6, {}), (6, 2, {}), (3, 1, {"experts": 4})):
        for targets in (TARGETS, TARGETS[:0]):
            compare(LanguageConfig(heads=heads, groups=key_groups, **shape, **extra), targets)
    sys.stdout.write(", ".join(f"{name} {times}" for name, times in sorted(calls.items())))


main()
