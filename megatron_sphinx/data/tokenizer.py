"""Text to token ids and back, by a sentencepiece model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import sentencepiece

from megatron_sphinx.errors import DataError
from megatron_sphinx.ranges import Range


@dataclass(frozen=True)
class TokenizerIdentity:
    """What a tokenizer is recognised by; it is written beside data that was made with it.

    Attributes:
        vocabulary: how many token ids it has.
        sha256: of the model's file.
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
    """A sentencepiece model; BOS and EOS are added by whoever needs them, never by `encode`.

    Raises:
        DataError: the file is missing, is no sentencepiece model, or has no BOS or EOS piece.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"data.tokenizer={path}: {error.strerror}; give a sentencepiece .model file") from error
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"data.tokenizer={path}: not a sentencepiece model; give a .model file") from error
        self.bos, self.eos = self._model.bos_id(), self._model.eos_id()
        if min(self.bos, self.eos) < 0:
            raise DataError(f"data.tokenizer={path}: has no BOS or no EOS piece; train it with both")
        self.identity = TokenizerIdentity(self._model.vocab_size(), hashlib.sha256(content).hexdigest())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without BOS and EOS."""
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a text, and the characters that each stands for, as (begin, end).

        A character of several tokens belongs to the last of them; the others are empty spans at its begin.
        """
        mapping = self._model.encode(text, return_type="offset_mapping")
        return mapping["ids"], mapping["offsets"]

    def decode(self, ids: list[int]) -> str:
        """Return the text that token ids stand for."""
        text: str = self._model.decode(ids)
        return text


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
