"""How ranks learn that the job ends: a failing rank's own error comes first, and the others follow within seconds.

Every rank watches one key of the job's store from a thread. Whoever ends the job writes it; a rank that is stuck in a
collective, or far ahead of the others, sees it and leaves. The same thread publishes how far the rank is (a beat). The
first rank reads the beats of all ranks and ends the job when one of them holds the others up; so does the last rank, a
little later, for the case that it is the first that does.
"""

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from math import inf
from threading import Event, Thread
from typing import Any, NoReturn

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from megatron_sphinx.console import complain, last_words, say
from megatron_sphinx.liveness.progress import Beat, Progress
from megatron_sphinx.liveness.stalls import RESUME, LastBeat, find_stall, find_stragglers
from megatron_sphinx.liveness.stop import StopSignal

_ENDED, _STOP, _BROKEN, _BEAT = "ended", "stop", "broken", "beat"  # keys of the job's store
_GRACE_SECONDS = 3.0  # in which a rank that is not stuck leaves in its own way
_STORE_SECONDS = 1.5  # that the first rank stays longer than the others, who still read the store
_LOOK_SECONDS = 0.5  # between two looks at the store
_MOST_BEAT_SECONDS = 3.0
_STILL_SECONDS = 10.0  # between two looks at the clock, beyond which a process was not merely slow
_UNHEARD_SECONDS = 4.0  # between two judgements, beyond which silence says nothing about those who were to be heard
_GONE = f"it is gone: killed, or its node is; {RESUME}"


class Lifeline:
    """Watches for the end of the job on one rank, and announces it to the others.

    Args:
        store: a connection of this rank's own to the job's store.
        name: what this rank is called in messages.
        rank: number of this rank in the world.
        world: ranks in the job.
        progress: how far this rank is, and the limits by which ranks are blamed; without it nobody ever is.
        stop: asked to stop on the first rank where another rank was told to.
        straggler_ratio: how many times as long as the median rank a rank takes that is reported.
        silence: seconds without a beat that prove a rank gone; the timeout of `progress` where that is less.
        command: what the job runs.
        remedy: what a user does about a job that has ended so.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        rank: int,
        world: int,
        progress: Progress | None = None,
        stop: StopSignal | None = None,
        straggler_ratio: float = 1.3,
        silence: float = inf,
        command: str = "train",
        remedy: str = RESUME,
    ) -> None:
        self._command, self._remedy = command, remedy
        self.name, self.is_first_rank = name, rank == 0
        self._rank, self._world, self._stop, self._ratio = rank, world, stop, straggler_ratio
        self._progress = progress or Progress()
        self._silence = min(silence, self._progress.timeout)
        self._store, self._closed = store, Event()
        self._beat_seconds = min(_MOST_BEAT_SECONDS, max(_LOOK_SECONDS, self._progress.timeout / 30))
        self._last_beats: dict[int, tuple[Beat, float]] = {}  # by rank, and when each was first seen
        self._answered, self._blamed_since = time.monotonic(), inf
        self._judged = time.monotonic()
        with suppress(RuntimeError):  # the store is gone: the watchers find out
            self._publish()  # at once: a rank that is lost in its first moment was there
        threads = {"lifeline": self._watch, "lifeline of the store": self._watch_store}
        self._watchers = [Thread(target=work, name=name, daemon=True) for name, work in threads.items()]
        for watcher in self._watchers:
            watcher.start()

    @classmethod
    def connect(cls, name: str, **options: Any) -> "Lifeline":
        """Make a lifeline over the store that the ranks met at, by torchrun's MASTER_ADDR and MASTER_PORT.

        Args:
            name: what this rank is called in messages.
            options: arguments of the constructor: `progress`, `stop`, `straggler_ratio`, `silence`, `command`,
                `remedy`.
        """
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        store: Store = HashStore()
        if world > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives it
        return cls(PrefixStore(f"megatron_sphinx/{attempt}", store), name, rank=rank, world=world, **options)

    def leave(self, status: int, reason: str) -> NoReturn:
        """Announce that the job ends with `status`, and end this process; the first announcement stands.

        The first rank, where the store may live, goes last.
        """
        self._closed.set()
        self.announce(status, reason)
        self._exit(status, _GRACE_SECONDS + _STORE_SECONDS if self.is_first_rank else 0.0)

    def announce(self, status: int, reason: str) -> bool:
        """Announce that the job ends with `status`; return False where another rank has done so before."""
        try:
            return self._announce(status, reason)
        except RuntimeError:  # the store is gone, and nobody will hear of anything
            return True

    def close(self) -> None:
        """Stop watching: from here on other ranks may leave."""
        self._closed.set()
        for watcher in self._watchers:
            watcher.join()

    def ended(self) -> dict[str, Any] | None:
        """Read how another rank ended the job: its `status`, who it was (`by`), and the `reason`; None if none did."""
        return _read(self._store)

    def why_broken(self) -> dict[str, Any] | None:
        """Find out how the job ended, on a rank whose connection to another rank broke.

        Waits until it is known who is gone, and returns what `ended` does; None where nobody is gone, which takes some
        seconds to be sure of.
        """
        with suppress(RuntimeError):
            self._store.set(_BROKEN, self.name)
        deadline = time.monotonic() + 2 * self._silence_when_broken + 2 * self._beat_seconds
        while (end := self.ended()) is None and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return end

    @property
    def _silence_when_broken(self) -> float:
        """Seconds without a beat that prove a rank gone once a connection has broken."""
        return 2 * self._beat_seconds + 1

    def _announce(self, status: int, reason: str) -> bool:
        """Write how the job ends into the store; return False where another rank had done so before.

        Raises:
            RuntimeError: the store is gone.
        """
        end = json.dumps({"status": status, "by": self.name, "reason": " ".join(reason.split())[:400]})
        return bool(self._store.compare_set(_ENDED, "", end) == end.encode())

    def _publish(self) -> None:
        """Write this rank's beat into the store.

        Raises:
            RuntimeError: the store is gone.
        """
        self._store.set(f"{_BEAT}/{self._rank}", json.dumps(asdict(self._progress.beat(self.name))))

    def _watch(self) -> None:
        """The life of the thread that talks to the store."""
        published = time.monotonic()
        while not self._closed.wait(_LOOK_SECONDS):
            try:
                end = _read(self._store)
                if end is None:
                    self._pass_on_stop()
                    is_due = (now := time.monotonic()) - published >= self._beat_seconds
                    if is_due:
                        published = now
                        self._publish()
                    if self._rank in (0, self._world - 1):
                        is_broken = self._store.check([_BROKEN])
                        if is_due or is_broken:
                            self._judge(is_broken=is_broken)
                self._answered = time.monotonic()
            except RuntimeError:  # the store is gone; the next look finds out
                continue
            if end is None:
                continue
            if self._closed.wait(_GRACE_SECONDS):  # a rank that is not stuck leaves in its own way
                return
            last_words(f"[{self.name}] leaves: {end['by']} ended the job ({end['reason']})")
            self._exit(end["status"], _STORE_SECONDS if self.is_first_rank else 0.0)

    def _pass_on_stop(self) -> None:
        """Pass a request to stop on to the first rank, which tells all ranks at the end of its step."""
        if self._stop is None:
            return
        if not self.is_first_rank and self._stop.has_come:
            self._store.set(_STOP, f"{self._stop.reason} to {self.name}")
        elif self.is_first_rank and not self._stop.has_come and self._store.check([_STOP]):
            self._stop.ask(self._store.get(_STOP).decode())

    def _judge(self, *, is_broken: bool) -> None:
        """Read the beats of all ranks; end the job if a rank holds it up, and say which are slow.

        Args:
            is_broken: whether a rank has lost its connection to another one, so that silence means more.
        """
        now, keys = time.monotonic(), [f"{_BEAT}/{rank}" for rank in range(self._world)]
        if len(self._last_beats) < self._world and not self._store.check(keys):
            return
        if now - self._judged > 2 * self._beat_seconds + _UNHEARD_SECONDS:  # nobody was heard: all are given time anew
            self._last_beats = {rank: (beat, now) for rank, (beat, _) in self._last_beats.items()}
            self._judged = now
            return
        self._judged = now
        for rank, text in enumerate(self._store.multi_get(keys)):
            beat = Beat(**json.loads(text))
            if rank not in self._last_beats or self._last_beats[rank][0].number != beat.number:
                self._last_beats[rank] = (beat, now)
        stall = find_stall(
            [LastBeat(beat, now - since) for beat, since in self._last_beats.values()],
            timeout=self._progress.timeout,
            storage_timeout=self._progress.storage_timeout,
            silence=self._silence_when_broken if is_broken else self._silence,
            remedy=self._remedy,
        )
        self._blamed_since = min(self._blamed_since, now) if stall else inf
        patience = 0.0 if self.is_first_rank else 2 * self._beat_seconds + 2
        if stall and now - self._blamed_since >= patience and self._announce(1, stall):
            self._closed.set()
            last_words(f"megatron-sphinx {self._command}: {stall}")
            self._exit(1, _GRACE_SECONDS + _STORE_SECONDS if self.is_first_rank else 0.0)
        if self.is_first_rank:
            self._report_stragglers()

    def _report_stragglers(self) -> None:
        """Say which ranks have become slow, and which are no longer."""
        slow = find_stragglers([beat for beat, _ in self._last_beats.values()], self._ratio)
        for who in slow.keys() - self._progress.stragglers.keys():
            say(f"straggler: {who} takes {slow[who]:.2f} times as long as the median rank for the same work")
        for who in self._progress.stragglers.keys() - slow.keys():
            say(f"no longer a straggler: {who}")
        self._progress.stragglers = slow

    def _watch_store(self) -> None:
        """The life of the thread that never talks to the store, but watches whether it still answers.

        It also finds out that this process itself stood still: then the clock goes on between two of its looks.
        """
        limit = self._silence

        def silence() -> float:
            return time.monotonic() - self._answered

        looked = time.monotonic()
        while not self._closed.wait(_LOOK_SECONDS):
            stood, looked = time.monotonic() - looked - _LOOK_SECONDS, time.monotonic()
            if stood >= min(limit, _STILL_SECONDS):
                self._say_stood(stood)
            if silence() < limit or self._closed.wait(2.0) or silence() < limit:  # this process may have been stopped
                continue
            where = os.environ.get("MASTER_ADDR", "this process")
            last_words(
                f"[{self.name}] leaves: run.timeout={limit:g}: the job's store on {where} has not answered for "
                f"{silence():.0f} s: the first rank or its node is gone; {self._remedy}"
            )
            self._exit(1)

    def _say_stood(self, seconds: float) -> None:
        """Say that this process stood still for so long; end the job where that is longer than a rank may.

        The others may have left meanwhile, each with a word about this rank: it must not blame them for being gone.
        """
        what = (
            f"stood still for {seconds:.0f} s itself (stopped by SIGSTOP or Ctrl-Z, its machine suspended, or out of "
            f"memory or processors)"
        )
        doing = self._progress.beat(self.name)
        limit = self._progress.storage_timeout if doing.kind.is_long else self._progress.timeout
        if seconds < limit:
            complain(f"[{self.name}] {what}; goes on")
            return
        fault = f"run.timeout={limit:g}: {self.name} on host {doing.host} {what}; {self._remedy}"
        self._closed.set()  # before the other thread blames anybody
        self.announce(1, fault)
        last_words(f"megatron-sphinx {self._command}: {fault}")
        self._exit(1, _STORE_SECONDS if self.is_first_rank else 0.0)

    def _exit(self, status: int, seconds: float = 0.0) -> NoReturn:
        """End this process after so many seconds, and let no destructor wait for a message that will never come."""
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(seconds)
        os._exit(status)


def _read(store: Store) -> dict[str, Any] | None:
    """Read from the store how the job ended; None where it has not. A store that is gone says that it has."""
    try:
        if not store.check([_ENDED]):
            return None
        end: dict[str, Any] = json.loads(store.get(_ENDED))
    except RuntimeError:
        return {"status": 1, "by": "the first rank, where the store was,", "reason": _GONE}
    return end
