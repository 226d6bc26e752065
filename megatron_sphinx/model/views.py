"""Which views of a picture a model looks at. Arithmetic on sizes, so that a plan knows them without the pixels."""

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """A part of the padded square, in fractions of its side: left, top, width (a square part)."""

    left: float
    top: float
    width: float


GLOBAL = View(0.0, 0.0, 1.0)


def views_of(width: int, height: int) -> tuple[View, ...]:
    """The views of a picture of this size, the global one first.

    Source: SPHINX, arXiv:2311.07575, section 4.1: pre-training looks at the global view only.
    """
    return (GLOBAL,)
