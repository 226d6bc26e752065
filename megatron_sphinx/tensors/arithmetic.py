"""Weighted sums of the elements of tensors, in blocks that stay in a core's cache, with numpy alone.

The results have the bits that torch has on a CPU with vector instructions; but what is no number may have other bits in
fp16, where those of torch depend on its place in the block.
"""

from collections.abc import Sequence

import numpy as np

from megatron_sphinx.tensors.dtypes import FLOAT16, FLOAT32, Array, convert

BLOCK = 2**16  # elements of a block: the buffers of two inputs and a sum fit a cache of the second level of 1 MiB
_HALF_SCALE = np.float32(2.0**112)  # between the exponents of fp16 and of fp32
_EXPONENT, _QUIET = 0x7F800000, 0x00400000  # of what is infinite or no number in fp32; of what is none and says so


class Blender:
    """Sums blocks of elements, each input times its share; every thread needs one of its own.

    Args:
        dtype: type of the elements of the inputs and of the sum.
        size: most elements of a block.
    """

    def __init__(self, dtype: np.dtype, size: int = BLOCK) -> None:
        self._wide = np.dtype(np.float64) if dtype == np.float64 else FLOAT32
        self._sum, self._term = np.empty((2, size), self._wide)

    def blend(self, inputs: Sequence[Array], shares: Sequence[float], out: Array) -> None:
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
                np.multiply(self._widened(values, target), self._wide.type(share), out=target)
                if number:
                    np.add(term, total, out=total)
        convert(total, out)

    def _widened(self, values: Array, out: Array) -> Array:
        if values.dtype == self._wide:
            return values
        if values.dtype == FLOAT16:
            widen_half(values, out)
        else:
            convert(values, out)
        return out


def widen_half(values: Array, out: Array) -> None:
    """Convert fp16 to fp32 as whole numbers, many at a time: numpy's own way is four times as long.

    Args:
        values: shape (elements,), of fp16.
        out: what is filled, of the same shape and fp32.
    """
    bits = out.view(np.uint32)
    np.copyto(bits.view(np.int32), values.view(np.int16))  # the sign fills the upper half
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, 0x8FFFFFFF, out=bits)
    np.multiply(out, _HALF_SCALE, out=out)
    if values.view(np.int16).max(initial=0) >= 0x7C00 or values.view(np.uint16).max(initial=0) >= 0xFC00:
        places = np.flatnonzero(values.view(np.uint16) & 0x7C00 == 0x7C00)  # infinite, or no numbers
        found = values.view(np.uint16)[places].astype(np.uint32)
        fraction = found & 0x3FF
        bits[places] = (found & 0x8000) << 16 | _EXPONENT | fraction << 13 | np.where(fraction, _QUIET, 0)
