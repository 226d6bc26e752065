"""Image-text pairs: WebDataset shards, and an index beside them that knows every sample without reading it.

An index is a folder:

* `index.json`: the tokenizer's mark, the shards with their sizes, the type of caption tokens;
* `samples.bin`: a SAMPLE for each pair, shard by shard, memory-mapped;
* `captions.bin`: the tokens of all captions, memory-mapped;
* `quarantine.jsonl`: what was left out, and why.
"""

import json
import os
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data.files import Mapped, RangeReader, is_url
from megatron_sphinx.data.plan import PairSizes
from megatron_sphinx.data.tokenizer import Tokenizer, TokenizerMark, check_tokenizer
from megatron_sphinx.errors import DataError

SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),  # of the image in the shard
        ("bytes", "<u4"),  # of the image
        ("header", "<u4"),  # CRC-32 of the 512 bytes before it: of the tar's header, so of its name, size and time
        ("width", "<u4"),
        ("height", "<u4"),
        ("caption", "<u8"),  # first token in captions.bin
        ("tokens", "<u4"),  # of the caption
    ]
)
_REMEDY = "run tools/prepare_pairs.py again"


@dataclass(frozen=True)
class Shard:
    """A tar file as it was when it was indexed; its path is relative to the index, or a URL."""

    path: str
    bytes: int
    samples: int


class _Folder:
    """One index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            content = json.loads((folder / "index.json").read_text())
            self.tokenizer = TokenizerMark(**content["tokenizer"])
            self.shards = [Shard(**shard) for shard in content["shards"]]
            self.samples = Mapped(folder / "samples.bin", SAMPLE)
            self.captions = Mapped(folder / "captions.bin", np.dtype(content["caption_type"]))
        except OSError as error:
            raise DataError(
                f"data.pairs={folder}: {error.filename}: {error.strerror}; make the index by tools/prepare_pairs.py"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"data.pairs={folder}: damaged index ({error}); {_REMEDY}") from error
        [last] = self.samples.read(self.samples.size - 1, self.samples.size)
        found = (self.samples.size, self.captions.size)
        if found != (sum(shard.samples for shard in self.shards), int(last["caption"]) + int(last["tokens"])):
            raise DataError(f"data.pairs={folder}: the files of the index disagree; {_REMEDY}")

    def path(self, shard: int) -> str:
        """Where a shard is."""
        path = self.shards[shard].path
        return path if is_url(path) else os.path.abspath(self.folder / path)

    def check(self, shard: int) -> None:
        """Raise DataError where a shard on a disk is missing or of another size."""
        path, wanted = self.path(shard), self.shards[shard].bytes
        if is_url(path):
            return
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise DataError(
                f"data.pairs={self.folder}: shard {path} is missing ({error.strerror}); {_REMEDY}"
            ) from error
        if size != wanted:
            raise DataError(
                f"data.pairs={self.folder}: shard {path} has {size} bytes, its index was made for {wanted}; "
                f"copy it again, or {_REMEDY}"
            )


@dataclass(frozen=True)
class Place:
    """Where the image of a pair is: the shard's path or URL, and the bytes in it."""

    path: str
    offset: int
    bytes: int
    header: int


class PairIndex:
    """Sizes, places and captions of all pairs of some indexes; nothing of a shard is read through it.

    Pairs are numbered one index behind the other, as given.

    Raises:
        DataError: a folder holds no index, or a damaged one.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self._folders = [_Folder(Path(folder)) for folder in folders]
        self.bounds = [0, *accumulate(folder.samples.size for folder in self._folders)]

    def __len__(self) -> int:
        return self.bounds[-1]

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise DataError where a shard is missing or has changed its size, or the tokenizer is another one.

        That a shard of the right size is the one that was indexed is checked with each image that is read.
        """
        with ThreadPoolExecutor(16, "check") as pool:
            for folder in self._folders:
                check_tokenizer(f"data.pairs={folder.folder}", folder.tokenizer, tokenizer)
                for _ in pool.map(folder.check, range(len(folder.shards))):
                    pass

    def sizes(self, first: int, last: int) -> PairSizes:
        """Sizes of neighbouring pairs."""
        found = []
        while first < last:
            source = bisect_right(self.bounds, first) - 1
            begin, stop = self.bounds[source], min(last, self.bounds[source + 1])
            samples = self._folders[source].samples.read(first - begin, stop - begin)
            found.append(PairSizes(samples["width"], samples["height"], samples["tokens"]))
            first = stop
        return PairSizes.joined(found)

    def size(self, pair: int) -> tuple[int, int]:
        """Width and height of a pair's image."""
        _, sample = self._at(pair)
        return int(sample["width"]), int(sample["height"])

    def caption(self, pair: int, most: int | None = None) -> NDArray[np.int64]:
        """Tokens of a pair's caption, at most so many."""
        folder, sample = self._at(pair)
        first, tokens = int(sample["caption"]), int(sample["tokens"])
        kept = tokens if most is None else min(tokens, most)
        return folder.captions.read(first, first + kept).astype(np.int64)

    def place(self, pair: int) -> Place:
        """Where a pair's image is."""
        folder, sample = self._at(pair)
        shard = int(sample["shard"])
        numbers = (int(sample[name]) for name in ("offset", "bytes", "header"))
        return Place(folder.path(shard), *numbers)

    def _at(self, pair: int) -> tuple[_Folder, Any]:
        source = bisect_right(self.bounds, pair) - 1
        folder = self._folders[source]
        place = pair - self.bounds[source]
        return folder, folder.samples.read(place, place + 1)[0]


class ImageReader:
    """Encoded images by pair number. Threads may share it."""

    def __init__(self, index: PairIndex) -> None:
        self.index = index
        self._files = RangeReader()

    def read(self, pair: int) -> bytes:
        """The image file of a pair.

        Raises:
            DataError: the shard ends before the image does, or is not the one that was indexed.
            OSError: the shard cannot be read.
        """
        place = self.index.place(pair)
        head = tarfile.BLOCKSIZE
        content = self._files.read(place.path, place.offset - head, place.bytes + head)
        if len(content) < head or zlib.crc32(memoryview(content)[:head]) != place.header:
            raise DataError("the shard is not the one its index was made for")
        if len(content) != place.bytes + head:
            raise DataError("the shard ends inside the image")
        return content[head:]

    def name(self, pair: int) -> tuple[str, str]:
        """Shard and key of a pair, as an error should name them; the key is read from the tar's own header."""
        place = self.index.place(pair)
        try:
            header = self._files.read(place.path, place.offset - tarfile.BLOCKSIZE, 100)
        except OSError:
            return place.path, f"at byte {place.offset}"
        return place.path, split_name(header.split(b"\0")[0].decode(errors="replace"))[0]


def split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member of a tar: divided at the first dot of the file's name, as WebDataset does."""
    folder, _, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return (f"{folder}/{key}" if folder else key), ending.lower()
