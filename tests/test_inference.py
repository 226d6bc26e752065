"""The decoder for answers: packed products, on shapes that fill no block of oneDNN's."""

import random

import pytest
import torch
from torch import nn

from megatron_sphinx.model import packed_linear
from megatron_sphinx.model.packed_linear import PackedLinear


@pytest.mark.parametrize("is_packable", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_packed_product_is_the_product(monkeypatch, seed, dtype, tolerance, is_packable):
    if not is_packable:
        monkeypatch.setattr(packed_linear, "_is_packable", lambda _: False)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(10):
        outputs, inputs = draw.randint(1, 90), draw.randint(1, 90)
        weight = nn.Parameter(torch.randn(outputs, inputs).to(dtype), requires_grad=False)
        order = torch.randperm(outputs) if draw.random() < 0.5 else torch.arange(outputs)
        wanted = weight.detach().double()[order]
        product = PackedLinear(weight, order)
        assert not weight.numel(), "its memory is given back"
        for rows in (torch.randn(draw.choice([1, 2, 7, 70]), inputs).to(dtype) for _ in range(3)):
            with torch.inference_mode():
                found = product(rows)
            assert found.dtype is dtype
            expected = rows.double() @ wanted.t()
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * inputs**0.5)


def test_a_processor_that_cannot_multiply_so_is_found_out(monkeypatch):
    def fail(*_):
        raise RuntimeError("mkldnn_linear: bf16 is not supported")

    packed_linear._is_packable.cache_clear()
    monkeypatch.setattr(packed_linear, "_multiplied", fail)
    assert not packed_linear._is_packable(torch.bfloat16)
    packed_linear._is_packable.cache_clear()
