"""Runs programs that are compared, each as a process of its own: how long it takes, and how much memory."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path


@dataclass(frozen=True)
class Turn:
    """A program that has run.

    Attributes:
        seconds: from its start to its end, the start of Python included.
        peak_rss_bytes: the most memory that it had at a time, mapped pages of files included.
    """

    seconds: float
    peak_rss_bytes: int


def run(command: Sequence[str]) -> Turn:
    """Run a program that must succeed, once the disk has what was written before; end this one where it fails."""
    os.sync()
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)[:300]}\n{log.read().decode(errors='replace')[-2000:]}")
    return Turn(seconds, usage.ru_maxrss * 1024)


def apart(work: Callable[..., None], *args: object, **options: object) -> None:
    """Call a function in a process of its own: what it takes of memory is not counted for programs that this one runs.

    Linux takes the memory that a process had before its program began for a part of the program's own peak.
    """
    child = get_context("fork").Process(target=work, args=args, kwargs=options)
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"{work.__name__} ended with {child.exitcode}")


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(one.stat().st_size for one in ([path] if path.is_file() else path.rglob("*")) if one.is_file())
