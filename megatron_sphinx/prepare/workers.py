"""Long offline work, divided in parts: on all cores, with a sign of progress, none of it lost when it is killed."""

import ctypes
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from megatron_sphinx.data.files import renamed
from megatron_sphinx.data.shuffle import key_of
from megatron_sphinx.errors import DataError

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h: the signal that a process gets when its parent ends

Unit = TypeVar("Unit")
Done = TypeVar("Done")


@dataclass
class Report:
    """How much was taken, and what was left out and why.

    Attributes:
        taken: how many samples, documents or pages were taken.
        tokens: how many tokens these have.
        held_out: how many samples or documents the held-out share has.
        rejected: how many were left out, by reason.
    """

    taken: int = 0
    tokens: int = 0
    held_out: int = 0
    rejected: dict[str, int] = field(default_factory=dict)

    def reject(self, lines: Sequence[dict[str, Any]]) -> None:
        """Count the entries of a quarantine by the first words of their reasons, up to a colon."""
        for line in lines:
            reason = line["reason"].split(":")[0]
            self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def why(self) -> str:
        """Say what was left out, as the end of an error's line."""
        return "".join(f"; {count} left out ({reason})" for reason, count in sorted(self.rejected.items()))

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
    bar = {"total": len(units), "unit": unit_name, "disable": not show, "dynamic_ncols": True, "mininterval": 1.0}
    if workers == 1 or len(units) < 2:
        yield from tqdm(map(work, units), **bar)
        return
    fork = multiprocessing.get_context("fork")  # so `work` and what it holds are there without being sent
    pool = ProcessPoolExecutor(min(workers, len(units)), fork, initializer=_begin, initargs=(os.getpid(), work))
    try:
        yield from tqdm(pool.map(_do, units), **bar)
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
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before this was said
        os._exit(1)


def _do(unit: Any) -> Any:
    return _work(unit)


def is_held_out(key: str, share: float) -> bool:
    """Say whether a sample belongs to the held-out share, which follows from its key alone."""
    return share > 0 and key_of("held out", key) < share * 2.0**64


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
