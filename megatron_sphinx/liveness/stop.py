"""How a process is asked to stop: signals that are noted from its first moment, whatever it is at."""

import os
import signal
import socket
from contextlib import suppress
from threading import Event, Thread
from types import TracebackType
from typing import Any

from megatron_sphinx.console import complain

_MEETING_SECONDS = 20.0  # enough to import everything and to meet the other ranks
STOPPED = os.EX_TEMPFAIL  # the exit status that says: submit me again
_LEFT_AT_ONCE = 128 + signal.SIGINT  # the exit status of a run that was interrupted twice


class StopSignal:
    """Notes SIGTERM, SIGUSR1, SIGINT and SIGHUP; a run saves its state and ends. A second SIGINT ends it at once.

    Made before torch is imported, so that no signal kills a rank that others wait for. Python calls its handlers only
    between two instructions of its own, and a rank may be in a collective for minutes; a thread hears of the signal
    from the interpreter's C handler all the same.

    Before the ranks have met they cannot agree on anything, and one that waits for others cannot be reached: asked to
    stop then, it leaves by itself after a while that is enough to import everything and to meet.

    Attributes:
        has_come: whether the process was asked to stop.
        reason: which signal came, and to which rank where it was another one; empty before.
    """

    def __init__(self) -> None:
        self.has_come, self.reason = False, ""
        self._interrupts = 0
        self._met = Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup asks for just that
            self._before[number] = signal.signal(number, _leave_to_the_thread)
        self._listener = Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()
        self._listener.join()
        self._reader.close()

    def ask(self, reason: str) -> None:
        """Note that this rank is to stop since another one was asked to; the first reason stands."""
        self.reason = self.reason or reason
        self.has_come = True

    def has_met(self) -> None:
        """Note that the ranks have met, and hear of each other's signals from now on."""
        self._met.set()

    def _listen(self) -> None:
        """The life of the thread that hears of signals."""
        while numbers := self._reader.recv(16):
            for number in numbers:
                if number in self._before:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        """Note a signal; a second SIGINT ends the process, and so does any signal before the ranks meet in time."""
        if not self.has_come and not self._met.is_set():
            Thread(target=self._leave_alone, args=(number.name,), name="stop", daemon=True).start()
        self.ask(number.name)
        if number is not signal.SIGINT:
            return
        self._interrupts += 1
        is_again = self._interrupts > 1
        if os.environ.get("RANK", "0") == "0":
            now, then = "saves the state at the end of this step", "interrupt again to leave at once, unsaved"
            with suppress(OSError):  # nobody hears it
                complain("interrupted again: leaves at once, unsaved" if is_again else f"interrupted: {now}; {then}")
        if is_again:
            os._exit(_LEFT_AT_ONCE)

    def _leave_alone(self, name: str) -> None:
        """End this process if it has not met the other ranks within the time that this should take."""
        if not self._met.wait(_MEETING_SECONDS):
            with suppress(OSError):
                complain(f"stopped by {name} before the ranks had met; nothing new to save")
            os._exit(STOPPED)


def _leave_to_the_thread(_number: int, _frame: object) -> None:
    """Do nothing, for the thread hears of the signal; but without a Python handler its C handler wakes nobody."""
