"""The headers of tars with nothing unusual in them, in a fraction of the time that `tarfile` takes; others are its own.

Plain is a file with a short name, as `tarfile`, GNU tar and webdataset write it; before it may be a header that has its
time in fractions of a second, as webdataset's writer does.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

_BLOCK = tarfile.BLOCKSIZE
_NUMBER = rb"[0-7]{6}[0-7 ]\0"
_HEADER = re.compile(
    rb"[^\0].{99}" + _NUMBER * 3 + rb"([0-7]{11})[ \0][0-7]{11}[ \0]([0-7]{6})\0 ([0x]).{100}"
    rb"ustar(?:\x0000|  \0).{64}(?:" + _NUMBER + rb"|\0{8}){2}\0",
    re.DOTALL,
)
_TIME = re.compile(rb"([0-9]{2}) mtime=[0-9]{1,20}(?:\.[0-9]{1,20})?\n")
_ADLER = 65521  # the modulus of Adler-32, whose lower half is one more than the sum of the bytes


class PlainFiles:
    """The files of a tar as long as their headers are plain.

    Args:
        file: of the tar; where it stands does not matter.
        begin: of the first header in the file.

    Attributes:
        end: behind what was given out, where the next header is; or where one is that is not plain.
    """

    def __init__(self, file: BinaryIO, begin: int) -> None:
        self._file, self._begin, self.end = file, begin, begin

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Yield the files.

        Raises:
            ReadError: the tar ends inside the padding of a file.
        """
        while (entry := self._next()) is not None:
            self.end = entry.offset_data - (-entry.size // _BLOCK) * _BLOCK
            yield entry

    def _next(self) -> tarfile.TarInfo | None:
        """Return the file whose header is at the end; None where it is not plain."""
        at = self.end
        self._file.seek(at)
        header = self._file.read(_BLOCK)
        if not header and at > self._begin:
            self._file.seek(at - 1)
            if not self._file.read(1):
                raise tarfile.ReadError("unexpected end of data")
        found = _checked(header)
        if found and found[3] == b"x":
            size = int(found[1], 8)
            content = self._file.read(_BLOCK)[:size] if size <= _BLOCK else b""
            time = _TIME.fullmatch(content)
            if time is None or int(time[1]) != size:
                return None
            at += 2 * _BLOCK
            header = self._file.read(_BLOCK)
            found = _checked(header)
        if not found or found[3] != b"0":
            return None
        entry = tarfile.TarInfo(header[:100].partition(b"\0")[0].decode(tarfile.ENCODING, "surrogateescape"))
        entry.size, entry.offset_data = int(found[1], 8), at + _BLOCK
        return entry


def _checked(header: bytes) -> re.Match[bytes] | None:
    """Return size, checksum and type of a plain header whose checksum is right; None where it is not that."""
    found = _HEADER.match(header)
    if found is None or len(header) != _BLOCK:
        return None
    total = int(found[2], 8) - sum(b" " * 8) + sum(header[148:156])  # the checksum itself counts as spaces
    return found if (total + 1) % _ADLER == zlib.adler32(header) & 0xFFFF else None
