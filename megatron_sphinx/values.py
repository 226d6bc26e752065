"""Plain values, as YAML and the command line give them, into checked dataclasses; knows nothing of a training run."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_sphinx.errors import ConfigError, nearest

T = TypeVar("T")  # a dataclass


def read_mapping(path: Path, title: str, *, otherwise: str, holds: str) -> dict[str, Any]:
    """Read the mapping that a YAML file holds.

    Args:
        path: the file.
        title: how messages begin.
        otherwise: what the message advises where there is no such file.
        holds: what the message says that the file must hold.

    Raises:
        ConfigError: no such file, not YAML, not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{title}: {error.strerror}; {otherwise}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{title}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{title}: must hold {holds}")
    return values


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
        raise ConfigError(f"{text}: an override must read key.path=value")
    try:
        value = yaml.safe_load(yaml_text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text}: the value is not YAML") from error
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


def build(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build a tree of dataclasses from plain values.

    Args:
        cls: the dataclass at the root of the tree.
        values: plain values by the names of its fields.
        path: what messages put before a field's name, with the dot, e.g. `data.`.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a required key left out, a wrong type.
    """
    types = get_type_hints(cls)
    for key in values:
        if key not in types:
            raise ConfigError(f"{path}{key}: unknown key; {nearest(f'{path}{key}', [path + name for name in types])}")
    for item in fields(cls):  # type: ignore[arg-type]
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{path}{item.name}: not given; set it in the file or as {path}{item.name}=value")
    return cls(**{key: _value(types[key], value, f"{path}{key}") for key, value in values.items()})


def _value(kind: Any, value: Any, path: str) -> Any:
    """Turn a plain value into the type `kind`, or raise an error that names the key."""
    if is_dataclass(kind):
        if isinstance(value, str) and (from_text := getattr(kind, "from_text", None)):
            return from_text(value)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value}: must be a section with keys of its own")
        return build(kind, value, f"{path}.")  # type: ignore[arg-type]
    if get_origin(kind) in (UnionType, Union):
        words = [word for option in get_args(kind) if get_origin(option) is Literal for word in get_args(option)]
        if (value is None and NoneType in get_args(kind)) or value in words:
            return value
        kind = next(option for option in get_args(kind) if option is not NoneType)
        if words:
            return _scalar(kind, value, path, f" or {' or '.join(words)}")
    if get_origin(kind) is tuple:
        item_kind = get_args(kind)[0]
        if hasattr(item_kind, "from_text") and isinstance(value, str | Mapping | None):
            value = [] if value is None else [value]  # a single item may stand without its list
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{path}={value}: must be a list")
        return tuple(_value(item_kind, item, f"{path}.{i}") for i, item in enumerate(value))
    return _scalar(kind, value, path)


def _scalar(kind: type, value: Any, path: str, otherwise: str = "") -> Any:
    """Turn a single value into a bool, an int, a float or a text; messages add what else it may be."""
    if kind is float:
        try:  # YAML reads 5e-5 as text
            return float(value) if not isinstance(value, bool) else _refuse(kind, value, path, otherwise)
        except (TypeError, ValueError):
            _refuse(kind, value, path, otherwise)
    if type(value) is not kind:
        _refuse(kind, value, path, otherwise)
    return value


def _refuse(kind: type, value: Any, path: str, otherwise: str) -> Any:
    """Raise the error of a value that has another type."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{path}={value}: must be {names[kind]}{otherwise}")
