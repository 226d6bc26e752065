"""Files and folders behind URLs that fsspec knows, such as s3://bucket/model: named like paths, read by ranges.

Options and credentials are those of fsspec's own configuration: its files, and environment variables.
"""

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock, local
from typing import Any, BinaryIO, Protocol, cast

from megatron_sphinx.errors import ConfigError

BLOCK = 2**22  # bytes that are asked for at a time
_AHEAD = 4  # blocks that are on their way to a thread
_LOCAL = "file://"
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs",
             "az": "adlfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}  # fmt: skip
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")  # as file systems call it


def place_of(text: str) -> Path:
    """Return the file or folder that a user names by a path or a URL; that behind a URL has the methods of a path.

    Raises:
        ConfigError: it is a URL, and fsspec knows none like it, or what reads URLs is not installed.
    """
    if "://" not in text:
        return Path(text)
    if text.startswith(_LOCAL):
        return Path(text.removeprefix(_LOCAL))
    try:
        from upath import UPath
    except ImportError as error:
        raise ConfigError(f"{text}: is a URL; pip install 'megatron-sphinx[remote]' to use such") from error
    try:
        return cast("Path", UPath(text))
    except ValueError as error:
        scheme = text.partition("://")[0]
        raise ConfigError(f"{text}: {scheme}:// is not known to fsspec; give a path, or a URL like s3://...") from error


def require_package(path: Path) -> None:
    """Refuse what is behind a URL that nothing installed reads.

    Raises:
        ConfigError: fsspec needs another package for it.
    """
    from fsspec import get_filesystem_class

    scheme = str(path).partition("://")[0]
    try:
        get_filesystem_class(scheme)
    except ImportError as error:
        package = _PACKAGES.get(scheme, "megatron-sphinx[remote]")
        raise ConfigError(f"{path}: needs a package that is not installed; pip install '{package}'") from error


def is_remote(path: Path) -> bool:
    """Tell whether a path is behind a URL."""
    return not isinstance(path, Path)


def state_of(path: Path) -> str:
    """Return the size of a file and a version, both in words that differ when the file has been written again.

    Raises:
        OSError: there is no such file.
    """
    if not is_remote(path):
        return f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    info = _system(path).info(_name(path))
    return f"{info['size']} {next((info[key] for key in _VERSIONS if key in info), '')}"


def size_of(path: Path) -> int:
    """Return the bytes of a file.

    Raises:
        OSError: there is no such file, or its server does not tell its size.
    """
    if not is_remote(path):
        return path.stat().st_size
    size = _system(path).info(_name(path)).get("size")
    if size is None:
        raise OSError("its server does not tell its size")
    return int(size)


def open_file(path: Path) -> BinaryIO:
    """Open a file to read little of it here and there."""
    return cast("BinaryIO", io.BufferedReader(_Seekable(RemoteFile(path)))) if is_remote(path) else path.open("rb")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, wherever both are.

    Raises:
        OSError: one cannot be read, or the other not written.
    """
    with source.open("rb") as one, target.open("wb") as other:
        while block := one.read(BLOCK):
            other.write(block)


def remove_files(folder: Path) -> None:
    """Remove all files in a folder behind a URL."""
    system = _system(folder)
    with _errors():
        for name in system.find(_name(folder)):
            system.rm_file(name)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn the errors of its own that a file system has into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file behind a URL, and the folder that it is in where folders have to be made.

    Raises:
        OSError: it cannot be written.
    """
    with _errors():
        try:
            path.write_text(text)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def _system(path: Path) -> Any:
    return cast("Any", path).fs


def _name(path: Path) -> str:
    return cast("str", cast("Any", path).path)


@cache
def _pool() -> ThreadPoolExecutor:
    """The threads that wait for what was asked for."""
    return ThreadPoolExecutor(16, "remote")


class RemoteFile:
    """A file behind a URL, of which threads read ranges side by side.

    A thread that has said which ranges it will read, by `expect`, finds them there, or on their way.

    Args:
        path: the file.

    Attributes:
        size: bytes of the file.

    Raises:
        OSError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.size = path, size_of(path)
        self._thread = local()

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Say which ranges this thread will read next: first byte and end of each, in the order of their use."""
        self._thread.blocks = _Blocks(self, ranges)

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer with the bytes from a place on.

        Raises:
            OSError: the file ends before, or cannot be read.
        """
        blocks: _Blocks | None = getattr(self._thread, "blocks", None)
        done = blocks.read_into(buffer, start) if blocks else 0
        if done < len(buffer):
            buffer[done:] = self.read(start + done, len(buffer) - done)

    def read(self, start: int, count: int) -> bytes:
        """Return so many bytes from a place on.

        Raises:
            OSError: the file ends before, or cannot be read.
        """
        if count == 0:
            return b""
        with _errors():
            content: bytes = _system(self._path).cat_file(_name(self._path), start=start, end=start + count)
        if len(content) != count:
            raise OSError(f"{len(content)} bytes came of the {count} from byte {start} on")
        return content


class _Blocks:
    """What a thread is going to read, in blocks that are asked for before it needs them."""

    def __init__(self, file: RemoteFile, ranges: Iterable[tuple[int, int]]) -> None:
        self._file, self._left = file, self._cut(ranges)
        self._coming: deque[tuple[int, int, Future[bytes]]] = deque()

    @staticmethod
    def _cut(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for start, end in ranges:
            for first in range(start, end, BLOCK):
                yield first, min(end, first + BLOCK)

    def read_into(self, buffer: memoryview, start: int) -> int:
        """Fill as much of a buffer as was expected from this place on; the number of bytes."""
        done = 0
        while done < len(buffer):
            while len(self._coming) < _AHEAD and (block := next(self._left, None)):
                self._coming.append((*block, _pool().submit(self._file.read, block[0], block[1] - block[0])))
            if not self._coming:
                return done
            first, end, content = self._coming[0]
            place = start + done
            if not first <= place < end:
                return done
            count = min(end - place, len(buffer) - done)
            buffer[done : done + count] = content.result()[place - first : place - first + count]
            done += count
            if place + count == end:
                self._coming.popleft()
        return done


class _Seekable(io.RawIOBase):
    """A remote file as one that Python reads."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        self._place = max(0, origin + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._file.size - self._place))
        self._file.read_into(view[:count], self._place)
        self._place += count
        return count


class Sink(Protocol):
    """Where the bytes of a file go."""

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes to a place in the file."""

    def close(self) -> None:
        """Complete the file behind all that was written."""


class RemoteSink:
    """A file behind a URL that is written from front to back.

    What comes for places further on waits in memory until those before them are written: that must be little.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        with _errors():
            self._file = _system(path).open(_name(path), "wb")
        self._place, self._waiting, self._lock = 0, dict[int, bytes](), Lock()

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes to a place, each place once."""
        with self._lock:
            assert offset >= self._place, "a place is written twice"
            if offset > self._place:
                self._waiting.update({offset: bytes(data)} if data else {})
                return
            self._write(data)
            while (waiting := self._waiting.pop(self._place, None)) is not None:
                self._write(waiting)

    def _write(self, data: bytes | memoryview) -> None:
        with _errors():
            self._file.write(data)
        self._place += len(data)

    def close(self) -> None:
        """Complete the file, which is visible from now on."""
        assert not self._waiting, "bytes before others are missing"
        with _errors():
            self._file.close()
