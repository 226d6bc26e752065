"""Read tars of samples, also joined or damaged ones and those with odd members: each file is given or listed."""

import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path
from typing import BinaryIO

from megatron_sphinx.data import images
from megatron_sphinx.data.files import open_file
from megatron_sphinx.data.pairs import split_name
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare import plain_jpeg
from megatron_sphinx.prepare.json_files import unpacker_of
from megatron_sphinx.prepare.plain_tar import PlainFiles

BLOCK = tarfile.BLOCKSIZE
_SEARCHED = 2**20  # bytes at a time, a multiple of a block

LeaveOut = Callable[[str | None, str], None]


@dataclass(frozen=True)
class ShardImage:
    """An image as it lies in a shard.

    Attributes:
        offset: its first byte in the shard.
        bytes: its size.
        header: CRC-32 of the tar header before it.
        width: in pixels, of the upright image.
        height: in pixels.
        orientation: EXIF's number for how stored pixels are turned, 1 to 8; 0 where there is no image.
    """

    offset: int
    bytes: int
    header: int
    width: int
    height: int
    orientation: int


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    Attributes:
        part: number of the tar that it is in, of several that are joined.
        name: as the tar has it; bytes that are not UTF-8 are surrogates.
        offset: of its content.
        block: its header and its content; empty where nobody wanted that, or where it cannot be read.
        fault: why it cannot be read; empty where it can.
    """

    part: int
    name: str
    offset: int
    block: bytes
    fault: str = ""


def file_content(path: Path) -> tuple[bytes, str]:
    """Return the content of a file, or why it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            return b"", "no file, but a folder, a device or a pipe"
        if (size := path.stat().st_size) > images.MOST_BYTES:
            return b"", f"file too large: {size} bytes, at most {images.MOST_BYTES} are read"
        return path.read_bytes(), ""
    except OSError as error:
        return b"", error.strerror or str(error)


def image_of(offset: int, block: bytes) -> ShardImage:
    """Return what an index knows of an image, which is opened, not decoded.

    Args:
        offset: of the content in the shard.
        block: header and content.

    Raises:
        DataError: the image cannot be used.
    """
    content = block[BLOCK:]
    shape = plain_jpeg.shape_of(content) or images.shape_of(content)
    return ShardImage(offset, len(content), zlib.crc32(block[:BLOCK]), shape.width, shape.height, shape.orientation)


def members(path: str, leave_out: LeaveOut, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[Member]:
    """Yield the files of a tar, as far as it can be read; also those behind the mark of its end, where tars are joined.

    Args:
        path: of the tar, or its URL.
        leave_out: told a reason for what cannot be read, behind the key of the sample that it tears, or None.
        wanted: says by a file's name whether its content is asked for.

    Raises:
        DataError: the disk or the network fails, so that nothing is known of the tar.
    """
    try:
        with open_file(path) as file:
            reader = _Reader(file, leave_out, wanted)
            begin: int | None = 0
            while begin is not None:
                yield from reader.part(begin)
                begin = reader.next_part()
    except OSError as error:  # of a network perhaps: nothing is known of the shard
        raise DataError(f"{path}: cannot be read ({error}); run this again: what is done is kept") from error


class _Reader:
    """Reads the tars that lie one behind the other in a file.

    Args:
        file: of them; it can seek.
        leave_out: told what cannot be read.
        wanted: says by a file's name whether its content is asked for.
    """

    def __init__(self, file: BinaryIO, leave_out: LeaveOut, wanted: Callable[[str], bool]) -> None:
        self._file, self._leave_out, self._wanted = file, leave_out, wanted
        self._part = self._end = 0  # number of the tar that is read; where what has been read of it ends
        self._fault = ""  # what ended it before the mark of its end
        self._links: dict[str, tuple[int, int]] = {}  # offset and size of each file, for the hard links to it

    def part(self, begin: int) -> Iterator[Member]:
        """Yield the files of the tar at an offset, up to the mark of its end or to damage."""
        name = None
        self._end, self._fault = begin, ""
        try:
            plain = PlainFiles(self._file, begin)
            for entry in plain:
                name, self._end = entry.name, entry.offset_data
                if (member := self._member(entry)) is not None:
                    yield member
                self._end = plain.end
            self._file.seek(plain.end)
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                for entry in tar:
                    name, self._end = entry.name, entry.offset_data
                    if (member := self._member(entry)) is not None:
                        yield member
                    self._end = tar.offset
        except Exception as error:  # tarfile raises what it meets in damaged bytes
            if isinstance(error, OSError) and error.errno not in (None, EINVAL):
                raise  # but for a place that no file has, which a damaged header names, and tarfile's own errors
            self._fault = str(error) or type(error).__name__
            if name is not None:
                self._leave_out(split_name(name)[0], f"the shard is cut short: {self._fault}")
            elif begin:
                self._leave_out(None, f"the shard is damaged: {self._fault} at byte {begin}")

    def _member(self, entry: tarfile.TarInfo) -> Member | None:
        """Return a file of the tar; None for a folder.

        Raises:
            ReadError: the tar ends inside the file, or the file's size makes no sense.
        """
        offset, size, fault = entry.offset_data, entry.size, ""
        if size < 0:
            raise tarfile.ReadError(f"{entry.name} has a size below 0")
        if entry.isdir():
            return None
        if entry.islnk():
            offset, size = self._links.get(entry.linkname, (0, 0))
            fault = "" if offset else f"a hard link to no file before it: {entry.linkname}"
        elif entry.issym():
            fault = "a symbolic link: its file is not in the tar; pack with tar --dereference"
        elif entry.issparse():
            fault = "a sparse file: its holes are not in the tar; pack without --sparse"
        elif not entry.isreg():
            fault = "no file: a device or a pipe"
        elif size > images.MOST_BYTES:
            fault = f"file too large: {size} bytes, at most {images.MOST_BYTES} are read"
        else:
            self._links[entry.name] = offset, size
        if fault or not self._wanted(entry.name):
            return Member(self._part, entry.name, offset, b"", fault)
        self._file.seek(offset - BLOCK)
        block = self._file.read(BLOCK + size)
        if len(block) != BLOCK + size:
            raise tarfile.ReadError(f"it ends inside {entry.name}")
        return Member(self._part, entry.name, offset, block)

    def next_part(self) -> int | None:
        """Return where to read on; None where nothing is behind what has been read."""
        end = -(-self._end // BLOCK) * BLOCK
        if end == 0 and self._fault:
            return self._first_header()
        if self._fault:  # which is listed
            return self._next_header(end + BLOCK)
        at = self._behind_zeros(end)
        if at is None:
            if self._file.seek(0, os.SEEK_END) < end + BLOCK:
                self._leave_out(None, "the shard is cut short: it lacks the mark of its end")
            return None
        if at > end:
            self._part += 1
            if self._next_header(at, at + BLOCK) is not None:
                return at
        elif self._file.seek(0, os.SEEK_END) < at + BLOCK:
            self._leave_out(None, "the shard is cut short: it ends inside a header")
            return None
        found = self._next_header(at + BLOCK)
        size = (self._file.seek(0, os.SEEK_END) if found is None else found) - at
        self._leave_out(None, f"the shard is damaged: {size} bytes from byte {at} are no tar, and are passed over")
        return found

    def _first_header(self) -> int | None:
        """Return where to read on in a file that does not begin as a tar does."""
        self._file.seek(0)
        if tool := unpacker_of(self._file.read(8)):
            reason = f"not a tar file: it is compressed, but images are read from where they lie; unpack it ({tool})"
            self._leave_out(None, reason)
            return None
        found = self._next_header(BLOCK)
        fault = f"not a tar file: {self._fault}"
        self._leave_out(None, fault if found is None else f"the shard is damaged: its first {found} bytes are no tar")
        return found

    def _behind_zeros(self, at: int) -> int | None:
        """Return where the first block at or behind an offset is that holds more than zeros; None at the file's end."""
        self._file.seek(at)
        while chunk := self._file.read(_SEARCHED):
            if rest := chunk.lstrip(b"\0"):
                return at + (len(chunk) - len(rest)) // BLOCK * BLOCK
            at += len(chunk)
        return None

    def _next_header(self, at: int, end: int | None = None) -> int | None:
        """Return where the first block at or behind an offset is that is a header of a tar; None where there is none.

        Args:
            at: the offset, a multiple of a block.
            end: where blocks are not looked at any more; None for the file's end.
        """
        self._file.seek(at)
        while (end is None or at < end) and (chunk := self._file.read(_SEARCHED if end is None else end - at)):
            for place in range(0, len(chunk) - BLOCK + 1, BLOCK):
                if end is not None or chunk[place + 257 : place + 262] == b"ustar":
                    with suppress(tarfile.HeaderError):
                        tarfile.TarInfo.frombuf(chunk[place : place + BLOCK], "utf-8", "surrogateescape")
                        return at + place
            at += len(chunk)
        return None
