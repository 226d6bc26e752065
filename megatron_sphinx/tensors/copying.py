"""Copies ranges of files: by the kernel where it can, else through a buffer that stays in a core's cache."""

import os
from errno import EBADF, EINVAL, ENOSYS, EOPNOTSUPP, EPERM, ETXTBSY, EXDEV
from pathlib import Path
from threading import Lock

from megatron_sphinx.errors import CheckpointError

BUFFER = 2**20  # bytes that pass through memory at a time
_KERNEL_CANNOT = (EBADF, EINVAL, ENOSYS, EOPNOTSUPP, EPERM, EXDEV, ETXTBSY)  # of copy_file_range


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


def read_into(file: int, buffer: memoryview, start: int, path: Path) -> None:
    """Fill a buffer with bytes of an open file.

    Args:
        file: its number.
        buffer: what is filled.
        start: where the bytes begin.
        path: how messages call the file.

    Raises:
        CheckpointError: the file ends before.
    """
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
        self._lock = Lock()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        while self._numbers:
            os.close(self._numbers.popitem()[1])

    def number_of(self, path: Path) -> int:
        """Return the number of an open file."""
        with self._lock:
            if path not in self._numbers:
                self._numbers[path] = os.open(path, os.O_RDONLY)
            return self._numbers[path]
