"""Writes the tensors of a conversion: several at once, whole runs of bytes as they are, all else in small pieces."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from functools import partial
from math import prod
from pathlib import Path
from threading import Event, Lock, local
from typing import Any

import numpy as np

from megatron_sphinx.checkpoint.bar import progress_bar
from megatron_sphinx.checkpoint.digests import THREADS, Algorithm
from megatron_sphinx.checkpoint.formats.format import Format, PlannedFile, SourceCheckpoint, WritePlan
from megatron_sphinx.checkpoint.journal import Journal
from megatron_sphinx.checkpoint.mapping.conversion import Conversion, Run
from megatron_sphinx.checkpoint.mapping.rules import TensorSpec
from megatron_sphinx.checkpoint.target_file import TargetFiles
from megatron_sphinx.remote import is_remote
from megatron_sphinx.tensors.copying import BUFFER, OpenFiles, Source, read_into
from megatron_sphinx.tensors.dtypes import FLOAT16, Array, bytes_of, convert
from megatron_sphinx.tensors.entries import Entry
from megatron_sphinx.tensors.write import FileContents, TensorFile

_BLOCK = 2**18  # elements of a run that are read at a time: few enough to stay in a core's cache
_PIECE = 2**20  # elements that are made at a time: enough for long rows where a matrix is turned
_REMOTE_PIECE = 2**21  # elements, where they come from behind a URL: few enough to keep, enough to wait for
_KEPT = 2**26  # bytes of the source that stay in memory while a tensor is made
_SHOWN = 2**26  # bytes that are copied between two looks at whether the user has stopped it
_Write = Callable[[TensorFile], None]


def _in_turn(jobs: Iterable[Callable[[], None]]) -> None:
    for job in jobs:
        job()


class TensorStreams:
    """Writes the files of tensors of a checkpoint into a folder.

    Memory: two buffers of about 1 MB for each thread, and what `Conversion` says of tensors in several chunks.

    Args:
        partial: the folder.
        checkpoint: what is converted.
        to: the format of what is written.
        plan: the files.
        conversion: makes their tensors.
        dtype: type of their elements; the source's if None.
        algorithm: of the files' digests, if the format has a manifest.

    Attributes:
        contents: the tensors of each file, by its name.
    """

    def __init__(
        self,
        partial: Path,
        checkpoint: SourceCheckpoint,
        to: Format,
        plan: WritePlan,
        conversion: Conversion,
        dtype: np.dtype | None,
        algorithm: Algorithm,
    ) -> None:
        self._partial, self._checkpoint, self._to, self._plan = partial, checkpoint, to, plan
        self._conversion, self._dtype, self._algorithm = conversion, dtype, algorithm
        self.contents: Mapping[str, FileContents] = {file.name: self._contents_of(file) for file in plan.files}
        self._is_stopped, self._lock, self._buffers = Event(), Lock(), local()
        self._is_source_remote = is_remote(checkpoint.folder)
        self._infinite: dict[str, int] = {}

    @property
    def notes(self) -> list[str]:
        """What must be told of what was written, a line each."""
        return [
            f"{name}: {count} values are infinite in fp16, whose largest one is 65,504; --dtype bf16 holds larger ones"
            for name, count in sorted(self._infinite.items())
        ]

    def _contents_of(self, file: PlannedFile) -> FileContents:
        return {
            **{spec.name: (spec.shape, self._dtype or self._conversion.dtype_of(spec)) for spec in file.tensors},
            **{name: (entry.shape, entry.dtype) for name, entry in file.verbatim},
        }

    def write(self, journal: Journal, show: bool) -> None:
        """Write the files of tensors that are not yet there, several tensors at a time, and note each file."""
        sizes = {name: _nbytes(contents) for name, contents in self.contents.items()}
        left = [file for file in self._plan.files if file.name not in journal.done]
        with (
            progress_bar("converting", sum(sizes.values()), show) as bar,
            OpenFiles() as sources,
            ThreadPoolExecutor(THREADS, "convert") as pool,
        ):
            bar.update(sum(sizes[name] for name in journal.done))
            found = [list(self._jobs(file, sources, journal, bar)) for file in left]
            if is_remote(self._partial):  # there a file is written from front to back
                found = [[partial(_in_turn, of_file)] for of_file in found]
            jobs = [pool.submit(job) for of_file in found for job in of_file]
            try:
                for future in as_completed(jobs):
                    future.result()
            finally:  # also where the user has stopped it: a file may be large
                self._is_stopped.set()
                pool.shutdown(cancel_futures=True)

    def _jobs(self, file: PlannedFile, sources: OpenFiles, journal: Journal, bar: Any) -> Iterator[Callable[[], None]]:
        """What is to be done for a file, a job for each tensor."""
        contents, path = self.contents[file.name], self._partial / file.name
        target = TargetFiles(self._to, [path], contents, self._algorithm)

        def job(write: Callable[[TensorFile], Iterator[int]]) -> None:
            for count in write(target.begin_tensor()[0]):
                self._conversion.release(_KEPT)
                if self._is_stopped.is_set():
                    raise CancelledError
                with self._lock:
                    bar.update(count)
            self._conversion.release()
            if word := target.end_tensor():
                journal.note(file.name, word)

        def made(spec: TensorSpec) -> Callable[[], None]:
            return lambda: job(lambda out: self._write_tensor(out, spec, contents[spec.name][1], sources))

        def copied(name: str, entry: Entry) -> Callable[[], None]:
            return lambda: job(lambda out: self._write_verbatim(out, name, entry))

        yield from (made(spec) for spec in file.tensors)
        yield from (copied(name, entry) for name, entry in file.verbatim)

    def _write_verbatim(self, out: TensorFile, name: str, entry: Entry) -> Iterator[int]:
        data = bytes_of(self._checkpoint.source.maps.read(entry))
        for start in range(0, len(data), BUFFER):
            out.append(name, data[start : start + BUFFER])
            yield len(data[start : start + BUFFER])

    def _write_tensor(self, out: TensorFile, spec: TensorSpec, dtype: np.dtype, sources: OpenFiles) -> Iterator[int]:
        """Write a tensor, and say again and again how many more bytes of it are there."""
        found = self._conversion.runs_of(spec)
        if found is None:
            yield from self._write_pieces(out, spec, dtype)
            return
        sources.expect((run.path, run.start, run.count * run.dtype.itemsize) for run in found)
        place = 0
        for run in found:
            yield from self._write_zeros(out, spec.name, (run.place - place) * dtype.itemsize)
            yield from self._write_run(out, spec.name, run, dtype, sources.opened(run.path))
            place = run.place + run.count
        yield from self._write_zeros(out, spec.name, (prod(spec.shape) - place) * dtype.itemsize)

    def _write_run(self, out: TensorFile, name: str, run: Run, dtype: np.dtype, source: Source) -> Iterator[int]:
        """Write elements that lie in a row in a file of the source."""
        size, copied = run.count * run.dtype.itemsize, 0
        is_same = run.dtype == dtype
        while is_same and copied < size:
            count = out.append_range(name, source, run.start + copied, min(_SHOWN, size - copied))
            copied += count
            yield count
            if not count:
                break
        read, made = self._memory(run.dtype, dtype)
        for start in range(copied, size, len(read) * run.dtype.itemsize):
            count = min(len(read), (size - start) // run.dtype.itemsize)
            values = read[:count]
            read_into(source, bytes_of(values), run.start + start, run.path)
            if not is_same:
                convert(values, made[:count])
                values = made[:count]
            self._count_infinite(name, values)
            out.append(name, bytes_of(values))
            yield values.nbytes

    def _memory(self, source: np.dtype, target: np.dtype) -> tuple[Array, Array]:
        """What this thread reads to and converts to."""
        known: dict[tuple[str, np.dtype], Array] = self._buffers.__dict__.setdefault("buffers", {})
        for kind in (("read", source), ("made", target)):
            if kind not in known:
                known[kind] = np.empty(_BLOCK, kind[1])
        return known["read", source], known["made", target]

    def _write_pieces(self, out: TensorFile, spec: TensorSpec, dtype: np.dtype) -> Iterator[int]:
        """Write a tensor whose elements lie in another order than in the source."""
        for piece in spec.split(_REMOTE_PIECE if self._is_source_remote else _PIECE):
            value = self._conversion.make(piece, dtype)
            self._count_infinite(spec.name, value)
            out.put(spec.name, value)
            yield value.nbytes

    def _write_zeros(self, out: TensorFile, name: str, count: int) -> Iterator[int]:
        for start in range(0, count, BUFFER):
            out.append(name, memoryview(bytes(min(BUFFER, count - start))))
            yield min(BUFFER, count - start)

    def _count_infinite(self, name: str, values: Array) -> None:
        if self._dtype == FLOAT16 and (count := int(np.isinf(values).sum())):
            with self._lock:
                self._infinite[name] = self._infinite.get(name, 0) + count


def _nbytes(contents: FileContents) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in contents.values())
