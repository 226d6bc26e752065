"""Blocks of elements widened, summed and rounded: the bits are those of torch."""

import random

import numpy as np
import pytest
import torch
from torch_arrays import as_tensor

from megatron_sphinx.tensors.arithmetic import Blender, widen_half
from megatron_sphinx.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32, SAFETENSORS_DTYPES, Array, converted

NARROW = [BFLOAT16, FLOAT16]
COUNT = 2**20


def is_same(found: Array, wanted: torch.Tensor) -> bool:
    """Whether the bits are the same; of what is no number in fp16 torch keeps some here and others there."""
    if found.dtype == FLOAT16:
        found, wanted = found.copy(), wanted.clone()
        none, none_wanted = np.isnan(found), wanted.isnan()
        if not np.array_equal(none, none_wanted.numpy()):
            return False
        found[none], wanted[none_wanted] = 0, 0
    return torch.equal(torch.from_numpy(found.view(np.uint8)), wanted.view(torch.uint8))


def torch_type(dtype: np.dtype) -> torch.dtype:
    return as_tensor(np.empty(0, dtype)).dtype


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_element_of_16_bits_is_widened_and_comes_back(dtype):
    values = np.arange(2**16, dtype=np.uint16).view(dtype)
    out = np.empty(2**16, np.float32)
    if dtype == FLOAT16:
        with np.errstate(all="ignore"):
            widen_half(values, out)
        assert is_same(out, as_tensor(values).float())
    out = converted(values, FLOAT32)
    is_number = ~np.isnan(out)
    assert torch.equal(torch.from_numpy(out[is_number]), as_tensor(values[is_number]).float())
    assert np.array_equal(converted(out, dtype).view(np.uint16)[is_number], values.view(np.uint16)[is_number])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_border_between_two_elements_is_rounded_as_torch_rounds(dtype):
    """What lies midway between two neighbours, and next to it on both sides, of both signs and beyond the largest."""
    shift = 16 if dtype == BFLOAT16 else 13
    ends = converted(np.arange(2**15, dtype=np.uint16).view(dtype), np.dtype(np.float64))
    ends = ends[np.isfinite(ends)]
    borders = np.concatenate([(ends[:-1] + ends[1:]) / 2, ends[-1:]]).astype(np.float32).view(np.int32)
    half = 1 << shift - 1
    near = np.concatenate([borders + step for step in (-1, 0, 1, half - 1, half, half + 1)])
    near = np.concatenate([near, near | np.int32(-(2**31))]).astype(np.int32).view(np.float32)
    assert is_same(converted(near, dtype), as_tensor(near).to(torch_type(dtype)))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_any_bits_are_rounded_as_torch_rounds(dtype):
    """A quarter of them near fp16's range, the others anywhere: no numbers, infinite ones and subnormal ones too."""
    generator = np.random.default_rng(random.randrange(2**32))
    values = generator.integers(0, 2**32, COUNT, np.uint32).view(np.float32)
    near = np.exp2(generator.uniform(-30, 18, COUNT // 4)) * generator.choice([-1, 1], COUNT // 4)
    values[: len(near)] = near
    assert is_same(converted(values, dtype), as_tensor(values).to(torch_type(dtype)))


def plain(inputs: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    """The sum as torch computes it."""
    wide = torch.promote_types(inputs[0].dtype, torch.float32)
    total = torch.empty(inputs[0].shape, dtype=wide).copy_(inputs[0]).mul_(shares[0])
    for values, share in zip(inputs[1:], shares[1:], strict=True):
        total.add_(torch.empty(inputs[0].shape, dtype=wide).copy_(values).mul_(share))
    return torch.empty_like(inputs[0]).copy_(total)


@pytest.mark.parametrize("kind", ["weights", "any bits"])
@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
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
    assert is_same(found, plain([as_tensor(values) for values in inputs], shares)), f"seed {seed}"


def drawn(generator: np.random.Generator, dtype: np.dtype, count: int, kind: str) -> Array:
    if dtype.kind in "iub":
        return generator.integers(0, 2 if dtype.kind == "b" else 200, count).astype(dtype)
    if kind == "weights":
        return (generator.standard_normal(count) * 0.02).astype(dtype)
    return np.frombuffer(bytearray(generator.bytes(count * dtype.itemsize)), dtype)


def test_nothing_of_no_elements():
    for dtype in SAFETENSORS_DTYPES.values():
        Blender(dtype).blend([np.empty(0, dtype)] * 2, [0.5, 0.5], np.empty(0, dtype))
