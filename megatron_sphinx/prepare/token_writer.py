"""Write a token file: Megatron's .bin and .idx, and what they hold, without reading them again.

Source: IndexedDatasetBuilder and _IndexWriter of megatron.core.datasets.indexed_dataset, which take seconds to import.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data.content import Content, Gauge
from megatron_sphinx.data.tokenizer import Tokenizer

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_CODES = {"int32": 4, "uint16": 8}  # of the types that token ids have
_BUFFER_BYTES = 2**20


class TokenWriter:
    """Writes a token file, whose two files appear at the end, or not at all.

    Args:
        prefix: of the two files.
        tokenizer: that made the tokens; it decides their type.
    """

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        self._prefix, self._type = prefix, tokenizer.identity.token_type
        partial = prefix.with_name(f".{prefix.name}.{os.getpid()}.partial")
        self._partial = {ending: Path(f"{partial}{ending}") for ending in (".bin", ".idx")}
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial[".bin"].open("wb", buffering=_BUFFER_BYTES)
        self._gauge = Gauge()
        self._lengths: list[int] = []

    def __enter__(self) -> "TokenWriter":
        return self

    def add(self, tokens: Sequence[int] | NDArray[np.integer]) -> None:
        """Append one document, given by its token ids."""
        ids = np.asarray(tokens).astype(self._type, copy=False)
        self._file.write(ids.data)
        self._gauge.add(".bin", ids, are_tokens=True)
        self._lengths.append(len(ids))

    def content(self) -> Content | None:
        """Return what the files hold, when they are written; None where they have no token."""
        return self._gauge.content() if any(self._lengths) else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
            return
        self._file.close()
        for path in self._partial.values():
            path.unlink(missing_ok=True)

    def _finish(self) -> None:
        """Write the index, and give both files their names when they are on the disk."""
        index = self._index()
        self._gauge.add(".idx", index, are_tokens=False)
        with self._file, self._partial[".idx"].open("wb") as file:
            file.write(index.data)
            for one in (self._file, file):
                one.flush()
                os.fsync(one.fileno())
        for ending, path in self._partial.items():
            os.replace(path, self._prefix.with_name(self._prefix.name + ending))

    def _index(self) -> NDArray[np.uint8]:
        """Return the bytes of the index: lengths in tokens, begins in bytes, and where documents begin, one by one."""
        lengths = np.array(self._lengths, np.int32)
        count = len(lengths)
        begins = (np.cumsum(lengths, dtype=np.int64) - lengths) * self._type.itemsize
        head = _MAGIC + struct.pack("<QBQQ", _VERSION, _CODES[self._type.name], count, count + 1)
        parts = (head, lengths.tobytes(), begins.tobytes(), np.arange(count + 1, dtype=np.int64).tobytes())
        return np.frombuffer(b"".join(parts), np.uint8)
