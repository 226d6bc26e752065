"""Text as token files: Megatron's .bin and .idx, memory-mapped.

A source is the prefix of one such file, whoever made it, or a folder of them as `prepare text` makes it, with
an `index.json` that says what is in each.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from megatron_sphinx.data.content import BESIDE, Content, Memory, check_known, content_in, fingerprint, measure
from megatron_sphinx.data.plan import Runs
from megatron_sphinx.data.tokenizer import Tokenizer, TokenizerIdentity, check_tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import is_plain

_OPEN_FILES = 64
_REMEDY = "make it by megatron-sphinx prepare text"


def _paths(prefix: Path) -> list[Path]:
    """The files of a token file: of its tokens, and of where documents begin."""
    return [prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx")]


class TokenFile:
    """Documents of tokens. Every array it returns is a copy: the maps close with this object.

    Attributes:
        documents: how many there are.
        tokens: how many there are.
        kind: type of a token id.

    Raises:
        DataError: a file is missing, damaged, or shorter than its index says.
    """

    def __init__(self, prefix: str | Path) -> None:
        prefix = Path(prefix)
        bin_path, idx_path = _paths(prefix)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise DataError(f"data.text={prefix}: {path} is missing; {_REMEDY}")
        size = bin_path.stat().st_size
        if not size:
            raise DataError(f"data.text={prefix}: holds no tokens; make it again from files with text")
        try:
            self._dataset = IndexedDataset(str(prefix))
        except Exception as error:
            raise DataError(
                f"data.text={prefix}: {idx_path} is not an index of tokens ({error}); make it again"
            ) from error
        index = self._dataset.index
        self.kind, self._item = np.dtype(index.dtype), DType.size(index.dtype)
        if self.kind.kind not in "iu":
            raise DataError(f"data.text={prefix}: {idx_path} is an index of {self.kind}, not of tokens; make it again")
        self.documents = int(index.sequence_count)
        if not self.documents or size % self._item:
            raise DataError(f"data.text={prefix}: {bin_path} and {idx_path} do not belong together; make them again")
        end = int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * self._item
        if size != end:
            raise DataError(f"data.text={prefix}: {bin_path} has {size} bytes, its index says {end}; copy it again")
        self.tokens = size // self._item

    def runs(self, first: int, last: int) -> Runs:
        """The documents, or parts of them, that tokens `first` to `last` are of."""
        index, item = self._dataset.index, self._item
        lowest = int(np.searchsorted(index.sequence_pointers, first * item, side="right")) - 1
        highest = int(np.searchsorted(index.sequence_pointers, last * item, side="left"))
        begins = index.sequence_pointers[lowest:highest] // item
        ends = begins + index.sequence_lengths[lowest:highest]
        start, stop = np.maximum(begins, first), np.minimum(ends, last)
        found = Runs(np.arange(lowest, highest, dtype=np.int64), start - begins, stop - start, stop == ends)
        return found[np.flatnonzero(found.length)]

    def read(self, document: int, start: int, length: int) -> NDArray[np.int64]:
        """Tokens `start` to `start + length` of a document."""
        tokens: NDArray[Any] = self._dataset.get(document, start, length)
        return tokens.astype(np.int64)


@dataclass
class _Part:
    """One of the token files; see Measured for what it holds."""

    source: str
    prefix: Path
    documents: int
    tokens: int
    content: Content | None = None

    @property
    def label(self) -> str:
        return f"data.text={self.source}"

    @property
    def paths(self) -> list[Path]:
        return _paths(self.prefix)

    @property
    def memory(self) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.content.json")

    def measure(self, is_stopped: Callable[[], bool]) -> Content | None:
        return content_of(self.prefix, is_stopped)


class TextIndex:
    """The documents of all sources, numbered one source behind the other; so are their tokens.

    Token files are opened when something of them is needed. Threads may share it.

    Attributes:
        bounds: first token of each source, and how many there are.
        documents: how many there are.
        parts: the token files.

    Raises:
        DataError: a source is missing or damaged.
    """

    def __init__(self, sources: Sequence[str | Path]) -> None:
        found = [_open_source(Path(source)) for source in sources]
        self._marks = [(str(source), mark) for source, (_, mark) in zip(sources, found, strict=True)]
        self.parts = [part for parts, _ in found for part in parts]
        self.bounds = [0, *accumulate(sum(part.tokens for part in parts) for parts, _ in found)]
        self._first_token = [0, *accumulate(part.tokens for part in self.parts)]
        self._first_document = [0, *accumulate(part.documents for part in self.parts)]
        self.documents = self._first_document[-1]
        self._file = lru_cache(maxsize=_OPEN_FILES)(lambda part: TokenFile(self.parts[part].prefix))

    @property
    def fingerprint(self) -> str | None:
        """Equal exactly where all documents are, wherever they lie; None while a file has not been read yet."""
        return fingerprint(self.parts)

    def check(self, tokenizer: Tokenizer, memory: Memory = BESIDE) -> None:
        """Raise DataError where a file is missing or damaged, or was made with another tokenizer.

        Token ids are compared with the vocabulary as far as `index.json` or the memory know them.
        """
        for source, mark in self._marks:
            check_tokenizer(f"data.text={source}", mark, tokenizer)
        with ThreadPoolExecutor(16, "check") as pool:
            for _ in pool.map(lambda part: self._check(part, memory, tokenizer.identity.vocabulary), self.parts):
                pass

    def _check(self, part: _Part, memory: Memory, vocabulary: int) -> None:
        file = TokenFile(part.prefix)
        if (file.documents, file.tokens) != (part.documents, part.tokens):
            raise DataError(f"data.text={part.source}: {part.prefix} is not the file its index was made for; {_REMEDY}")
        check_known(part, memory, vocabulary)

    def runs(self, first: int, last: int) -> Runs:
        """The documents, or parts of them, that tokens `first` to `last` are of; none is empty."""
        found = []
        while first < last:
            part = bisect_right(self._first_token, first) - 1
            begin, stop = self._first_token[part], min(last, self._first_token[part + 1])
            runs = self._file(part).runs(first - begin, stop - begin)
            found.append(Runs(runs.document + self._first_document[part], runs.start, runs.length, runs.is_end))
            first = stop
        return Runs.joined(found)

    def read(self, document: int, start: int, length: int) -> NDArray[np.int64]:
        """Tokens `start` to `start + length` of a document."""
        part = bisect_right(self._first_document, document) - 1
        return self._file(part).read(document - self._first_document[part], start, length)

    def name(self, document: int) -> str:
        """A document as an error should name it: its source, file, and number in that."""
        number = bisect_right(self._first_document, document) - 1
        part = self.parts[number]
        return f"{part.label}: document {document - self._first_document[number]} of {part.paths[0]}"


def content_of(prefix: Path, is_stopped: Callable[[], bool] = lambda: False) -> Content | None:
    """What a token file holds, read from begin to end; None where that was stopped."""
    tokens, index = _paths(prefix)
    return measure({tokens: TokenFile(prefix).kind, index: None}, is_stopped)


def _open_source(source: Path) -> tuple[list[_Part], TokenizerIdentity | None]:
    """The token files of a source, and the tokenizer that made them where it is known."""
    if not source.is_dir():
        file = TokenFile(source)
        return [_Part(str(source), source, file.documents, file.tokens)], None
    try:
        content = json.loads((source / "index.json").read_text())
        mark = TokenizerIdentity(**content["tokenizer"])
        parts = [
            _Part(str(source), _prefix(source, part["name"]), part["documents"], part["tokens"], content_in(part))
            for part in content["files"]
            if part["tokens"]
        ]
    except OSError as error:
        raise DataError(f"data.text={source}: {error.filename}: {error.strerror}; {_REMEDY}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.text={source}: damaged index.json ({error}); {_REMEDY}") from error
    return parts, mark


def _prefix(folder: Path, name: object) -> Path:
    """The prefix of a token file, by the name that an index has for it.

    Raises:
        ValueError: it is no name of a file beside the index.
    """
    if not is_plain(name):
        raise ValueError(f"{name!r} is no name of a file beside it")
    return folder / str(name)
