"""The zip files of torch.save: where their records lie, and how they are laid out before they are written.

Source: PKWARE's APPNOTE.TXT; PyTorch, caffe2/serialize/inline_container.cc: records uncompressed, each from a multiple
of 64 bytes on.
"""

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

_MOST_BYTES = 2**28  # of the pickle in such a file
_ALIGNMENT = 64  # bytes
_LOCAL, _DESCRIPTOR, _DIRECTORY, _END = b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02", b"PK\x05\x06"
_END_64, _LOCATOR_64 = b"PK\x06\x06", b"PK\x06\x07"
_LATER = 0x808  # flags: sizes and checksum are behind the data; names are UTF-8
_MOST_32 = 2**32 - 1
_DATE = 33  # of records: 1980-01-01
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch before 1.6 begin


class ArchiveError(ValueError):
    """A file is no archive of torch.save, or one that cannot be read in parts."""


class Archive:
    """A file of torch.save that is read.

    Args:
        file: what is read; it stays open.

    Raises:
        Exception: it is none, or damaged; zipfile has many errors for this.

    Attributes:
        pickle: what it says of its tensors.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        head = file.read(len(_OLD))
        if head == _OLD:
            raise ArchiveError("it is of the old format of torch.save, which cannot be read in parts: save it again")
        with zipfile.ZipFile(file) as archive:
            self._members = {member.filename: member for member in archive.infolist()}
            self._prefix = next(iter(self._members), "").partition("/")[0]
            if f"{self._prefix}/data.pkl" not in self._members:
                raise ArchiveError("it has no data.pkl")
            if f"{self._prefix}/constants.pkl" in self._members:
                raise ArchiveError("it is a program of TorchScript")
            if self._record("data.pkl").file_size > _MOST_BYTES:
                raise ArchiveError("its data.pkl is too large")
            self.pickle = archive.read(self._record("data.pkl"))
            order = f"{self._prefix}/byteorder"
            if order in self._members and archive.read(self._record("byteorder")) != b"little":
                raise ArchiveError("its numbers are not little-endian")

    def _record(self, name: str) -> zipfile.ZipInfo:
        if f"{self._prefix}/{name}" not in self._members:
            raise ArchiveError(f"it has no record {name[:80]}")
        member = self._members[f"{self._prefix}/{name}"]
        if (
            member.compress_type != zipfile.ZIP_STORED
            or member.flag_bits & 1
            or member.file_size > member.compress_size
        ):
            raise ArchiveError(f"its record {name[:80]} is compressed or encrypted")
        return member

    def place_of(self, storage: str) -> tuple[int, int]:
        """Return where the elements of a storage begin in the file, and how many bytes they are.

        Raises:
            ArchiveError: there is none of this name.
        """
        member = self._record(f"data/{storage}")
        self._file.seek(member.header_offset)
        head = self._file.read(30)
        if len(head) < 30 or head[:4] != _LOCAL:
            raise ArchiveError(f"its record data/{storage[:80]} is not where it is said to be")
        return member.header_offset + 30 + sum(struct.unpack("<2H", head[26:30])), member.file_size


@dataclass(frozen=True)
class Record:
    """A record of an archive that is to be written.

    Attributes:
        name: its name.
        header: bytes in front of its data.
        header_start: where these begin in the file.
        nbytes: bytes of its data.
    """

    name: str
    header: bytes
    header_start: int
    nbytes: int

    @property
    def start(self) -> int:
        """Where its data begin."""
        return self.header_start + len(self.header)

    @property
    def stop(self) -> int:
        """Where the next record may begin."""
        return self.start + self.nbytes + len(self.descriptor(0))

    def descriptor(self, checksum: int) -> bytes:
        """Return what is behind the data: their CRC-32, and how many they are."""
        kind = "<2Q" if self.nbytes >= _MOST_32 else "<2I"
        return _DESCRIPTOR + struct.pack("<I", checksum) + struct.pack(kind, self.nbytes, self.nbytes)

    def entry(self, checksum: int) -> bytes:
        """Return what the directory at the end of the archive says of the record."""
        is_long = self.nbytes >= _MOST_32
        long = struct.pack("<2Q", self.nbytes, self.nbytes) if is_long else b""
        is_far = self.header_start >= _MOST_32
        long += struct.pack("<Q", self.header_start) if is_far else b""
        extra = struct.pack("<2H", 1, len(long)) + long if long else b""
        name, size = self.name.encode(), _MOST_32 if is_long else self.nbytes
        place = _MOST_32 if is_far else self.header_start
        version = 45 if long else 20
        return (
            _DIRECTORY
            + struct.pack("<6H3I", version, version, _LATER, 0, 0, _DATE, checksum, size, size)
            + struct.pack("<5H2I", len(name), len(extra), 0, 0, 0, 0, place)
            + name
            + extra
        )


def records_of(sizes: Mapping[str, int]) -> list[Record]:
    """Lay out the records of an archive one behind the other, so that it can be written from front to back.

    Args:
        sizes: bytes of the data of each record, by name.
    """
    records: list[Record] = []
    for name, nbytes in sizes.items():
        start = records[-1].stop if records else 0
        records.append(Record(name, _header(name, nbytes, start), start, nbytes))
    return records


def _header(name: str, nbytes: int, start: int) -> bytes:
    """What is in front of the data of a record, filled up to the multiple of bytes that torch wants them at."""
    text = name.encode()
    is_long = nbytes >= _MOST_32
    extra = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if is_long else b""
    room = -(start + 30 + len(text) + len(extra) + 4) % _ALIGNMENT
    extra += b"FB" + struct.pack("<H", room) + b"Z" * room
    size = _MOST_32 if is_long else 0
    fixed = struct.pack("<5H3I2H", 45 if is_long else 20, _LATER, 0, 0, _DATE, 0, size, size, len(text), len(extra))
    return _LOCAL + fixed + text + extra


def directory_of(records: list[Record], checksums: Mapping[str, int]) -> bytes:
    """Return the end of an archive: its directory, and where that is.

    Args:
        records: all records, in their order.
        checksums: the CRC-32 of the data of each.
    """
    entries = b"".join(record.entry(checksums[record.name]) for record in records)
    start, count = records[-1].stop, len(records)
    end = b""
    if start + len(entries) >= _MOST_32 or count >= 2**16 - 1:
        numbers = struct.pack("<2H2I4Q", 45, 45, 0, 0, count, count, len(entries), start)
        end += _END_64 + struct.pack("<Q", len(numbers)) + numbers
        end += _LOCATOR_64 + struct.pack("<IQI", 0, start + len(entries), 1)
    count, place = min(count, 2**16 - 1), min(start, _MOST_32)
    return entries + end + _END + struct.pack("<4H2IH", 0, 0, count, count, min(len(entries), _MOST_32), place, 0)


def checksum_of(data: bytes | memoryview, before: int = 0) -> int:
    """Return the CRC-32 of bytes, behind others that have one."""
    return zlib.crc32(data, before)
