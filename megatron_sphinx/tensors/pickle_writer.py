"""Writes pickles of plain values and of objects that are named, not imported: torch's files without torch.

Source: the comments on operations in CPython's Lib/pickletools.py.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Name:
    """Stands for what a module has under a name.

    Attributes:
        module: the module.
        name: the name in it.
    """

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """Stands for what a function returns, or a class makes, when the pickle is read.

    Attributes:
        function: what is called.
        arguments: what it is given.
    """

    function: Name
    arguments: Sequence[Any] = ()


@dataclass(frozen=True, eq=False)
class Instance:
    """Stands for an object that is made without arguments and then given its state.

    Attributes:
        kind: its class.
        state: its attributes, or what its `__setstate__` takes.
    """

    kind: Name
    state: Any


@dataclass(frozen=True)
class Outside:
    """Stands for what lies outside of the pickle, as torch has its storages.

    Attributes:
        place: where that is.
    """

    place: Any


def dumps(value: Any) -> bytes:
    """Write a value as a pickle of protocol 2, as torch.save does.

    Args:
        value: of None, bool, int, str, tuple, list, dict and the classes of this module.

    Raises:
        TypeError: it is of another type.
    """
    return b"\x80\x02" + _encode(value) + b"."


def _encode(value: Any) -> bytes:
    encode = _ENCODERS.get(type(value))
    if encode is None:
        raise TypeError(f"{type(value).__name__}: cannot be written here; give plain values")
    return encode(value)


def _encode_all(values: Iterable[Any]) -> bytes:
    return b"".join(map(_encode, values))


def _encode_text(value: str) -> bytes:
    text = value.encode()
    return b"X" + struct.pack("<I", len(text)) + text


def _encode_number(value: int) -> bytes:
    if 0 <= value < 2**8:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"\x88" if value else b"\x89",
    int: _encode_number,
    str: _encode_text,
    tuple: lambda value: b"(" + _encode_all(value) + b"t",
    list: lambda value: b"](" + _encode_all(value) + b"e",
    dict: lambda value: b"}(" + _encode_all(part for item in value.items() for part in item) + b"u",
    Name: lambda value: f"c{value.module}\n{value.name}\n".encode(),
    Call: lambda value: _encode(value.function) + _encode(tuple(value.arguments)) + b"R",
    Instance: lambda value: _encode(value.kind) + b")\x81" + _encode(value.state) + b"b",
    Outside: lambda value: _encode(value.place) + b"Q",
}
