"""What a process says, on standard output and error; where nobody reads them any more, it goes on in a file."""

import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO


def say(message: str) -> None:
    """Print a line about what is going on, on standard output at once."""
    print(message, flush=True)


def complain(message: str) -> None:
    """Print a line about what is wrong, on standard error at once."""
    print(message, file=sys.stderr, flush=True)


def last_words(message: str) -> None:
    """Print on standard error what ends this process, and leave it to torchrun."""
    complain(message)
    leave_to_torchrun(message)


def leave_to_torchrun(message: str) -> None:
    """Write what ends this process where torchrun looks for it, which shows it in its summary; the first stands."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"py_callstack": message, "timestamp": str(int(time.time()))}  # of the two, it shows the call stack
        with suppress(OSError), open(path, "x") as file:
            json.dump({"message": {"message": message, "extraInfo": about}}, file)


def say_of_ranks(facts: Sequence[str]) -> None:
    """Print a line for each rank, in their order; neighbours with the same fact share one.

    Args:
        facts: what is to be said about each rank, by rank.
    """
    first = 0
    for fact, same in groupby(facts):
        last = first + len(list(same)) - 1
        say(f"rank {first}: {fact}" if first == last else f"ranks {first}-{last}: {fact}")
        first = last + 1


def reserve_streams() -> None:
    """Open the null device in place of closed standard streams, so that no later file becomes one of them."""
    while (taken := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(taken)


@contextmanager
def enduring(log: Path) -> Iterator[None]:
    """Let output go on in a file once standard output or error cannot take it, instead of ending the process.

    Args:
        log: the file; it is made only when it is needed.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Enduring(sys.stdout, log), _Enduring(sys.stderr, log)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Enduring(io.TextIOBase):
    """A text stream that goes on in a file when its reader has gone, beginning with what the reader did not take."""

    def __init__(self, stream: TextIO | None, log: Path) -> None:
        self._log = log
        self._stream = stream if stream is not None else self._opened()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._divert()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._divert()

    def _divert(self) -> None:
        """Write into the file what the stream could not take: its reader, its terminal or its disk's room is gone."""
        with self._opened() as log:
            os.dup2(log.fileno(), self._stream.fileno())  # for libraries that write to it, too
        with suppress(OSError):  # the file's disk is full as well; what follows tries again
            self._stream.flush()

    def _opened(self) -> TextIO:
        """Open the file and write into it why it is needed; open the null device where it cannot be written."""
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            file = self._log.open("a")
            file.write(f"{time.strftime('%F %T')} a rank's output has no reader any more and goes on here\n")
            file.flush()
        except OSError:
            return open(os.devnull, "w")
        return file
