"""Starts a launcher, a command that starts ranks, and ends all of them where this process is told to end."""

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from subprocess import Popen, TimeoutExpired
from typing import IO

from megatron_sphinx.console import complain

_LOOK_SECONDS = 0.1
_GRACE_SECONDS = 45.0  # torchrun gives its ranks 30


def run_launcher(command: Sequence[str], *, stdout: IO[str], stderr: IO[str]) -> int:
    """Run a launcher, such as torchrun or srun, to its end, and return its exit status.

    Args:
        command: the launcher, and what it starts on every rank.
        stdout: file that all ranks write their standard output to.
        stderr: file that all ranks write their standard error to.

    Raises:
        OSError: there is no such command.
        SystemExit: SIGTERM, SIGINT, SIGHUP or SIGUSR1 has come, and what was started has ended.
    """
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        launcher = Popen(command, stdout=stdout, stderr=stderr, start_new_session=True)
        while (status := launcher.poll()) is None and not received:
            time.sleep(_LOOK_SECONDS)
        if status is None:
            _end(launcher)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        complain(f"ended by {signal.Signals(received[0]).name}, and so are the ranks that were started")
        raise SystemExit(128 + received[0])
    assert status is not None
    return status


def _end(launcher: Popen[bytes]) -> None:
    """End a launcher by SIGTERM, on which it ends its ranks, and by SIGKILL where it does not follow."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, number)
        with suppress(TimeoutExpired):
            launcher.wait(_GRACE_SECONDS)
            return
