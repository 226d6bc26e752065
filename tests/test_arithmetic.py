"""Blocks of elements widened, summed and rounded: the bits are those of torch."""

import random

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_sphinx.tensors.arithmetic import Blender, narrow, wide_type, widen

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TORCH = {BFLOAT16: torch.bfloat16, np.dtype(np.float16): torch.float16, np.dtype(np.float32): torch.float32,
         np.dtype(np.float64): torch.float64, np.dtype(np.int64): torch.int64, np.dtype(np.uint8): torch.uint8,
         np.dtype(bool): torch.bool}  # fmt: skip
NARROW = [BFLOAT16, np.dtype(np.float16)]
COUNT = 2**20


def tensor_of(values: NDArray) -> torch.Tensor:
    """The same memory as a tensor."""
    return torch.from_numpy(values.view(np.uint8)).view(TORCH[values.dtype])


def is_same(found: NDArray, wanted: torch.Tensor) -> bool:
    return torch.equal(torch.from_numpy(found.view(np.uint8)), wanted.view(torch.uint8))


def narrowed(values: NDArray, dtype: np.dtype) -> NDArray:
    out = np.empty(len(values), dtype)
    with np.errstate(all="ignore"):
        narrow(values, out, np.empty((2, len(values)), np.uint32))
    return out


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_element_of_16_bits_is_widened_and_comes_back(dtype):
    values = np.arange(2**16, dtype=np.uint16).view(dtype)
    out = np.empty(2**16, np.float32)
    with np.errstate(all="ignore"):
        widen(values, out)
    assert is_same(out, tensor_of(values).float())
    is_number = ~np.isnan(out)
    assert np.array_equal(narrowed(out, dtype).view(np.uint16)[is_number], values.view(np.uint16)[is_number])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_border_between_two_elements_is_rounded_as_torch_rounds(dtype):
    """What lies midway between two neighbours, and next to it on both sides, of both signs and beyond the largest."""
    shift = 16 if dtype == BFLOAT16 else 13
    values = np.arange(2**15, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        ends = values.view(dtype).astype(np.float64)
    ends = ends[np.isfinite(ends)]
    borders = np.concatenate([(ends[:-1] + ends[1:]) / 2, ends[-1:]]).astype(np.float32).view(np.int32)
    half = 1 << shift - 1
    near = np.concatenate([borders + step for step in (-1, 0, 1, half - 1, half, half + 1)])
    near = np.concatenate([near, near | np.int32(-(2**31))]).astype(np.int32).view(np.float32)
    assert is_same(narrowed(near, dtype), tensor_of(near).to(TORCH[dtype]))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_any_bits_are_rounded_as_torch_rounds(dtype):
    """A quarter of them near fp16's range, the others anywhere: no numbers, infinite ones and subnormal ones too."""
    generator = np.random.default_rng(random.randrange(2**32))
    values = generator.integers(0, 2**32, COUNT, np.uint32).view(np.float32)
    near = np.exp2(generator.uniform(-30, 18, COUNT // 4)) * generator.choice([-1, 1], COUNT // 4)
    values[: len(near)] = near
    assert is_same(narrowed(values, dtype), tensor_of(values).to(TORCH[dtype]))


def plain(inputs: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    """The sum as torch computes it."""
    wide = torch.promote_types(inputs[0].dtype, torch.float32)
    total = torch.empty(inputs[0].shape, dtype=wide).copy_(inputs[0]).mul_(shares[0])
    for values, share in zip(inputs[1:], shares[1:], strict=True):
        total.add_(torch.empty(inputs[0].shape, dtype=wide).copy_(values).mul_(share))
    return torch.empty_like(inputs[0]).copy_(total)


@pytest.mark.parametrize("kind", ["weights", "any bits"])
@pytest.mark.parametrize("dtype", TORCH, ids=str)
def test_a_sum_has_the_bits_of_torch(dtype, kind):
    seed = random.randrange(2**32)
    generator = np.random.default_rng(seed)
    count, number = int(generator.integers(1, 2**17)), int(generator.integers(1, 5))
    inputs = [drawn(generator, dtype, count, kind) for _ in range(number)]
    shares = generator.dirichlet([1] * number).tolist()
    blender, found = Blender(dtype, size=2**14), np.empty(count, dtype)
    for start in range(0, count, 2**14):
        part = slice(start, start + 2**14)
        blender.blend([values[part] for values in inputs], shares, found[part])
    wanted = plain([tensor_of(values) for values in inputs], shares)
    if dtype == np.float16:  # which bits of no number torch keeps depends on the place in the block
        assert np.array_equal(np.isnan(found), wanted.isnan().numpy()), f"seed {seed}"
        found[np.isnan(found)] = wanted[wanted.isnan()] = 0
    assert is_same(found, wanted), f"seed {seed}"


def drawn(generator: np.random.Generator, dtype: np.dtype, count: int, kind: str) -> NDArray:
    if dtype.kind in "iub":
        return generator.integers(0, 2 if dtype.kind == "b" else 200, count).astype(dtype)
    if kind == "weights":
        return (generator.standard_normal(count) * 0.02).astype(dtype)
    return np.frombuffer(bytearray(generator.bytes(count * dtype.itemsize)), dtype)


def test_nothing_of_no_elements():
    for dtype in TORCH:
        Blender(dtype).blend([np.empty(0, dtype)] * 2, [0.5, 0.5], np.empty(0, dtype))
    assert wide_type(np.dtype(np.float64)) == np.float64
    assert wide_type(np.dtype(np.int64)) == wide_type(BFLOAT16) == np.float32
