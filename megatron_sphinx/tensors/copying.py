"""Copies ranges of files: by the kernel where it can, else through a buffer that stays in a core's cache."""

import os
from collections.abc import Iterable
from errno import EBADF, EINVAL, ENOSYS, EOPNOTSUPP, EPERM, ETXTBSY, EXDEV
from pathlib import Path
from threading import Lock

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.remote import RemoteFile, is_remote

BUFFER = 2**20  # bytes that pass through memory at a time
_KERNEL_CANNOT = (EBADF, EINVAL, ENOSYS, EOPNOTSUPP, EPERM, EXDEV, ETXTBSY)  # of copy_file_range


Source = int | RemoteFile  # the number of an open file, or a file behind a URL


def copy_range(source: int, start: int, target: int, offset: int, count: int) -> int:
    """Copy bytes between open files as far as the kernel does that by itself.

    Args:
        source: number of the file that is read.
        start: where the bytes begin in it.
        target: number of the file that is written.
        offset: where they go in it.
        count: how many there are.

    Returns:
        How many were copied; less than `count` where the file systems have no way, or the source has no more.

    Raises:
        OSError: the target cannot be written, as where its disk is full.
    """
    done = 0
    while done < count:
        try:
            copied = os.copy_file_range(source, target, count - done, start + done, offset + done)
        except OSError as error:
            if error.errno in _KERNEL_CANNOT:
                return done
            raise
        if not copied:
            return done
        done += copied
    return done


def read_into(file: Source, buffer: memoryview, start: int, path: Path) -> None:
    """Fill a buffer with bytes of an open file.

    Args:
        file: what is read.
        buffer: what is filled.
        start: where the bytes begin.
        path: how messages call the file.

    Raises:
        CheckpointError: the file ends before.
    """
    if isinstance(file, RemoteFile):
        file.read_into(buffer, start)
        return
    while buffer:
        count = os.preadv(file, [buffer], start)
        if not count:
            raise CheckpointError(f"{path}: is cut off while it is read; give a whole checkpoint")
        buffer, start = buffer[count:], start + count


def write_from(file: int, data: memoryview, offset: int) -> None:
    """Write bytes to a place of an open file."""
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


class OpenFiles:
    """Files that threads read by ranges; each is opened once, and stays open until all are closed."""

    def __init__(self) -> None:
        self._numbers: dict[Path, int] = {}
        self._remote: dict[Path, RemoteFile] = {}
        self._lock = Lock()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        while self._numbers:
            os.close(self._numbers.popitem()[1])

    def expect(self, ranges: Iterable[tuple[Path, int, int]]) -> None:
        """Say what this thread will read next, in this order: of what is behind URLs it is asked for in time.

        Args:
            ranges: files, with the first byte and the number of bytes of each range.
        """
        by_file: dict[Path, list[tuple[int, int]]] = {}
        for path, start, count in ranges:
            if is_remote(path):
                by_file.setdefault(path, []).append((start, start + count))
        for path, of_file in by_file.items():
            source = self.opened(path)
            assert isinstance(source, RemoteFile)
            source.expect(of_file)

    def opened(self, path: Path) -> Source:
        """Return an open file: its number, or what reads it behind its URL."""
        with self._lock:
            if is_remote(path):
                return self._remote.get(path) or self._remote.setdefault(path, RemoteFile(path))
            if path not in self._numbers:
                self._numbers[path] = os.open(path, os.O_RDONLY)
            return self._numbers[path]
