"""How long the start of a run takes: measured by each rank phase by phase, told and kept by the first one."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
FILE = "startup.json"
_IMPORTED = time.monotonic()
_SHORT = 0.1  # seconds; phases that took less on every rank are left out of what is printed


def process_seconds() -> float:
    """Tell how many seconds ago this process began; where /proc does not say it, since it imported this module."""
    try:
        begin = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - begin
    except (OSError, AttributeError):
        return time.monotonic() - _IMPORTED


class StartClock:
    """Measures the start of one rank.

    Args:
        is_profiled: whether the user wants to see every phase and rank.

    Attributes:
        seconds: by phase, what this rank needed for itself, without its waiting for others. What goes on beside other
            phases stands in it too: `expert <name>` for the weights of a visual expert, all at once.
        is_profiled: see above.
    """

    def __init__(self, *, is_profiled: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.is_profiled = is_profiled

    def note(self, phase: str, seconds: float) -> None:
        """Add what a phase took."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def timed(self, phase: str, work: Callable[[], T]) -> Callable[[], T]:
        """Give a function that does the work and notes how long it took."""

        def measured() -> T:
            start = time.perf_counter()
            try:
                return work()
            finally:
                self.note(phase, time.perf_counter() - start)

        return measured


def line(total: float, ranks: Sequence[dict[str, float]]) -> str:
    """Tell a start in one line: what took long, longest first.

    Args:
        total: seconds since the first rank's process began.
        ranks: by rank, the seconds of its phases.
    """
    most = {phase: max(found) for phase, found in _by_phase(ranks).items()}
    parts = [f"{phase} {most[phase]:.1f}" for phase in sorted(most, key=most.__getitem__, reverse=True)]
    shown = parts[: sum(seconds >= _SHORT for seconds in most.values())]
    return f"start: {total:.1f} s ({', '.join(shown) or 'nothing took long'})"


def table(ranks: Sequence[dict[str, float]]) -> list[str]:
    """Tell every phase of a start in a line: how long the slowest rank took, which one that is, and the fastest one."""
    lines = [f"{'phase':<28} {'slowest':>9} {'rank':>6} {'fastest':>9}"]
    for phase, found in _by_phase(ranks).items():
        slowest = max(found)
        rank = next(number for number, own in enumerate(ranks) if own.get(phase) == slowest)
        lines.append(f"{phase:<28} {slowest:>7.2f} s {rank:>6} {min(found):>7.2f} s")
    return lines


def _by_phase(ranks: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """List for each phase the seconds of the ranks that took it."""
    phases = list(dict.fromkeys(phase for own in ranks for phase in own))
    return {phase: [own[phase] for own in ranks if phase in own] for phase in phases}


def keep(folder: Path, total: float, ranks: Sequence[dict[str, float]]) -> None:
    """Write the start of the newest job to `startup.json` in the run folder."""
    rounded = [{phase: round(seconds, 3) for phase, seconds in own.items()} for own in ranks]
    _write(folder, {"start_seconds": round(total, 3), "first_step_seconds": None, "ranks": rounded})


def keep_first_step(folder: Path, total: float) -> None:
    """Add to `startup.json` how many seconds after the first rank's process began the first step was done."""
    _write(folder, {**read(folder), "first_step_seconds": round(total, 3)})


def read(folder: Path) -> dict[str, Any]:
    """Read how the newest job in a run folder started.

    Returns:
        `start_seconds`, from the begin of the first rank's process until all was ready for steps;
        `first_step_seconds`, from there until the first step was done, None before; and `ranks`, by rank the
        seconds of its phases.
    """
    found: dict[str, Any] = json.loads((folder / FILE).read_text())
    return found


def _write(folder: Path, values: dict[str, Any]) -> None:
    """Write the file so that no reader finds half of it."""
    part = folder / f"{FILE}.part"
    part.write_text(json.dumps(values, indent=1))
    part.replace(folder / FILE)
