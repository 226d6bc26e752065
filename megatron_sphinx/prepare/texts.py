"""Texts of other people's files: which of them can become tokens."""

from megatron_sphinx.errors import DataError


def check_text(text: str, name: str) -> None:
    """Raise DataError where a text cannot become tokens: half a surrogate pair is in it, or a NUL character.

    Args:
        text: as JSON or a file has it.
        name: what the text is, as the message begins.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is not Unicode: half a surrogate pair at character {error.start}") from error
    if "\0" in text:
        raise DataError(f"{name} with a NUL character")
