"""The types of the elements of tensors, by the names that files of several kinds have for them."""

from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]  # a tensor in memory, of any type

BFLOAT16, FLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64), "F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16, "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_TILE = 256  # elements of a row that are turned at a time
_FLOATING = (FLOAT16, BFLOAT16, FLOAT32, np.dtype(np.float64))  # those that weights come in


def is_floating(dtype: np.dtype) -> bool:
    """Tell whether a type is one of floating point that holds weights as they are, not quantized."""
    return dtype in _FLOATING


def promoted(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Return the smallest type of floating point that holds all elements of some types: fp32 for bf16 and fp16."""
    first, *others = set(dtypes)
    if not others:
        return first
    return max([FLOAT32, first, *others], key=lambda dtype: dtype.itemsize)


def bits(values: Array) -> Array:
    """Return a view of a tensor as whole numbers, which numpy moves and compares without looking at them."""
    return values.view(np.dtype(f"u{values.dtype.itemsize}")) if values.dtype.itemsize <= 8 else values


def convert(values: Array, out: Array) -> None:
    """Copy a tensor into memory of any strides and another type, rounded once to the nearest, ties to even.

    What is no number becomes 0xffff in bf16, as torch makes it with vector instructions.

    Args:
        values: what is copied.
        out: what is filled, of the same shape.
    """
    axis = _turned_axis(values, out)
    if axis is not None:
        for start in range(0, out.shape[axis], _TILE):
            part = (*(slice(None),) * axis, slice(start, start + _TILE))
            _convert(values[part].copy(order="K"), out[part])  # read in the order in which it lies, then turned
    else:
        _convert(values, out)


def _turned_axis(values: Array, out: Array) -> int | None:
    """The axis whose elements are neighbours in `out`, where others are in `values`, so that a copy would be slow."""
    if out.size < _TILE**2:
        return None
    fastest = [
        min((step, axis) for axis, (step, size) in enumerate(zip(one.strides, one.shape, strict=True)) if size > 1)[1]
        for one in (values, out)
    ]
    return fastest[1] if fastest[0] != fastest[1] else None


def _convert(values: Array, out: Array) -> None:
    if values.dtype == out.dtype:
        np.copyto(bits(out), bits(values))
        return
    with np.errstate(all="ignore"):
        np.copyto(out, values, casting="unsafe")
        if out.dtype == BFLOAT16 and values.size and np.isnan(values.max()):
            bits(out)[np.isnan(values)] = 0xFFFF


def converted(values: Array, dtype: np.dtype) -> Array:
    """Return a tensor in another type, itself where it has that type."""
    if values.dtype == dtype:
        return values
    out = np.empty(values.shape, dtype)
    convert(values, out)
    return out


def bytes_of(values: Array) -> memoryview:
    """Return the memory of a tensor, a copy where it is not contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
