"""What the configuration file of a checkpoint may say: keys that are honoured, that must have one value, or are free.

Each format has one table of its keys. A key that no table knows may change what the model computes, so it is refused
by name, until the user says that it does not.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sphinx.errors import CheckpointError


class Fault(NamedTuple):
    """A setting that is not computed here.

    Attributes:
        key: its key, with dots.
        value: its value.
        reason: what the setting changes, and what to give instead.
    """

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Fixed:
    """A key that must have one value, since another one changes what the model computes.

    Attributes:
        values: the value, and other ways to write it.
        reason: what another value changes.
        otherwise: the value that the format gives a key which is absent.
    """

    values: tuple[Any, ...]
    reason: str
    otherwise: Any = None

    def has(self, value: Any) -> bool:
        """Tell whether a value is the one that it must be; true is not 1, and text is no number."""
        is_bool = isinstance(value, bool)
        return any(value == known and is_bool == isinstance(known, bool) for known in self.values)


@dataclass(frozen=True)
class KeyTable:
    """The keys of a configuration file of one format.

    Attributes:
        honoured: keys that the reader of the format takes.
        fixed: keys that must have one value.
        free: keys that change nothing of what the weights compute.
        faults: finds settings in honoured keys that are not computed here.
    """

    honoured: Collection[str]
    fixed: Mapping[str, Fixed]
    free: Collection[str]
    faults: Callable[[Mapping[str, Any]], Iterator[Fault]] = field(default=lambda _: iter(()))

    def unknown(self, values: Mapping[str, Any]) -> list[str]:
        """List the keys of a file that the table does not know."""
        return [key for key in values if key not in self.honoured and key not in self.fixed and key not in self.free]


@dataclass(frozen=True)
class SettingsFile:
    """A configuration file with the table of its keys.

    Attributes:
        path: the file.
        values: its content.
        table: of its format.
    """

    path: Path
    values: Mapping[str, Any]
    table: KeyTable

    def check(self, ignored: Collection[str] = ()) -> list[str]:
        """Refuse what is not computed here, or not known.

        Args:
            ignored: keys that the user says are of no matter.

        Returns:
            A line for each setting that is passed over since the user says so.

        Raises:
            CheckpointError: a setting is not computed here, or not known, and is not ignored.
        """
        faults = list(self._faults())
        for key in ignored:
            if key in self.table.honoured and not any(fault.key == key for fault in faults):
                raise CheckpointError(f"--ignore {key}: is what the weights are read by; leave this option out")
        for fault in faults:
            if fault.key not in ignored:
                raise CheckpointError(f"{self.path}: {shown(fault.key)}={shortened(fault.value)}: {fault.reason}")
        unknown = self.table.unknown(self.values)
        if open_keys := [key for key in unknown if key not in ignored]:
            named = ", ".join(f"{shown(key)}={shortened(self.values[key])}" for key in open_keys[:_MOST_NAMED])
            named += f" and {len(open_keys) - _MOST_NAMED} more" if len(open_keys) > _MOST_NAMED else ""
            options = " ".join(f"--ignore {shown(key)}" for key in open_keys[:_MOST_NAMED])
            raise CheckpointError(
                f"{self.path}: {named}: unknown, and may change what the model computes; "
                f"if not, convert, mix or inspect it with {options}"
            )
        passed_over = [(fault.key, fault.value) for fault in faults] + [(key, self.values[key]) for key in unknown]
        return [f"{self.path}: {shown(key)}={shortened(value)} is ignored" for key, value in passed_over]

    def _faults(self) -> Iterator[Fault]:
        for key, fixed in self.table.fixed.items():
            value = self.values.get(key, fixed.otherwise)
            if value is not None and not fixed.has(value):
                given = "" if key in self.values else " where it is absent, as here"
                is_named = fixed.values and fixed.values != ({},)
                wanted = f"with {key}={shortened(fixed.values[0])}" if is_named else "without it"
                yield Fault(key, value, f"{fixed.reason}{given}; give a model {wanted}")
        yield from self.table.faults(self.values)


_MOST_NAMED, _MOST_SHOWN = 8, 200  # keys in a message, and characters of a value
_LARGEST = 1e300


def shortened(value: Any) -> str:
    """Return a value for a message: in one line, and not long."""
    try:
        text = " ".join(repr(value).split())
    except RecursionError:
        text = "what is nested too deep"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def shown(name: str) -> str:
    """Return a name from somebody's file for a message: as it is where it can stand in a line, else quoted."""
    return name if name.isprintable() and len(name) <= _MOST_SHOWN else shortened(name)


class Values:
    """The values of a configuration file, read with the format's own defaults; null is as if the key were absent.

    Args:
        values: content of the file.
        path: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self._values, self._path = values, path

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return a whole number.

        Args:
            key: what it is called.
            default: its value where it is absent; None where it must be there.
            least: the smallest one.

        Raises:
            CheckpointError: it is none, or too small.
        """
        value = self._given(key, default)
        if type(value) is not int or value < least:
            raise self._fault(key, value, f"must be a whole number, at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number above 0.

        Args:
            key: what it is called.
            default: its value where it is absent; None where it must be there.

        Raises:
            CheckpointError: it is none.
        """
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
            raise self._fault(key, value, "must be a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """Tell whether a key is set."""
        return self._values.get(key) is True

    def section(self, key: str) -> "Values":
        """Return the values of a mapping inside the file; none where it is absent.

        Raises:
            CheckpointError: it is no mapping.
        """
        value = self._given(key, {})
        if not isinstance(value, Mapping):
            raise self._fault(key, value, "must hold keys")
        return Values(value, self._path)

    def has(self, key: str) -> bool:
        """Tell whether a key is there."""
        return self._values.get(key) is not None

    def __bool__(self) -> bool:
        return bool(self._values)

    def _given(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        return default if value is None else value

    def _fault(self, key: str, value: Any, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {key}={shortened(value)}: {reason}; give a whole checkpoint")
