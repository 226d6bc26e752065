"""From tokens to text that may be shown, and whether a stop string has come.

Text is cut where characters are whole, never where tokens end: a character may be several tokens, and a token may hold
the end of one and the beginning of the next. Each token costs the decoding of a few, however long the answer is.
"""

from collections.abc import Sequence
from typing import Protocol

from megatron_sphinx.errors import DataError

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes become that are no character, or none yet
_MOST_CONTEXT = 16  # blank tokens that are kept as context
_FEW_OPEN = 8  # tokens that may wait for the end of a character, which has at most four bytes
_MOST_OPEN = 64  # tokens that may wait at all, where each border is inside a character
_TAIL = 3  # bytes, so at most as many tokens, that may still become a character


class Decoder(Protocol):
    """What a tokenizer is used for here."""

    def decode(self, ids: list[int]) -> str:
        """Return the text that token ids stand for."""


class _Text:
    """The text of a sequence of tokens, given out as soon as it is final.

    Each group of tokens is decoded behind others, its context, because a tokenizer drops the space that the very first
    token begins with. The context is the tokens from the beginning while these are blank, then one token that is not.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._before = ""  # the text of the context
        self._is_settled = False  # whether the context stays as it is
        self._open: list[int] = []  # tokens whose text is not given out

    def feed(self, token: int) -> str:
        """Take a token; return the text that is final with it."""
        self._open.append(token)
        text = self._decode(self._open)
        if text is not None and not text.endswith(_BROKEN):
            return self._close(len(self._open), text)
        count = self._seam() if len(self._open) > _FEW_OPEN else 0
        return self._close(count, self._decode(self._open[:count])) if count else ""

    def rest(self) -> str:
        """Return the text of the tokens whose text has not been given out."""
        return self._close(len(self._open), self._decode(self._open)) if self._open else ""

    def _decode(self, tokens: list[int]) -> str | None:
        """Return the text of tokens behind the context; None where they change the text of that."""
        text = self._tokenizer.decode(self._context + tokens)
        return text[len(self._before) :] if text.startswith(self._before) else None

    def _seam(self) -> int:
        """Return how many of the first open tokens are no part of what may still become a character; 0 if unknown."""
        most, whole = len(self._open) - _TAIL, self._decode(self._open)
        for count in range(most, 0, -1):
            first, second = self._decode(self._open[:count]), self._decode(self._open[count:])
            if whole is not None and first is not None and second is not None and first + second == whole:
                return count
        return most if len(self._open) > _MOST_OPEN else 0

    def _close(self, count: int, text: str | None) -> str:
        """Give out the text of the first open tokens, and take them into account as context of later ones."""
        tokens, self._open = self._open[:count], self._open[count:]
        if text is None:
            text = self._tokenizer.decode(tokens)
        if self._is_settled:
            return text
        if alone := self._tokenizer.decode(tokens).strip():
            self._context, self._before = tokens, self._tokenizer.decode(tokens)
            self._is_settled = len(tokens) == 1 and _BROKEN not in alone
        elif not self._before.strip() and len(self._context) < _MOST_CONTEXT:
            self._context = self._context + tokens
            self._before = self._tokenizer.decode(self._context)
        return text


class Detokenizer:
    """The text of one answer as its tokens come, up to a stop string.

    What may be the beginning of a stop string is held back, and so is half a character.

    Args:
        tokenizer: what decodes; only `decode` is used.
        stop: texts any of which ends the answer. Of several, the one that is complete first does.

    Raises:
        DataError: a stop string is empty.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str]) -> None:
        if not all(stop):
            raise DataError("stop='': an empty text would end every answer before it begins; leave it out")
        self._text, self._stop = _Text(tokenizer), tuple(stop)
        self._held = ""
        self._is_stopped = False

    def feed(self, token: int) -> tuple[str, bool]:
        """Take the next token of the answer.

        Returns:
            The text that may be shown now, and whether a stop string has come; no text comes behind that.
        """
        return self._show(self._text.feed(token)), self._is_stopped

    def rest(self) -> str:
        """Return what was held back, once the last token has been fed: it was no beginning of a stop string."""
        shown = self._show(self._text.rest())
        if self._is_stopped:
            return shown
        rest, self._held = self._held, ""
        return shown + rest

    def _show(self, text: str) -> str:
        """Take more text; return what of all that is held may be shown."""
        if self._is_stopped or not text:
            return ""
        held = self._held + text
        found = [(place + len(stop), place) for stop in self._stop if (place := held.find(stop)) >= 0]
        self._is_stopped = bool(found)
        cut = min(found)[1] if found else len(held) - self._beginning(held)
        self._held = "" if found else held[cut:]
        return held[:cut]

    def _beginning(self, text: str) -> int:
        """Return how many of the last characters of a text may be the beginning of a stop string."""
        return max((_overlap(text, stop) for stop in self._stop), default=0)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that is a beginning of the stop string, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
