"""Weighted sums of tensors, computed while they stream: the bytes of a tensor pass through buffers in the cache.

Several threads do that, each with a tensor of its own. Behind it the thread goes on with the digests of the files that
the tensor lies in, while they are still in memory.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from megatron_sphinx.checkpoint.bar import progress_bar
from megatron_sphinx.checkpoint.digests import THREADS, Algorithm, FollowingDigests, digest_of
from megatron_sphinx.checkpoint.formats.format import Format
from megatron_sphinx.checkpoint.journal import Journal
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.tensors.arithmetic import BLOCK, Blender
from megatron_sphinx.tensors.entries import Entry, MappedFiles
from megatron_sphinx.tensors.layout import Layout
from megatron_sphinx.tensors.write import TensorFile, bytes_of

ReadBytes = Callable[[memoryview, int], None]  # fills a buffer with the bytes of a tensor from an offset on


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


class _TargetFiles:
    """A file of each target: they are made when their first tensor comes, and closed behind their last."""

    def __init__(self, form: Format, paths: Sequence[Path], tensors: Sequence[MixedTensor]) -> None:
        self._form, self._paths, self._lock, self._left = form, paths, Lock(), len(tensors)
        self._contents = {tensor.name: (tensor.entries[0].shape, tensor.entries[0].dtype) for tensor in tensors}
        self._files: list[TensorFile] = []

    def begin_tensor(self) -> list[TensorFile]:
        """Return the files, one of each target, that the bytes of the next tensor are appended to."""
        with self._lock:
            self._files = self._files or [self._form.create_file(path, self._contents) for path in self._paths]
            return self._files

    def end_tensor(self) -> Sequence[Path]:
        """Note that a tensor is complete, and return the files if they are now."""
        with self._lock:
            self._left -= 1
            if self._left:
                return ()
            for file in self._files:
                file.close()
            return self._paths


class MixWriter:
    """Makes the tensors of all targets.

    Args:
        tensors: what is made.
        partials: a folder for each target.
        shares: the shares of the inputs in each target.
        form: the format of all of them.
        journal: keeps which files are finished, and their digests if the format has a manifest.
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
        self._tensors, self._shares, self._journal, self._digests = tensors, shares, journal, digests
        self._algorithm, self._has_manifest = algorithm, form.has_manifest
        self._used = {index for one in shares for index, share in enumerate(one) if share} | {0}
        by_file: dict[str, list[MixedTensor]] = {}
        for tensor in tensors:
            by_file.setdefault(tensor.file, []).append(tensor)
        self._files = {
            file: _TargetFiles(form, [partial / file for partial in partials], inside)
            for file, inside in by_file.items()
        }
        self._maps, self._assembling = MappedFiles(), Lock()

    def run(self, show: bool) -> None:
        """Make the tensors of all files that are not finished, in several threads."""
        left = [tensor for tensor in self._tensors if tensor.file not in self._journal.done]
        size = len(self._shares) * sum(tensor.entries[0].nbytes for tensor in left)
        pool = ThreadPoolExecutor(THREADS, "mix")
        try:
            with progress_bar("mixing", size, show) as bar:
                for written in as_completed([pool.submit(self._make, tensor) for tensor in left]):
                    bar.update(written.result())
        finally:
            pool.shutdown(cancel_futures=True)

    def _make(self, tensor: MixedTensor) -> int:
        """Make a tensor in all targets; the bytes written."""
        entries = tensor.entries
        files = self._files[tensor.file].begin_tensor()
        used = [index for index in range(len(entries)) if index in self._used]
        with ExitStack() as stack:
            if any(not entries[index].is_contiguous for index in used):
                stack.enter_context(self._assembling)  # whole tensors in memory: one at a time
            readers = {index: stack.enter_context(self._reader(entries[index])) for index in used}
            mixer = _Mixer(entries[0].dtype, used)
            shares = [one if len(entries) > 1 else (1.0,) for one in self._shares]
            for offset in range(0, entries[0].nbytes, mixer.nbytes):
                count = min(mixer.nbytes, entries[0].nbytes - offset)
                for index, read in readers.items():
                    read(mixer.buffer(index, count), offset)
                for file, shares_of_target in zip(files, shares, strict=True):
                    file.append(tensor.name, mixer.mix(shares_of_target, count))
        for entry in entries:
            for chunk in entry.chunks:
                extent = Layout(0, chunk.shape, chunk.stride).extent
                self._digests.advance(chunk.path, chunk.start + extent * entry.dtype.itemsize)
        if finished := self._files[tensor.file].end_tensor():
            self._journal.note(tensor.file, ",".join(map(self._word_on, finished)))
        return len(files) * entries[0].nbytes

    def _word_on(self, path: Path) -> str:
        return digest_of(path, self._algorithm) if self._has_manifest else "-"

    @contextmanager
    def _reader(self, entry: Entry) -> Iterator[ReadBytes]:
        """What reads the bytes of a tensor."""
        if not entry.is_contiguous:
            whole = bytes_of(self._maps.read(entry))
            self._maps.release()

            def copy(out: memoryview, offset: int) -> None:
                out[:] = whole[offset : offset + len(out)]

            yield copy
            return
        chunk = entry.chunks[0]
        file = os.open(chunk.path, os.O_RDONLY)

        def read(out: memoryview, offset: int) -> None:
            if os.preadv(file, [out], chunk.start + offset) != len(out):
                raise CheckpointError(f"{chunk.path}: is cut off while it is read; give a whole checkpoint")

        try:
            yield read
        finally:
            os.close(file)


class _Mixer:
    """Buffers in which blocks of a tensor are mixed.

    Args:
        dtype: type of its elements.
        used: numbers of the inputs that are read.

    Attributes:
        nbytes: bytes of a block.
    """

    def __init__(self, dtype: np.dtype[Any], used: Sequence[int]) -> None:
        self.nbytes = BLOCK * dtype.itemsize
        self._inputs = {index: np.empty(BLOCK, dtype) for index in used}
        self._buffers = {index: bytes_of(value) for index, value in self._inputs.items()}
        self._blender, self._out = Blender(dtype), np.empty(BLOCK, dtype)

    def buffer(self, index: int, count: int) -> memoryview:
        """Return where so many bytes of an input are to be read to."""
        return self._buffers[index][:count]

    def mix(self, shares: Sequence[float], count: int) -> memoryview:
        """Sum so many bytes of what was read, each input times its share; those of a single input are copied."""
        taken = [(index, share) for index, share in enumerate(shares) if share]
        if len(taken) == 1:
            return self.buffer(taken[0][0], count)
        size = count // self._out.itemsize
        self._blender.blend(
            [self._inputs[index][:size] for index, _ in taken], [share for _, share in taken], self._out[:size]
        )
        return bytes_of(self._out[:size])
