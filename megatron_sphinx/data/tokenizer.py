"""Text to token ids and back, by a sentencepiece model or a tokenizer.json."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data.encodings import Encoding, SentencepieceModel, TokenizerJson
from megatron_sphinx.data.tokenizer_files import KEY, tokenizer_file
from megatron_sphinx.errors import DataError
from megatron_sphinx.ranges import Range

# The rows that a model may have for no token: 152,064 of Qwen2.5-7B for 151,665, 102,400 of DeepSeek-7B for 100,015.
_LEAST_PADDING, _PART_OF_PADDING = 127, 16


@dataclass(frozen=True)
class TokenizerIdentity:
    """What a tokenizer is recognised by; it is written beside data that was made with it.

    Attributes:
        vocabulary: how many token ids it has.
        sha256: of its file.
    """

    vocabulary: Annotated[int, Range(least=1, most=2**31, why="ids are counted from 0")]
    sha256: str

    def __repr__(self) -> str:
        # Prepared parts are recognised by a hash of this text; the class had this name when the first were made.
        return f"TokenizerMark(vocabulary={self.vocabulary}, sha256={self.sha256!r})"

    @property
    def token_type(self) -> np.dtype[Any]:
        """The type in which token files and indexes hold the ids.

        Source: DType.optimal_dtype of megatron.core.datasets.indexed_dataset, which takes seconds to import.
        """
        return np.dtype(np.uint16 if self.vocabulary < 65500 else np.int32)


class Tokenizer:
    """A sentencepiece model or a tokenizer.json; BOS and EOS are added by whoever needs them, never by `encode`.

    Args:
        path: the file; or a folder that holds tokenizer.model or, without that, tokenizer.json.

    Attributes:
        identity: what it is recognised by.
        bos: the id that begins a sequence; with a tokenizer.json that has none, what stands between documents.
        eos: the id that ends a sequence.
        is_padded: whether a model may have more rows than it has ids, as those that come with a tokenizer.json have.

    Raises:
        DataError: the file is missing, is of neither kind, or has no BOS or EOS piece.
    """

    def __init__(self, path: str | Path) -> None:
        file = tokenizer_file(Path(path))
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"{KEY}={file}: {error.strerror}; "
                f"give a sentencepiece .model file, a tokenizer.json, or a folder with one"
            ) from error
        self.is_padded = file.suffix == ".json"
        self._encoding: Encoding = (TokenizerJson if self.is_padded else SentencepieceModel)(file, content)
        self.bos, self.eos = self._encoding.bos, self._encoding.eos
        self.identity = TokenizerIdentity(self._encoding.vocabulary, hashlib.sha256(content).hexdigest())

    def encode(self, text: str, *, has_special: bool = False) -> list[int]:
        """Return the token ids of a text, without BOS and EOS around it.

        Args:
            text: what is encoded.
            has_special: whether names of control tokens in it, such as <|im_start|>, become those tokens; what a user
                has written never may. A sentencepiece model has no control tokens in a text.

        Raises:
            DataError: the text holds half a surrogate pair, which is no character.
        """
        _check_characters(text)
        return self._encoding.encode(text, has_special=has_special)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Return the token ids of each text, without BOS and EOS around it; other threads go on meanwhile.

        Raises:
            DataError: a text holds half a surrogate pair, which is no character.
        """
        for text in texts:
            _check_characters(text)
        return self._encoding.encode_batch(texts)

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a text, and the characters that each stands for, as (begin, end).

        A character of several tokens belongs to the last of them; the others are empty spans at its begin.

        Raises:
            DataError: the text holds half a surrogate pair, which is no character.
        """
        _check_characters(text)
        return self._encoding.encode_with_spans(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that token ids stand for; control tokens and rows of padding stand for none."""
        return self._encoding.decode([number for number in ids if number < self.identity.vocabulary])

    def text_of(self, token: int) -> str:
        """Return the text that a token stands for inside of a text, its space with it; half a character is U+FFFD."""
        anchor = self.encode("a")  # the space of the very first token is dropped
        before = self.decode(anchor)
        text = self.decode([*anchor, token])
        return text[len(before) :] if text.startswith(before) else self.decode([token])

    def check_vocabulary(self, path: str, vocabulary: int) -> None:
        """Compare the vocabulary with that of a model.

        Args:
            path: of the tokenizer, as the error should name it.
            vocabulary: rows of the model's embedding, as it is configured. Those beyond the ids of a tokenizer.json may
                be padding, if they are fewer than 128 or a sixteenth.

        Raises:
            DataError: they do not belong together.
        """
        own = self.identity.vocabulary
        padding = max(_LEAST_PADDING, vocabulary // _PART_OF_PADDING) if self.is_padded else 0
        if not vocabulary - padding <= own <= vocabulary:
            raise DataError(
                f"{KEY}={path}: has {own} pieces, but model.vocabulary={vocabulary}; "
                f"set that to {own}, or give the model's tokenizer"
            )


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        sign = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"text: holds half a surrogate pair, {sign}; leave it out") from error


def check_tokenizer(source: str, identity: TokenizerIdentity | None, tokenizer: Tokenizer) -> None:
    """Raise DataError where data was made with another tokenizer.

    Args:
        source: the data, as the error should name it.
        identity: of the tokenizer that it was made with; None where nothing knows.
        tokenizer: of the run.
    """
    if identity is not None and identity != tokenizer.identity:
        raise DataError(
            f"{source}: was made with a tokenizer of {identity.vocabulary} pieces ({identity.sha256[:12]}), "
            f"data.tokenizer has {tokenizer.identity.vocabulary} ({tokenizer.identity.sha256[:12]}); "
            f"give the same one, or prepare the data again"
        )
