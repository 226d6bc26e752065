"""Image-text pairs and conversations of all indexes of a run: their sizes, their tokens, and their images by number."""

import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data import images
from megatron_sphinx.data.content import BESIDE, ContentSource, Memory, check_known, fingerprint
from megatron_sphinx.data.files import RangeReader
from megatron_sphinx.data.index import IndexFolder
from megatron_sphinx.data.streams import SampleSizes
from megatron_sphinx.data.tokenizer import Tokenizer, check_tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import printable


@dataclass(frozen=True)
class ImageLocation:
    """Where the image of a sample is.

    Attributes:
        path: of the shard, or its URL.
        offset: first byte of the image in the shard.
        bytes: size of the image; 0 where the sample has none.
        header: CRC-32 of the tar header before the image.
    """

    path: str
    offset: int
    bytes: int
    header: int


class SampleIndex:
    """Sizes, locations and tokens of all samples of some indexes; nothing of a shard is read through it.

    Samples are numbered one index behind the other, in the order in which the indexes are given.

    Args:
        folders: of the indexes.
        key: what the indexes have, and what the configuration calls them: pairs or conversations.
        section: the section of the configuration that names them.

    Attributes:
        bounds: number of the first sample of each index, and how many samples there are in all.
        folders: the indexes.

    Raises:
        DataError: a folder holds no index, or a damaged one, or one of something else.
    """

    def __init__(self, folders: Sequence[str | Path], key: str = "pairs", section: str = "data") -> None:
        self.folders = [IndexFolder(Path(folder), key, section) for folder in folders]
        self.bounds = [0, *accumulate(folder.samples.size for folder in self.folders)]
        self._is_stored = False

    def as_stored(self) -> "SampleIndex":
        """Return the index with the sizes of images as they are stored, not as their orientations turn them."""
        index = copy(self)
        index._is_stored = True
        return index

    def __len__(self) -> int:
        return self.bounds[-1]

    @property
    def content_sources(self) -> Sequence[ContentSource]:
        """The indexes, as data whose content is scanned and compared."""
        return self.folders

    @property
    def fingerprint(self) -> str | None:
        """Identifies what the indexes hold, wherever they lie; None while one of them has not been read yet.

        Shards count too, by what the indexes know of them: names, sizes and times of their images.
        """
        return fingerprint(self.folders)

    def check(self, tokenizer: Tokenizer, memory: Memory = BESIDE) -> None:
        """Raise DataError where a shard is missing or has changed its size, or the tokenizer is another one.

        Token ids are compared with the vocabulary as far as `index.json` or the memory know them.
        That a shard of the right size is the one that was indexed is checked with each image that is read.
        """
        with ThreadPoolExecutor(16, "check") as pool:
            for folder in self.folders:
                check_tokenizer(folder.label, folder.tokenizer, tokenizer)
                check_known(folder, memory, tokenizer.identity.vocabulary)
                for _ in pool.map(folder.check, range(len(folder.shards))):
                    pass

    def sizes(self, first: int, last: int) -> SampleSizes:
        """Return the sizes of samples `first` to `last`, the last not among them."""
        tables = []
        while first < last:
            source = bisect_right(self.bounds, first) - 1
            begin, stop = self.bounds[source], min(last, self.bounds[source + 1])
            samples = self.folders[source].samples.read(first - begin, stop - begin)
            targets = samples["tokens"] + 1 if self.folders[source].answers is None else samples["targets"]
            width, height = samples["width"], samples["height"]
            if self._is_stored and self.folders[source].is_upright:
                is_turned = np.isin(samples["orientation"], images.SIDEWAYS)
                width, height = np.where(is_turned, height, width), np.where(is_turned, width, height)
            tables.append(SampleSizes(width, height, samples["tokens"], targets))
            first = stop
        return SampleSizes.joined(tables)

    def caption(self, sample: int, most_tokens: int | None = None) -> NDArray[np.int64]:
        """Return the tokens of a sample's caption or conversation; no more than `most_tokens`, if that is given."""
        folder, record = self._record(sample)
        first, tokens = int(record["caption"]), int(record["tokens"])
        kept = tokens if most_tokens is None else min(tokens, most_tokens)
        return folder.captions.read(first, first + kept).astype(np.int64)

    def is_target(self, sample: int, kept: int) -> NDArray[np.bool_]:
        """Say which of a sample's first `kept` tokens, and of the EOS behind them, are learned: bool [kept + 1].

        A caption is learned as a whole; of a conversation its answers are, and EOS where it stands behind a whole one.
        """
        answers = self._answers(sample)
        if answers is None:
            return np.ones(kept + 1, np.bool_)
        is_whole = kept == len(answers) or not answers[kept]
        return np.append(answers[:kept], answers[:kept][-1:].any() and is_whole)

    def cut(self, sample: int, most_tokens: int) -> tuple[int, int]:
        """Return how many tokens are kept of a sample that has more than fit, and its positions with a target then.

        A caption loses its end, a conversation all turns behind the last answer that fits; where not even its first
        answer does, that loses its end, and the EOS behind it is not learned.
        """
        answers = self._answers(sample)
        if answers is None:
            return most_tokens, most_tokens + 1
        ends = np.flatnonzero(answers[:-1] & ~answers[1:]) + 1
        kept = int(ends[ends <= most_tokens][-1]) if (ends <= most_tokens).any() else most_tokens
        return kept, int(self.is_target(sample, kept).sum())

    def _answers(self, sample: int) -> NDArray[np.bool_] | None:
        """Say for each token of a conversation whether it belongs to an answer; None where the sample is a pair."""
        folder, record = self._record(sample)
        first = int(record["caption"])
        return folder.answers.read(first, first + int(record["tokens"])) if folder.answers is not None else None

    def location(self, sample: int) -> ImageLocation:
        """Return where a sample's image is."""
        folder, record = self._record(sample)
        shard = int(record["shard"])
        numbers = (int(record[name]) for name in ("offset", "bytes", "header"))
        return ImageLocation(folder.path(shard), *numbers)

    def is_upright(self, sample: int) -> bool:
        """Say whether the size of a sample's image is that of the upright one; an older index has it as stored."""
        return not self._is_stored and self.folders[bisect_right(self.bounds, sample) - 1].is_upright

    def name(self, sample: int) -> str:
        """Name a sample as an error should: by its index, and by its number in that."""
        source = bisect_right(self.bounds, sample) - 1
        folder = self.folders[source]
        return f"{folder.label}: {folder.key.removesuffix('s')} {sample - self.bounds[source]}"

    def _record(self, sample: int) -> tuple[IndexFolder, Any]:
        """Return the index that has a sample, and the sample's record there."""
        source = bisect_right(self.bounds, sample) - 1
        folder = self.folders[source]
        number = sample - self.bounds[source]
        return folder, folder.samples.read(number, number + 1)[0]


class ImageReader:
    """Reads encoded images by the numbers of their samples. Threads may share it."""

    def __init__(self, index: SampleIndex) -> None:
        self.index = index
        self._files = RangeReader()

    def read(self, sample: int) -> bytes:
        """Return the image file of a sample.

        Raises:
            DataError: the shard ends before the image does, or is not the one that was indexed.
            OSError: the shard cannot be read.
        """
        image = self.index.location(sample)
        head = tarfile.BLOCKSIZE
        content = self._files.read(image.path, image.offset - head, image.bytes + head)
        if len(content) < head or zlib.crc32(memoryview(content)[:head]) != image.header:
            raise DataError("the shard is not the one its index was made for")
        if len(content) != image.bytes + head:
            raise DataError("the shard ends inside the image")
        return content[head:]

    def name(self, sample: int) -> tuple[str, str]:
        """Return shard and key of a sample, as an error should name them; the key is read from the tar's own header."""
        image = self.index.location(sample)
        header = b""
        with suppress(OSError):
            header = self._files.read(image.path, image.offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        if zlib.crc32(header) != image.header:  # it may be any file, which is not for a message to show
            return image.path, f"at byte {image.offset}"
        name = header[:100].split(b"\0")[0].decode(errors="surrogateescape")
        if folder := header[345:500].split(b"\0")[0].decode(errors="surrogateescape"):  # where ustar has long ones
            name = f"{folder}/{name}" if header[257:263] == b"ustar\0" else name
        return image.path, printable(split_name(name)[0])


def split_name(name: str) -> tuple[str, str]:
    """Divide the name of a tar's member into key and ending, at the first dot of the file's name, as WebDataset does.

    Returns:
        The key with the folders before it, and the ending in small letters and without its dot.
    """
    folder, _, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return (f"{folder}/{key}" if folder else key), ending.lower()
