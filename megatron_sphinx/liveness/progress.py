"""How far a rank is in the run: its main thread notes it at no cost, its watcher publishes it, others judge by it."""

import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import inf
from threading import get_ident
from types import FrameType
from typing import Protocol

PACKAGE = __name__.partition(".")[0]
_PROBES = 3  # how many of the last probes count


class Activity(Enum):
    """What a rank can be doing, in the order of a step."""

    STARTING = "starting up"
    READING = "reading data"
    ENCODING = "encoding"
    SENDING = "waiting for its features to be taken"
    COMPUTING = "forward and backward"
    COUNTING = "adding up the losses of all ranks"
    UPDATING = "updating the weights"
    REPORTING = "writing the metrics"
    SAVING = "saving a checkpoint"
    VALIDATING = "validating"
    ENDING = "waiting for the end"
    ANSWERING = "answering"

    @property
    def is_long(self) -> bool:
        """Whether it reads or writes large files, and may take as long as they do; or waits for somebody to ask."""
        return self in (Activity.STARTING, Activity.SAVING, Activity.ENDING, Activity.ANSWERING)

    @property
    def is_waiting(self) -> bool:
        """Whether it consists of waiting for other ranks."""
        return self in (Activity.SENDING, Activity.COUNTING, Activity.ENDING)


@dataclass(frozen=True)
class Beat:
    """What a rank publishes about itself every few seconds.

    Attributes:
        number: how many beats the rank has published; unchanged, it says that the process is stopped or gone.
        who: the rank's role and number.
        host: the name of its machine.
        doing: what it is doing, by the name of an `Activity`.
        step: the optimizer step it is at; -1 before the first.
        micro_batch: the micro-batch of the step, counted from 0; None where it makes no difference.
        seconds: how long it has been doing that.
        is_waiting: whether it waits for other ranks.
        place: the line of this package that it is in, as `file:line in function`.
        probe_seconds: the least seconds of its last probes; None before there are enough.
    """

    number: int
    who: str
    host: str
    doing: str
    step: int
    micro_batch: int | None
    seconds: float
    is_waiting: bool
    place: str
    probe_seconds: float | None

    @property
    def kind(self) -> Activity:
        """What the rank is doing."""
        return Activity[self.doing]

    @property
    def order(self) -> tuple[int, int, int]:
        """A key that sorts beats by how far their ranks have come."""
        return self.step, list(Activity).index(self.kind), self.micro_batch or 0

    @property
    def where(self) -> str:
        """How far the rank is, for a message: step, micro-batch, what it is doing, and the line of code."""
        step = f"step {self.step}, " if self.step >= 0 else ""
        micro_batch = f"micro-batch {self.micro_batch}, " if self.micro_batch is not None else ""
        return f"{step}{micro_batch}{self.kind.value}" + (f" ({self.place})" if self.place else "")


class Listener(Protocol):
    """Hears of a rank's progress as it happens, on the rank's own thread."""

    def step(self, number: int) -> None:
        """Hear that the rank begins a step."""

    def activity(self, doing: Activity) -> None:
        """Hear what the rank does from now on."""


class Progress:
    """One rank's progress; made on the thread that does the rank's work.

    Args:
        timeout: seconds that a rank may stay at one thing.
        storage_timeout: seconds that a rank may stay at one thing that reads or writes large files.
        probe: does a small fixed amount of work, and returns how many seconds it took.
        probe_interval: steps between two probes; 0 for none.
        listener: hears of every step and activity; None for nobody.

    Attributes:
        stragglers: slow ranks by name, and how many times as long as the median rank each takes; known on the first
            rank, whose watcher writes it.
        saver: the thread that writes checkpoints, for which the rank may have to wait; None before the first.
    """

    def __init__(
        self,
        *,
        timeout: float = inf,
        storage_timeout: float = inf,
        probe: Callable[[], float] | None = None,
        probe_interval: int = 0,
        listener: Listener | None = None,
    ) -> None:
        self.timeout, self.storage_timeout = timeout, storage_timeout
        self.stragglers: dict[str, float] = {}
        self.saver: int | None = None
        self._probe, self._probe_interval, self._listener = probe, probe_interval, listener
        self._probes: deque[float] = deque(maxlen=_PROBES)
        self._thread, self._host = get_ident(), socket.gethostname()
        self._step, self._beats = -1, 0
        self._noted: tuple[Activity, int | None, float] = (Activity.STARTING, None, time.monotonic())

    def begin(self, step: int, micro_batch: int | None = None) -> None:
        """Note that the rank reads what a step needs; now and then probe its speed first."""
        is_new, self._step = step != self._step, step
        if is_new and self._probe and self._probe_interval and step % self._probe_interval == 0:
            self._probes.append(self._probe())
        if is_new and self._listener:
            self._listener.step(step)
        self.note(Activity.READING, micro_batch)

    def note(self, doing: Activity, micro_batch: int | None = None) -> None:
        """Note what the rank is doing from now on."""
        self._noted = (doing, micro_batch, time.monotonic())
        if self._listener:
            self._listener.activity(doing)

    def beat(self, who: str) -> Beat:
        """Describe how far the rank `who` is now; may be called from any thread."""
        self._beats += 1
        doing, micro_batch, since = self._noted
        thread = self.saver if doing is Activity.SAVING and self.saver else self._thread
        # CPython's only way to see what another thread is doing; a snapshot, and it stops nobody
        is_waiting, place = _inspect(sys._current_frames().get(thread))
        return Beat(
            number=self._beats,
            who=who,
            host=self._host,
            doing=doing.name,
            step=self._step,
            micro_batch=micro_batch,
            seconds=round(time.monotonic() - since, 1),
            is_waiting=is_waiting or doing.is_waiting,
            place=place,
            probe_seconds=min(self._probes) if len(self._probes) == _PROBES else None,
        )


def _inspect(frame: FrameType | None) -> tuple[bool, str]:
    """Tell whether a thread waits for other ranks, and the line of this package that it is in; reads no file.

    Args:
        frame: the innermost frame of the thread; None where the thread has ended.
    """
    is_waiting = frame is not None and (
        (_module(frame).startswith("torch.distributed") and "checkpoint" not in _module(frame))
        or not {"wait", "synchronize"}.isdisjoint(frame.f_code.co_names)
    )
    while frame is not None and (not _module(frame).startswith(PACKAGE) or _module(frame).endswith(".lifeline")):
        frame = frame.f_back
    if frame is None:
        return is_waiting, ""
    name = frame.f_code.co_filename.rpartition("/")[2]
    return is_waiting, f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _module(frame: FrameType) -> str:
    """The name of the module whose code a frame runs, empty where it has none."""
    return str(frame.f_globals.get("__name__", ""))
