"""Where the ranks of a job meet before any process group exists: a store at MASTER_ADDR and MASTER_PORT.

The first rank has the store, or torchrun's agent has it. Every rank signs in there; the first one waits until all have,
says again and again who is missing, and tells the others how it went.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from megatron_sphinx.console import say
from megatron_sphinx.errors import MeetingError
from megatron_sphinx.parallel.place import Place, read_number

_ANSWER_SECONDS = 20.0  # in which something must listen where the ranks meet, and answer as a store does
_SLURM_SECONDS = 300.0  # the same in a Slurm job, whose nodes may start long after each other
_PATIENCE_SECONDS = 15.0  # until the first line about who is missing
_REPORT_SECONDS = 30.0  # between two such lines
_LOOK_SECONDS = 0.2
_NAMED = 16  # missing ranks that a line names


@dataclass(frozen=True)
class Address:
    """Where the ranks of a job meet.

    Attributes:
        host: name or address of the machine.
        port: of TCP, there.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"MASTER_ADDR={self.host} MASTER_PORT={self.port}"

    @classmethod
    def read(cls) -> "Address":
        """Read the address from the environment.

        Raises:
            MeetingError: it is not there, or is none.
        """
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise MeetingError(
                    f"{name}={os.environ.get(name, '')}: is not set, so the ranks have nowhere to meet; export the "
                    f"first rank's host and a free port of it as MASTER_ADDR and MASTER_PORT, or start by torchrun"
                )
        return cls(os.environ["MASTER_ADDR"], read_number("MASTER_PORT", 1, 65535))


def meet(place: Place, timeout_seconds: float) -> Store:
    """Meet all other ranks of the job; the store that they have in common.

    Args:
        place: of this rank in the job.
        timeout_seconds: how long to wait for ranks that are missing, and for values in the store from then on.

    Raises:
        MeetingError: the ranks cannot meet at that address, a rank is missing, or two have one number.
    """
    if place.world == 1:
        return HashStore()
    address, timeout = Address.read(), timedelta(seconds=timeout_seconds)
    is_of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    own = _listen(address, timeout) if place.rank == 0 and not is_of_agent else None
    store: Store = _connect(address, timeout, is_first=own is not None)
    if own is not None:
        _require_own(own, store, address)
        store = own
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart
    store = PrefixStore(f"/worker/attempt_{attempt}", store)
    try:
        _sign_in(PrefixStore("meeting", store), place, address, time.monotonic() + timeout_seconds)
    except RuntimeError as error:  # of the store's connection; the first rank has said why it left
        raise MeetingError(
            f"{address}: the first rank, where the ranks meet, has left again; see what it says, then start anew"
        ) from error
    return store


def _listen(address: Address, timeout: timedelta) -> TCPStore:
    """Make the job's store, on the first rank.

    Raises:
        MeetingError: the port is taken.
    """
    try:
        return TCPStore(  # it listens on all of the host's addresses, whatever name it is given
            "localhost", address.port, is_master=True, wait_for_workers=False, timeout=timeout, multi_tenant=True
        )
    except RuntimeError as error:
        is_taken = "EADDRINUSE" in str(error)
        why = "is in use" if is_taken else f"cannot be listened at ({_first_line(error)})"
        raise MeetingError(
            f"MASTER_PORT={address.port}: {why} on host {socket.gethostname()}, where rank 0 would let the ranks meet; "
            f"end the other program, which may be rank 0 of another job or a second one of this, or give another port"
        ) from None


def _connect(address: Address, timeout: timedelta, *, is_first: bool) -> TCPStore:
    """Connect to the job's store, which may have to start yet.

    Raises:
        MeetingError: nothing listens there, or nothing that is a store.
    """
    began = time.monotonic()
    deadline, is_told = began + _grace(timeout), False
    while True:
        try:
            socket.create_connection((address.host, address.port), max(1.0, deadline - time.monotonic())).close()
            break
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= deadline or (is_first and isinstance(error, socket.gaierror | UnicodeError)):
                raise MeetingError(_nobody_there(address, error, _grace(timeout), is_first=is_first)) from None
            if not is_told and time.monotonic() >= began + _ANSWER_SECONDS:
                is_told = True
                say(f"{address}: nothing listens there yet ({_reason(error)}): rank 0 is missing; still waiting")
            time.sleep(_LOOK_SECONDS)
    made: list[TCPStore] = []
    faults: list[Exception] = []

    def connect() -> None:
        """Connect, which takes for ever where something listens that says nothing."""
        try:
            made.append(TCPStore(address.host, address.port, is_master=False, timeout=timeout))
        except RuntimeError as error:
            faults.append(error)

    thread = Thread(target=connect, name="meeting", daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    if made:
        return made[0]
    why = f" ({_first_line(faults[0])})" if faults else ""
    raise MeetingError(
        f"{address}: something listens there that is not the meeting place of a job{why}; rank 0 is missing, or "
        f"another program has its port; see whether rank 0 runs on that host, or give another port"
    )


def _grace(timeout: timedelta) -> float:
    """Seconds in which rank 0 must be there after this one."""
    return min(_SLURM_SECONDS if "SLURM_JOB_ID" in os.environ else _ANSWER_SECONDS, timeout.total_seconds())


def _nobody_there(address: Address, error: Exception, seconds: float, *, is_first: bool) -> str:
    """Say that nothing answers where the ranks would meet."""
    if isinstance(error, socket.gaierror | UnicodeError):
        return f"MASTER_ADDR={address.host}: is no known host ({_reason(error)}); give the host that rank 0 runs on"
    if is_first:
        return (
            f"MASTER_ADDR={address.host}: rank 0 runs on host {socket.gethostname()} and cannot reach itself at that "
            f"address ({_reason(error)}); give the name of this host, which all ranks can reach"
        )
    return (
        f"{address}: nothing has listened there for {seconds:.0f} s ({_reason(error)}), so that rank 0 is "
        f"missing; start rank 0 on that host, or give the one where it runs"
    )


def _require_own(own: Store, reached: Store, address: Address) -> None:
    """Make sure on the first rank that its own store is the one which the address leads to.

    Raises:
        MeetingError: it is another machine's.
    """
    own.compare_set("meeting/own", "", "yes")  # unlike `set`, it waits until the store has it
    if not reached.check(["meeting/own"]):
        raise MeetingError(
            f"{address}: leads to another job's meeting place, not to host {socket.gethostname()}, where rank 0 runs; "
            f"give the name of this host"
        )


def _sign_in(store: Store, place: Place, address: Address, deadline: float) -> None:
    """Sign in, and wait until everyone has; the first rank decides for all how it went.

    Raises:
        MeetingError: a rank is missing, or two have one number, or they do not agree on how many there are.
        RuntimeError: the store is gone.
    """
    own = f"process {os.getpid()} on host {socket.gethostname()}"
    entry = json.dumps({"who": own, "world": place.world})
    found = store.compare_set(f"rank/{place.rank}", "", entry).decode()
    if found != entry:
        said = (
            f"RANK={place.rank}: {json.loads(found)['who']} and {own} both say so at {address}; "
            f"give each rank a number of its own, from 0 to WORLD_SIZE-1"
        )
        if not store.check(["outcome"]):
            store.compare_set("fault", "", said)
        raise MeetingError(said)
    if place.rank == 0:
        outcome = _wait_for_all(store, place, address, deadline)
        store.set("outcome", outcome)
        if outcome:  # the store ends with this process: the others must have read it
            _wait(lambda: store.check([f"read/{rank}" for rank in _there(store, place.world) if rank]), 2.0)
            raise MeetingError(outcome)
        return
    _require_same_world(store, place, address)
    if not _wait(lambda: store.check(["outcome"]), deadline + 2 * _LOOK_SECONDS - time.monotonic()):
        raise MeetingError(f"{address}: rank 0 is missing; start it, or give the address where it is")
    outcome = store.get("outcome").decode()
    store.set(f"read/{place.rank}", "")
    if outcome:
        raise MeetingError(outcome, is_told=True)


def _require_same_world(store: Store, place: Place, address: Address) -> None:
    """Make sure that rank 0, where it has come already, counts as many ranks as this one does."""
    if not store.check(["rank/0"]):
        return
    first = json.loads(store.get("rank/0"))
    if first["world"] != place.world:
        said = (
            f"WORLD_SIZE={place.world}: rank {place.rank} counts so many ranks, rank 0 {first['world']} at {address}; "
            f"give all ranks of the job one WORLD_SIZE"
        )
        store.compare_set("fault", "", said)
        raise MeetingError(said)


def _wait_for_all(store: Store, place: Place, address: Address, deadline: float) -> str:
    """Wait on the first rank until everyone has signed in; what is wrong then, empty where nothing is."""
    report = time.monotonic() + _PATIENCE_SECONDS
    while True:
        if store.check(["fault"]):
            return store.get("fault").decode()
        if store.check([f"rank/{rank}" for rank in range(place.world)]):
            entries = [json.loads(store.get(f"rank/{rank}")) for rank in range(place.world)]
            odd = next((rank for rank, entry in enumerate(entries) if entry["world"] != place.world), None)
            counted = f"WORLD_SIZE={place.world}: rank 0 counts so many ranks, rank {odd} another number at {address}"
            return "" if odd is None else f"{counted}; give all ranks of the job one WORLD_SIZE"
        now = time.monotonic()
        if now >= deadline:
            return f"{_missing(store, place.world, address)}; start them all, each with its own RANK"
        if now >= report:
            report = now + _REPORT_SECONDS
            say(f"waits for ranks: {_missing(store, place.world, address)}")
        time.sleep(_LOOK_SECONDS)


def _there(store: Store, world: int) -> list[int]:
    """List the ranks that have signed in."""
    return [rank for rank in range(world) if store.check([f"rank/{rank}"])]


def _missing(store: Store, world: int, address: Address) -> str:
    """Say who has come and who is missing."""
    there = _there(store, world)
    missing = sorted(set(range(world)).difference(there))
    return f"{address}: ranks {_listed(there)} of {world} are there, {_listed(missing)} missing"


def _listed(ranks: Sequence[int]) -> str:
    """List numbers, the first of them where there are many."""
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return ", ".join(map(str, ranks[:_NAMED])) + more


def _wait(is_done: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is so, at most that long; whether it is."""
    deadline = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def _reason(error: Exception) -> str:
    """Return the text of an error of the network."""
    return (isinstance(error, OSError) and error.strerror) or _first_line(error)


def _first_line(error: Exception) -> str:
    """Return an error's first line: torch writes the frames of C++ below it."""
    with suppress(IndexError):
        return str(error).splitlines()[0]
    return type(error).__name__
