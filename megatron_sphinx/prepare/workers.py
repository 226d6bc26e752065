"""Long offline work, divided in parts: on all cores, with a sign of progress, none of it lost when it is killed."""

import ctypes
import fcntl
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from megatron_sphinx.data.files import renamed
from megatron_sphinx.data.shuffle import key_of
from megatron_sphinx.errors import DataError, SphinxError
from megatron_sphinx.paths import printable

_LOCK = ".lock"  # in a folder, while it is written
_LOCK_SECONDS = 2.0  # until workers of a killed process are gone
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h: the signal that a process gets when its parent ends

Unit = TypeVar("Unit")
Done = TypeVar("Done")


@dataclass
class Report:
    """How much was taken, and what was left out and why.

    Attributes:
        inputs: how many samples, documents or pages came in, counted where they were read.
        taken: how many samples, documents or pages were taken.
        tokens: how many tokens these have.
        held_out: how many samples or documents the held-out share has.
        rejected: how many were left out, by reason.
        first: the whole reason why the first of them was left out.
    """

    inputs: int = 0
    taken: int = 0
    tokens: int = 0
    held_out: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    first: str = ""

    def reject(self, lines: Sequence[dict[str, Any]]) -> None:
        """Count the entries of a quarantine by the first words of their reasons, up to a colon.

        An entry stands for as many as its `documents` say (none, where it is but a remark), else for one.
        """
        for line in lines:
            if count := line.get("documents", 1):
                self.first = self.first or line["reason"]
                reason = line["reason"].split(":")[0]
                self.rejected[reason] = self.rejected.get(reason, 0) + count

    @property
    def quarantined(self) -> int:
        """How many were left out, each with a line in the quarantine."""
        return sum(self.rejected.values())

    def balance(self, output: str, quarantine: str = "quarantine.jsonl") -> str:
        """Say that nothing was lost: what came in is what was taken, held out, and left out; a tool's last line.

        Args:
            output: what those are called that were taken.
            quarantine: name of the file that lists what was left out.

        Raises:
            RuntimeError: the numbers do not add up, which is a fault of this package.
        """
        if self.inputs != self.taken + self.held_out + self.quarantined:
            numbers = f"{self.inputs} came in, {self.taken} + {self.held_out} + {self.quarantined} came out"
            raise RuntimeError(f"the numbers of {output} do not add up: {numbers}; please report this")
        held_out = f" + {self.held_out} held out" if self.held_out else ""
        return f"input {self.inputs} = {self.taken} {output}{held_out} + {self.quarantined} in {quarantine}"

    def why(self) -> str:
        """Say what was left out, as the end of an error's line."""
        counts = "".join(f"; {count} left out ({reason})" for reason, count in sorted(self.rejected.items()))
        return f"{counts}; the first: {self.first}" if ":" in self.first else counts

    def left_out(self) -> str:
        """Say what was left out, a line for each reason."""
        return "".join(f"  left out: {count} ({reason})\n" for reason, count in sorted(self.rejected.items()))


def in_parallel(
    work: Callable[[Unit], Done], units: Sequence[Unit], *, workers: int, unit_name: str, show: bool = False
) -> Iterator[Done]:
    """Yield what `work` makes of each unit, in their order; several are worked on at a time.

    Args:
        work: called in another process, which is forked, so it may hold anything.
        units: sent to that process.
        workers: processes at a time; with 1 the work is done in this process.
        unit_name: what a unit is called beside the progress bar.
        show: whether there is a progress bar.

    Raises:
        DataError: a process was killed; or whatever `work` raises.
    """
    check_workers(workers)
    bar = {"total": len(units), "unit": unit_name, "disable": not show, "dynamic_ncols": True, "mininterval": 1.0}
    if workers == 1 or len(units) < 2:
        yield from tqdm(map(work, units), **bar)
        return
    fork = multiprocessing.get_context("fork")  # so `work` and what it holds are there without being sent
    pool = ProcessPoolExecutor(min(workers, len(units)), fork, initializer=_begin, initargs=(os.getpid(), work))
    try:
        yield from tqdm(pool.map(_do, units), **bar)
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():  # what they are at takes long, and is not kept
            child.kill()
        raise
    except BrokenProcessPool as error:
        raise DataError(
            "a worker was killed, perhaps for want of memory; run this again with fewer --workers: what is done is kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]


def _begin(parent: int, work: Callable[[Any], Any]) -> None:
    """Keep the work of this process, and let it end when the one that forked it is gone, however that ended."""
    global _work
    _work = work
    for lock in _locks.values():  # which end with the parent
        os.close(lock)
    _locks.clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent is the one that speaks
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before this was said
        os._exit(1)


def _do(unit: Any) -> Any:
    return _work(unit)


def one_line(reason: str) -> str:
    """Return a reason as a quarantine has it, in one line and without bytes that are not UTF-8."""
    return printable(" ".join(reason.split()))


def check_workers(workers: int) -> None:
    """Raise DataError where there would be no process to do the work."""
    if workers < 1:
        raise DataError(f"workers={workers}: must be 1 or more; leave --workers out to take every core")


def check_share(name: str, share: float) -> None:
    """Raise DataError where a share that is held out is no share, or leaves nothing.

    Args:
        name: of the setting.
        share: its value.
    """
    if not 0 <= share < 1:
        raise DataError(f"{name}={share:g}: must be 0 or more and below 1; give 0.001 for one of a thousand")


def is_held_out(key: str, share: float) -> bool:
    """Say whether a sample belongs to the held-out share, which follows from its key alone."""
    return share > 0 and key_of("held out", printable(key)) < share * 2.0**64


_locks: dict[Path, int] = {}  # open files that this process has locked


@contextmanager
def target_folder(folder: Path) -> Iterator[None]:
    """Make a folder that a tool writes, and have it for this process alone; a killed process has it no more.

    Raises:
        DataError: the folder cannot be made or written, or another process writes it.
    """
    path = Path(os.path.realpath(folder)) / _LOCK
    if path in _locks:  # by a caller
        yield
        return
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locks[path] = _lock(path)
        try:
            yield
        finally:
            del _locks[path]
            path.unlink(missing_ok=True)
            os.close(lock)
            if is_new and not any(path.parent.iterdir()):  # nothing came of it
                path.parent.rmdir()
    except BlockingIOError as error:
        raise DataError(f"{folder}: another process writes it; wait for that, or give another TARGET") from error
    except OSError as error:
        if isinstance(error, SphinxError):
            raise
        raise _cannot_write(folder, error) from error


def _lock(path: Path) -> int:
    """Open a file and lock it.

    Raises:
        BlockingIOError: another process has it, and keeps it.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(lock).st_ino:
                return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise
        except FileNotFoundError:  # its last owner has just removed it
            pass
        except OSError:  # a file system without locks
            return lock
        os.close(lock)
        time.sleep(0.05)


def _cannot_write(folder: Path, error: OSError) -> DataError:
    fault = f"{error.strerror or error}: {error.filename or folder}"
    return DataError(f"{folder}: cannot be written ({fault}); mend that, or give another TARGET")


def quarantine_beside(target: Path) -> Path:
    """Return the file that lists what was left out of a file of JSON lines: x.quarantine.jsonl beside x.jsonl."""
    return target.with_name(f"{target.name.removesuffix('.jsonl')}.quarantine.jsonl")


def write_lines(path: Path, entries: Iterable[object]) -> None:
    """Write JSON lines under their final name when they are whole."""
    with renamed(path) as partial, partial.open("w") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: object) -> None:
    """Write JSON under its final name when it is whole."""
    with renamed(path) as partial, partial.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
