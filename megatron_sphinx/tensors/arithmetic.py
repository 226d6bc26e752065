"""Weighted sums of the elements of tensors, in blocks that stay in a core's cache, with numpy alone.

Elements of 16 bits are widened to fp32 and narrowed again as integers, which vector instructions do many at a time:
numpy's own conversions of them, and those of ml_dtypes, go one by one. The results have the bits that torch has on a
CPU with AVX2: it rounds to nearest, ties to even, makes 0xffff of whatever is no number in bf16, and in fp16 keeps the
sign and the upper bits of it.
"""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BLOCK = 2**16  # elements of a block: four fp32 buffers of them fit a cache of the second level of 1 MiB
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_HALF = np.dtype(np.float16)
_HALF_SCALE = np.float32(2.0**112)  # between the exponents of fp16 and of fp32
_HALF_INFINITY = 0x7C00 << 13  # where the bits of fp16 are shifted to those of fp32, with the exponent of fp16
_EXPONENT = 0x7F800000


def wide_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that elements are summed in: fp64 for fp64, fp32 for all others."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


class Blender:
    """Sums blocks of elements, each input times its share; every thread needs one of its own.

    Args:
        dtype: type of the elements of the inputs and of the sum.
        size: most elements of a block.
    """

    def __init__(self, dtype: np.dtype[Any], size: int = BLOCK) -> None:
        self._wide_type = wide_type(dtype)
        memory = np.empty((3, size), self._wide_type)
        self._sum, self._term = memory[:2]
        self._scratch = memory[1:].view(np.uint32)  # the last term is in the sum when that is rounded

    def blend(self, inputs: Sequence[NDArray[Any]], shares: Sequence[float], out: NDArray[Any]) -> None:
        """Sum a block: computed in fp32, or in fp64 if that is the type, rounded once.

        Args:
            inputs: a block of each input, all of shape (elements,).
            shares: the share of each.
            out: what is filled, of the same shape.
        """
        total, term = (buffer[: len(out)] for buffer in (self._sum, self._term))
        with np.errstate(all="ignore"):
            for number, (values, share) in enumerate(zip(inputs, shares, strict=True)):
                target = term if number else total
                np.multiply(self._widened(values, target), self._wide_type.type(share), out=target)
                if number:
                    np.add(term, total, out=total)
            narrow(total, out, self._scratch[:, : len(out)])

    def _widened(self, values: NDArray[Any], out: NDArray[Any]) -> NDArray[Any]:
        if values.dtype == self._wide_type:
            return values
        widen(values, out)
        return out


def widen(values: NDArray[Any], out: NDArray[Any]) -> None:
    """Convert elements to fp32 or fp64.

    Args:
        values: shape (elements,), of any type.
        out: what is filled: shape (elements,), of fp32; of fp64 if `values` are.
    """
    bits = out.view(np.uint32)
    if values.dtype == BFLOAT16:
        np.copyto(bits, values.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
    elif values.dtype == _HALF:
        _widen_half(values, out)
    else:
        np.copyto(out, values, casting="unsafe")


def _widen_half(values: NDArray[Any], out: NDArray[Any]) -> None:
    bits = out.view(np.uint32)
    np.copyto(bits.view(np.int32), values.view(np.int16))  # the sign fills the upper half
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, 0x8FFFFFFF, out=bits)
    np.multiply(out, _HALF_SCALE, out=out)
    if values.view(np.int16).max(initial=0) >= 0x7C00 or values.view(np.uint16).max(initial=0) >= 0xFC00:
        places = np.flatnonzero(values.view(np.uint16) & 0x7C00 == 0x7C00)  # infinite, or no numbers
        found = values.view(np.uint16)[places].astype(np.uint32)
        fraction = found & 0x3FF
        bits[places] = (found & 0x8000) << 16 | _EXPONENT | fraction << 13 | np.where(fraction, 0x400000, 0)


def narrow(values: NDArray[Any], out: NDArray[Any], scratch: NDArray[Any]) -> None:
    """Round elements of fp32 or fp64, once.

    Args:
        values: shape (elements,), of fp32; of fp64 if `out` is.
        out: what is filled: shape (elements,), of any type.
        scratch: other memory to compute in, of shape (2, elements) and uint32.
    """
    if out.dtype == BFLOAT16:
        _narrow_bfloat16(values, out.view(np.uint16), scratch[0])
    elif out.dtype == _HALF:
        _narrow_half(values, out.view(np.uint16), *scratch)
    else:
        np.copyto(out, values, casting="unsafe")


def _narrow_bfloat16(values: NDArray[Any], out: NDArray[Any], scratch: NDArray[Any]) -> None:
    bits = values.view(np.uint32)
    np.right_shift(bits, 16, out=scratch)
    np.bitwise_and(scratch, 1, out=scratch)  # of two that are equally near, the even one
    np.add(scratch, 0x7FFF, out=scratch)
    np.add(scratch, bits, out=scratch)
    np.right_shift(scratch, 16, out=scratch)
    np.copyto(out, scratch, casting="unsafe")
    if _has_no_number(values):
        out[np.isnan(values)] = 0xFFFF


def _narrow_half(values: NDArray[Any], out: NDArray[Any], bits: NDArray[Any], scratch: NDArray[Any]) -> None:
    """Round as fp32 rounds a sum with a number so large that only the bits of fp16 are left."""
    given = values.view(np.uint32)
    np.bitwise_and(given, _EXPONENT, out=scratch)
    np.maximum(scratch, 113 << 23, out=scratch)  # the least exponent of fp16; below it are fixed digits
    np.minimum(scratch, 143 << 23, out=scratch)  # beyond its largest one
    np.add(scratch, 13 << 23, out=scratch)
    np.bitwise_and(given, 0x7FFFFFFF, out=bits)
    rounded, large = bits.view(np.float32), scratch.view(np.float32)
    np.add(rounded, large, out=rounded)
    np.subtract(rounded, large, out=rounded)
    np.multiply(rounded, np.float32(1) / _HALF_SCALE, out=rounded)
    np.minimum(bits, _HALF_INFINITY, out=bits)
    np.right_shift(bits, 13, out=bits)
    np.right_shift(given, 16, out=scratch)
    np.bitwise_and(scratch, 0x8000, out=scratch)
    np.bitwise_or(bits, scratch, out=bits)
    np.copyto(out, bits, casting="unsafe")
    if _has_no_number(values):
        places = np.isnan(values)
        found = given[places]
        out[places] = (found >> 16 & 0x8000) | 0x7E00 | (found >> 13 & 0x3FF)


def _has_no_number(values: NDArray[Any]) -> bool:
    return bool(np.isnan(values.max(initial=0)))
