"""What a process says, on standard output and error; where nobody hears it any more, a file of the run goes on."""

import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO


def say(message: str) -> None:
    """Say a line of what is going on, on standard output at once."""
    print(message, flush=True)


def complain(message: str) -> None:
    """Say a line of what is wrong, on standard error at once."""
    print(message, file=sys.stderr, flush=True)


def say_of_ranks(facts: Sequence[str]) -> None:
    """Say a line for each rank, numbered as they come; neighbours of whom the same is to be said share one."""
    first = 0
    for fact, same in groupby(facts):
        last = first + len(list(same)) - 1
        say(f"rank {first}: {fact}" if first == last else f"ranks {first}-{last}: {fact}")
        first = last + 1


def reserve_streams() -> None:
    """Let no file that is opened later become standard input, output or error where those are closed."""
    while (taken := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(taken)


@contextmanager
def enduring(log: Path) -> Iterator[None]:
    """Let what is said go on in a file once standard output or error cannot take it, instead of ending the process."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Enduring(sys.stdout, log), _Enduring(sys.stderr, log)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Enduring(io.TextIOBase):
    """A stream that goes on in a file when its reader has gone, with what that did not take."""

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
        """Let the file take what the stream has not: its reader, its terminal or the room on its disk is gone."""
        with self._opened() as log:
            os.dup2(log.fileno(), self._stream.fileno())  # for libraries that write to it, too
        with suppress(OSError):  # the file's disk is full as well; what follows tries again
            self._stream.flush()

    def _opened(self) -> TextIO:
        """The file, told that it is needed; nothing at all where it cannot be written."""
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            file = self._log.open("a")
            file.write(f"{time.strftime('%F %T')} a rank's output has no reader any more and goes on here\n")
            file.flush()
        except OSError:
            return open(os.devnull, "w")
        return file
