"""Weighted sums of tensors, computed while they stream: the bytes of a tensor pass through buffers in the cache.

Several threads do that, each with a tensor of its own. Behind it the thread goes on with the digests of the files that
the tensor lies in, while they are still in memory.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock, local
from typing import Any

import numpy as np

from megatron_sphinx.checkpoint.bar import progress_bar
from megatron_sphinx.checkpoint.digests import THREADS, Algorithm, FollowingDigests
from megatron_sphinx.checkpoint.formats.format import Format
from megatron_sphinx.checkpoint.journal import Journal
from megatron_sphinx.checkpoint.target_file import TargetFiles
from megatron_sphinx.remote import is_remote
from megatron_sphinx.tensors.arithmetic import BLOCK, Blender
from megatron_sphinx.tensors.copying import BUFFER, OpenFiles, read_into
from megatron_sphinx.tensors.dtypes import Array, bytes_of, convert
from megatron_sphinx.tensors.entries import Entry, MappedFiles
from megatron_sphinx.tensors.layout import Layout
from megatron_sphinx.tensors.write import FileContents, TensorFile

_Shares = Sequence[tuple[int, float]]  # numbers of inputs, each with its share, which is not 0


@dataclass(frozen=True)
class MixedTensor:
    """A tensor to be made.

    Attributes:
        file: its file in every target.
        name: its name there.
        entries: the tensor in each input; in the first one alone if it is copied from there.
    """

    file: str
    name: str
    entries: tuple[Entry, ...]


def by_file(tensors: Iterable[MixedTensor]) -> dict[str, FileContents]:
    """Return the shapes and types of tensors by their names, file by file."""
    found: dict[str, dict[str, tuple[tuple[int, ...], np.dtype]]] = {}
    for tensor in tensors:
        found.setdefault(tensor.file, {})[tensor.name] = (tensor.entries[0].shape, tensor.entries[0].dtype)
    return {**found}


class MixWriter:
    """Makes the tensors of all targets.

    Memory: for each thread a few buffers that fit its core's cache, whatever the tensors' sizes; whole tensors, one of
    each input at a time, where they do not lie in a row.

    Args:
        tensors: what is made.
        partials: a folder for each target.
        shares: the shares of the inputs in each target.
        form: the format of all of them.
        journal: keeps which files are finished, with a word on each.
        digests: of the files of the inputs.
        algorithm: of the digests of finished files.
    """

    def __init__(
        self,
        tensors: Sequence[MixedTensor],
        partials: Sequence[Path],
        shares: Sequence[Sequence[float]],
        form: Format,
        journal: Journal,
        digests: FollowingDigests,
        algorithm: Algorithm,
    ) -> None:
        self._tensors, self._journal, self._digests = tensors, journal, digests
        self._shares = [[(index, share) for index, share in enumerate(one) if share] for one in shares]
        self._files = {
            file: TargetFiles(form, [partial / file for partial in partials], contents, algorithm)
            for file, contents in by_file(tensors).items()
        }
        self._is_remote = any(map(is_remote, partials))
        self._maps, self._assembling, self._counting, self._thread = MappedFiles(), Lock(), Lock(), local()

    def run(self, show: bool) -> None:
        """Make the tensors of all files that are not finished, in several threads."""
        left = [tensor for tensor in self._tensors if tensor.file not in self._journal.done]
        size = len(self._shares) * sum(tensor.entries[0].nbytes for tensor in left)
        with progress_bar("mixing", size, show) as bar, OpenFiles() as sources, ThreadPoolExecutor(THREADS) as pool:
            try:
                jobs = [pool.submit(self._make, tensors, sources, bar) for tensors in self._in_turn(left)]
                for job in as_completed(jobs):
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _in_turn(self, tensors: Iterable[MixedTensor]) -> Iterable[Sequence[MixedTensor]]:
        """The tensors by the threads that make them: one each, or a file's where that is written from front to back."""
        if not self._is_remote:
            return [[tensor] for tensor in tensors]
        by_file: dict[str, list[MixedTensor]] = {}
        for tensor in tensors:
            by_file.setdefault(tensor.file, []).append(tensor)
        return by_file.values()

    def _make(self, tensors: Sequence[MixedTensor], sources: OpenFiles, bar: Any) -> None:
        for tensor in tensors:
            written = self._make_one(tensor, sources)
            with self._counting:
                bar.update(written)

    def _make_one(self, tensor: MixedTensor, sources: OpenFiles) -> int:
        """Make a tensor in all targets; the bytes written."""
        entries, target = tensor.entries, self._files[tensor.file]
        files = target.begin_tensor()
        mixed: list[tuple[TensorFile, _Shares]] = []
        for file, shares in zip(files, self._shares, strict=True):
            taken = shares if len(entries) > 1 else [(0, 1.0)]
            if len(taken) == 1 and entries[taken[0][0]].is_contiguous:
                self._copy(file, tensor.name, entries[taken[0][0]], sources)
            else:
                mixed.append((file, taken))
        if mixed:
            self._mix(tensor, mixed, sources)
        for entry in entries:
            for chunk in entry.chunks:
                extent = Layout(0, chunk.shape, chunk.stride).extent
                self._digests.advance(chunk.path, chunk.start + extent * entry.dtype.itemsize)
        if word := target.end_tensor():
            self._journal.note(tensor.file, word)
        return len(files) * entries[0].nbytes

    @staticmethod
    def _copy(file: TensorFile, name: str, entry: Entry, sources: OpenFiles) -> None:
        """Write a tensor of one input: the kernel does, as far as it can."""
        chunk, source = entry.chunks[0], sources.opened(entry.chunks[0].path)
        sources.expect([(chunk.path, chunk.start, entry.nbytes)])
        done = file.append_range(name, source, chunk.start, entry.nbytes)
        buffer = memoryview(bytearray(min(BUFFER, entry.nbytes - done)))
        for start in range(done, entry.nbytes, BUFFER):
            part = buffer[: entry.nbytes - start]
            read_into(source, part, chunk.start + start, chunk.path)
            file.append(name, part)

    def _mix(self, tensor: MixedTensor, mixed: Sequence[tuple[TensorFile, _Shares]], sources: OpenFiles) -> None:
        """Write a tensor of several inputs, block by block."""
        used = {index: tensor.entries[index] for index in sorted({index for _, taken in mixed for index, _ in taken})}
        is_row = all(entry.is_contiguous for entry in used.values())
        with nullcontext() if is_row else self._assembling:  # whole tensors in memory: one at a time
            wholes = {} if is_row else {index: self._maps.read(entry).reshape(-1) for index, entry in used.items()}
            dtype, count = tensor.entries[0].dtype, prod(tensor.entries[0].shape)
            if is_row:
                rows = [(entry.chunks[0], entry.nbytes) for entry in used.values()]
                sources.expect((chunk.path, chunk.start, nbytes) for chunk, nbytes in rows)
            mixer = self._mixer(dtype)
            for start in range(0, count, BLOCK):
                for index, entry in used.items():
                    values = mixer.input(index, min(BLOCK, count - start))
                    if wholes:
                        convert(wholes[index][start : start + BLOCK], values)
                    else:
                        chunk, place = entry.chunks[0], entry.chunks[0].start + start * dtype.itemsize
                        read_into(sources.opened(chunk.path), bytes_of(values), place, chunk.path)
                for file, taken in mixed:
                    file.put(tensor.name, mixer.mix(taken, min(BLOCK, count - start)))
            self._maps.release()

    def _mixer(self, dtype: np.dtype) -> "_Mixer":
        """The buffers of this thread."""
        if getattr(self._thread, "dtype", None) != dtype:
            self._thread.dtype, self._thread.mixer = dtype, _Mixer(dtype)
        mixer: _Mixer = self._thread.mixer
        return mixer


class _Mixer:
    """Buffers in which blocks of a tensor are mixed.

    Args:
        dtype: type of its elements.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self._inputs: dict[int, Array] = {}
        self._blender, self._out = Blender(dtype), np.empty(BLOCK, dtype)

    def input(self, index: int, count: int) -> Array:
        """Return where so many elements of an input are to be read to."""
        if index not in self._inputs:
            self._inputs[index] = np.empty_like(self._out)
        return self._inputs[index][:count]

    def mix(self, shares: _Shares, count: int) -> Array:
        """Sum so many elements of what was read, each input times its share; those of a single input stay."""
        values = [self.input(index, count) for index, _ in shares]
        if len(values) == 1:
            return values[0]
        self._blender.blend(values, [share for _, share in shares], self._out[:count])
        return self._out[:count]
