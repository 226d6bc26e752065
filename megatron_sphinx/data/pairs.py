"""Image-text pairs: WebDataset shards, and an index beside them that knows every sample without reading it."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data import images
from megatron_sphinx.data.text import TokenFile, TokenWriter, check_tokenizer, renamed
from megatron_sphinx.data.tokenizer import Tokenizer, TokenizerMark
from megatron_sphinx.errors import DataError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
CAPTION_ENDINGS = (".txt", ".caption")
SAMPLE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("bytes", "<u4"), ("width", "<u4"), ("height", "<u4")])


@dataclass(frozen=True)
class Shard:
    """A tar file as it was when it was indexed."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str
    samples: int

    @classmethod
    def of(cls, path: Path, name: str, samples: int) -> "Shard":
        """The shard at `path` as it is now."""
        state = path.stat()
        return cls(name, state.st_size, state.st_mtime_ns, file_sha256(path), samples)

    def check(self, folder: Path) -> None:
        """Raise DataError where the file is not the one that was indexed. Reads it only if its time has changed."""
        path = folder / self.path
        remedy = "run tools/prepare_pairs.py again"
        try:
            state = path.stat()
        except OSError as error:
            raise DataError(f"data.pairs={folder}: shard {path} is missing ({error.strerror}); {remedy}") from error
        if state.st_size != self.bytes:
            raise DataError(
                f"data.pairs={folder}: shard {path} has {state.st_size} bytes, its index was made for {self.bytes}; "
                f"copy it again, or {remedy}"
            )
        if state.st_mtime_ns != self.mtime_ns and file_sha256(path) != self.sha256:
            raise DataError(f"data.pairs={folder}: shard {path} is not the file its index was made for; {remedy}")


def file_sha256(path: Path) -> str:
    """Digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PairIndex:
    """Sizes, places and captions of all pairs; nothing of a shard is read through it.

    Raises:
        DataError: the folder holds no index, or a damaged one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            content = json.loads((self.folder / "index.json").read_text())
            self.tokenizer = TokenizerMark(**content["tokenizer"])
            self.shards = [Shard(**shard) for shard in content["shards"]]
            self.samples: NDArray[Any] = np.load(self.folder / "samples.npy", mmap_mode="r")
        except OSError as error:
            raise DataError(
                f"data.pairs={folder}: {error.filename}: {error.strerror}; make the index by tools/prepare_pairs.py"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"data.pairs={folder}: damaged index ({error}); run tools/prepare_pairs.py again"
            ) from error
        self.captions = TokenFile(self.folder / "captions", "data.pairs")
        if not len(self.samples) == len(self.captions.lengths) == sum(shard.samples for shard in self.shards):
            raise DataError(f"data.pairs={folder}: the files of the index disagree; run tools/prepare_pairs.py again")

    def __len__(self) -> int:
        return len(self.samples)

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise DataError where a shard or the tokenizer is not the one that was indexed."""
        check_tokenizer(f"data.pairs={self.folder}", self.tokenizer, tokenizer)
        for shard in self.shards:
            shard.check(self.folder)

    def size(self, pair: int) -> tuple[int, int]:
        """Width and height of a pair's image."""
        sample = self.samples[pair]
        return int(sample["width"]), int(sample["height"])


class ImageReader:
    """Encoded images by pair number. Threads may share it."""

    def __init__(self, index: PairIndex) -> None:
        self.index = index
        self._files: dict[int, int] = {}
        self._lock = Lock()

    def read(self, pair: int) -> bytes:
        """The image file of a pair.

        Raises:
            DataError: the shard ends before the image does.
        """
        sample = self.index.samples[pair]
        content = os.pread(self._file(int(sample["shard"])), int(sample["bytes"]), int(sample["offset"]))
        if len(content) != sample["bytes"]:
            raise DataError("the shard ends inside the image")
        return content

    def name(self, pair: int) -> tuple[str, str]:
        """Shard and key of a pair, as an error should name them; the key is read from the tar's own header."""
        sample = self.index.samples[pair]
        shard = self.index.shards[int(sample["shard"])].path
        header = os.pread(self._file(int(sample["shard"])), 100, int(sample["offset"]) - tarfile.BLOCKSIZE)
        return shard, os.path.splitext(header.split(b"\0")[0].decode(errors="replace"))[0]

    def _file(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                if len(self._files) >= 256:
                    os.close(self._files.pop(next(iter(self._files))))
                self._files[shard] = os.open(self.index.folder / self.index.shards[shard].path, os.O_RDONLY)
            return self._files[shard]


@dataclass
class Report:
    """What `index_shards` took, and what it left out and why."""

    pairs: int = 0
    rejected: dict[str, int] = field(default_factory=dict)

    def reject(self, reason: str) -> None:
        """Count one sample left out."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1


def write_shards(folder: Path, target: Path, samples_per_shard: int = 1000) -> list[Path]:
    """Pack a folder of images with captions (`x.png` and `x.txt`) into WebDataset shards.

    Raises:
        DataError: no image in the folder has a caption.
    """
    from webdataset import TarWriter

    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    found = [path for path in found if path.with_suffix(".txt").is_file()]
    if not found:
        raise DataError(f"{folder}: holds no image with a caption beside it; give x.png and x.txt, and so on")
    target.mkdir(parents=True, exist_ok=True)
    shards = []
    for first in range(0, len(found), samples_per_shard):
        shard = target / f"{first // samples_per_shard:06d}.tar"
        with renamed(shard) as partial, TarWriter(str(partial), encoder=False) as tar:
            for number, image in enumerate(found[first : first + samples_per_shard], first):
                kind, caption = image.suffix.lower().removeprefix("."), image.with_suffix(".txt")
                tar.write({"__key__": f"{number:09d}", kind: image.read_bytes(), "txt": caption.read_bytes()})
        shards.append(shard)
    return shards


def index_shards(shards: Iterable[Path], folder: Path, tokenizer: Tokenizer) -> Report:
    """Write the index of WebDataset or img2dataset shards: index.json, samples.npy, captions.bin, captions.idx.

    Images are opened, not decoded. A sample without image or caption is left out and counted.

    Raises:
        DataError: a shard that is no tar or is cut short, or no pair in any of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report, marks, rows = Report(), list[Shard](), list[tuple[int, ...]]()
    with TokenWriter(folder / "captions", tokenizer) as captions:
        for number, path in enumerate(shards):
            before = len(rows)
            for row, caption in _pairs_of(path, report):
                rows.append((number, *row))
                captions.add(tokenizer.encode(caption))
            marks.append(Shard.of(path, os.path.relpath(path, folder), len(rows) - before))
        if not rows:
            raise DataError(f"{marks[0].path if marks else folder}: no image has a caption (.txt, or caption in .json)")
    report.pairs = len(rows)
    with renamed(folder / "samples.npy") as partial, partial.open("wb") as file:
        np.save(file, np.array(rows, dtype=SAMPLE))
    with renamed(folder / "index.json") as partial:
        content = {"tokenizer": asdict(tokenizer.mark), "shards": [asdict(mark) for mark in marks]}
        partial.write_text(json.dumps(content, indent=1))
    return report


def _pairs_of(path: Path, report: Report) -> Iterator[tuple[tuple[int, int, int, int], str]]:
    """(offset, bytes, width, height) and caption of each pair of a shard, in the order of its images."""
    images_found: dict[str, tuple[int, int, int, int]] = {}
    captions: dict[str, str] = {}
    for name, offset, content in _members(path):
        key, ending = os.path.splitext(name)
        if ending.lower() in IMAGE_ENDINGS:
            try:
                images_found[key] = (offset, len(content), *images.size_of(content))
            except DataError as error:
                report.reject(str(error).split(":")[0])
        elif ending.lower() in CAPTION_ENDINGS:
            captions[key] = content.decode("utf-8", errors="replace").strip()
        elif ending.lower() == ".json" and key not in captions:
            captions[key] = _json_caption(content)
    for key, image in images_found.items():
        if captions.get(key):
            yield image, captions[key]
        else:
            report.reject("no caption")
    for _key in captions.keys() - images_found.keys():
        report.reject("no image")


def _members(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Name, offset of the content, and content of each regular file of a tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg():
                    file = tar.extractfile(member)
                    content = file.read() if file else b""
                    if len(content) != member.size:
                        raise DataError(f"{path}: cut short inside {member.name}; copy it again")
                    yield member.name, member.offset_data, content
        with path.open("rb") as file:
            file.seek(-2 * tarfile.BLOCKSIZE, os.SEEK_END)
            if file.read().strip(b"\0"):
                raise DataError(f"{path}: cut short, it lacks the mark of its end; copy it again")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a tar file ({error}); copy it again") from error


def _json_caption(content: bytes) -> str:
    try:
        value = json.loads(content)
    except ValueError:
        return ""
    caption = value.get("caption") if isinstance(value, dict) else None
    return caption.strip() if isinstance(caption, str) else ""
