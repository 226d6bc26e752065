"""Compressed files, told by their first bytes: gzip, bzip2, xz, zstd and lz4, of any number of members or frames.

What can be unpacked of a damaged file is given out before the error is raised, so that it is not lost.
"""

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO, Protocol

from megatron_sphinx.errors import ConfigError, DataError

_READ_BYTES = 2**18  # of the file at once
_FEED_BYTES = 2**8  # given to a decompressor at once: what an error in them costs, and a bomb must fit in memory
_READY_BYTES = 2**16  # unpacked, before they are given out
_MOST_LAYERS = 4  # a file that was compressed twice by mistake is read; a quine that unpacks to itself ends
_WINDOW_BYTES = 2**31  # of zstd --long=31, the most that its format can ask for


class _Decompressor(Protocol):
    """What the decompressor objects of all libraries have in common; one reads one member or frame."""

    @property
    def eof(self) -> bool:
        """Whether the member has ended."""

    @property
    def unused_data(self) -> bytes:
        """What follows the member."""

    def decompress(self, data: bytes, /) -> bytes:
        """Unpack a piece of the member."""


@dataclass(frozen=True)
class Compression:
    """A format of compressed files.

    Attributes:
        name: of the program that packs it.
        endings: of such files, in small letters.
        magic: matches the first bytes of a file.
        begin: makes the decompressor of a member.
    """

    name: str
    endings: tuple[str, ...]
    magic: re.Pattern[bytes]
    begin: Callable[[], _Decompressor]


def _zstd() -> _Decompressor:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()


def _lz4() -> _Decompressor:
    try:
        import lz4.frame
    except ImportError as error:
        raise ConfigError("lz4: is read by a package that is not installed; pip install lz4, or unpack it") from error
    decompressor: _Decompressor = lz4.frame.LZ4FrameDecompressor()
    return decompressor


COMPRESSIONS = (
    Compression(
        "gzip", (".gz", ".gzip"), re.compile(rb"\x1f\x8b\x08"), lambda: zlib.decompressobj(zlib.MAX_WBITS | 16)
    ),
    Compression("bzip2", (".bz2",), re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2Decompressor),
    Compression("xz", (".xz",), re.compile(rb"\xfd7zXZ\x00"), lzma.LZMADecompressor),
    Compression("lzma", (".lzma",), re.compile(rb"\x5d\x00\x00.{2}[\x00-\x0f\xff]", re.DOTALL), lzma.LZMADecompressor),
    Compression("zstd", (".zst", ".zstd"), re.compile(rb"(\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)"), _zstd),
    Compression("lz4", (".lz4",), re.compile(rb"\x04\x22\x4d\x18"), _lz4),
)


def compression_of(head: bytes) -> Compression | None:
    """Return how a file is compressed, by its first bytes; None where it is not."""
    return next((compression for compression in COMPRESSIONS if compression.magic.match(head)), None)


def without_compression(name: str) -> tuple[str, Compression | None]:
    """Return the name of a file without the endings of compression, and the compression that the last of them names."""
    outer = None
    while found := next((one for one in COMPRESSIONS if name.lower().endswith(one.endings)), None):
        name = name[: name.rindex(".")]
        outer = outer or found
    return name, outer


def pieces_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield a file from where it stands to its end."""
    while piece := file.read(_READ_BYTES):
        yield piece


def unpacked(pieces: Iterator[bytes], layers: int = _MOST_LAYERS) -> Iterator[bytes]:
    """Yield what is in a file that may be compressed, in pieces of any size.

    Args:
        pieces: the file from its beginning, in pieces of any size.
        layers: how many compressions may be inside one another.

    Raises:
        DataError: the file is cut off or damaged; what is before that has been given out.
        ConfigError: a package that reads its compression is not installed.
    """
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= 16:
            break
    whole = chain([head] if head else [], pieces)
    compression = compression_of(head)
    if compression is None:
        yield from whole
    elif not layers:
        raise DataError(f"compressed more than {_MOST_LAYERS} times: unpack it")
    else:
        yield from unpacked(_decompressed(whole, compression), layers - 1)


def _decompressed(pieces: Iterator[bytes], compression: Compression) -> Iterator[bytes]:
    """Yield what is in a compressed file, member by member; zeros between members are passed over, as programs pad.

    Raises:
        DataError: the file is cut off or damaged.
    """
    decompressor: _Decompressor | None = compression.begin()
    ready: list[bytes] = []
    for data in _small(pieces):
        while data:
            if decompressor is None:
                if not (data := data.lstrip(b"\0")):
                    break
                decompressor = compression.begin()
            try:
                content = decompressor.decompress(data)
            except Exception as error:  # each library has an error class of its own
                yield b"".join(ready)
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise DataError(f"damaged: no {compression.name} from here on ({reason}); copy it again") from error
            if content:
                ready.append(content)
            data, decompressor = (decompressor.unused_data, None) if decompressor.eof else (b"", decompressor)
        if sum(map(len, ready)) >= _READY_BYTES:
            yield b"".join(ready)
            ready.clear()
    yield b"".join(ready)
    if decompressor is not None:
        raise DataError(f"cut off: its {compression.name} has no end; copy it again")


def _small(pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        for begin in range(0, len(piece), _FEED_BYTES):
            yield piece[begin : begin + _FEED_BYTES]
