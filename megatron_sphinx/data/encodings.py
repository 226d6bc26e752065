"""The libraries that tokenize behind one interface: sentencepiece models, and tokenizer.json of Hugging Face's."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data.tokenizer_files import BOS_NAMES, EOS_NAMES, JSON, KEY, named_tokens
from megatron_sphinx.errors import DataError, shortened

Spans = list[tuple[int, int]]


class Encoding(Protocol):
    """What a tokenizer is read as.

    Attributes:
        vocabulary: how many ids there are, counted from 0.
        bos: the id that begins a sequence.
        eos: the id that ends one.
    """

    vocabulary: int
    bos: int
    eos: int

    def encode(self, text: str, *, has_special: bool) -> list[int]:
        """Return the ids of a text; control tokens only where it may have them."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Return the ids of each text, without control tokens; other threads go on meanwhile."""

    def encode_with_spans(self, text: str) -> tuple[list[int], Spans]:
        """Return the ids of a text without control tokens, and the characters of each, as (begin, end)."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control tokens have none."""


class SentencepieceModel:
    """A sentencepiece model. It finds no control pieces in a text, whoever wrote it.

    Args:
        path: of the file, for messages.
        content: of the file.

    Attributes:
        vocabulary: how many pieces it has.
        bos: the id of its BOS piece.
        eos: the id of its EOS piece.

    Raises:
        DataError: it is no sentencepiece model, or has no BOS or EOS piece.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        import sentencepiece

        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"{KEY}={path}: not a sentencepiece model; give a .model file, or a {JSON}") from error
        self.vocabulary: int = self._model.vocab_size()
        self.bos: int = self._model.bos_id()
        self.eos: int = self._model.eos_id()
        if min(self.bos, self.eos) < 0:
            raise DataError(f"{KEY}={path}: has no BOS or no EOS piece; train it with both")

    def encode(self, text: str, *, has_special: bool) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Return the ids of each text."""
        ids: list[NDArray[np.integer]] = self._model.encode(list(texts), return_type="numpy", num_threads=1)
        return ids

    def encode_with_spans(self, text: str) -> tuple[list[int], Spans]:
        """Return the ids of a text, and the characters of each, as (begin, end)."""
        mapping = self._model.encode(text, return_type="offset_mapping")
        return mapping["ids"], mapping["offsets"]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control pieces have none."""
        text: str = self._model.decode(list(ids))
        return text


class TokenizerJson:
    """A tokenizer.json: byte-level BPE and whatever else the `tokenizers` library reads.

    Args:
        path: of the file, for messages; what lies beside it tells BOS and EOS.
        content: of the file.

    Attributes:
        vocabulary: one more than its highest id; the ids of its own added tokens count, too.
        bos: the id that begins a sequence. Where nothing names one, that of <|endoftext|>, which stands between
            documents, and where there is no such token, EOS, which does.
        eos: the id that ends a sequence.

    Raises:
        DataError: it is no tokenizer.json, nothing tells its EOS, or a file beside it is damaged or names a token that
            it does not have.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        self._path = path
        try:
            self._text = content.decode()
            self._plain = self._make()
        except Exception as error:  # the library raises nothing narrower
            fault = shortened(error)
            raise DataError(f"{KEY}={path}: not a tokenizer.json that can be read ({fault}); fetch it again") from error
        ids = self._plain.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise DataError(f"{KEY}={path}: has no tokens; fetch it again")
        self.vocabulary = max(ids) + 1
        eos = self._special("eos", EOS_NAMES)
        if eos is None:
            raise DataError(
                f"{KEY}={path}: nothing tells which token is EOS; "
                f"put its tokenizer_config.json with eos_token beside it"
            )
        bos = self._special("bos", BOS_NAMES)
        self.eos, self.bos = eos, eos if bos is None else bos
        self._mark(self._plain)
        self._plain.encode_special_tokens = True  # as text

    def _make(self) -> Any:
        """Read the tokenizer anew, without what would cut, pad or trim what it gives."""
        import tokenizers

        made = tokenizers.Tokenizer.from_str(self._text)
        made.no_truncation()
        made.no_padding()
        made.post_processor = None
        return made

    @cached_property
    def _with_special(self) -> Any:
        """A second tokenizer, which finds control tokens in a text."""
        made = self._make()
        self._mark(made)
        return made

    def _mark(self, made: Any) -> None:
        """Let BOS and EOS be control tokens, also where the file has them as words."""
        made.add_special_tokens([made.id_to_token(self.bos), made.id_to_token(self.eos)])

    def _special(self, name: str, known: Sequence[str]) -> int | None:
        """Find a special token: by the files beside the tokenizer, else by its name; None where it has none.

        Raises:
            DataError: a file beside it is damaged, or names a token that it does not have.
        """
        for file, key, token in named_tokens(self._path, name):
            number = self._plain.token_to_id(token) if isinstance(token, str) else token
            if number is None or not 0 <= number < self.vocabulary or self._plain.id_to_token(number) is None:
                raise DataError(
                    f"{KEY}={self._path}: {file.name} beside it has {key}={shortened(token)}, which is no token of it; "
                    f"give files that belong together"
                )
            return int(number)
        found = (self._plain.token_to_id(token) for token in known)
        return next((number for number in found if number is not None), None)

    def encode(self, text: str, *, has_special: bool) -> list[int]:
        """Return the ids of a text; control tokens only where it may have them."""
        ids: list[int] = self._encoded(self._with_special if has_special else self._plain, text).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Return the ids of each text, without control tokens."""
        return [np.array(self._encoded(self._plain, text).ids, np.int32) for text in texts]

    def encode_with_spans(self, text: str) -> tuple[list[int], Spans]:
        """Return the ids of a text without control tokens, and the characters of each, as (begin, end)."""
        encoded = self._encoded(self._plain, text)
        return encoded.ids, _side_by_side(encoded.offsets, len(text))

    @staticmethod
    def _encoded(tokenizer: Any, text: str) -> Any:
        return tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control tokens have none."""
        text: str = self._plain.decode(list(ids), skip_special_tokens=True)
        return text


def _side_by_side(offsets: Sequence[tuple[int, int]], length: int) -> Spans:
    """Make spans of characters that follow each other without gaps, over the whole text.

    Args:
        offsets: of each token, as the library tells them: all bytes of a character have the same ones, and characters
            that a normalization has put together or dropped may be in none.
        length: of the text.

    Returns:
        A character of several tokens belongs to the last of them, one that is in none to the token behind it.
    """
    ends: list[int] = []
    limit = length
    for begin, end in reversed(offsets):
        ends.append(min(end, limit) if ends else length)
        limit = min(begin, ends[-1])
    ends.reverse()
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []
