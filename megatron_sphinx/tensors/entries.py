"""Where tensors lie in files, and how they are looked at: a file is mapped into memory, a tensor is a view of it.

Nothing is loaded to be looked at, and the pages of a tensor are given back once it has been used.
"""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from threading import Lock, local

import numpy as np

from megatron_sphinx.remote import RemoteFile, is_remote
from megatron_sphinx.tensors.dtypes import FLOAT32, Array, convert, converted
from megatron_sphinx.tensors.layout import Layout, contiguous_strides


@dataclass(frozen=True)
class Chunk:
    """The place of a box of a tensor in a file.

    Attributes:
        path: the file.
        start: offset of the box's first element in the file, in bytes.
        stride: strides of the box's dimensions, in elements.
        offset: corner of the box in the whole tensor.
        shape: sizes of the box.
    """

    path: Path
    start: int
    stride: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor that can be read from files.

    Attributes:
        shape: sizes of the whole tensor.
        dtype: type of its elements.
        chunks: boxes that are together the whole tensor, each element once.
        added: a difference to be added to it, in fp32 and rounded once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[Chunk, ...]
    added: "Entry | None" = None

    @classmethod
    def contiguous(cls, path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype) -> "Entry":
        """Describe a tensor whose elements lie in one run of bytes, row by row."""
        return cls(shape, dtype, (Chunk(path, start, contiguous_strides(shape), (0,) * len(shape), shape),))

    @property
    def is_view(self) -> bool:
        """Whether the tensor can be read without copying."""
        return len(self.chunks) == 1 and self.added is None

    @property
    def is_contiguous(self) -> bool:
        """Whether the tensor is one run of bytes in one file, row by row."""
        return self.is_view and self.chunks[0].stride == contiguous_strides(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def paths(self) -> set[Path]:
        """The files that the tensor and its difference lie in."""
        return {chunk.path for chunk in self.chunks} | (self.added.paths if self.added else set())

    def of_spans(self, dimension: int, spans: Sequence[tuple[int, int]]) -> "Entry":
        """Describe a part of the tensor: spans of one of its dimensions, side by side.

        Args:
            dimension: which one.
            spans: first index of each span, and the one behind its last.
        """
        added = self.added.of_spans(dimension, spans) if self.added is not None else None
        size = sum(stop - start for start, stop in spans)
        chunks = tuple(_chunks_of_spans(self, dimension, spans))
        return replace(self, shape=_with(self.shape, dimension, size), chunks=chunks, added=added)


def _chunks_of_spans(entry: Entry, dimension: int, spans: Sequence[tuple[int, int]]) -> Iterator[Chunk]:
    """Yield the boxes of a tensor that lie in spans of a dimension, where they lie when the spans are side by side."""
    end = 0  # of the spans so far
    for start, stop in spans:
        for chunk in entry.chunks:
            begin = chunk.offset[dimension]
            first, last = max(start, begin), min(stop, begin + chunk.shape[dimension])
            if first < last:
                yield replace(
                    chunk,
                    start=chunk.start + (first - begin) * chunk.stride[dimension] * entry.dtype.itemsize,
                    offset=_with(chunk.offset, dimension, end + first - start),
                    shape=_with(chunk.shape, dimension, last - first),
                )
        end += stop - start


def _with(numbers: tuple[int, ...], place: int, number: int) -> tuple[int, ...]:
    return (*numbers[:place], number, *numbers[place + 1 :])


class MappedFiles:
    """Files mapped into memory, which threads may share; `release` gives back the pages of what was read.

    What lies behind a URL is read into memory, the range that is asked for alone.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._remote: dict[Path, RemoteFile] = {}
        self._lock = Lock()
        self._thread = local()

    def read(self, entry: Entry) -> Array:
        """Return a tensor: a view of its file if it is one chunk, else put together in memory of its own."""
        if entry.added is not None:
            whole = np.array(converted(self.read(replace(entry, added=None)), FLOAT32))
            whole += converted(self.read(entry.added), FLOAT32)
            return converted(whole, entry.dtype)
        if len(entry.chunks) == 1:
            return self._view(entry.chunks[0], entry.dtype)
        whole = np.empty(entry.shape, entry.dtype)
        for chunk in entry.chunks:
            box = tuple(slice(first, first + size) for first, size in zip(chunk.offset, chunk.shape, strict=True))
            convert(self._view(chunk, entry.dtype), whole[box])
        return whole

    def part(self, chunk: Chunk, dtype: np.dtype, inside: Layout) -> Array:
        """Return a part of a chunk.

        Args:
            chunk: where it lies.
            dtype: type of its elements.
            inside: how the part lies in the file, its places counted from the chunk's first element.
        """
        if 0 in inside.shape:
            return np.empty(inside.shape, dtype)
        if is_remote(chunk.path):
            return self._remote_part(chunk, dtype, inside)
        start = chunk.start + inside.start * dtype.itemsize
        strides = tuple(step * dtype.itemsize for step in inside.strides)
        with self._lock:
            if chunk.path not in self._maps:
                with chunk.path.open("rb") as opened:
                    self._maps[chunk.path] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            mapped = self._maps[chunk.path]
        extent = Layout(0, chunk.shape, chunk.stride).extent
        self._touched[chunk.path, chunk.start] = (mapped, extent * dtype.itemsize)
        return np.ndarray(inside.shape, dtype, mapped, start, strides)

    def _remote_part(self, chunk: Chunk, dtype: np.dtype, inside: Layout) -> Array:
        with self._lock:
            file = self._remote.get(chunk.path) or self._remote.setdefault(chunk.path, RemoteFile(chunk.path))
        whole = Layout(0, chunk.shape, chunk.stride)
        strides = tuple(step * dtype.itemsize for step in inside.strides)
        if inside.extent <= 2 * prod(inside.shape):
            content = file.read(chunk.start + inside.start * dtype.itemsize, inside.extent * dtype.itemsize)
            return np.ndarray(inside.shape, dtype, content, 0, strides)
        known, content = self._thread.__dict__.get("kept", (None, b""))
        if known != chunk:  # else the parts of a matrix that is turned would each bring all of it
            self._thread.__dict__.pop("kept", None)
            content = file.read(chunk.start, whole.extent * dtype.itemsize)
            self._thread.__dict__["kept"] = (chunk, content)
        return np.ndarray(inside.shape, dtype, content, inside.start * dtype.itemsize, strides)

    def _view(self, chunk: Chunk, dtype: np.dtype) -> Array:
        return self.part(chunk, dtype, Layout(0, chunk.shape, chunk.stride))

    @property
    def _touched(self) -> dict[tuple[Path, int], tuple[mmap.mmap, int]]:
        """The ranges of files that this thread has read: map and bytes by file and first byte."""
        ranges: dict[tuple[Path, int], tuple[mmap.mmap, int]] = self._thread.__dict__.setdefault("touched", {})
        return ranges

    def release(self, kept: int = 0) -> None:
        """Give back the memory of what this thread has read; it can be read again.

        Args:
            kept: bytes that may stay, so that what is soon read again is not fetched again; one tensor may in any case.
        """
        sizes = [size for _, size in self._touched.values()]
        if kept and (len(sizes) < 2 or sum(sizes) <= kept):
            return
        for (_, start), (mapped, size) in self._touched.items():
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, first, start + size - first)
        self._touched.clear()
