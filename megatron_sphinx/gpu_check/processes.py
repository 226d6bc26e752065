"""Starts the processes of the check, several at once where they do not disturb each other, and ends those that hang."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_sphinx.errors import SphinxError

_LOOK_SECONDS = 0.05
_LEAST_SECONDS = 5.0  # that a process must have left to be worth starting
_LAST_CHARACTERS = 300  # of what a failed process has said


class TimeIsUpError(SphinxError):
    """The check has no time left for a process."""

    exit_status = 1


@dataclass(frozen=True)
class Process:
    """A process of the check that has been started.

    Attributes:
        popen: the process itself.
        log: the file that holds what it has said.
        began: when it was started, as time.monotonic has it.
    """

    popen: "subprocess.Popen[bytes]"
    log: Path
    began: float

    @property
    def last_words(self) -> str:
        """The end of what the process has said, in one line."""
        said = " ".join(self.log.read_text(errors="replace").split())
        return said[-_LAST_CHARACTERS:]


@dataclass(frozen=True)
class Clock:
    """How long the check may still take.

    Attributes:
        deadline: when it must have ended, as time.monotonic has it.
    """

    deadline: float

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    def start(self, words: Sequence[object], log: Path, environment: Mapping[str, str] | None = None) -> Process:
        """Start this Python with some words behind it.

        Args:
            words: its arguments.
            log: file that both of its streams go to.
            environment: variables that it has beside those of this process.

        Raises:
            TimeIsUpError: the check has no time left.
        """
        if self.left < _LEAST_SECONDS:
            raise TimeIsUpError("left out: the time of --minutes is spent")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            popen = subprocess.Popen(
                [sys.executable, *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONWARNINGS": "ignore"} | dict(environment or {}),
                start_new_session=True,
            )
        return Process(popen, log, time.monotonic())

    def wait(self, process: Process, *, until: Callable[[], bool] = lambda: False) -> str:
        """Wait until a process has ended, or until something has come true, and end it then.

        Returns:
            Why it has not ended well, in one line; empty where it has, or where `until` came true.
        """
        popen = process.popen
        try:
            while popen.poll() is None and self.left > 0:
                if until():
                    return ""
                time.sleep(_LOOK_SECONDS)
        finally:
            is_late = popen.poll() is None
            end(process)
        if until():
            return ""
        if is_late:
            return "ended: the time of --minutes is spent"
        return f"status {popen.returncode}: {process.last_words}" if popen.returncode else ""


def end(process: Process) -> None:
    """Kill a process and all that it has started, if it still runs."""
    if process.popen.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.popen.pid, 9)
    process.popen.wait()
