"""How a tensor lies in memory or in a file: where its first element is, and the strides of its dimensions.

Cutting a layout cuts no data; two layouts of one shape, side by side, say which runs of elements are copied whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from megatron_sphinx.tensors.dtypes import Array


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a tensor whose last dimension is the fastest."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True)
class Layout:
    """The places of the elements of a tensor.

    Attributes:
        start: place of the first one.
        shape: sizes of the dimensions.
        strides: what a step along each dimension adds to a place.
    """

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def contiguous(cls, shape: Sequence[int]) -> "Layout":
        """Lay out a tensor row by row from place 0 on."""
        return cls(0, tuple(shape), contiguous_strides(shape))

    @classmethod
    def of_array(cls, values: Array) -> "Layout":
        """Return how a tensor lies in memory, its first element at place 0."""
        return cls(0, values.shape, tuple(stride // values.itemsize for stride in values.strides))

    @property
    def extent(self) -> int:
        """How many places there are from the first to the last element, both counted."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))

    def divided(self, sizes: Sequence[Sequence[int]]) -> "Layout":
        """Divide each dimension into several.

        Args:
            sizes: those of each dimension, the slowest first.
        """
        strides = [
            step * inner for step, parts in zip(self.strides, sizes, strict=True) for inner in contiguous_strides(parts)
        ]
        return Layout(self.start, tuple(size for parts in sizes for size in parts), tuple(strides))

    def narrowed(self, axis: int, first: int, size: int) -> "Layout":
        """Cut a range out of a dimension."""
        shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
        return Layout(self.start + first * self.strides[axis], shape, self.strides)

    def ordered(self, axes: Sequence[int | None]) -> "Layout":
        """Put dimensions into another order; those that are not named are of size 1, None stands for a new one."""
        shape = tuple(1 if axis is None else self.shape[axis] for axis in axes)
        return Layout(self.start, shape, tuple(0 if axis is None else self.strides[axis] for axis in axes))

    def view(self, values: Array) -> Array:
        """Return a tensor that lies like this in memory.

        Args:
            values: the memory, whose first element is at place 0, of any shape that has no gaps or that of `of_array`.
        """
        strides = tuple(step * values.itemsize for step in self.strides)
        extent = Layout.of_array(values).extent
        flat = np.lib.stride_tricks.as_strided(values, (extent,), (values.itemsize,))
        return np.lib.stride_tricks.as_strided(flat[self.start : self.start + self.extent], self.shape, strides)


def runs(one: Layout, other: Layout) -> tuple[int, int]:
    """Say of two layouts of one shape how many runs of elements lie in a row in both, and how long each is."""
    sizes, _, _ = _merged(one, other)
    return prod(sizes[:-1]), sizes[-1]


def places(one: Layout, other: Layout) -> Iterator[tuple[int, int]]:
    """List where the runs of two layouts of one shape begin in each, in the order of the other one's dimensions."""
    sizes, steps, other_steps = _merged(one, other)
    for indices in product(*map(range, sizes[:-1])):
        first = sum(index * step for index, step in zip(indices, steps, strict=False))
        second = sum(index * step for index, step in zip(indices, other_steps, strict=False))
        yield one.start + first, other.start + second


def _merged(one: Layout, other: Layout) -> tuple[list[int], list[int], list[int]]:
    """The sizes and both strides of the fewest dimensions, slowest in `other` first; both have the last in a row."""
    dimensions = sorted(
        ((other_step, step, size) for size, step, other_step in zip(one.shape, one.strides, other.strides, strict=True)
         if size != 1),
        reverse=True,
    )  # fmt: skip
    merged: list[tuple[int, int, int]] = [(1, 1, 1)]
    for other_step, step, size in reversed(dimensions):
        fast_other, fast, count = merged[-1]
        if (other_step, step) == (fast_other * count, fast * count):
            merged[-1] = (fast_other, fast, count * size)
        else:
            merged.append((other_step, step, size))
    merged.reverse()
    return [size for _, _, size in merged], [step for _, step, _ in merged], [step for step, _, _ in merged]
