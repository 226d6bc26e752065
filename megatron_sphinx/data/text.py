"""Text as token files: Megatron's .bin and .idx.

A source is the prefix of one such file, whoever made it, or a folder of them as `prepare text` makes it, with
an `index.json` that says what is in each.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data.content import (
    BESIDE,
    Content,
    ContentSource,
    Memory,
    check_known,
    content_in,
    fingerprint,
    measure,
)
from megatron_sphinx.data.files import Records
from megatron_sphinx.data.streams import TextSpans
from megatron_sphinx.data.tokenizer import Tokenizer, TokenizerIdentity, check_tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import is_plain
from megatron_sphinx.ranges import Range
from megatron_sphinx.values import read_json

_OPEN_FILES = 64
_REMEDY = "make it by megatron-sphinx prepare text"
_COUNT = Range(least=0, most=2**48)
_HEADER = 34  # bytes before the lengths in an .idx; source: _IndexReader of megatron.core.datasets.indexed_dataset


def _paths(prefix: Path) -> list[Path]:
    """Return the two files of a token file: its tokens, and where its documents begin."""
    return [prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx")]


class TokenFile:
    """Documents of tokens. Every array that it returns is the caller's own.

    Args:
        prefix: of its two files.
        key: of the configuration, that names it.

    Attributes:
        documents: how many documents it has.
        tokens: how many tokens it has.
        token_type: of a token id.

    Raises:
        DataError: a file is missing, damaged, or shorter than its index says.
    """

    def __init__(self, prefix: str | Path, key: str = "data.text") -> None:
        # here, since megatron-core takes seconds to import, and what plans by sizes alone opens no token file
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        prefix = Path(prefix)
        bin_path, idx_path = _paths(prefix)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise DataError(f"{key}={prefix}: {path} is missing; {_REMEDY}")
        size = bin_path.stat().st_size
        if not size:
            raise DataError(f"{key}={prefix}: holds no tokens; make it again from files with text")
        try:
            index = IndexedDataset(str(prefix)).index
        except Exception as error:
            raise DataError(f"{key}={prefix}: {idx_path} is not an index of tokens ({error}); make it again") from error
        self.token_type = np.dtype(index.dtype)
        if self.token_type.kind not in "iu":
            raise DataError(
                f"{key}={prefix}: {idx_path} is an index of {self.token_type}, not of tokens; make it again"
            )
        self._bytes = self.token_type.itemsize
        self.documents = int(index.sequence_count)
        if not self.documents or size % self._bytes:
            raise DataError(f"{key}={prefix}: {bin_path} and {idx_path} do not belong together; make them again")
        end = int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * self._bytes
        if size != end:
            raise DataError(f"{key}={prefix}: {bin_path} has {size} bytes, its index says {end}; copy it again")
        self.tokens = size // self._bytes
        self._tokens = Records(bin_path, self.token_type)
        lengths, pointers = index.sequence_lengths.dtype, index.sequence_pointers.dtype
        self._lengths = Records(idx_path, lengths, begin=_HEADER, size=self.documents)
        begin = _HEADER + self.documents * lengths.itemsize
        self._pointers = Records(idx_path, pointers, begin=begin, size=self.documents)

    def spans(self, first: int, last: int) -> TextSpans:
        """Return what tokens `first` to `last`, the last not among them, are in documents; no span is empty.

        Raises:
            DataError: the files have been cut since they were opened.
        """
        lowest = bisect_right(self._pointers, first * self._bytes) - 1  # pointers are in bytes
        highest = bisect_left(self._pointers, last * self._bytes)
        begins = self._pointers.read(lowest, highest) // self._bytes
        ends = begins + self._lengths.read(lowest, highest)
        start, stop = np.maximum(begins, first), np.minimum(ends, last)
        spans = TextSpans(np.arange(lowest, highest, dtype=np.int64), start - begins, stop - start, stop == ends)
        return spans[np.flatnonzero(spans.length)]

    def read(self, document: int, start: int, length: int) -> NDArray[np.int64]:
        """Return tokens `start` to `start + length` of a document.

        Raises:
            DataError: the files have been cut since they were opened.
        """
        begin = int(self._pointers[document]) // self._bytes + start
        return self._tokens.read(begin, begin + length).astype(np.int64)


@dataclass
class _TokenFileEntry:
    """A token file as its index lists it, not opened; a ContentSource.

    Attributes:
        label: key and value that name its source in the configuration: the folder that the file is in, or its prefix.
        prefix: of the file.
        documents: how many documents it has.
        tokens: how many tokens it has.
        content: what it holds; None while that is not known.
    """

    label: str
    prefix: Path
    documents: int
    tokens: int
    content: Content | None = None

    @property
    def paths(self) -> list[Path]:
        return _paths(self.prefix)

    @property
    def memory_file(self) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.content.json")

    def measure(self, is_stopped: Callable[[], bool]) -> Content | None:
        return content_of(self.prefix, is_stopped)


@dataclass(frozen=True, kw_only=True)
class ListedTokenFile:
    """What `index.json` of a folder of text must say of a token file.

    Attributes:
        name: of the token file, without its endings.
        documents: how many documents it has.
        tokens: how many tokens it has.
        content: what it holds; None where that is not known.
    """

    name: str
    documents: Annotated[int, _COUNT]
    tokens: Annotated[int, _COUNT]
    content: Any = None


@dataclass(frozen=True, kw_only=True)
class TextIndexFile:
    """What `index.json` of a folder of text must hold.

    Attributes:
        tokenizer: identity of the one that it was made with.
        files: the token files in the folder.
    """

    tokenizer: TokenizerIdentity
    files: tuple[ListedTokenFile, ...]


class TextIndex:
    """The documents of all sources; documents and tokens are numbered one source behind the other.

    Token files are opened when something of them is needed. Threads may share it.

    Attributes:
        key: of the configuration, that names the sources.
        bounds: number of the first token of each source, and how many tokens there are in all.
        documents: how many documents there are in all.
        files: the token files of all sources.

    Raises:
        DataError: a source is missing or damaged.
    """

    def __init__(self, sources: Sequence[str | Path], key: str = "data.text") -> None:
        self.key = key
        opened = [_open_source(Path(source), key) for source in sources]
        self._tokenizers = [(str(source), identity) for source, (_, identity) in zip(sources, opened, strict=True)]
        self.files = [file for files, _ in opened for file in files]
        self.bounds = [0, *accumulate(sum(file.tokens for file in files) for files, _ in opened)]
        self._first_token = [0, *accumulate(file.tokens for file in self.files)]
        self._first_document = [0, *accumulate(file.documents for file in self.files)]
        self.documents = self._first_document[-1]
        self._open = lru_cache(maxsize=_OPEN_FILES)(lambda number: TokenFile(self.files[number].prefix, key))

    @property
    def content_sources(self) -> Sequence[ContentSource]:
        """The token files, as data whose content is scanned and compared."""
        return self.files

    @property
    def fingerprint(self) -> str | None:
        """Identifies the documents, wherever they lie; None while one of the files has not been read yet."""
        return fingerprint(self.files)

    def check(self, tokenizer: Tokenizer, memory: Memory = BESIDE) -> None:
        """Raise DataError where a file is missing or damaged, or was made with another tokenizer.

        Token ids are compared with the vocabulary as far as `index.json` or the memory know them.
        """
        for source, identity in self._tokenizers:
            check_tokenizer(f"{self.key}={source}", identity, tokenizer)
        with ThreadPoolExecutor(16, "check") as pool:
            for _ in pool.map(lambda entry: self._check(entry, memory, tokenizer.identity.vocabulary), self.files):
                pass

    def _check(self, entry: _TokenFileEntry, memory: Memory, vocabulary: int) -> None:
        file = TokenFile(entry.prefix, self.key)
        if (file.documents, file.tokens) != (entry.documents, entry.tokens):
            raise DataError(f"{entry.label}: {entry.prefix} is not the file its index was made for; {_REMEDY}")
        check_known(entry, memory, vocabulary)

    def spans(self, first: int, last: int) -> TextSpans:
        """Return what tokens `first` to `last`, the last not among them, are in documents; no span is empty."""
        tables = []
        while first < last:
            file = bisect_right(self._first_token, first) - 1
            begin, stop = self._first_token[file], min(last, self._first_token[file + 1])
            spans = self._open(file).spans(first - begin, stop - begin)
            document = spans.document + self._first_document[file]
            tables.append(TextSpans(document, spans.start, spans.length, spans.is_end))
            first = stop
        return TextSpans.joined(tables)

    def read(self, document: int, start: int, length: int) -> NDArray[np.int64]:
        """Return tokens `start` to `start + length` of a document."""
        file = bisect_right(self._first_document, document) - 1
        return self._open(file).read(document - self._first_document[file], start, length)

    def name(self, document: int) -> str:
        """Name a document as an error should: by its source, its file, and its number in that."""
        number = bisect_right(self._first_document, document) - 1
        file = self.files[number]
        return f"{file.label}: document {document - self._first_document[number]} of {file.paths[0]}"


def content_of(prefix: Path, is_stopped: Callable[[], bool] = lambda: False) -> Content | None:
    """Return what a token file holds, read from begin to end; None where `is_stopped` said to give up."""
    tokens, index = _paths(prefix)
    return measure({tokens: TokenFile(prefix).token_type, index: None}, is_stopped)


def _open_source(source: Path, key: str) -> tuple[list[_TokenFileEntry], TokenizerIdentity | None]:
    """Return the token files of a source, and the tokenizer that made them where it is known."""
    if not source.is_dir():
        file = TokenFile(source, key)
        return [_TokenFileEntry(f"{key}={source}", source, file.documents, file.tokens)], None
    try:
        content = read_json(source / "index.json", TextIndexFile)
        identity = TokenizerIdentity(**content["tokenizer"])
        files = [
            _TokenFileEntry(
                f"{key}={source}",
                _prefix(source, entry["name"]),
                entry["documents"],
                entry["tokens"],
                content_in(entry),
            )
            for entry in content["files"]
            if entry["tokens"]
        ]
    except OSError as error:
        raise DataError(f"{key}={source}: {error.filename}: {error.strerror}; {_REMEDY}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{key}={source}: damaged index.json ({error}); {_REMEDY}") from error
    return files, identity


def _prefix(folder: Path, name: object) -> Path:
    """Return the prefix of a token file, by the name that an index has for it.

    Raises:
        ValueError: the name is not that of a file beside the index.
    """
    if not is_plain(name):
        raise ValueError(f"{name!r} is no name of a file beside it")
    return folder / str(name)
