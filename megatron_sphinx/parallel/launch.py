"""Starts a command that starts ranks, and ends all of them where this process is told to end."""

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
    """Run a launcher, such as torchrun or srun, to its end; its exit status.

    Args:
        command: the launcher, and what it starts on every rank.
        stdout: file that all of them write to.
        stderr: file for their errors.

    Raises:
        OSError: there is no such command.
        SystemExit: SIGTERM, SIGINT, SIGHUP or SIGUSR1 has come, and what was started has ended.
    """
    asked: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in numbers}
    try:
        launcher = Popen(command, stdout=stdout, stderr=stderr, start_new_session=True)
        while (status := launcher.poll()) is None and not asked:
            time.sleep(_LOOK_SECONDS)
        if status is None:
            _end(launcher)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        complain(f"ended by {signal.Signals(asked[0]).name}, and so are the ranks that were started")
        raise SystemExit(128 + asked[0])
    assert status is not None
    return status


def _end(launcher: Popen[bytes]) -> None:
    """End a launcher as it wants to be ended, for it ends its ranks then; or as it must be."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, number)
        with suppress(TimeoutExpired):
            launcher.wait(_GRACE_SECONDS)
            return
