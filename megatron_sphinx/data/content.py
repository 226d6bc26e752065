"""What data holds: its lowest and highest token id, and a digest that is equal exactly where its files are.

The prepare tools write it to `index.json`. Other data is read once, in the background of the first run that takes it,
and what is found is remembered beside it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx import parsing
from megatron_sphinx.data.files import renamed
from megatron_sphinx.errors import DataError

_BLOCK = 2**22  # bytes read at a time: all the memory that a scan takes
_STOP_SECONDS = 2.0  # that a disk which does not answer may hold up the end of a run


@dataclass(frozen=True)
class Content:
    """What a token file or an index holds, as far as samples depend on it.

    Attributes:
        lowest: the lowest token id.
        highest: the highest token id.
        sha256: SHA-256 of the SHA-256 digests of the files, one behind the other; their names and times do not count.
    """

    lowest: int
    highest: int
    sha256: str


def content_in(document: Mapping[str, Any]) -> Content | None:
    """Return the `content` that a JSON object holds; None where it has none.

    Raises:
        ValueError: the value under that key is something else.
    """
    if (value := document.get("content")) is None:
        return None
    types = {"lowest": int, "highest": int, "sha256": str}
    if not isinstance(value, dict) or {name: type(part) for name, part in value.items()} != types:
        raise ValueError(f"content must have {', '.join(types)}")
    return Content(**value)


class Gauge:
    """Finds the Content of files while their bytes pass by, block by block; several files may take turns."""

    def __init__(self) -> None:
        self._digests: dict[str, Any] = {}
        self._ids: list[int] = []

    def add(self, file: str, records: NDArray[Any], *, are_tokens: bool) -> None:
        """Take what comes next in a file; files count in the order in which they are added first."""
        self._digests.setdefault(file, hashlib.sha256()).update(records)
        if are_tokens and len(records):
            ids = [*self._ids, int(records.min()), int(records.max())]
            self._ids = [min(ids), max(ids)]

    def content(self) -> Content:
        """Return the content of all files that were added; its ids are 0 where there was no token."""
        whole = hashlib.sha256(b"".join(digest.digest() for digest in self._digests.values()))
        return Content(min(self._ids, default=0), max(self._ids, default=0), whole.hexdigest())


def measure(
    files: Mapping[Path, np.dtype[Any] | None], is_stopped: Callable[[], bool] = lambda: False
) -> Content | None:
    """Read files from begin to end.

    Args:
        files: each with the type of the token ids in it, or None where it holds no token ids.
        is_stopped: asked again and again whether to give up.

    Returns:
        What they hold; None where `is_stopped` said so.

    Raises:
        OSError: a file cannot be read.
    """
    gauge, block = Gauge(), bytearray(_BLOCK)
    for path, kind in files.items():
        with path.open("rb") as file:
            while count := file.readinto(block):
                if is_stopped():
                    return None
                records = np.frombuffer(memoryview(block)[:count], kind or np.uint8)
                gauge.add(str(path), records, are_tokens=kind is not None)
    return gauge.content()


class ContentSource(Protocol):
    """Data whose content decides which samples a run sees: a token file, or an index.

    Attributes:
        content: what it holds; None while that is not known.
    """

    content: Content | None

    @property
    def label(self) -> str:
        """Key and value that name the data in the configuration."""

    @property
    def paths(self) -> Sequence[Path]:
        """Files of the data; the token ids are in the first."""

    @property
    def memory_file(self) -> Path:
        """The file beside the data in which its content is remembered."""

    def measure(self, is_stopped: Callable[[], bool]) -> Content | None:
        """Read the data from begin to end; None where `is_stopped` said to give up."""


def bad_id(where: str, token: int, vocabulary: int) -> DataError:
    """Return the error of a token id that the model does not have.

    Args:
        where: the data, as the error should name it.
        token: the id.
        vocabulary: how many ids the model has.
    """
    return DataError(
        f"{where} holds token id {token}, but model.vocabulary={vocabulary}; "
        f"it was made with another tokenizer, or is damaged: prepare it again with data.tokenizer"
    )


def check_ids(data: ContentSource, content: Content, vocabulary: int) -> None:
    """Raise DataError where data with such a content holds a token id that the model does not have."""
    if content.lowest < 0 or content.highest >= vocabulary:
        bad = content.lowest if content.lowest < 0 else content.highest
        raise bad_id(f"{data.label}: {data.paths[0]}", bad, vocabulary)


def fingerprint(data: Iterable[ContentSource]) -> str | None:
    """Identify the content of data in its order, wherever it lies; None where some of it is not known yet."""
    contents = [source.content for source in data]
    digests = [content.sha256 for content in contents if content is not None]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if len(digests) == len(contents) else None


@dataclass(frozen=True)
class Memory:
    """Remembers the content of data in a file beside it; where that cannot be written, in a folder of the run.

    What is remembered holds as long as no file of the data has another size or time.

    Attributes:
        folder: where a run remembers; None where there is no run.
    """

    folder: Path | None = None

    def recall(self, data: ContentSource) -> Content | None:
        """Return the content of data as it is now; None where that is not remembered."""
        for file in self._files(data):
            with suppress(OSError, ValueError, KeyError, TypeError):  # it is not there, or somebody else's
                remembered = parsing.read_json(file)
                if remembered["files"] == _states(data):
                    return content_in(remembered)
        return None

    def find(self, data: ContentSource, is_stopped: Callable[[], bool]) -> Content | None:
        """Read data, and remember its content; None where `is_stopped` said to give up.

        Raises:
            OSError: a file of the data cannot be read.
        """
        states = _states(data)
        if (content := data.measure(is_stopped)) is None:
            return None
        for file in self._files(data):
            with suppress(OSError):  # the folder of the data may be another's
                file.parent.mkdir(parents=True, exist_ok=True)
                with renamed(file) as partial:
                    partial.write_text(json.dumps({"content": asdict(content), "files": states}, indent=1) + "\n")
                break
        return content

    def _files(self, data: ContentSource) -> Iterable[Path]:
        """Yield the files that may remember data, the one beside it first."""
        yield data.memory_file
        if self.folder is not None:
            yield self.folder / f"{hashlib.sha256(str(data.memory_file.absolute()).encode()).hexdigest()[:24]}.json"


def _states(data: ContentSource) -> dict[str, list[int]]:
    """Return size and time of each file of data, by its name."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in data.paths}


BESIDE = Memory()  # remembers beside the data only


def check_known(data: ContentSource, memory: Memory, vocabulary: int) -> None:
    """Raise DataError where data is known to hold a token id that the model does not have; nothing is scanned."""
    data.content = data.content or memory.recall(data)
    if data.content is not None:
        check_ids(data, data.content, vocabulary)


class Scan:
    """Reads all data whose content is not known, in a thread that runs while its `with` block does.

    The content becomes that of the data; a token id that the model does not have ends the scan.

    Attributes:
        error: what the scan ended with, if it failed.
        then: called when everything is known; what it raises becomes the error.
    """

    def __init__(self, data: Iterable[ContentSource], vocabulary: int, memory: Memory) -> None:
        self._unknown = [source for source in data if source.content is None]
        self._vocabulary, self._memory = vocabulary, memory
        self.error: Exception | None = None
        self.then: Callable[[], None] = lambda: None
        self._stop = Event()
        self._thread = Thread(target=self._work, name="scan", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_STOP_SECONDS)

    def _work(self) -> None:
        try:
            for data in self._unknown:
                if not self._stop.is_set():
                    self._read(data)
            if self._unknown and not self._stop.is_set():
                self.then()
        except Exception as error:  # whatever it is, the thread that waits for it raises it
            self.error = error

    def _read(self, data: ContentSource) -> None:
        try:
            content = self._memory.recall(data) or self._memory.find(data, self._stop.is_set)
        except (ValueError, TypeError) as error:
            raise DataError(f"{data.label}: {data.paths[0]} is damaged ({error}); make it again") from error
        except OSError as error:
            raise DataError(
                f"{data.label}: {error.filename or data.paths[0]} cannot be read ({error.strerror or error}); "
                f"copy it again"
            ) from error
        if content is not None:
            check_ids(data, content, self._vocabulary)
            data.content = content
