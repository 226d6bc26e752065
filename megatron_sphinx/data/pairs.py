"""Image-text pairs and conversations: shards of images, and an index beside them that knows every sample unread.

An index is a folder:

* `index.json`: what it is of, the tokenizer's mark, the shards with their sizes, the type of tokens, the content;
* `samples.bin`: a SAMPLE for each pair, shard by shard, memory-mapped;
* `captions.bin`: the tokens of all captions, memory-mapped;
* `quarantine.jsonl`: what was left out, and why.

In one of conversations `captions.bin` holds those, `samples.bin` CONVERSATIONs, and `answers.bin` for each token
whether it is of an answer.
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

from megatron_sphinx.data.content import BESIDE, Content, Memory, check_known, content_in, fingerprint, measure
from megatron_sphinx.data.files import Mapped, RangeReader, is_url
from megatron_sphinx.data.plan import SampleSizes
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
    """A tar file as it was when it was indexed; its path is relative to the index, or a URL."""

    path: str
    bytes: int
    samples: int


class _Folder:
    """One index, see Measured for what it holds; `key` is what the configuration calls it: pairs or conversations."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        try:
            content = json.loads((folder / "index.json").read_text())
            if (found := content.get("of", "pairs")) != key:
                raise DataError(f"data.{key}={folder}: is an index of {found}; give it as data.{found}")
            self.tokenizer = TokenizerIdentity(**content["tokenizer"])
            self.shards = [Shard(**shard) for shard in content["shards"]]
            self.samples = Mapped(folder / "samples.bin", SAMPLE if key == "pairs" else CONVERSATION)
            self.kind = _token_type(content["caption_type"])
            self.content = content_in(content)
            self.captions = Mapped(folder / "captions.bin", self.kind)
            self.answers = None if key == "pairs" else Mapped(folder / "answers.bin", np.dtype(np.bool_))
        except OSError as error:
            raise DataError(
                f"data.{key}={folder}: {error.filename}: {error.strerror}; make the index by "
                f"megatron-sphinx prepare {key}"
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
        return f"run megatron-sphinx prepare {self.key} again"

    @property
    def label(self) -> str:
        return f"data.{self.key}={self.folder}"

    @property
    def paths(self) -> list[Path]:
        names = ["captions.bin", "samples.bin"] + ["answers.bin"] * (self.answers is not None)
        return [self.folder / name for name in names]

    @property
    def memory(self) -> Path:
        return self.folder / "content.json"

    def measure(self, is_stopped: Callable[[], bool]) -> Content | None:
        captions, *others = self.paths
        return measure({captions: self.kind, **dict.fromkeys(others)}, is_stopped)

    def path(self, shard: int) -> str:
        """Where a shard is."""
        path = self.shards[shard].path
        return path if is_url(path) else os.path.abspath(self.folder / path)

    def check(self, shard: int) -> None:
        """Raise DataError where a shard on a disk is missing or of another size."""
        path, wanted = self.path(shard), self.shards[shard].bytes
        if is_url(path) or not wanted:  # without images there is no shard
            return
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise DataError(
                f"data.{self.key}={self.folder}: shard {path} is missing ({error.strerror}); {self._remedy}"
            ) from error
        if size != wanted:
            raise DataError(
                f"data.{self.key}={self.folder}: shard {path} has {size} bytes, its index was made for {wanted}; "
                f"copy it again, or {self._remedy}"
            )


def _token_type(name: str) -> np.dtype[Any]:
    """The type of token ids that an index names.

    Raises:
        TypeError: it is one of something else.
    """
    kind = np.dtype(name)
    if kind.kind not in "iu":
        raise TypeError(f"caption_type={name}: is no type of whole numbers")
    return kind


@dataclass(frozen=True)
class Place:
    """Where the image of a pair is: the shard's path or URL, and the bytes in it."""

    path: str
    offset: int
    bytes: int
    header: int


class SampleIndex:
    """Sizes, places and tokens of all samples of some indexes; nothing of a shard is read through it.

    They are called pairs here, whether they are pairs or conversations, and numbered one index behind the other, as
    given.

    Args:
        folders: of the indexes.
        key: what they are of, and called in the configuration: pairs or conversations.

    Attributes:
        bounds: first pair of each index, and how many there are.
        parts: the indexes.

    Raises:
        DataError: a folder holds no index, or a damaged one, or one of something else.
    """

    def __init__(self, folders: Sequence[str | Path], key: str = "pairs") -> None:
        self.parts = [_Folder(Path(folder), key) for folder in folders]
        self.bounds = [0, *accumulate(folder.samples.size for folder in self.parts)]

    def __len__(self) -> int:
        return self.bounds[-1]

    @property
    def fingerprint(self) -> str | None:
        """Equal exactly where all indexes are, wherever they lie; None while one has not been read yet.

        What they know of shards counts, so these too, by the names, sizes and times that they keep of their images.
        """
        return fingerprint(self.parts)

    def check(self, tokenizer: Tokenizer, memory: Memory = BESIDE) -> None:
        """Raise DataError where a shard is missing or has changed its size, or the tokenizer is another one.

        Token ids are compared with the vocabulary as far as `index.json` or the memory know them.
        That a shard of the right size is the one that was indexed is checked with each image that is read.
        """
        with ThreadPoolExecutor(16, "check") as pool:
            for folder in self.parts:
                check_tokenizer(folder.label, folder.tokenizer, tokenizer)
                check_known(folder, memory, tokenizer.identity.vocabulary)
                for _ in pool.map(folder.check, range(len(folder.shards))):
                    pass

    def sizes(self, first: int, last: int) -> SampleSizes:
        """Sizes of neighbouring pairs."""
        found = []
        while first < last:
            source = bisect_right(self.bounds, first) - 1
            begin, stop = self.bounds[source], min(last, self.bounds[source + 1])
            samples = self.parts[source].samples.read(first - begin, stop - begin)
            targets = samples["tokens"] + 1 if self.parts[source].answers is None else samples["targets"]
            found.append(SampleSizes(samples["width"], samples["height"], samples["tokens"], targets))
            first = stop
        return SampleSizes.joined(found)

    def caption(self, pair: int, most: int | None = None) -> NDArray[np.int64]:
        """Tokens of a pair's caption, at most so many."""
        folder, sample = self._at(pair)
        first, tokens = int(sample["caption"]), int(sample["tokens"])
        kept = tokens if most is None else min(tokens, most)
        return folder.captions.read(first, first + kept).astype(np.int64)

    def is_target(self, pair: int, kept: int) -> NDArray[np.bool_]:
        """Which of the first `kept` tokens of a pair, and the EOS behind them, are learned: bool [kept + 1].

        Of a caption all; of a conversation its answers, and EOS where it stands behind a whole answer.
        """
        answers = self._answers(pair)
        if answers is None:
            return np.ones(kept + 1, np.bool_)
        is_whole = kept == len(answers) or not answers[kept]
        return np.append(answers[:kept], answers[:kept][-1:].any() and is_whole)

    def cut(self, pair: int, most: int) -> tuple[int, int]:
        """Tokens that are kept of a pair with more than `most`, and positions with a target then.

        A caption loses its end, a conversation all turns behind the last answer that fits; where not even its first
        answer does, that loses its end, and the EOS behind it is not learned.
        """
        answers = self._answers(pair)
        if answers is None:
            return most, most + 1
        ends = np.flatnonzero(answers[:-1] & ~answers[1:]) + 1
        kept = int(ends[ends <= most][-1]) if (ends <= most).any() else most
        return kept, int(self.is_target(pair, kept).sum())

    def _answers(self, pair: int) -> NDArray[np.bool_] | None:
        """For each token of a conversation, whether it is of an answer; None of a caption."""
        folder, sample = self._at(pair)
        first = int(sample["caption"])
        return folder.answers.read(first, first + int(sample["tokens"])) if folder.answers is not None else None

    def place(self, pair: int) -> Place:
        """Where a pair's image is."""
        folder, sample = self._at(pair)
        shard = int(sample["shard"])
        numbers = (int(sample[name]) for name in ("offset", "bytes", "header"))
        return Place(folder.path(shard), *numbers)

    def name(self, pair: int) -> str:
        """A pair as an error should name it: its index, and number in that."""
        source = bisect_right(self.bounds, pair) - 1
        folder = self.parts[source]
        return f"{folder.label}: {folder.key.removesuffix('s')} {pair - self.bounds[source]}"

    def _at(self, pair: int) -> tuple[_Folder, Any]:
        source = bisect_right(self.bounds, pair) - 1
        folder = self.parts[source]
        place = pair - self.bounds[source]
        return folder, folder.samples.read(place, place + 1)[0]


class ImageReader:
    """Encoded images by pair number. Threads may share it."""

    def __init__(self, index: SampleIndex) -> None:
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
        header = b""
        with suppress(OSError):
            header = self._files.read(place.path, place.offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        if zlib.crc32(header) != place.header:  # it may be any file, which is not for a message to show
            return place.path, f"at byte {place.offset}"
        return place.path, split_name(header[:100].split(b"\0")[0].decode(errors="replace"))[0]


def split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member of a tar: divided at the first dot of the file's name, as WebDataset does."""
    folder, _, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return (f"{folder}/{key}" if folder else key), ending.lower()
