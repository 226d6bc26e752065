"""Documents in JSON: objects in lines, in one array, or one behind the other; the text of each is under one key.

A file is cut into its documents before any is parsed, so that a bad one costs itself alone, and none needs more memory
than it is long.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_sphinx.errors import DataError

_MARK = re.compile(rb'\\.?|["\[\]{},]', re.DOTALL)
_BLANK = b" \t\r\n"
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
_MOST_KEYS = 8  # that a message shows


@dataclass(frozen=True)
class Cut:
    """A part of a file that should be one document.

    Attributes:
        offset: of its first byte.
        line: that it begins in, counted from 1.
        content: None where it is longer than may be.
        is_open: whether it goes on to the end of the file, though brackets say that more should follow.
    """

    offset: int
    line: int
    content: bytes | None
    is_open: bool = False


class _Keyed(dict[str, Any]):
    """An object, with the keys that it has more than once."""

    twice: frozenset[str] = frozenset()


def _keyed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keyed = _Keyed(pairs)
    if len(keyed) < len(pairs):
        names = [name for name, _ in pairs]
        keyed.twice = frozenset(name for name in names if names.count(name) > 1)
    return keyed


_decode = json.JSONDecoder(object_pairs_hook=_keyed).decode


def parse(text: str) -> Any:
    """Return what JSON says; its objects know which keys they have twice.

    Raises:
        DataError: it is not JSON, or nobody could hold it.
    """
    try:
        return _decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at its character {error.pos + 1}") from error
    except RecursionError as error:
        raise DataError("not JSON that can be read: lists or objects lie too deep in one another") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"not JSON that can be read: {error}") from error


def text_of(value: Any, key: str) -> str:
    """Return the text of a document.

    Args:
        value: what `parse` returned.
        key: of the text.

    Raises:
        DataError: there is no text under the key, or it is there twice.
    """
    if not isinstance(value, _Keyed):
        raise DataError(f"not a JSON object: {_KINDS.get(type(value), 'a number')}")
    if key in value.twice:
        raise DataError(f"the key twice: {key!r}")
    if key not in value:
        raise DataError(f"no key {key!r}: {_shown(value)}")
    text = value[key]
    if not isinstance(text, str):
        raise DataError(f"not a text under {key!r}: {_KINDS.get(type(text), 'a number')}")
    return text


def _shown(value: dict[str, Any]) -> str:
    names = ", ".join(repr(name)[:40] for name in list(value)[:_MOST_KEYS])
    return f"it has {names}{', ...' if len(value) > _MOST_KEYS else ''}" if names else "it is empty"


def _value(content: bytes | bytearray) -> bytes:
    """Return content without blanks around it, and without a byte-order mark, which joined files have in the middle."""
    return bytes(content).strip(_BLANK).removeprefix(codecs.BOM_UTF8).lstrip(_BLANK)


def cut_lines(pieces: Iterator[bytes], most_bytes: int, offset: int = 0) -> Iterator[Cut]:
    """Cut a file into its lines; blank ones are counted and not yielded.

    Args:
        pieces: of the file.
        most_bytes: of a line that is kept.
        offset: of the first byte.

    Raises:
        DataError: whatever `pieces` raises, behind the last whole line.
    """
    kept, length, line = bytearray(), 0, 1

    def cut() -> Iterator[Cut]:
        if length > most_bytes:
            yield Cut(offset, line, None)
        elif content := _value(kept):
            yield Cut(offset, line, content)

    for piece in pieces:
        begin = 0
        while (end := piece.find(b"\n", begin)) >= 0:
            length += end - begin
            if length <= most_bytes:
                kept += piece[begin:end]
            yield from cut()
            offset, line, begin = offset + length + 1, line + 1, end + 1
            kept, length = bytearray(), 0
        length += len(piece) - begin
        if length <= most_bytes:
            kept += piece[begin:]
        else:
            kept = bytearray()
    yield from cut()


def cut_values(pieces: Iterator[bytes], most_bytes: int, *, is_array: bool) -> Iterator[Cut]:
    """Cut a file into the elements of the array that it is, or into values that stand one behind the other.

    Args:
        pieces: of the file.
        most_bytes: of a value that is kept.
        is_array: whether the file is one array.

    Raises:
        DataError: the array has no end; or whatever `pieces` raises, behind the last whole value.
    """
    cutter = _Cutter(most_bytes, is_array)
    for piece in pieces:
        yield from cutter.take(piece)
    yield from cutter.end()


class _Cutter:
    """Finds where values end: by brackets outside of strings, and by the commas between the elements of an array."""

    def __init__(self, most_bytes: int, is_array: bool) -> None:
        self._most_bytes = most_bytes
        self._depth, self._level = 0, int(is_array)  # of brackets, here and around each value
        self._is_string, self._is_escaped = False, False
        self._kept, self._length, self._lines = bytearray(), 0, 0  # of the value that is looked at
        self._offset, self._line = 0, 1  # of its first byte

    def take(self, piece: bytes) -> Iterator[Cut]:
        """Take the next piece of the file; yield the values that end in it."""
        begin = 0
        first = int(self._is_escaped and bool(piece))
        self._is_escaped = self._is_escaped and not piece
        for mark in _MARK.finditer(piece, first):
            found = mark[0]
            if found == b'"':
                self._is_string = not self._is_string
            elif found[:1] == b"\\":
                self._is_escaped = len(found) == 1
            elif not self._is_string and (kept := self._step(found)) is not None:
                end = mark.end() if kept else mark.start()
                self._add(piece[begin:end])
                yield from self._cut(mark.end() - end)
                begin = mark.end()
        self._add(piece[begin:])

    def _step(self, found: bytes) -> bool | None:
        """Go over a bracket or a comma; say whether the value that it ends holds it too; None where it ends none."""
        if found in b"[{":
            self._depth += 1
            return False if self._depth == self._level else None
        if found == b",":
            return False if self._depth == self._level else None
        if self._depth == self._level == 1:  # the array's own
            self._depth = self._level = 0
            return False
        self._depth = max(self._depth - 1, 0)
        return True if self._depth == self._level == 0 else None

    def _add(self, content: bytes) -> None:
        if not self._length:  # blanks before a value are not of it
            value = content.lstrip(_BLANK)
            self._pass_over(content[: len(content) - len(value)])
            content = value
        self._length += len(content)
        self._lines += content.count(b"\n")
        if self._length <= self._most_bytes:
            self._kept += content
        else:
            self._kept = bytearray()

    def _pass_over(self, content: bytes) -> None:
        self._offset += len(content)
        self._line += content.count(b"\n")

    def _cut(self, passed_over: int = 0, *, is_open: bool = False) -> Iterator[Cut]:
        """Yield what is kept if it is something, and begin anew behind it and so many bytes more."""
        if self._length > self._most_bytes:
            yield Cut(self._offset, self._line, None, is_open)
        elif value := _value(self._kept):
            yield Cut(self._offset, self._line, value, is_open)
        self._offset += self._length + passed_over
        self._line += self._lines
        self._kept, self._length, self._lines = bytearray(), 0, 0

    def end(self) -> Iterator[Cut]:
        """Yield what is left at the end of the file."""
        yield from self._cut(is_open=True)
        if self._level:
            raise DataError("cut off: its array has no end; copy it again")
