"""Which ranks hold the job up, and which are slow: judged from what every rank publishes. Arithmetic only."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import median_low

from megatron_sphinx.liveness.progress import Beat

_NAMED = 3  # ranks of whom a message says where they are


@dataclass(frozen=True)
class LastBeat:
    """The last beat of a rank, and how old it is.

    Attributes:
        beat: what the rank published last.
        silent_seconds: seconds since then, in which it has published nothing.
    """

    beat: Beat
    silent_seconds: float

    @property
    def seconds(self) -> float:
        """How long the rank has been doing what it says."""
        return self.beat.seconds + self.silent_seconds


RESUME = "resume with checkpoint.resume=auto"  # what a user does when a training run has ended so


def find_stall(
    ranks: Sequence[LastBeat], *, timeout: float, storage_timeout: float, silence: float, remedy: str = RESUME
) -> str | None:
    """Find who holds the job up, if anybody does; return a line that says so, or None.

    A rank that publishes nothing is to blame before all others; then one that waits for nobody and is furthest behind.
    Where all wait for one another, those furthest behind are named. While a rank reads or writes large files the
    others may wait for it.

    Args:
        ranks: the last beats of all ranks of the job.
        timeout: seconds that a rank may stay at one thing.
        storage_timeout: seconds that a rank may stay at one thing that reads or writes large files.
        silence: seconds after which a rank that publishes nothing is gone.
        remedy: what a user does about it.
    """

    def limit(rank: LastBeat) -> float:
        return storage_timeout if rank.beat.kind.is_long else timeout

    if gone := [rank for rank in ranks if rank.silent_seconds >= silence]:
        seconds = max(rank.silent_seconds for rank in gone)
        what = f"has not been heard of for {seconds:.0f} s (killed, stopped, or its node is gone), last in"
        key = f"run.timeout={timeout:g}: " if timeout < inf else ""
        return f"{key}{_line(gone, what, ranks)}; look there, then {remedy}"
    late = [rank for rank in ranks if rank.seconds >= limit(rank)]
    in_time = (rank.beat.kind for rank in ranks if rank.seconds < limit(rank))
    if not late or any(doing.is_long and not doing.is_waiting for doing in in_time):
        return None
    working = [rank for rank in ranks if not rank.beat.is_waiting]
    behind = [rank for rank in late if not rank.beat.is_waiting] or working or late
    lowest = min(rank.beat.order for rank in behind)
    stuck = [rank for rank in behind if rank.beat.order == lowest]
    what = f"{'is stuck' if working else 'waits, as all do,'} for {max(rank.seconds for rank in stuck):.0f} s in"
    key = "run.storage_timeout" if stuck[0].beat.kind.is_long else "run.timeout"
    return f"{key}={limit(stuck[0]):g}: {_line(stuck, what, ranks)}; look there, then {remedy}"


def _line(blamed: Sequence[LastBeat], what: str, ranks: Sequence[LastBeat]) -> str:
    """Put into words which ranks are to blame for `what`, and how many wait for them."""
    named = "; ".join(f"{rank.beat.who} on host {rank.beat.host} {what} {rank.beat.where}" for rank in blamed[:_NAMED])
    more = f" and {len(blamed) - _NAMED} more" if len(blamed) > _NAMED else ""
    known = {id(rank) for rank in blamed}
    waiting = [rank for rank in ranks if id(rank) not in known]
    first = min(waiting, key=lambda rank: rank.beat.order, default=None)
    count = "1 rank waits" if len(waiting) == 1 else f"{len(waiting)} ranks wait"
    others = f"; {count}, the first, {first.beat.who}, in {first.beat.where}" if first else ""
    return f"{named}{more}{others}"


def find_stragglers(beats: Sequence[Beat], ratio: float) -> dict[str, float]:
    """Find the ranks that took at least `ratio` times as long as the median rank for the same work.

    Noise only ever adds time, so a rank is as fast as the best of its last probes.

    Args:
        beats: the last beat of every rank.
        ratio: how many times as long a straggler takes, at least.

    Returns:
        Each straggler's name and host, and how many times as long it took.
    """
    known = {f"{beat.who} on host {beat.host}": beat.probe_seconds for beat in beats if beat.probe_seconds is not None}
    if len(known) < 2:
        return {}
    usual = median_low(known.values())
    return {who: round(seconds / usual, 2) for who, seconds in known.items() if seconds >= ratio * usual}
