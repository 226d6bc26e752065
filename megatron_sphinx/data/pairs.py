"""Image-text pairs and conversations: shards of images, and an index beside them that knows every sample unread.

An index is a folder:

* `index.json`: which kind of samples it has, the tokenizer's identity, the shards with their sizes, the type of tokens,
  and the content (see `content.py`);
* `samples.bin`: a SAMPLE for each pair, shard by shard, memory-mapped;
* `captions.bin`: the tokens of all captions, memory-mapped;
* `quarantine.jsonl`: what was left out, and why.

In an index of conversations `captions.bin` holds their tokens, `samples.bin` a CONVERSATION for each, and `answers.bin`
says for each token whether it belongs to an answer.
"""

import json
import os
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

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
from megatron_sphinx.data.files import Mapped, RangeReader, is_url
from megatron_sphinx.data.streams import SampleSizes
from megatron_sphinx.data.tokenizer import Tokenizer, TokenizerIdentity, check_tokenizer
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
CONVERSATION = np.dtype([*SAMPLE.descr, ("targets", "<u4")])  # positions with a target; without an image `bytes` is 0


@dataclass(frozen=True)
class Shard:
    """A tar file as it was when it was indexed.

    Attributes:
        path: relative to the folder of the index, or a URL.
        bytes: size of the file; 0 where there is no file, since no sample has an image.
        samples: how many samples have their image in it.
    """

    path: str
    bytes: int
    samples: int


class _IndexFolder:
    """One index, opened; a ContentSource.

    Attributes:
        folder: of the index.
        key: what the index has, and what the configuration calls it: pairs or conversations.
        tokenizer: identity of the one that the index was made with.
        shards: the tar files of images.
        samples: a SAMPLE or CONVERSATION for each sample.
        token_type: of the records of `captions`.
        content: what the files hold; None while that is not known.
        captions: token ids of all samples, one behind the other.
        answers: for each token whether it belongs to an answer; None of pairs.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        try:
            content = json.loads((folder / "index.json").read_text())
            if (kind := content.get("of", "pairs")) != key:
                raise DataError(f"data.{key}={folder}: is an index of {kind}; give it as data.{kind}")
            self.tokenizer = TokenizerIdentity(**content["tokenizer"])
            self.shards = [Shard(**shard) for shard in content["shards"]]
            self.samples = Mapped(folder / "samples.bin", SAMPLE if key == "pairs" else CONVERSATION)
            self.token_type = _token_type(content["caption_type"])
            self.content = content_in(content)
            self.captions = Mapped(folder / "captions.bin", self.token_type)
            self.answers = None if key == "pairs" else Mapped(folder / "answers.bin", np.dtype(np.bool_))
        except OSError as error:
            raise DataError(
                f"data.{key}={folder}: {error.filename}: {error.strerror}; make the index by tools/prepare_{key}.py"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"data.{key}={folder}: damaged index ({error}); {self._remedy}") from error
        [last] = self.samples.read(self.samples.size - 1, self.samples.size)
        tokens = int(last["caption"]) + int(last["tokens"])
        sizes = (self.samples.size, self.captions.size, self.answers.size if self.answers is not None else tokens)
        if sizes != (sum(shard.samples for shard in self.shards), tokens, tokens):
            raise DataError(f"data.{key}={folder}: the files of the index disagree; {self._remedy}")

    @property
    def _remedy(self) -> str:
        return f"run tools/prepare_{self.key}.py again"

    @property
    def label(self) -> str:
        return f"data.{self.key}={self.folder}"

    @property
    def paths(self) -> list[Path]:
        names = ["captions.bin", "samples.bin"] + ["answers.bin"] * (self.answers is not None)
        return [self.folder / name for name in names]

    @property
    def memory_file(self) -> Path:
        return self.folder / "content.json"

    def measure(self, is_stopped: Callable[[], bool]) -> Content | None:
        captions, *others = self.paths
        return measure({captions: self.token_type, **dict.fromkeys(others)}, is_stopped)

    def path(self, shard: int) -> str:
        """Return the absolute path or the URL of a shard."""
        path = self.shards[shard].path
        return path if is_url(path) else os.path.abspath(self.folder / path)

    def check(self, shard: int) -> None:
        """Raise DataError where a shard on a disk is missing or of another size."""
        path, known_size = self.path(shard), self.shards[shard].bytes
        if is_url(path) or not known_size:  # without images there is no shard
            return
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise DataError(
                f"data.{self.key}={self.folder}: shard {path} is missing ({error.strerror}); {self._remedy}"
            ) from error
        if size != known_size:
            raise DataError(
                f"data.{self.key}={self.folder}: shard {path} has {size} bytes, its index was made for {known_size}; "
                f"copy it again, or {self._remedy}"
            )


def _token_type(name: str) -> np.dtype[Any]:
    """Return the type of token ids that an index names.

    Raises:
        TypeError: the name is that of no type of whole numbers.
    """
    kind = np.dtype(name)
    if kind.kind not in "iu":
        raise TypeError(f"caption_type={name}: is no type of whole numbers")
    return kind


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

    Attributes:
        bounds: number of the first sample of each index, and how many samples there are in all.
        folders: the indexes.

    Raises:
        DataError: a folder holds no index, or a damaged one, or one of something else.
    """

    def __init__(self, folders: Sequence[str | Path], key: str = "pairs") -> None:
        self.folders = [_IndexFolder(Path(folder), key) for folder in folders]
        self.bounds = [0, *accumulate(folder.samples.size for folder in self.folders)]

    def __len__(self) -> int:
        return self.bounds[-1]

    @property
    def content_sources(self) -> Sequence[ContentSource]:
        """Whatever decides the content of samples: the indexes."""
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
            tables.append(SampleSizes(samples["width"], samples["height"], samples["tokens"], targets))
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

    def name(self, sample: int) -> str:
        """Name a sample as an error should: by its index, and by its number in that."""
        source = bisect_right(self.bounds, sample) - 1
        folder = self.folders[source]
        return f"{folder.label}: {folder.key.removesuffix('s')} {sample - self.bounds[source]}"

    def _record(self, sample: int) -> tuple[_IndexFolder, Any]:
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
        return image.path, split_name(header[:100].split(b"\0")[0].decode(errors="replace"))[0]


def split_name(name: str) -> tuple[str, str]:
    """Divide the name of a tar's member into key and ending, at the first dot of the file's name, as WebDataset does.

    Returns:
        The key with the folders before it, and the ending in small letters and without its dot.
    """
    folder, _, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return (f"{folder}/{key}" if folder else key), ending.lower()
