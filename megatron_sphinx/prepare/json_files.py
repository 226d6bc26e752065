"""Read files of JSON with one item after the other: a list, or JSON lines. A bad item costs itself, never the file."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_sphinx.errors import DataError

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)
_MANY = 1000  # items that are read at once
_UNPACKERS = {
    b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd", b"PK\3\4": "unzip",
}  # fmt: skip
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Item:
    """An item of a file.

    Attributes:
        place: where it is in the file, such as `line 3` or `item 3`, counted from 1.
        content: what it holds; None where there is a fault.
        fault: why it cannot be read; empty where it can.
    """

    place: str
    content: Any
    fault: str = ""

    def checked(self) -> Any:
        """Return what the item holds; raise DataError with the fault where there is one."""
        if self.fault:
            raise DataError(self.fault)
        return self.content


@dataclass(frozen=True)
class Items:
    """Neighbouring items of a file.

    Attributes:
        source: the file.
        first: number of the first item, or of the first line, counted from 0.
        held: the items of a list; None where they are lines, which are read when they are asked for.
        begin: first byte of the first line.
        end: behind the last byte of the last line.
    """

    source: Path
    first: int
    held: tuple[Item, ...] | None
    begin: int = 0
    end: int = 0

    def read(self) -> Iterator[Item]:
        """Yield the items; blank lines are none."""
        if self.held is not None:
            yield from self.held
            return
        with self.source.open("rb") as file:
            file.seek(self.begin)
            lines = file.read(self.end - self.begin).split(b"\n")
        for number, line in enumerate(lines, self.first + 1):
            if line.strip():
                yield _item(line, f"line {number}")


def read_items(source: Path, size: int, *, are_lines: bool = False) -> list[Items]:
    """Divide the items of a file into groups of neighbours; whether it is a list or has lines is seen by its content.

    Args:
        source: the file.
        size: how many items or lines a group has, but for the last.
        are_lines: whether a file that holds one object has it as its one line.

    Raises:
        DataError: the file cannot be read, is compressed, or is neither a list nor lines of JSON objects.
    """
    try:
        with source.open("rb") as file:
            head = file.read(4096)
            check_plain(source, head)
            is_list = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
            if not is_list and (are_lines or _is_lines(source) or _first_is_whole(source)):
                ends = [0]
                file.seek(0)
                for line in file:
                    ends.append(ends[-1] + len(line))
                cuts = [*range(0, len(ends) - 1, size), len(ends) - 1]
                return [Items(source, a, None, ends[a], ends[b]) for a, b in pairwise(cuts)]
        content = source.read_bytes()
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check its path") from error
    items = _list_in(source, content)
    return [Items(source, first, tuple(items[first : first + size])) for first in range(0, len(items), size)]


def read_items_or_object(source: Path) -> Any:
    """Return the items of a file, a list of Item, or the object that it holds.

    Raises:
        DataError: the file cannot be read, is compressed, or is not JSON.
    """
    try:
        with source.open("rb") as file:
            head = file.read(4096)
            begins = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if _is_lines(source) or begins == b"[" or _first_is_whole(source):
            return [item for items in read_items(source, _MANY) for item in items.read()]
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check its path") from error
    return read_json(source)


def check_plain(source: Path, head: bytes) -> None:
    """Raise DataError where a file is compressed or UTF-16, by the bytes that it begins with."""
    if tool := unpacker_of(head):
        raise DataError(f"{source}: is compressed; unpack it ({tool})")
    if head.startswith(_UTF16):
        raise DataError(f"{source}: is UTF-16; save it as UTF-8")


def read_json(source: Path) -> Any:
    """Return what a file of JSON holds.

    Raises:
        DataError: the file cannot be read, is compressed, or is not JSON.
    """
    try:
        content = source.read_bytes()
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check its path") from error
    check_plain(source, content[:8])
    item = _item(content, "")
    if item.fault:
        raise DataError(f"{source}: {item.fault}; give a .json, or a .jsonl with one object a line")
    return item.content


def _is_lines(source: Path) -> bool:
    return source.suffix.lower() in (".jsonl", ".ndjson")


def _first_is_whole(source: Path) -> bool:
    """Say whether the first line of a file is a JSON object by itself, and there are more."""
    with source.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
        return isinstance(_item(first, "").content, dict) and any(line.strip() for line in file)


def _item(content: bytes | str, place: str) -> Item:
    try:
        return Item(place, json.loads(content))
    except RecursionError:
        return Item(place, None, "not JSON: it is nested too deep")
    except UnicodeDecodeError as error:
        return Item(place, None, f"not UTF-8: {error.reason} at byte {error.start}")
    except ValueError as error:
        return Item(place, None, f"not JSON: {error}")


def _list_in(source: Path, content: bytes) -> list[Item]:
    """Return the items of a JSON list; where one of them cannot be read by itself, the others can.

    Raises:
        DataError: there is no list.
    """
    whole = _item(content, "")
    if isinstance(whole.content, list):
        return [Item(f"item {number}", item) for number, item in enumerate(whole.content, 1)]
    parts = _parts_of(content.decode(errors="replace").removeprefix("\ufeff")) if "nested" in whole.fault else None
    if parts is not None:
        return [_item(part, f"item {number}") for number, part in enumerate(parts, 1)]
    if _is_lines(source) and whole.fault:
        lines = content.split(b"\n")
        return [_item(line, f"line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if whole.fault:
        raise DataError(f"{source}: {whole.fault}; give a list of objects, or .jsonl")
    raise DataError(f"{source}: must hold a list of objects; give one, or .jsonl with one object a line")


def _parts_of(text: str) -> list[str] | None:
    """Return the items of a JSON list as text, however deep they are nested; None where brackets do not match."""
    parts: list[str] = []
    depth, begin = 0, 0
    for token in _TOKEN.finditer(text):
        kind = token[0]
        if kind in "[{":
            depth += 1
            begin = token.end() if depth == 1 else begin
        elif kind in "]}" or (kind == "," and depth == 1):
            depth -= kind != ","
            if depth <= 1 and (kind == "," or depth == 0):
                parts.append(text[begin : token.start()])
                begin = token.end()
            if depth == 0:
                return parts if not text[token.end() :].strip() else None
    return None


def unpacker_of(head: bytes) -> str | None:
    """Return the program that unpacks a file that begins with some bytes; None where it is not compressed."""
    return next((program for begin, program in _UNPACKERS.items() if head.startswith(begin)), None)
