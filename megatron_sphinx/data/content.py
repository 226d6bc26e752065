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

from megatron_sphinx.data.files import renamed
from megatron_sphinx.errors import DataError

_BLOCK = 2**22  # bytes read at a time: all the memory that a scan takes
_STOP_SECONDS = 2.0  # that a disk which does not answer may hold up the end of a run


@dataclass(frozen=True)
class Content:
    """What a token file or an index holds.

    Attributes:
        lowest: token id.
        highest: token id.
        sha256: of the SHA-256 digests of its files, one behind the other; their names and times do not count.
    """

    lowest: int
    highest: int
    sha256: str


def content_in(about: Mapping[str, Any]) -> Content | None:
    """The `content` that a JSON object holds; None where it has none.

    Raises:
        ValueError: it is something else.
    """
    if (value := about.get("content")) is None:
        return None
    types = {"lowest": int, "highest": int, "sha256": str}
    if not isinstance(value, dict) or {name: type(part) for name, part in value.items()} != types:
        raise ValueError(f"content must have {', '.join(types)}")
    return Content(**value)


class Gauge:
    """Finds the Content of files while their bytes pass by: block by block, and several files in turns."""

    def __init__(self) -> None:
        self._digests: dict[str, Any] = {}
        self._ids: list[int] = []

    def add(self, file: str, records: NDArray[Any], *, are_tokens: bool) -> None:
        """Take what comes next in a file; files count in the order in which they begin."""
        self._digests.setdefault(file, hashlib.sha256()).update(records)
        if are_tokens and len(records):
            ids = [*self._ids, int(records.min()), int(records.max())]
            self._ids = [min(ids), max(ids)]

    def content(self) -> Content:
        """What all that was taken is; ids are 0 where there was no token."""
        whole = hashlib.sha256(b"".join(digest.digest() for digest in self._digests.values()))
        return Content(min(self._ids, default=0), max(self._ids, default=0), whole.hexdigest())


def measure(
    files: Mapping[Path, np.dtype[Any] | None], is_stopped: Callable[[], bool] = lambda: False
) -> Content | None:
    """Read files from begin to end, given with the type of the token ids in them, or None where there are none.

    Returns:
        What they hold; None where it was stopped.

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


class Measured(Protocol):
    """Data whose content decides samples: a token file, or an index.

    Attributes:
        content: what it holds; None while that is not known.
    """

    content: Content | None

    @property
    def label(self) -> str:
        """Key and value that name it in the configuration."""

    @property
    def paths(self) -> Sequence[Path]:
        """Its files; the token ids are in the first."""

    @property
    def memory(self) -> Path:
        """The file beside it that says what it holds."""

    def measure(self, is_stopped: Callable[[], bool]) -> Content | None:
        """Read it from begin to end; None where that was stopped."""


def bad_id(where: str, token: int, vocabulary: int) -> DataError:
    """The error of a token id that the model does not have."""
    return DataError(
        f"{where} holds token id {token}, but model.vocabulary={vocabulary}; "
        f"it was made with another tokenizer, or is damaged: prepare it again with data.tokenizer"
    )


def check_ids(data: Measured, content: Content, vocabulary: int) -> None:
    """Raise DataError where data holds a token id that the model does not have."""
    if content.lowest < 0 or content.highest >= vocabulary:
        bad = content.lowest if content.lowest < 0 else content.highest
        raise bad_id(f"{data.label}: {data.paths[0]}", bad, vocabulary)


def fingerprint(data: Iterable[Measured]) -> str | None:
    """Identifies the content of data in its order, wherever it lies; None where some of it is not known yet."""
    contents = [one.content for one in data]
    digests = [content.sha256 for content in contents if content is not None]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if len(digests) == len(contents) else None


@dataclass(frozen=True)
class Memory:
    """What was found in data, kept in a file beside it; where that cannot be written, in a folder of the run.

    It is good as long as no file of the data has another size or time.

    Attributes:
        folder: of the run; None where there is no run.
    """

    folder: Path | None = None

    def recall(self, data: Measured) -> Content | None:
        """What was found in data as it is now."""
        for place in self._places(data):
            with suppress(OSError, ValueError, KeyError, TypeError):  # it is not there, or somebody else's
                found = json.loads(place.read_text())
                if found["files"] == _states(data):
                    return content_in(found)
        return None

    def find(self, data: Measured, is_stopped: Callable[[], bool]) -> Content | None:
        """Read data, and keep what is found; None where that was stopped.

        Raises:
            OSError: a file of the data cannot be read.
        """
        states = _states(data)
        if (content := data.measure(is_stopped)) is None:
            return None
        for place in self._places(data):
            with suppress(OSError):  # the folder of the data may be another's
                place.parent.mkdir(parents=True, exist_ok=True)
                with renamed(place) as partial:
                    partial.write_text(json.dumps({"content": asdict(content), "files": states}, indent=1) + "\n")
                break
        return content

    def _places(self, data: Measured) -> Iterable[Path]:
        yield data.memory
        if self.folder is not None:
            yield self.folder / f"{hashlib.sha256(str(data.memory.absolute()).encode()).hexdigest()[:24]}.json"


def _states(data: Measured) -> dict[str, list[int]]:
    """Size and time of each file."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in data.paths}


BESIDE = Memory()  # nothing is kept but beside the data


def check_known(data: Measured, memory: Memory, vocabulary: int) -> None:
    """Raise DataError where data is known, to itself or a memory, to hold a token id that the model does not have."""
    data.content = data.content or memory.recall(data)
    if data.content is not None:
        check_ids(data, data.content, vocabulary)


class Scan:
    """Reads data whose content is not known, in a thread of its own from `with` on; a bad token id ends it.

    What it finds becomes the `content` of the data.

    Attributes:
        error: what it ended with.
        then: called when everything is known; what it raises becomes the error.
    """

    def __init__(self, data: Iterable[Measured], vocabulary: int, memory: Memory) -> None:
        self._unknown = [one for one in data if one.content is None]
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

    def _read(self, data: Measured) -> None:
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
