"""Text as token files: Megatron's .bin and .idx, with a mark of the tokenizer beside them."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray

from megatron_sphinx.data.tokenizer import Tokenizer, TokenizerMark
from megatron_sphinx.errors import DataError


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it becomes `path` at the end, or goes away on an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class TokenFile:
    """Documents of tokens, memory-mapped.

    Attributes:
        lengths: int32 [documents].
        tokenizer: mark of the tokenizer that made it; None for a file made elsewhere.

    Raises:
        DataError: a file is missing, damaged, or shorter than its index says.
    """

    def __init__(self, prefix: str | Path, key: str) -> None:
        self.prefix = Path(prefix)
        bin_path, idx_path, mark_path = (self.prefix.with_name(self.prefix.name + e) for e in (".bin", ".idx", ".json"))
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise DataError(f"{key}={prefix}: {path} is missing; make it by tools/prepare_text.py")
        size = bin_path.stat().st_size
        if not size:
            raise DataError(f"{key}={prefix}: holds no tokens; make it again from files with text")
        try:
            self._dataset = IndexedDataset(str(self.prefix))
        except Exception as error:
            raise DataError(f"{key}={prefix}: {idx_path} is not an index of tokens ({error}); make it again") from error
        self.lengths: NDArray[np.int32] = self._dataset.sequence_lengths
        wanted = int(self.lengths.sum(dtype=np.int64)) * DType.size(self._dataset.index.dtype)
        if size != wanted:
            raise DataError(f"{key}={prefix}: {bin_path} has {size} bytes, its index says {wanted}; copy it again")
        self.tokenizer = TokenizerMark(**json.loads(mark_path.read_text())) if mark_path.is_file() else None

    def read(self, document: int, start: int, length: int) -> NDArray[np.int64]:
        """Tokens `start` to `start + length` of a document."""
        tokens: NDArray[Any] = self._dataset.get(document, start, length)
        return tokens.astype(np.int64)


class TokenWriter:
    """Writes a TokenFile; its files appear at the end, or not at all."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        self.prefix = prefix
        self.tokenizer = tokenizer
        self._partial = prefix.with_name(f".{prefix.name}.partial")
        dtype = DType.optimal_dtype(tokenizer.mark.vocabulary)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._builder = IndexedDatasetBuilder(f"{self._partial}.bin", dtype=dtype)

    def __enter__(self) -> "TokenWriter":
        return self

    def add(self, tokens: list[int]) -> None:
        """Append one document."""
        self._builder.add_document(torch.tensor(tokens, dtype=torch.int64), [len(tokens)])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        files = {ending: Path(f"{self._partial}{ending}") for ending in (".bin", ".idx", ".json")}
        self._builder.finalize(str(files[".idx"]))
        files[".json"].write_text(json.dumps(asdict(self.tokenizer.mark)))
        for ending, path in files.items():
            if kind is None:
                os.replace(path, self.prefix.with_name(self.prefix.name + ending))
            else:
                path.unlink(missing_ok=True)


def check_tokenizer(source: str, mark: TokenizerMark | None, tokenizer: Tokenizer) -> None:
    """Raise DataError where data was made with another tokenizer."""
    if mark is not None and mark != tokenizer.mark:
        raise DataError(
            f"{source}: was made with a tokenizer of {mark.vocabulary} pieces ({mark.sha256[:12]}), "
            f"data.tokenizer has {tokenizer.mark.vocabulary} ({tokenizer.mark.sha256[:12]}); "
            f"give the same one, or prepare the data again"
        )


def documents(path: Path, key: str = "content") -> Iterator[str]:
    """The texts of a file: `key` of each .jsonl line or .parquet row, or the whole of any other file.

    Raises:
        DataError: a line that is no JSON object with that key, or no such column.
    """
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = json.loads(line)[key]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}:{number}: not a JSON object with the key {key!r}; give --key") from error
                yield text
    elif path.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                raise DataError(f"{path}: has no column {key!r}, but {file.schema_arrow.names}; give --key")
            for batch in file.iter_batches(columns=[key]):
                yield from batch.column(0).to_pylist()
    else:
        yield path.read_text(encoding="utf-8", errors="replace")


def write_text(paths: Iterable[Path], prefix: Path, tokenizer: Tokenizer, key: str = "content") -> tuple[int, int]:
    """Tokenise files to one TokenFile, `[BOS] text [EOS]` a document; empty texts are left out.

    Returns:
        How many documents and tokens were written.

    Raises:
        DataError: a file that cannot be read as what it is, or no text in any of them.
    """
    count = tokens = 0
    with TokenWriter(prefix, tokenizer) as writer:
        for path in paths:
            for text in documents(path, key):
                if text and text.strip():
                    ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
                    writer.add(ids)
                    count, tokens = count + 1, tokens + len(ids)
        if not count:
            raise DataError(f"{prefix}: the files hold no text")
    return count, tokens
