"""Files as data comes in, on a disk or behind any URL that fsspec knows; and files that appear when they are whole."""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from fsspec.core import url_to_fs
from numpy.typing import NDArray

from megatron_sphinx.errors import DataError

_OPEN_FILES = 256


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to, which becomes `path` at the end, or goes away on an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove from a folder the files that a process has left unfinished when it was killed."""
    for path in folder.glob(".*.partial*"):
        path.unlink(missing_ok=True)


def is_url(path: str) -> bool:
    """Say whether a path is a URL, such as s3://bucket/shard.tar."""
    return "://" in path


def _remote(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and what it calls the file."""
    return _remote_of(url, os.getpid())


@lru_cache(maxsize=4096)
def _remote_of(url: str, _process: int) -> tuple[Any, str]:  # a connection does not survive a fork
    try:
        return url_to_fs(url)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}") from error


def state_of(path: str) -> tuple[int, str]:
    """Return the size of a file in bytes, and a version that differs when the file has been written again.

    Raises:
        OSError: there is no such file.
        DataError: fsspec cannot read such a URL here.
    """
    if not is_url(path):
        state = os.stat(path)
        return state.st_size, str(state.st_mtime_ns)
    system, name = _remote(path)
    info = system.info(name)  # its keys are those of each file system
    version = next((str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in info), "")
    return int(info["size"]), version


def open_file(path: str) -> BinaryIO:
    """Open a file to be read from its beginning; it can seek.

    Raises:
        OSError: there is no such file.
        DataError: fsspec cannot read such a URL here.
    """
    if not is_url(path):
        return open(path, "rb")
    system, name = _remote(path)
    return system.open(name, "rb")  # type: ignore[no-any-return]


class Records:
    """A file of records, of which only those that are asked for are read. Threads may share it.

    They are read by pread, not through a memory map: what reads a map beyond the end of a file that has been cut is
    killed by SIGBUS without a word, and no check comes early enough.

    Args:
        path: of the file.
        record: type of a record.
        begin: bytes before the first record.
        size: how many records there are; None for all that fit.

    Attributes:
        size: how many records there are.
        record: type of a record.

    Raises:
        OSError: there is no such file.
        ValueError: it holds no record.
    """

    def __init__(self, path: Path, record: np.dtype[Any], *, begin: int = 0, size: int | None = None) -> None:
        self._path, self._begin, self._file = path, begin, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._bytes = os.fstat(self._file).st_size
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # else what is read brings its neighbours along
        self.size, self.record = (self._bytes - begin) // record.itemsize if size is None else size, record
        if self.size < 1:
            raise ValueError(f"{path} is empty")

    def read(self, first: int, last: int) -> NDArray[Any]:
        """Return records `first` to `last`, the last not among them, as an array that is the caller's own.

        Raises:
            DataError: the file has been cut since it was opened.
        """
        itemsize = self.record.itemsize
        content = bytearray((last - first) * itemsize)
        view, done = memoryview(content), 0
        while done < len(content):  # one call returns 2 GiB at most
            read = os.preadv(self._file, [view[done:]], self._begin + first * itemsize + done)
            if not read:
                raise DataError(
                    f"{self._path}: has {os.fstat(self._file).st_size} bytes, and had {self._bytes} when it was "
                    f"opened: it was cut while it is in use; copy it again, then go on with checkpoint.resume=auto"
                )
            done += read
        return np.frombuffer(content, self.record)

    def __getitem__(self, number: int) -> Any:
        return self.read(number, number + 1)[0]

    def __len__(self) -> int:
        return self.size


class RangeReader:
    """Reads ranges of bytes of many files, of which it keeps some open. Threads may share it."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._lock = Lock()

    def read(self, path: str, start: int, size: int) -> bytes:
        """Return bytes `start` to `start + size` of a file; fewer where it ends before.

        Raises:
            OSError: the file cannot be read.
        """
        if is_url(path):
            system, name = _remote(path)
            try:
                content: bytes = system.cat_file(name, start=start, end=start + size)
            except OSError:
                raise
            except Exception as error:  # each file system has errors of its own
                raise OSError(f"{type(error).__name__}: {error}") from error
            return content
        with self._lock:  # a file that is closed meanwhile must not be read
            file = self._files.pop(path, None)
            if file is None:
                if len(self._files) >= _OPEN_FILES:
                    os.close(self._files.pop(next(iter(self._files))))
                file = os.open(path, os.O_RDONLY)
            self._files[path] = file
            own = os.dup(file)
        try:
            return os.pread(own, size, start)
        finally:
            os.close(own)
