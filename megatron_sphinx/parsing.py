"""The one reader of YAML and JSON: whatever a file holds, it is read or refused at once, and in little memory."""

import json
import re
import stat
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_sphinx.errors import shortened

YAML_BYTES, JSON_BYTES = 2**20, 2**26  # the most of a file; an index of 700,000 shards has as many
_DEPTH = 40  # of nested lists and mappings
_VALUES = 20_000  # the most values of a YAML file, those that an alias repeats counted each time
_DIGITS = 400  # of a number
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_WORDS = ("null", "bool", "int", "float", "str", "merge", "seq", "map")


class ParseError(ValueError):
    """A file or a text that is not what it should be; the message says what is wrong, and in which line."""


class _Loader(_PARSER):  # type: ignore[misc]
    """YAML's own kinds of values and no others; what looks like a date, or like a number of YAML 1.1 alone, is text."""


_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+",
    "float": r"[-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] in ("null", "bool", "merge")]
    for first, found in _PARSER.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^({_pattern})$"), list("-+0123456789."))


def read_yaml(path: Path) -> Any:
    """Read what a YAML file holds.

    Raises:
        OSError: it cannot be opened.
        ParseError: it is too large, not UTF-8, not YAML, too deep, or gives a key twice.
    """
    return parse_yaml(read_text(path, YAML_BYTES))


def read_json(path: Path, most_bytes: int = JSON_BYTES) -> Any:
    """Read what a JSON file holds.

    Raises:
        OSError: it cannot be opened.
        ParseError: it is too large, not UTF-8, not JSON, too deep, or gives a key twice.
    """
    return parse_json(read_text(path, most_bytes))


def read_text(path: Path, most_bytes: int) -> str:
    """Read a text file, which must be UTF-8.

    Raises:
        OSError: it cannot be opened.
        ParseError: it is no file, has more bytes than `most_bytes`, or is not UTF-8.
    """
    try:
        kind = path.stat().st_mode
    except ValueError as error:  # a NUL in it
        raise ParseError(f"no file can have this name ({error})") from error
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind) and path.parts[1:2] not in (("dev",), ("proc",)):
        raise ParseError("is no regular file, and could be waited for without end")
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ParseError(f"has more than {most_bytes:,} bytes, more than such a file can need")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or content[:2].count(0) == 1:
        raise ParseError("is in UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ParseError(
            f"line {line}: byte {error.start} (0x{content[error.start]:02x}) is not UTF-8; save it as UTF-8"
        ) from error


def parse_json(text: str) -> Any:
    """Read JSON; numbers that are not finite are taken, as json writes them.

    Raises:
        ParseError: it is not JSON, too deep, or gives a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ParseError("not JSON that can be read: it is nested too deep") from error
    except ParseError:
        raise
    except ValueError as error:
        raise ParseError(f"not JSON: {shortened(error)}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, whose keys must differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ParseError(f"the key {shortened(twice)} is given twice")
    return found


def parse_yaml(text: str) -> Any:
    """Read one YAML document, of which no two parts are one object: aliases are copied.

    Raises:
        ParseError: it is not YAML, too deep, too large with its aliases, or gives a key twice.
    """
    if bad := _UNPRINTABLE.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        raise ParseError(f"line {line}: holds the character U+{ord(bad.group()):04X}, which is not of YAML; remove it")
    try:
        _check_events(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            left = [_VALUES]
            return _value(loader, node, "", (), left)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ParseError(_fault(text, error)) from error
    except RecursionError as error:
        raise ParseError("not YAML that can be read: it is nested too deep") from error


def _check_events(text: str) -> None:
    """Refuse what is nested too deep or has too many values, before anything is made of it."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_PARSER)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        line = event.start_mark.line + 1  # type: ignore[union-attr]
        if depth > _DEPTH:
            raise ParseError(f"line {line}: is nested deeper than {_DEPTH} levels")
        if number > 2 * _VALUES:
            raise ParseError(f"line {line}: it has more than {_VALUES:,} values")


def _value(loader: Any, node: yaml.Node, name: str, above: tuple[yaml.Node, ...], left: list[int]) -> Any:
    """Make the plain value of a node.

    Args:
        loader: what has read it.
        node: of the document.
        name: dotted path to it, for messages.
        above: the nodes that it is in.
        left: how many values there may still be.
    """
    line = node.start_mark.line + 1
    left[0] -= 1
    if left[0] < 0:
        raise ParseError(f"line {line}: with its aliases it has more than {_VALUES:,} values; write out what is needed")
    if any(node is other for other in above):
        raise ParseError(f"line {line}: the alias in {name} leads to what it is part of")
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in _WORDS:
        raise ParseError(
            f"line {line}: {shortened(node.tag)} of {name or 'all'} is no kind of value here; leave it out"
        )
    within = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, f"{name}.{n}".lstrip("."), within, left) for n, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, name, within, left)
    return _scalar(loader, node, name)


def _mapping(
    loader: Any, node: yaml.MappingNode, name: str, within: tuple[yaml.Node, ...], left: list[int]
) -> dict[str, Any]:
    """Make the mapping of a node, what `<<` merges into it below its own keys."""
    values: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, item in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag.endswith(":merge"):
            for part in _merged(loader, item, name, within, left):
                merged = part | merged
            continue
        key = _scalar(loader, key_node, name) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise ParseError(
                f"line {line}: the key {shortened(key_node.value)} {f'in {name} ' if name else ''}is no text; "
                f"write it in quotes"
            )
        full = f"{name}.{key}".lstrip(".")
        if key in lines:
            raise ParseError(f"line {line}: {shortened(full)} is given twice, first in line {lines[key]}; remove one")
        lines[key] = line
        values[key] = _value(loader, item, full, within, left)
    return merged | values


def _merged(
    loader: Any, node: yaml.Node, name: str, within: tuple[yaml.Node, ...], left: list[int]
) -> Iterator[dict[str, Any]]:
    """Yield the mappings that a `<<` names, the one that counts most first."""
    value = _value(loader, node, name, within, left)
    for part in value if isinstance(value, list) else [value]:
        if not isinstance(part, dict):
            raise ParseError(f"line {node.start_mark.line + 1}: << in {name or 'it'} must name mappings")
        yield part


def _scalar(loader: Any, node: yaml.Node, name: str) -> Hashable:
    """Make the single value of a node."""
    line = node.start_mark.line + 1
    if node.tag.endswith((":int", ":float")) and len(node.value) > _DIGITS:
        raise ParseError(f"line {line}: the number of {name or 'all'} has more than {_DIGITS} digits")
    try:
        found: Hashable = loader.construct_object(node, deep=True)
    except (ValueError, KeyError, TypeError) as error:  # a tag that does not fit its text
        raise ParseError(f"line {line}: {shortened(node.value)} is no {node.tag.rpartition(':')[2]}") from error
    return found


def _fault(text: str, error: yaml.YAMLError) -> str:
    """Say what YAML has against a text, and in which line."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return f"not YAML: {shortened(error)}"
    line = text.split("\n")[mark.line] if mark.line < text.count("\n") + 1 else ""
    problem = getattr(error, "problem", None) or getattr(error, "context", None) or "it cannot be read"
    if "\t" in line[: len(line) - len(line.lstrip())]:
        problem = "it is indented by a tab; use spaces"
    return f"line {mark.line + 1}: not YAML: {shortened(problem)}"
