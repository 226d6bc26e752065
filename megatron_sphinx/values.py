"""Plain values, as YAML and the command line give them, into checked dataclasses; knows nothing of a training run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from math import inf
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from megatron_sphinx import parsing
from megatron_sphinx.errors import ConfigError, nearest, shortened
from megatron_sphinx.parsing import ParseError, parse_yaml, read_yaml
from megatron_sphinx.ranges import ANY, Range, check_range, range_of, types_of

T = TypeVar("T")  # a dataclass
_SET = "set it in the file or as {key}=value"  # the advice where a key is left out
_NO_TEXT = re.compile("[\x00\ud800-\udc7f\udd00-\udfff]")  # what no file's name has, UTF-8 or not


def read_mapping(path: Path, title: str, *, otherwise: str, holds: str) -> dict[str, Any]:
    """Read the mapping that a YAML file holds.

    Args:
        path: the file.
        title: how messages begin.
        otherwise: what the message advises where there is no such file.
        holds: what the message says that the file must hold.

    Raises:
        ConfigError: no such file, not YAML, too large or too deep, a key given twice, not a mapping.
    """
    try:
        values = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{title}: {error.strerror}; {otherwise}") from error
    except ParseError as error:
        raise ConfigError(f"{title}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{title}: must hold {holds}")
    return values


def read_json(path: Path, schema: Any, newest: int = 1) -> dict[str, Any]:
    """Read a JSON file of ours, checked against what it must hold.

    Args:
        path: the file. Its key `format` is the version of what it holds; 1 where it has none.
        schema: a dataclass with what must be there, and what may; keys beside it are left alone.
        newest: the newest format that is known.

    Returns:
        What the file holds, as plain values.

    Raises:
        OSError: it cannot be opened.
        ParseError: it is not JSON, lacks what must be there, has another type or a number out of its range, or was made
            by a newer version of this package.
    """
    content = parsing.read_json(path)
    if not isinstance(content, dict):
        raise ParseError(f"{path.name} must hold an object with keys, not {shortened(content, 40)}")
    version = content.get("format", 1)
    if type(version) is int and version > newest:
        raise ParseError(
            f"{path.name} was made by a newer version (format {shortened(version, 20)}; this one knows {newest}); "
            f"upgrade megatron-sphinx"
        )
    try:
        build(_Format, {"format": version})
        build(schema, content, advice="the file is not whole", is_open=True)
    except ConfigError as error:
        raise ParseError(f"{path.name}: {error}") from error
    return content


@dataclass(frozen=True, kw_only=True)
class _Format:
    """Which version of its kind a JSON file of ours is."""

    format: Annotated[int, Range(least=1, most=1_000_000, why="it counts versions")]


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay `above` over `below`, mapping by mapping; lists and single values are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def override(values: dict[str, Any], text: str) -> None:
    """Set one dotted key in place from `key.path=value`; a whole number in the path picks an item of a list.

    Raises:
        ConfigError: the text has no `=`, its value is not YAML, or its path leads into a single value or past a list.
    """
    key, separator, yaml_text = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"{shortened(text)}: an override must read key.path=value")
    try:
        value = parse_yaml(yaml_text)
    except ParseError as error:
        reason = str(error).removeprefix("line 1: ").removeprefix("not YAML: ")
        raise ConfigError(f"{shortened(text)}: the value is not YAML ({reason}); put text in quotes") from error
    *parents, last = key.split(".")
    node: Any = values  # the mapping or list that holds the next name of the path
    for name in parents:
        node = _item(node, name, key) if isinstance(node, list) else node.setdefault(name, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"{key}: {name} is a single value, not a section")
    if isinstance(node, list):
        _item(node, last, key)
        node[int(last)] = value
    else:
        node[last] = value


def _item(items: list[Any], name: str, key: str) -> Any:
    """Pick the item of a list that the whole number `name` counts from 0."""
    if not name.isdigit() or int(name) >= len(items):
        raise ConfigError(f"{key}: {name} must be one of the {len(items)} items, counted from 0")
    return items[int(name)]


def check_choice(key: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is none of the known ones, and name the nearest.

    Raises:
        ConfigError: the value is not known.
    """
    if value not in known:
        raise ConfigError(f"{key}={value}: unknown value; {nearest(str(value), list(known))}")


def build(cls: type[T], values: Mapping[str, Any], path: str = "", *, advice: str = _SET, is_open: bool = False) -> T:
    """Build a tree of dataclasses from plain values.

    Args:
        cls: the dataclass at the root of the tree. A number in it has a `Range`.
        values: plain values by the names of its fields.
        path: what messages put before a field's name, with the dot, e.g. `data.`.
        advice: what the message about a key that is left out advises; `{key}` in it is the key.
        is_open: whether keys that are not known are left out; else they are refused.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a required key left out, a wrong type, a number that
            is not finite or out of its range.
    """
    types = types_of(cast(Any, cls))
    for key in values:
        if key not in types and not is_open:
            near = nearest(f"{path}{key}"[:200], [path + name for name in types])
            raise ConfigError(f"{path}{shortened(key)}: unknown key; {near}")
    for item in fields(cls):  # type: ignore[arg-type]
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{path}{item.name}: not given; {advice.format(key=path + item.name)}")
    more = {"advice": advice, "is_open": is_open}
    return cls(
        **{key: _value(types[key], value, f"{path}{key}", more) for key, value in values.items() if key in types}
    )


def _value(kind: Any, value: Any, path: str, more: dict[str, Any]) -> Any:
    """Turn a plain value into the type `kind`, or raise an error that names the key; `more` is for `build`."""
    kind, bounds = range_of(kind)
    if get_origin(kind) in (UnionType, Union):
        words = [word for option in get_args(kind) if get_origin(option) is Literal for word in get_args(option)]
        if (value is None and NoneType in get_args(kind)) or value in words:
            return value
        kind = next(option for option in get_args(kind) if option is not NoneType)
        if words:
            return _scalar(kind, value, path, bounds, f" or {' or '.join(words)}")
    if is_dataclass(kind):
        if isinstance(value, str) and (from_text := getattr(kind, "from_text", None)):
            return from_text(_scalar(str, value, path, None))
        return build(kind, _mapping(value, path), f"{path}.", **more)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        item_kind = Annotated[get_args(kind)[0], bounds] if bounds else get_args(kind)[0]
        return tuple(_value(item_kind, item, f"{path}.{i}", more) for i, item in enumerate(_list(kind, value, path)))
    if get_origin(kind) is dict:
        item_kind = get_args(kind)[1]
        return {
            name: item if item_kind is Any else _value(item_kind, item, f"{path}.{shortened(name)}", more)
            for name, item in _mapping(value, path).items()
        }
    return value if kind is Any else _scalar(kind, value, path, bounds)


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    """Require a mapping."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}={shortened(value)}: must be a section with keys of its own")
    return value


def _list(kind: Any, value: Any, path: str) -> Sequence[Any]:
    """Require a list for a tuple; a single item that a text can stand for may stand without its list."""
    if hasattr(get_args(kind)[0], "from_text") and isinstance(value, str | Mapping | None):
        value = [] if value is None else [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"{path}={shortened(value)}: must be a list")
    return value


def _scalar(kind: Any, value: Any, path: str, bounds: Range | None, otherwise: str = "") -> Any:
    """Turn a single value into a bool, an int, a float or a text; messages add what else it may be."""
    found: Any = value
    if kind is float:
        try:  # YAML reads 5e-5 as text
            found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
        except OverflowError:
            found = inf
        except ValueError:
            found = None
    if type(found) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        quotes = "; put it in quotes" if kind is str and isinstance(value, int | float) else ""
        given = "null" if value is None else shortened(value)
        raise ConfigError(f"{path}={given}: must be {names[kind]}{otherwise}{quotes}")
    if kind is str and (bad := _NO_TEXT.search(found)):
        raise ConfigError(f"{path}={shortened(found)}: holds the character U+{ord(bad.group()):04X}; remove it")
    if kind in (int, float):
        check_range(found, bounds or ANY, path)
    return found
