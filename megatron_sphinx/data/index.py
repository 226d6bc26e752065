"""An index of samples, opened: it lies beside shards of images, and knows every pair or conversation in them unread.

An index is a folder:

* `index.json`: which kind of samples it has, the tokenizer's identity, the shards with their sizes, the type of tokens,
  and the content (see `content.py`);
* `samples.bin`: a SAMPLE for each pair, shard by shard;
* `captions.bin`: the tokens of all captions;
* `quarantine.jsonl`: what was left out, and why.

In an index of conversations `captions.bin` holds their tokens, `samples.bin` a CONVERSATION for each, and `answers.bin`
says for each token whether it belongs to an answer.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from megatron_sphinx.data.content import Content, content_in, measure
from megatron_sphinx.data.files import Records, is_url
from megatron_sphinx.data.tokenizer import TokenizerIdentity
from megatron_sphinx.errors import DataError
from megatron_sphinx.ranges import Range
from megatron_sphinx.values import read_json

SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),  # of the image in the shard
        ("bytes", "<u4"),  # of the image
        ("header", "<u4"),  # CRC-32 of the 512 bytes before it: of the tar's header, so of its name, size and time
        ("width", "<u4"),  # of the upright image
        ("height", "<u4"),
        (
            "orientation",
            "<u4",
        ),  # EXIF's number for how stored pixels are turned to that, 1 to 8; 0: no image
        ("caption", "<u8"),  # first token in captions.bin
        ("tokens", "<u4"),  # of the caption
    ]
)
CONVERSATION = np.dtype([*SAMPLE.descr, ("targets", "<u4")])  # positions with a target; without an image `bytes` is 0
UPRIGHT = "upright"  # what `sizes` of an index.json says; older indexes know the sizes of images as they are stored


def _record(kind: np.dtype[Any], content: dict[str, Any]) -> np.dtype[Any]:
    """Return the type of the records of an index, which is older where it knows of no orientation."""
    if content.get("sizes") == UPRIGHT:
        return kind
    return np.dtype([field for field in kind.descr if field[0] != "orientation"])


@dataclass(frozen=True)
class Shard:
    """A tar file as it was when it was indexed.

    Attributes:
        path: relative to the folder of the index, or a URL.
        bytes: size of the file; 0 where there is no file, since no sample has an image.
        samples: how many samples have their image in it.
    """

    path: str
    bytes: Annotated[int, Range(least=0, most=2**63)]
    samples: Annotated[int, Range(least=0, most=2**32)]


@dataclass(frozen=True, kw_only=True)
class IndexFile:
    """What `index.json` of an index of samples must hold.

    Attributes:
        of: which kind of samples it has; pairs in the oldest, which do not say so.
        tokenizer: identity of the one that it was made with.
        caption_type: the type of token ids.
        shards: the tar files of images.
        content: what the other files hold; None where that is not known.
    """

    of: str = "pairs"
    tokenizer: TokenizerIdentity
    caption_type: str
    shards: tuple[Shard, ...]
    content: Any = None


class IndexFolder:
    """One index, opened; a ContentSource.

    Attributes:
        folder: of the index.
        key: what the index has, and what the configuration calls it: pairs or conversations.
        label: key and value that name the index in the configuration.
        tokenizer: identity of the one that the index was made with.
        shards: the tar files of images.
        samples: a SAMPLE or CONVERSATION for each sample.
        token_type: of the records of `captions`.
        content: what the files hold; None while that is not known.
        captions: token ids of all samples, one behind the other.
        answers: for each token whether it belongs to an answer; None of pairs.
    """

    def __init__(self, folder: Path, key: str, section: str = "data") -> None:
        self.folder, self.key, self.label = folder, key, f"{section}.{key}={folder}"
        try:
            content = read_json(folder / "index.json", IndexFile)
            _check_kind(content, self.label, key)
            self.tokenizer = TokenizerIdentity(**content["tokenizer"])
            self.shards = [Shard(**shard) for shard in content["shards"]]
            self.samples = Records(folder / "samples.bin", _record(SAMPLE if key == "pairs" else CONVERSATION, content))
            self.token_type = _token_type(content["caption_type"])
            self.content = content_in(content)
            self.captions = Records(folder / "captions.bin", self.token_type)
            self.answers = None if key == "pairs" else Records(folder / "answers.bin", np.dtype(np.bool_))
        except OSError as error:
            raise DataError(
                f"{self.label}: {error.filename}: {error.strerror}; make the index by megatron-sphinx prepare {key}"
            ) from error
        except DataError:  # which is a ValueError
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.label}: damaged index ({error}); {self._remedy}") from error
        [last] = self.samples.read(self.samples.size - 1, self.samples.size)
        tokens = int(last["caption"]) + int(last["tokens"])
        sizes = (self.samples.size, self.captions.size, self.answers.size if self.answers is not None else tokens)
        if sizes != (sum(shard.samples for shard in self.shards), tokens, tokens):
            raise DataError(f"{self.label}: the files of the index disagree; {self._remedy}")

    @property
    def is_upright(self) -> bool:
        """Whether sizes are of images as they are looked at; an older index knows them as they are stored."""
        return "orientation" in (self.samples.record.names or ())

    @property
    def _remedy(self) -> str:
        return f"run megatron-sphinx prepare {self.key} again"

    @property
    def paths(self) -> list[Path]:
        """Files that decide the content; the token ids are in the first."""
        names = ["captions.bin", "samples.bin"] + ["answers.bin"] * (self.answers is not None)
        return [self.folder / name for name in names]

    @property
    def memory_file(self) -> Path:
        """The file in which the content is remembered where `index.json` does not have it."""
        return self.folder / "content.json"

    def measure(self, is_stopped: Callable[[], bool]) -> Content | None:
        """Read the files from begin to end; None where `is_stopped` said to give up."""
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
            raise DataError(f"{self.label}: shard {path} is missing ({error.strerror}); {self._remedy}") from error
        if size != known_size:
            raise DataError(
                f"{self.label}: shard {path} has {size} bytes, its index was made for {known_size}; "
                f"copy it again, or {self._remedy}"
            )


def _check_kind(content: dict[str, Any], label: str, key: str) -> None:
    """Raise DataError where an index is of something else than the configuration takes it for."""
    if (kind := content.get("of", "pairs")) != key:
        raise DataError(f"{label}: is an index of {kind}; give it as {label.partition('.')[0]}.{kind}")


def _token_type(name: str) -> np.dtype[Any]:
    """Return the type of token ids that an index names.

    Raises:
        TypeError: the name is that of no type of whole numbers.
    """
    kind = np.dtype(name)
    if kind.kind not in "iu":
        raise TypeError(f"caption_type={name}: is no type of whole numbers")
    return kind
