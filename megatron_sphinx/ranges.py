"""The range of every number that a configuration or a file of ours gives, and what is said of one beside it."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from math import inf, isfinite
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

from megatron_sphinx.errors import ConfigError, shortened

_SHARE = "between 0 and 1"


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


ANY = Range(least=-(2**63), most=2**63)  # of a number without another range


def _figure(number: float) -> str:
    """Write a bound as people do."""
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


@cache
def types_of(cls: Hashable) -> dict[str, Any]:
    """Return the type of each field of a dataclass, with the annotations of numbers."""
    return get_type_hints(cls, include_extras=True)


def range_of(kind: Any) -> tuple[Any, Range | None]:
    """Return a type without its annotations, and the range among them."""
    if get_origin(kind) is Annotated:
        plain, *notes = get_args(kind)
        return plain, next((note for note in notes if isinstance(note, Range)), None)
    return kind, None


def check_ranges(config: Any, path: str) -> None:
    """Refuse a dataclass whose numbers are out of their ranges, however it was made; `path` as for `build`.

    Raises:
        ConfigError: a number is not finite or out of its range.
    """
    for name, kind in types_of(cast(Any, type(config))).items():
        _, bounds = range_of(kind)
        given = getattr(config, name)
        for value in given if isinstance(given, tuple) else (given,):
            if bounds and isinstance(value, int | float):
                check_range(value, bounds, f"{path}{name}")


def check_range(value: float, bounds: Range, path: str) -> None:
    """Refuse a number that is out of its range; `path` is its whole key.

    Raises:
        ConfigError: it is.
    """
    if fault := bounds.fault(value):
        why = f"; {bounds.why}" if bounds.why else ""
        raise ConfigError(f"{path}={shortened(value)}: must be {fault}{why}")
