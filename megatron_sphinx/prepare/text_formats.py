"""Which format a file of text has: told by its first bytes, by the ending of its name, or by the user, in this order.

What contradicts itself, and what nothing tells, is refused before any work is done.
"""

import codecs
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Annotated, Any

from megatron_sphinx.data.files import is_url, open_file
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import printable
from megatron_sphinx.prepare.compression import compression_of, pieces_of, unpacked, without_compression
from megatron_sphinx.prepare.json_text import Cut, cut_lines, cut_values, parse
from megatron_sphinx.ranges import Range

FORMATS = ("text", "json", "parquet")
DEFAULT_KEYS = ("content", "text")
MOST_CHARACTERS = 2**23
BYTES_PER_CHARACTER = 6  # in JSON one may be \u and four digits, though rarely all of a document are
MOST_RANGE = Range(least=1, most=2**30, why="a document is held in memory while it is tokenised")
_HEAD_BYTES = 2**20
_HEAD_OBJECTS = 100
_ENDINGS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson", ".jsonlines", ".jl"), "json"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex"), "text"),
}
_BYTE_ORDER_MARKS = (  # that of UTF-32 begins as that of UTF-16 does
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_OTHERS = {  # what is no text, by where and how it begins
    "a zip archive (perhaps .docx or .epub)": (0, b"PK\x03\x04"), "a PDF (see prepare ocr)": (0, b"%PDF-"),
    "a tar archive": (257, b"ustar"), "a 7z archive": (0, b"7z\xbc\xaf\x27\x1c"), "a RAR archive": (0, b"Rar!\x1a\x07"),
    "an lzip archive": (0, b"LZIP\x01"), "a .Z archive": (0, b"\x1f\x9d"), "an Arrow file": (0, b"ARROW1\x00\x00"),
    "an Avro file": (0, b"Obj\x01"), "an SQLite database": (0, b"SQLite format 3\x00"), "an HDF5 file": (0, b"\x89HDF"),
    "a NumPy array": (0, b"\x93NUMPY"), "a PNG image": (0, b"\x89PNG"), "a JPEG image": (0, b"\xff\xd8\xff"),
    "an encrypted parquet file": (0, b"PARE"),
}  # fmt: skip


class PerFile:
    """Values of an option for all files, or for those that a pattern names.

    Args:
        option: as a message should name it.
        words: `VALUE` for all files, or `PATTERN=VALUE` for those whose path or name matches a pattern of the shell;
            of several values of one file, those of its patterns come before those for all.

    Attributes:
        words: as they were given.
    """

    def __init__(self, option: str, words: Sequence[str] = ()) -> None:
        self.option, self.words = option, tuple(words)
        self._values = [(pattern, value) for pattern, _, value in (word.rpartition("=") for word in words)]
        if bad := next((word for word, (_, value) in zip(words, self._values, strict=True) if not value), None):
            raise DataError(f"{option}={bad}: says nothing; give a value, or PATTERN=VALUE")

    def of(self, path: str) -> list[str]:
        """Return the values for a file: those of its patterns, else those for all files."""
        own = [value for pattern, value in self._values if pattern and _matches(path, pattern)]
        return own or [value for pattern, value in self._values if not pattern]

    def check(self, paths: Sequence[str]) -> None:
        """Raise DataError where a pattern names none of the files."""
        for pattern, value in self._values:
            if pattern and not any(_matches(path, pattern) for path in paths):
                raise DataError(f"{self.option}={pattern}={value}: no file has a name like {pattern}; mend the pattern")


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(PurePosixPath(path).name, pattern)


@dataclass(frozen=True)
class TextSettings:
    """What the user says of files of text.

    Attributes:
        keys: of the text in JSON, or its column in parquet; of several the first that a file has.
        encodings: of files without a byte-order mark; UTF-8 where nothing is said.
        formats: one of `FORMATS`, where neither content nor ending tells.
        most_characters: of a document; a longer one is left out, and never held as a whole.
    """

    keys: PerFile = field(default_factory=lambda: PerFile("--key"))
    encodings: PerFile = field(default_factory=lambda: PerFile("--encoding"))
    formats: PerFile = field(default_factory=lambda: PerFile("--format"))
    most_characters: Annotated[int, MOST_RANGE] = MOST_CHARACTERS

    def check(self, paths: Sequence[str]) -> None:
        """Raise DataError where something that the user says cannot be, or is of no file."""
        for option in (self.keys, self.encodings, self.formats):
            option.check(paths)
        for path in paths:
            for name in self.encodings.of(path):
                _check_encoding(name)
            if (names := self.formats.of(path)) and names[0] not in FORMATS:
                raise DataError(f"--format={names[0]}: is no format of text; known: {', '.join(FORMATS)}")


def _check_encoding(name: str) -> None:
    try:
        "a".encode(name)
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError) as error:
        raise DataError(
            f"--encoding={name}: is no encoding of text that is known; give one such as latin-1 or cp1252"
        ) from error


@dataclass(frozen=True)
class TextFormat:
    """How a file is read.

    Attributes:
        kind: `text`, `lines`, `array`, `values` or `parquet`; or `nothing`, where the file cannot be read.
        key: of the text.
        encoding: of the file.
        is_plain: whether lines can be read from the middle of the file.
        reason: why it cannot be read.
    """

    kind: str
    key: str = ""
    encoding: str = "utf-8"
    is_plain: bool = False
    reason: str = ""

    def cuts(self, pieces: Iterator[bytes], most_bytes: int) -> Iterator[Cut]:
        """Cut JSON, which has been decoded to UTF-8, into its documents."""
        if self.kind == "lines":
            return cut_lines(pieces, most_bytes)
        return cut_values(pieces, most_bytes, is_array=self.kind == "array")


def format_of(path: str, settings: TextSettings) -> TextFormat:
    """Find out how a file is read; for parquet its key is still to be found.

    Raises:
        DataError: the file is no file, is of a format that is not read, or nothing tells its format; or JSON has no
            such key.
    """
    if not is_url(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(f"{printable(path)}: is no file; give files, such as {path.rstrip('/')}/*.jsonl of a folder")
    with open_file(path) as file:
        first = file.read(512)
        file.seek(0)
        head, reason = _head(unpacked(pieces_of(file)))
    name = path.split("?")[0] if is_url(path) else path
    name, outer = without_compression(name)
    ending = PurePosixPath(name).suffix.lower()
    if first.startswith(b"version https://git-lfs"):
        return TextFormat("nothing", reason="a Git LFS pointer: fetch the file itself by git lfs pull")
    stated = next(iter(settings.formats.of(path)), _ENDINGS.get(ending, ""))
    if first[:4] == b"PAR1" or (stated == "parquet" and not compression_of(first)):
        return TextFormat("parquet") if first else TextFormat("nothing", reason="empty file")
    for content in (first, head):
        _refuse_others(path, content)
    if not head:
        return TextFormat("nothing", reason=reason or "empty file")
    mark = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if head.startswith(mark)), None)
    encoding = mark or next(iter(settings.encodings.of(path)), "utf-8")
    shape, objects = _json_shape(b"".join(decoded(iter([head]), encoding, is_all=False)))
    if outer and not compression_of(first) and not objects:
        return TextFormat("nothing", reason=f"named as {outer.name}, but is none: copy it again")
    kind = _kind(path, stated, bool(settings.formats.of(path)), objects, shape)
    if kind == "text":
        return TextFormat("text", encoding=encoding)
    is_plain = not compression_of(first) and kind == "lines" and encoding == "utf-8"
    return TextFormat(kind, _key_in(path, objects, settings.keys.of(path)), encoding, is_plain)


def _head(pieces: Iterator[bytes]) -> tuple[bytes, str]:
    """Return the first bytes of what is in a file, and why there are not more of them."""
    head = bytearray()
    try:
        for piece in pieces:
            head += piece
            if len(head) >= _HEAD_BYTES:
                break
    except DataError as error:
        return bytes(head[:_HEAD_BYTES]), str(error)
    return bytes(head[:_HEAD_BYTES]), ""  # what is unpacked comes in pieces of any size


def _refuse_others(path: str, head: bytes) -> None:
    for name, (place, magic) in _OTHERS.items():
        if head[place : place + len(magic)] == magic:
            raise DataError(
                f"{path}: is {name}, which is not read; unpack or convert it to JSON lines, parquet or text"
            )
    if head[:4] == b"PAR1":
        raise DataError(f"{printable(path)}: is parquet that was compressed as a whole; unpack it")


def _kind(path: str, stated: str, is_certain: bool, objects: Sequence[Any], shape: str) -> str:
    """Say whether a file is text as a whole or which shape of JSON; `is_certain` where the user said so."""
    if is_certain:
        return "text" if stated == "text" else shape
    if stated == "text" and objects:
        raise DataError(f"{printable(path)}: is named as text, but holds JSON; say --format json or --format text")
    if not stated and not objects:
        known = ", ".join(_ENDINGS)
        raise DataError(
            f"{printable(path)}: neither its ending nor its content tells its format; rename it (known: {known}, each "
            f"also compressed), or say --format text where the file is one document"
        )
    return "text" if stated == "text" else shape


def _json_shape(head: bytes) -> tuple[str, list[dict[str, Any]]]:
    """Say how JSON documents lie in a file, by its beginning, and return the first of the objects.

    Lines are lines where the first is whole by itself. Else what begins with a bracket is an array; and what begins
    with a brace is an object over several lines, if its end is found and it is one.
    """
    lines = [cut.content or b"" for cut in _few(cut_lines(iter([head]), _HEAD_BYTES + 4))]
    first, parsed = (lines[0] if lines else b""), _objects(lines)
    is_whole = _parsed(first) is not None
    if first[:1] == b"[" and (not is_whole or len(lines) == 1):
        cuts = cut_values(iter([head]), _HEAD_BYTES, is_array=True)
        return "array", _objects([content for cut in _few(cuts) if (content := cut.content)])
    if first[:1] == b"{" and not is_whole:
        cuts = cut_values(iter([head]), _HEAD_BYTES, is_array=False)
        values = [content for cut in _few(cuts) if (content := cut.content)]
        if _parsed(values[0]) is not None or (not parsed and len(lines) > 1):
            return "values", _objects(values)
    return "lines", parsed


def _few(cuts: Iterator[Cut]) -> Iterator[Cut]:
    try:
        for cut, _ in zip(cuts, range(_HEAD_OBJECTS), strict=False):
            yield cut
    except DataError:  # the head of an array has no end
        return


def _objects(contents: Sequence[bytes]) -> list[dict[str, Any]]:
    return [value for content in contents[:_HEAD_OBJECTS] if isinstance(value := _parsed(content), dict)]


def _parsed(content: bytes) -> Any:
    try:
        return parse(content.decode())
    except (DataError, UnicodeDecodeError):
        return None


def _key_in(path: str, objects: Sequence[dict[str, Any]], stated: Sequence[str]) -> str:
    """Return the key of the text, by the first objects of a file; the first one to try where there is no object."""
    if not objects:
        return (stated or DEFAULT_KEYS)[0]
    for one in objects:
        if len([key for key in stated or DEFAULT_KEYS if key in one]) > 1:
            return choose_key(path, list(one), stated, "key")
    found = [name for one in objects for name in one]  # no object has two of the keys, so one of these is no guess
    wanted = next((key for key in stated or DEFAULT_KEYS if key in found), None)
    return choose_key(path, list(dict.fromkeys(found)), [wanted] if wanted else stated, "key")


def choose_key(path: str, found: Sequence[str], stated: Sequence[str], noun: str) -> str:
    """Return which of the keys that a file has is that of its text.

    Args:
        path: of the file.
        found: keys or columns that are there.
        stated: by the user, those to try first before others.
        noun: what the file calls them.

    Raises:
        DataError: none of those stated is there; or none is stated, and not just one of those that are usual.
    """
    fits = [key for key in stated or DEFAULT_KEYS if key in found]
    if not fits:
        wanted = " or ".join(map(repr, stated or DEFAULT_KEYS))
        raise DataError(
            f"{printable(path)}: has no {noun} {wanted}, but {[name[:40] for name in found[:30]]}; give --key"
        )
    if len(fits) > 1 and not stated:
        raise DataError(
            f"{printable(path)}: has the {noun}s {' and '.join(map(repr, fits))}; say by --key which is the text"
        )
    return fits[0]


def decoded(pieces: Iterator[bytes], encoding: str, *, is_all: bool = True) -> Iterator[bytes]:
    """Yield a file as UTF-8; what is not of its encoding becomes bytes that are not UTF-8 at that place.

    Args:
        pieces: of the file.
        encoding: of the file; UTF-8 is left as it is.
        is_all: whether the file ends behind these pieces.

    Raises:
        DataError: the file cannot be decoded from there on.
    """
    name = codecs.lookup(encoding).name
    if name == "utf-8":
        yield from pieces
        return
    decoder = codecs.getincrementaldecoder(encoding)(_on_error(name))
    try:
        for piece in pieces:
            yield decoder.decode(piece).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=is_all).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise DataError(f"not {encoding} from here on: {error.reason}") from error


def _on_error(name: str) -> str:
    return "surrogatepass" if name.startswith(("utf-16", "utf-32")) else "surrogateescape"
