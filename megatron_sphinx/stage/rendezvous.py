"""How the two ranks of a transfer meet before either begins it: a share is announced, then asked for, then sent.

On NCCL a receive or a send that waits for its other end keeps parts of a GPU busy and holds back what lies behind it.
So both begin only when the other one is on its way: the encoder announces a share whose features are there, the
language rank asks for it and begins to receive in one go, and the encoder sends at once. Announcing and asking are
small messages from CPU to CPU over gloo. docs/channel.md says why nobody can wait in a circle.
"""

from array import array
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock, Thread
from time import sleep

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sphinx.device import Platform
from megatron_sphinx.parallel.groups import ProcessGroups

_ANNOUNCED, _ASKED = 1, 2  # tags of the messages between two ranks
_NOTHING = -1  # what a word holds until a number has come for it
_LOOK_SECONDS = 2e-4  # between two looks whether a GPU has sent


class Word:
    """A number on its way from or to another rank, over gloo.

    Args:
        number: to send; without one it is for a number to come.
    """

    def __init__(self, number: int = _NOTHING) -> None:
        self._memory = array("q", [number])
        self._work: dist.Work | None = None

    def send(self, rank: int, group: dist.ProcessGroup, tag: int) -> "Word":
        """Begin to send the number."""
        self._work = dist.isend(torch.frombuffer(self._memory, dtype=torch.int64), rank, group=group, tag=tag)
        return self

    def expect(self, rank: int, group: dist.ProcessGroup, tag: int) -> "Word":
        """Begin to wait for a number; those of a rank with the same tag come in order."""
        self._work = dist.irecv(torch.frombuffer(self._memory, dtype=torch.int64), rank, group=group, tag=tag)
        return self

    @property
    def has_come(self) -> bool:
        """Whether the number is there, seen in its memory: gloo's own receives tell it to nobody who does not wait."""
        return self._memory[0] != _NOTHING

    def wait(self) -> int:
        """Wait until the number is there, or is sent, and return it.

        Raises:
            RuntimeError: the other rank is gone.
        """
        assert self._work is not None, "nothing was begun"
        self._work.wait()
        return self._memory[0]


class Arrival:
    """The features of one share, on their way to this language rank.

    Args:
        groups: of this rank.
        platform: what it computes on.
        encoder: rank in the world of the encoder that they come from.
        number: of the share, among those from that encoder to this rank.
        part: where they are received to: bf16 [views, feature_values].
    """

    def __init__(self, groups: ProcessGroups, platform: Platform, encoder: int, number: int, part: Tensor) -> None:
        self.encoder = encoder
        self._groups, self._platform, self._number, self._part = groups, platform, number, part
        self._work: dist.Work | None = None
        self._asking: Word | None = None
        self._announcement = None
        if groups.control is not None:
            self._announcement = Word().expect(encoder, groups.control, _ANNOUNCED)

    @property
    def is_announced(self) -> bool:
        """Whether the encoder has the features."""
        return self._announcement is not None and self._announcement.has_come

    def begin(self, stream: torch.cuda.Stream | None) -> None:
        """Ask for the features and begin to receive them, unless that is done; waits until they are announced.

        Args:
            stream: one on which nothing is computed: a receive waits for what its stream holds.

        Raises:
            RuntimeError: the encoder is gone.
        """
        if self._work is not None:
            return
        if self._announcement is not None:
            assert self._groups.control is not None
            number = self._announcement.wait()
            assert number == self._number, f"share {number} of rank {self.encoder} came for share {self._number}"
            self._asking = Word(number).send(self.encoder, self._groups.control, _ASKED)
        # Nothing may come between: whoever is asked counts on this rank to be here.
        with self._platform.on(stream):
            self._work = dist.irecv(self._part, self.encoder, group=self._groups.features)

    def finish(self) -> None:
        """Let the current stream, or on the CPU this thread, wait for the features.

        Raises:
            RuntimeError: the encoder is gone.
        """
        assert self._work is not None, "nobody has asked for it"
        self._work.wait()
        if self._asking is not None:
            self._asking.wait()


@dataclass(frozen=True)
class Departure:
    """The features of one share, from when they are announced until they have left this encoder rank.

    Attributes:
        number: of the share, among those to one language rank.
        part: the features: bf16 [views, feature_values].
        announcement: what says that they are there; None where nobody is told.
        sent: done once the language rank has asked for them, and they are sent.
    """

    number: int
    part: Tensor
    announcement: Word | None
    sent: "Future[None]"

    def wait(self) -> None:
        """Wait until the features are asked for and sent.

        Raises:
            RuntimeError: the language rank is gone.
        """
        self.sent.result()
        if self.announcement is not None:
            self.announcement.wait()


class Courier:
    """Sends shares to one language rank: each when it is asked for, from a thread, since the encoder goes on meanwhile.

    Args:
        groups: of this rank.
        platform: what it computes on.
        target: the language rank.
        sending: held while a send begins: a process group's sends are not begun from two threads at once.
    """

    def __init__(self, groups: ProcessGroups, platform: Platform, target: int, sending: Lock) -> None:
        self._groups, self._platform, self._target, self._sending = groups, platform, target, sending
        self._waiting: SimpleQueue[Departure | None] = SimpleQueue()
        self._announced = 0
        self._thread: Thread | None = None

    def announce(self, part: Tensor) -> Departure:
        """Tell the language rank that features are there, which they are; in a dry run they are sent at once."""
        number, control = self._announced, self._groups.control
        self._announced += 1
        if control is None:
            departure = Departure(number, part, None, Future())
            self._send(departure)
            return departure
        departure = Departure(number, part, Word(number).send(self._target, control, _ANNOUNCED), Future())
        self._waiting.put(departure)
        if self._thread is None:
            self._thread = Thread(target=self._work, args=(control,), name=f"courier to {self._target}", daemon=True)
            self._thread.start()
        return departure

    def close(self) -> None:
        """Wait until everything that was announced is asked for and sent."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _work(self, control: dist.ProcessGroup) -> None:
        """The life of the thread; what goes wrong in it is raised where the departure is waited for."""
        self._platform.enter_thread()
        with self._platform.on(self._platform.new_stream()):  # a send waits for what its stream holds: nothing
            while (departure := self._waiting.get()) is not None:
                try:
                    number = Word().expect(self._target, control, _ASKED).wait()
                    assert number == departure.number, f"rank {self._target} asks for {number}, not {departure.number}"
                    self._send(departure)
                except Exception as error:
                    departure.sent.set_exception(error)

    def _send(self, departure: Departure) -> None:
        """Send the features of a departure to the language rank, and wait until they have left.

        NCCL's own wait would hold back a stream, and with it sends to other ranks where streams share a queue.
        """
        with self._sending:
            work = dist.isend(departure.part, self._target, group=self._groups.features)
        assert work is not None
        if self._platform.is_cuda:
            while not work.is_completed():
                sleep(_LOOK_SECONDS)
        else:
            work.wait()
        departure.sent.set_result(None)
