"""How ranks learn that the job ends: a failing rank's own error comes first, and the others follow within seconds.

Every rank watches one key of the job's store from a thread. Whoever ends the job writes it; a rank that is stuck in a
collective, or far ahead of the others, sees it and leaves.
"""

import json
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any, NoReturn

from torch._C._distributed_c10d import Store, TCPStore

_KEY = "megatron_sphinx/ended"
_GRACE_SECONDS = 3.0


class Lifeline:
    """The end of the job, as one rank sees and announces it.

    Args:
        store: a connection of this rank's own to the job's store; None for a job of one rank.
        name: what this rank is called in messages.
    """

    def __init__(self, store: Store | None, name: str, *, is_first_rank: bool = True) -> None:
        self.name, self.is_first_rank = name, is_first_rank
        self._store, self._closed = store, Event()
        self._watcher: Thread | None = None
        if store is not None:
            self._watcher = Thread(target=self._watch, args=(store,), name="lifeline", daemon=True)
            self._watcher.start()

    @classmethod
    def connect(cls, name: str) -> "Lifeline":
        """A lifeline over the store that the ranks met at, by torchrun's MASTER_ADDR and MASTER_PORT."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(None, name)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
        return cls(store, name, is_first_rank=os.environ["RANK"] == "0")

    def leave(self, status: int, reason: str) -> NoReturn:
        """Announce that the job ends with `status`, and end this process; the first announcement stands.

        The first rank, where the store may live, goes last.
        """
        assert self._store is not None
        self._closed.set()
        with suppress(RuntimeError):  # the store is gone already
            end = {"status": status, "by": self.name, "reason": " ".join(reason.split())[:200]}
            self._store.compare_set(_KEY, "", json.dumps(end))
            if self.is_first_rank:
                time.sleep(_GRACE_SECONDS + 1.5)
        _exit(status)

    def close(self) -> None:
        """Stop watching: from here on other ranks may leave."""
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join()

    def ended(self) -> dict[str, Any] | None:
        """How another rank ended the job, if one did: its `status`, who it was (`by`), and the `reason`."""
        return _read(self._store) if self._store is not None else None

    def _watch(self, store: Store) -> None:
        while not self._closed.wait(0.5):
            if (end := _read(store)) is None:
                continue
            if self._closed.wait(_GRACE_SECONDS):  # a rank that is not stuck leaves in its own way
                return
            print(f"[{self.name}] leaves: {end['by']} ended the job ({end['reason']})", file=sys.stderr, flush=True)
            _exit(end["status"])


def _read(store: Store) -> dict[str, Any] | None:
    """The announcement, if there is one; a store that is gone says that the job is."""
    try:
        if not store.check([_KEY]):
            return None
        end: dict[str, Any] = json.loads(store.get(_KEY))
    except RuntimeError:
        return {"status": 1, "by": "the first rank, where the store was,", "reason": "it is gone"}
    return end


def _exit(status: int) -> NoReturn:
    """End this process at once: no destructor waits for a message that will never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
