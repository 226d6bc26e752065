"""Plain values, as YAML and the command line give them, into checked dataclasses; knows nothing of a training run."""

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from math import inf, isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from megatron_sphinx.errors import ConfigError, nearest
from megatron_sphinx.parsing import ParseError, parse_yaml, read_yaml, shortened

T = TypeVar("T")  # a dataclass
_SHARE = "between 0 and 1"
_SET = "set it in the file or as {key}=value"  # the advice where a key is left out
_NO_TEXT = re.compile("[\x00\ud800-\udc7f\udd00-\udfff]")  # what no file's name has, UTF-8 or not


@dataclass(frozen=True, kw_only=True)
class Range:
    """The values that a number may have: the annotation of every number in a configuration or a file of ours.

    Attributes:
        least: the smallest of them.
        above: a number below all of them.
        most: the largest of them.
        below: a number above all of them.
        why: the reason for the bounds, which the message gives; empty where they need none.
    """

    least: float = -inf
    above: float = -inf
    most: float = inf
    below: float = inf
    why: str = ""

    def fault(self, value: float) -> str:
        """Say what a number must be that it is not; empty where it is in the range, which ends before the infinite."""
        if not -inf < value < inf:
            return f"a finite number, {self}".removesuffix(", ")
        if self.least <= value <= self.most and self.above < value < self.below:
            return ""
        if str(self) == _SHARE:
            return _SHARE
        is_low = value < self.least or value <= self.above
        return str(Range(least=self.least, above=self.above) if is_low else Range(most=self.most, below=self.below))

    def __str__(self) -> str:
        if (self.least, self.most) == (0, 1):
            return _SHARE
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {_figure(bound)}" for word, bound in bounds.items() if isfinite(bound))


_ANY = Range(least=-(2**63), most=2**63)


def _figure(number: float) -> str:
    """Write a bound as people do."""
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


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


def build(cls: type[T], values: Mapping[str, Any], path: str = "", *, advice: str = _SET) -> T:
    """Build a tree of dataclasses from plain values.

    Args:
        cls: the dataclass at the root of the tree. A number in it has a `Range`.
        values: plain values by the names of its fields.
        path: what messages put before a field's name, with the dot, e.g. `data.`.
        advice: what the message about a key that is left out advises; `{key}` in it is the key.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a required key left out, a wrong type, a number that
            is not finite or out of its range.
    """
    types = _types(cast(Any, cls))
    for key in values:
        if key not in types:
            near = nearest(f"{path}{key}"[:200], [path + name for name in types])
            raise ConfigError(f"{path}{shortened(key)}: unknown key; {near}")
    for item in fields(cls):  # type: ignore[arg-type]
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{path}{item.name}: not given; {advice.format(key=path + item.name)}")
    return cls(**{key: _value(types[key], value, f"{path}{key}", advice) for key, value in values.items()})


@cache
def _types(cls: Hashable) -> dict[str, Any]:
    """Return the type of each field of a dataclass, with the annotations of numbers."""
    return get_type_hints(cls, include_extras=True)


def range_of(kind: Any) -> tuple[Any, Range | None]:
    """Return a type without its annotations, and the range among them."""
    if get_origin(kind) is Annotated:
        plain, *notes = get_args(kind)
        return plain, next((note for note in notes if isinstance(note, Range)), None)
    return kind, None


def _value(kind: Any, value: Any, path: str, advice: str) -> Any:
    """Turn a plain value into the type `kind`, or raise an error that names the key."""
    kind, bounds = range_of(kind)
    if is_dataclass(kind):
        if isinstance(value, str) and (from_text := getattr(kind, "from_text", None)):
            return from_text(_scalar(str, value, path, None))
        return build(kind, _mapping(value, path), f"{path}.", advice=advice)  # type: ignore[arg-type]
    if get_origin(kind) in (UnionType, Union):
        words = [word for option in get_args(kind) if get_origin(option) is Literal for word in get_args(option)]
        if (value is None and NoneType in get_args(kind)) or value in words:
            return value
        kind = next(option for option in get_args(kind) if option is not NoneType)
        if words:
            return _scalar(kind, value, path, bounds, f" or {' or '.join(words)}")
    if get_origin(kind) is tuple:
        item_kind = Annotated[get_args(kind)[0], bounds] if bounds else get_args(kind)[0]
        return tuple(_value(item_kind, item, f"{path}.{i}", advice) for i, item in enumerate(_list(kind, value, path)))
    if get_origin(kind) is dict:
        item_kind = get_args(kind)[1]
        return {
            name: item if item_kind is Any else _value(item_kind, item, f"{path}.{shortened(name)}", advice)
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
        _check_range(found, bounds or _ANY, path)
    return found


def check_ranges(config: Any, path: str) -> None:
    """Refuse a dataclass whose numbers are out of their ranges, however it was made; `path` as for `build`.

    Raises:
        ConfigError: a number is not finite or out of its range.
    """
    for name, kind in _types(cast(Any, type(config))).items():
        _, bounds = range_of(kind)
        given = getattr(config, name)
        for value in given if isinstance(given, tuple) else (given,):
            if bounds and isinstance(value, int | float):
                _check_range(value, bounds, f"{path}{name}")


def _check_range(value: float, bounds: Range, path: str) -> None:
    """Refuse a number that is out of its range."""
    if fault := bounds.fault(value):
        why = f"; {bounds.why}" if bounds.why else ""
        raise ConfigError(f"{path}={shortened(value)}: must be {fault}{why}")
