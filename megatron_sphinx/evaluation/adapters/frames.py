"""Boxes of an answer in fractions of the picture, as other programs have them, instead of the square around it."""

from megatron_sphinx.prepare.boxes import parse_brackets, place_in_pixels

_DECIMALS = 4


def in_picture(text: str, width: int, height: int, padding: str) -> str:
    """Return an answer whose boxes and points are in fractions of the picture's own width and height.

    Args:
        text: the answer of a model.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        padding: where the picture is in the square that the model's boxes are fractions of: centre or corner.

    Raises:
        DataError: the padding is unknown.
    """
    for bracket in reversed(parse_brackets(text)):
        places = [place_in_pixels(place, width, height, padding) for place in bracket.places]
        numbers = [[value / (height if axis % 2 else width) for axis, value in enumerate(place)] for place in places]
        inside = ";".join(",".join(_written(number) for number in place) for place in numbers)
        text = f"{text[: bracket.begin]}[{inside}]{text[bracket.end :]}"
    return text


def _written(number: float) -> str:
    """Write a fraction of the picture, cut to it, with decimals that other programs look for."""
    return f"{min(max(number, 0.0), 1.0):.{_DECIMALS}f}"
