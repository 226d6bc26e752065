"""A lock, so that only one job writes a run folder: it says whose the folder is, and a killed job cannot keep it.

The lock is a file, made by the one operation that is exclusive on NFS too, a hard link. Its holder writes a number into
it every few seconds. Another job knows at once that a holder is gone where both see the same processes, or where Slurm
has requeued the job; else it watches the number. A holder that was taken for gone since its machine stood still finds
out within seconds, and always before it writes a checkpoint, and ends.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from errno import ENOSYS, ENOTSUP, EPERM
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from megatron_sphinx.console import say
from megatron_sphinx.errors import FolderError, SphinxError, writing

NAME, END = ".lock", "ended.json"  # files in the run folder: the lock; the exit status of the last job
_TRIES = 100  # to take the lock while other jobs take and leave it
_BEAT_SECONDS = 5.0  # between two numbers that the holder writes
_SILENCE_SECONDS = 60.0  # without a new number, the holder is gone


class Hold:
    """This job's hold on its run folder, from the start of a run to its end; the first rank has the lock for all.

    Args:
        folder: the run folder.
        rank: number of this rank.

    Attributes:
        end: the last line of the run: how it ended, and where the checkpoint and the plot are.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.is_first, self.end = folder, rank == 0, ""
        self._lock: RunLock | None = None

    def take(self) -> None:
        """Take the folder for this job.

        Raises:
            FolderError: another job writes it, or it cannot be written.
        """
        if self.is_first:
            self._lock = RunLock(self.folder, say)
            with writing(self.folder):
                (self.folder / END).unlink(missing_ok=True)

    def require(self) -> None:
        """Make sure that the folder is still this job's, by reading the lock.

        Raises:
            FolderError: another job has taken it, while this one stood still.
        """
        if self._lock:
            self._lock.require()

    def look(self) -> None:
        """Make sure that the folder is still this job's, as far as the lock's thread knows; this costs nothing.

        Raises:
            FolderError: another job has taken the folder.
        """
        if self._lock and self._lock.is_lost:
            self._lock.require()

    def give_back(self, status: int) -> None:
        """Print on the first rank how the run ended, write its exit status into a file, and give the folder free.

        The status is for the Slurm scripts, since torchrun itself ends with 1 whatever its ranks failed with.
        """
        if self.end and self.is_first:
            say(self.end)
        if self._lock:
            with suppress(OSError, SphinxError):  # no room, or another job's: what follows from that has been said
                self.require()
                (self.folder / END).write_text(json.dumps({"status": status}) + "\n")
            self._lock.release()


class RunLock:
    """The right to write a run folder, held by one process of a job.

    Args:
        folder: the run folder; it is made where there is none.
        say: prints a line: that another job has to be waited for, and what was found.

    Raises:
        FolderError: another job has it, or the folder cannot be written.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.path, self._say = folder / NAME, say
        self._closed, self._is_lost = Event(), False
        self._owner = _this_process()
        self._file = self._take()
        self._beats = Thread(target=self._beat, name="lock", daemon=True)
        self._beats.start()

    def require(self) -> None:
        """Make sure that no other job has taken the folder meanwhile; a lock that somebody removed is made again.

        Raises:
            FolderError: another job has taken it.
        """
        lock = _read(self.path)
        if lock is None and (file := self._make()) is not None:
            file, self._file = self._file, file
            os.close(file)
        elif lock is None or lock[0].get("token") != self._owner["token"]:
            other = _named(lock[0] if lock else {})
            raise FolderError(
                f"run.folder={self.path.parent}: {other} has taken it while this job stood still; it writes nothing "
                f"more; see which of them should go on"
            )

    @property
    def is_lost(self) -> bool:
        """Whether another job had taken the folder when the thread last looked."""
        return self._is_lost

    def release(self) -> None:
        """Remove the lock, unless another job has taken the folder."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._beats.join()
        os.close(self._file)
        lock = _read(self.path)
        if lock and lock[0].get("token") == self._owner["token"]:
            with suppress(OSError):
                self.path.unlink()

    def _take(self) -> int:
        """Make the lock, removing the locks of jobs that are gone; return its open file.

        Raises:
            FolderError: another job has the folder, or it cannot be written.
        """
        with writing(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(_TRIES):
                if (file := self._make()) is not None:
                    return file
                self._remove_left_behind()
        raise FolderError(f"run.folder={self.path.parent}: other jobs take it again and again; give another folder")

    def _make(self) -> int | None:
        """Make the lock and return its open file, or None where there is a lock; nobody ever reads half of it."""
        whole = self.path.with_name(f"{NAME}.{self._owner['token']}")
        file = self._write(whole)
        try:
            os.link(whole, self.path)
        except FileExistsError:
            # A network file system may carry a request out and lose the answer: asked again, it finds our own link.
            is_own = os.fstat(file).st_nlink == 2
            if not is_own:
                os.close(file)
            return file if is_own else None
        except OSError as error:
            os.close(file)
            if error.errno not in (EPERM, ENOTSUP, ENOSYS):
                raise
            try:  # a file system without links
                return self._write(self.path)
            except FileExistsError:
                return None
        finally:
            whole.unlink(missing_ok=True)
        return file

    def _write(self, path: Path) -> int:
        """Write a new file that says whose the lock is; its inode number tells it from a copy of the run folder."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._owner["file"] = os.fstat(file).st_ino
        os.write(file, f"{json.dumps(self._owner)}\n{0:020d}\n".encode())
        os.fsync(file)
        return file

    def _remove_left_behind(self) -> None:
        """Remove the lock of a job that is gone.

        Raises:
            FolderError: its job is still there.
        """
        lock = _read(self.path)
        if lock is None:
            return
        owner = lock[0]
        if owner.get("boot") == self._owner["boot"] and self._is_copy(owner):
            self.path.unlink(missing_ok=True)
            return
        is_alive = _is_alive(owner, self._owner)
        if is_alive is None and (later := self._listen(lock)) != lock:
            if later is None or later[0].get("token") != owner.get("token"):
                return  # the lock is another job's by now, or gone: look again
            is_alive = True
        if is_alive:
            raise FolderError(
                f"run.folder={self.path.parent}: {_named(owner)} is writing it; end that job or wait for it, "
                f"or give another folder"
            )
        aside = self.path.with_name(f"{NAME}.left.{self._owner['token']}")
        with suppress(FileNotFoundError):  # another job was faster
            os.rename(self.path, aside)
            taken = _read(aside)
            if taken and taken[0].get("token") != owner.get("token"):  # that of a job that was faster
                with suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()
            self._say(f"the run folder was left behind by {_named(owner)}, which is gone")

    def _is_copy(self, owner: dict[str, Any]) -> bool:
        """Whether a lock came with a copy of another run folder: its file has not the inode number that it tells.

        Asked only for locks that were made on this machine; another one may see other inode numbers.
        """
        with suppress(FileNotFoundError):
            number = self.path.stat().st_ino
            return bool(owner.get("file", number) != number)
        return False

    def _listen(self, lock: tuple[dict[str, Any], str]) -> tuple[dict[str, Any], str] | None:
        """Wait until a lock changes, or until its holder must have changed it, and read it again.

        Args:
            lock: what `_read` has returned.
        """
        self._say(f"waits up to {_SILENCE_SECONDS:g} s for a sign of {_named(lock[0])}, which has the run folder")
        deadline = time.monotonic() + _SILENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(1)
            if (now := _read(self.path)) != lock:
                return now
        return lock

    def _beat(self) -> None:
        """The life of the thread that writes a new number into the lock, and looks whether it is still this job's."""
        count = 0
        while not self._closed.wait(_BEAT_SECONDS):
            count += 1
            with suppress(OSError):  # a full disk or a server that is gone for a while: the next one may pass
                os.pwrite(self._file, f"{count:020d}".encode(), len(json.dumps(self._owner)) + 1)
                os.fsync(self._file)
                lock = _read(self.path)
                self._is_lost = lock is not None and lock[0].get("token") != self._owner["token"]


def _this_process() -> dict[str, Any]:
    """Describe this process as it is written into a lock."""
    return {
        "token": uuid4().hex,
        "host": socket.gethostname(),
        "boot": _boot(),
        "processes": _processes(),
        "pid": os.getpid(),
        "begun": _begun(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "start": time.strftime("%F %T"),
    }


def _is_alive(owner: dict[str, Any], this: dict[str, Any]) -> bool | None:
    """Whether the process that made a lock still runs; None where this process cannot see that.

    Args:
        owner: what the lock says of its process.
        this: what this process would write into a lock.
    """
    if owner.get("boot") == this["boot"] and owner.get("processes") == this["processes"]:
        return _runs(int(owner["pid"]), owner.get("begun"))
    if this["job"] and owner.get("job") == this["job"] and owner.get("restart") != this["restart"]:
        return False  # Slurm begins a job again once nothing of it runs
    return None


def _runs(pid: int, begun: str | None) -> bool:
    """Whether a process runs and is the one that began at that time, as far as its beginning can be read."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, of whom /proc may say nothing
        pass
    return (read := _begun(pid)) == begun or read is None


def _named(owner: dict[str, Any]) -> str:
    """Name the process that made a lock, for a message."""
    job = f"Slurm job {owner['job']}, " if owner.get("job") else ""
    return f"{job}process {owner.get('pid')} on {owner.get('host')}, since {owner.get('start')}"


def _read(path: Path) -> tuple[dict[str, Any], str] | None:
    """Read who made a lock, and the number in it; None where there is no lock, empty where it cannot be understood."""
    try:
        first, _, second = path.read_text().partition("\n")
        owner = json.loads(first)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):  # not a lock of ours
        return {}, ""
    return (owner, second) if isinstance(owner, dict) else ({}, "")


def _boot() -> str:
    """Return a text that is another one each time that this machine is started."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _processes() -> str:
    """Name the namespace that process numbers are counted in; empty where it cannot be read."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _begun(pid: int) -> str | None:
    """Read when a process began, in ticks of this machine's clock; empty for a zombie, None where it cannot be read."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return None
