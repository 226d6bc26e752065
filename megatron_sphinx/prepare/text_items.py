"""The documents of a file of text, each with its place: either its text, or the reason why it has none that is usable.

Every document of a file is yielded, so that what goes in is what comes out and what is put into quarantine.
"""

import codecs
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

from megatron_sphinx.data.files import open_file
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import printable
from megatron_sphinx.prepare.compression import pieces_of, unpacked
from megatron_sphinx.prepare.json_text import Cut, cut_lines, parse, text_of
from megatron_sphinx.prepare.text_formats import BYTES_PER_CHARACTER, TextFormat, TextSettings, choose_key, decoded

_BATCH_ROWS = 64


@dataclass(frozen=True)
class Item:
    """A document, or what stands in the place of one or several.

    Attributes:
        place: in the file.
        text: None where there is none that is usable.
        reason: why there is none.
        line: of the file or the part that is read, counted from 1; None where there are no lines.
        documents: how many there are at least, where it is known.
    """

    place: str
    text: str | None
    reason: str = ""
    line: int | None = None
    documents: int = 1


def items_of(
    path: str,
    form: TextFormat,
    most: int,
    begin: int = 0,
    end: int | None = None,
    *,
    count_lines: Callable[[int], None] = lambda lines: None,
) -> Iterator[Item]:
    """Yield the documents of a file, or of a part of it.

    Args:
        path: of the file, or its URL.
        form: how it is read.
        most: characters of a document.
        begin: of the part: a byte where lines are plain, a row group of parquet, else 0.
        end: of the part, in the same unit, not among it; ignored where the file cannot be read in parts.
        count_lines: told again and again how many more lines of a part have been read.

    Raises:
        DataError: the file cannot be read.
    """
    if form.kind == "nothing":
        yield Item("whole", None, form.reason)
        return
    try:
        with open_file(path) as file:
            if form.kind == "parquet":
                items = _rows(file, form, most, begin, end)
            elif form.kind == "text":
                items = iter([_whole(file, form.encoding, most)])
            else:
                is_part = form.is_plain and end is not None and (begin > 0 or end < file.seek(0, os.SEEK_END))
                file.seek(0)
                pieces = _part(file, begin, end or 0, count_lines) if is_part else None
                items = _json(file, form, most, pieces)
            yield from (_checked(item, most) for item in items)
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read ({error.strerror or error}); check its path") from error


def _checked(item: Item, most: int) -> Item:
    """Return an item whose text can be tokenised, or the reason why it cannot."""
    if item.text is None:
        return item
    reason = ""
    if len(item.text) > most:
        reason = _too_long(most)
    elif not item.text.strip():
        reason = "empty: a text without letters"
    elif (place := item.text.find("\0")) >= 0:
        reason = f"holds a NUL character: as character {place + 1} of the text"
    else:
        try:
            item.text.encode()
        except UnicodeEncodeError as error:
            reason = f"not valid Unicode: half of a surrogate pair as character {error.start + 1} of the text"
    return Item(item.place, None, reason, item.line) if reason else item


def _too_long(most: int) -> str:
    return f"longer than {most:,} characters: cut it, or raise --most-characters where there is memory"


def _decode(content: bytes, encoding: str, offset: int = 0) -> str:
    """Decode a text that begins at a byte of a file or row; raise DataError with its first byte that is wrong."""
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == "utf-8" else encoding
        where = f"0x{content[error.start]:02X} at byte {offset + error.start}"
        raise DataError(f"not {name}: {where}; say its --encoding, such as latin-1") from error


def _whole(file: BinaryIO, encoding: str, most: int) -> Item:
    """Return a file as one document."""
    content = bytearray()
    try:
        for piece in unpacked(pieces_of(file)):
            content += piece
            if len(content) > most * BYTES_PER_CHARACTER:
                return Item("whole", None, _too_long(most))
        text = _decode(bytes(content.removeprefix(codecs.BOM_UTF8) if encoding == "utf-8" else content), encoding)
    except DataError as error:
        return Item("whole", None, str(error))
    return Item("whole", text)


def _json(file: BinaryIO, form: TextFormat, most: int, part: tuple[int, Iterator[bytes]] | None) -> Iterator[Item]:
    """Yield the documents of JSON: of all of a file, or of a part of it, given by its offset and its lines."""
    behind, is_blank = 0, part is None
    try:
        if part is None:
            cuts = form.cuts(decoded(unpacked(pieces_of(file)), form.encoding), most * BYTES_PER_CHARACTER)
        else:
            cuts = cut_lines(part[1], most * BYTES_PER_CHARACTER, part[0])
        for cut in cuts:
            behind, is_blank = cut.offset + len(cut.content or b""), False
            yield _parsed(cut, form, most)
    except DataError as error:
        yield Item(f"behind byte {behind}", None, str(error))
        return
    if is_blank:
        yield Item("whole", None, "no document: nothing is in the file")


def _part(file: BinaryIO, begin: int, end: int, count_lines: Callable[[int], None]) -> tuple[int, Iterator[bytes]]:
    """Return where the first line begins that begins in a part of a file, and all lines that begin there, in pieces."""
    if begin:
        begin -= 1
        file.seek(begin)
        while piece := file.readline(2**18):  # the line that begins in the part before
            begin += len(piece)
            if piece.endswith(b"\n"):
                break

    def pieces() -> Iterator[bytes]:
        place = begin
        for piece in pieces_of(file) if begin < end else ():
            last = piece.find(b"\n", max(end - 1 - place, 0)) + 1  # what follows that begins behind the part
            count_lines(piece.count(b"\n", 0, last or None))
            yield piece[: last or None]
            if last:
                return
            place += len(piece)

    return begin, pieces()


def _parsed(cut: Cut, form: TextFormat, most: int) -> Item:
    """Return the document that a part of a file holds."""
    place = f"byte {cut.offset}"
    if cut.content is None:
        return Item(place, None, _too_long(most), cut.line)
    try:
        if form.encoding == "utf-8":
            content = _decode(cut.content, "utf-8", cut.offset)
        else:
            content = _again(cut.content, form.encoding)
        return Item(place, text_of(parse(content), form.key), line=cut.line)
    except DataError as error:
        reason = f"not JSON up to the end of the file: {error}" if cut.is_open else str(error)
        return Item(place, None, reason, cut.line)


def _again(content: bytes, encoding: str) -> str:
    """Return text that `decoded` has made, unless that met what is not of the encoding."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not {encoding}: at byte {error.start} of this document") from error


def parquet_format(path: str, file: BinaryIO, settings: TextSettings) -> tuple[TextFormat, list[int]]:
    """Find out how a parquet file is read, and how many bytes each of its row groups has.

    Args:
        path: of the file.
        file: the file.
        settings: what the user says of it.

    Raises:
        DataError: it has no such column, or no text can be in it.
        OSError: the file cannot be read.
        ValueError: the file is damaged.
    """
    table = _opened(file)
    names = table.schema_arrow.names
    sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
    key = choose_key(path, names, settings.keys.of(path), "column")
    if names.count(key) > 1:
        raise DataError(f"{path}: has {names.count(key)} columns {key!r}; rename one")
    kind = table.schema_arrow.field(key).type
    if not _is_text(kind):
        raise DataError(f"{path}: its column {key!r} is {kind}, not text; give another --key, or convert it to string")
    encoding = next(iter(settings.encodings.of(path)), "utf-8") if "binary" in str(kind) else "utf-8"
    return TextFormat("parquet", key, encoding), sizes


def _opened(file: BinaryIO) -> Any:
    """Open parquet; raise OSError where it cannot be read, ValueError where it is damaged."""
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file, page_checksum_verification=True)
    except Exception as error:  # pyarrow raises what it meets in damaged bytes
        raise _damage(error) from error


def _damage(error: Exception) -> Exception:
    """Return the error itself where a disk or a network had it, else one that says what is damaged."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return ValueError(f"damaged: {' '.join(str(error).split())[:200] or type(error).__name__}; copy it again")


def _is_text(kind: Any) -> bool:
    """Say whether a column of a type may hold text."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    checks = (
        types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary,
        types.is_binary_view, types.is_fixed_size_binary, types.is_null,
    )  # fmt: skip
    return any(check(kind) for check in checks)


def _rows(file: BinaryIO, form: TextFormat, most: int, begin: int, end: int | None) -> Iterator[Item]:
    """Yield the rows of some row groups; damage costs the rest of its row group."""
    table = _opened(file)
    groups = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    for group in range(begin, len(groups) if end is None else end):
        row, last = sum(groups[:group]), sum(groups[: group + 1])
        try:
            for value in islice(_values(table, group, form.key), last - row):
                yield _row(row, value, form.encoding, most)
                row += 1
        except Exception as error:  # pyarrow raises what it meets in damaged bytes
            if (error := _damage(error)) and isinstance(error, OSError):
                raise
            yield Item(f"rows {row} to {last - 1}", None, str(error), documents=last - row)
            row = last
        if row < last:
            yield Item(f"rows {row} to {last - 1}", None, "damaged: they are not there", documents=last - row)
    if not sum(groups):
        yield Item("whole", None, "no document: nothing is in the file")


def _values(table: Any, group: int, key: str) -> Iterator[bytes | None]:
    """Yield the values of a column in a row group, as bytes: what calls itself a string may not be one."""
    import pyarrow

    for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[key]):
        column = batch.column(key)
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        yield from column.cast(pyarrow.large_binary()).to_pylist()


def _row(row: int, value: bytes | None, encoding: str, most: int) -> Item:
    """Return the document of a row."""
    place = f"row {row}"
    if value is None:
        return Item(place, None, "no text: null")
    if len(value) > most * BYTES_PER_CHARACTER:
        return Item(place, None, _too_long(most))
    try:
        return Item(place, _decode(value, encoding))
    except DataError as error:
        return Item(place, None, str(error))
