"""Which files of a folder that is being made are finished, so that a tool that was killed goes on where it was."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from errno import EWOULDBLOCK
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from megatron_sphinx.checkpoint.targets import JOURNAL
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.remote import is_remote, remove_files, state_of, write_text
from megatron_sphinx.tensors.entries import Entry


class Journal:
    """The finished files of a folder; what a run before this one has left of another task is removed.

    While it is open, no other process can open one of the same folders: the system locks them, and lets them go with
    the process. What is behind URLs cannot be locked: there, two processes that make one folder disturb each other.

    Args:
        folders: to be made, or made in part; the first one holds the journal.
        task: plain values that tell what is made.
        inputs: what it is made of: the task is another one when their files have changed.

    Attributes:
        done: finished files, with a word on each: its digest, or "-".

    Raises:
        OSError: a folder cannot be made.
        CheckpointError: another process is making a folder.
    """

    def __init__(self, folders: Iterable[Path], task: Any, inputs: Iterable[Entry]) -> None:
        first, *_ = folders = list(folders)
        paths = {path for entry in inputs for path in entry.paths}
        states = sorted(f"{path} {state_of(path)}" for path in paths)
        digest = hashlib.sha256(json.dumps([states, task]).encode()).hexdigest()
        self._path, self._lock = first / JOURNAL, Lock()
        self._marks = [folder / JOURNAL for folder in folders if is_remote(folder)]
        self._locks: list[int] = []
        self._file: Any = None
        self.done: dict[str, str] = {}
        try:
            is_there = [folder.is_dir() for folder in folders]
            for folder in folders:
                self._locks += [] if is_remote(folder) else [_locked(folder)]
            lines = self._lines()
            if lines[:1] == [digest] and all(is_there):
                self.done = dict(line.split(" ", 1)[::-1] for line in lines[1:])
            else:
                for folder in folders:
                    remove_files(folder) if is_remote(folder) else _empty(folder)
                lines = [digest]
            for mark in self._marks:
                write_text(mark, f"{digest}\n")
            self._text = "".join(f"{line}\n" for line in lines)
            self._path.write_text(self._text)
            self._file = None if self._marks else self._path.open("a", buffering=1)
        except BaseException:
            self.close()
            raise

    def _lines(self) -> list[str]:
        text = self._path.read_text(errors="replace") if self._path.is_file() else ""
        return text[: text.rfind("\n") + 1].splitlines()  # the last one may be cut off

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def note(self, name: str, word: str = "-") -> None:
        """Note that a file is finished."""
        with self._lock:
            self.done[name] = word
            line = f"{word} {name}\n"
            self._text += line
            if self._file is None:  # nothing is appended to what is behind a URL
                write_text(self._path, self._text)
            else:
                self._file.write(line)

    def end(self) -> None:
        """Remove the journal, since all files are finished."""
        if self._file is not None:
            self._file.close()
        for path in [mark for mark in self._marks if mark != self._path] + [self._path]:
            path.unlink()

    def close(self) -> None:
        """Let other processes have the folders."""
        if self._file is not None:
            self._file.close()
        while self._locks:
            os.close(self._locks.pop())


def _locked(folder: Path) -> int:
    """Make a folder, and lock it; the number of its open file."""
    folder.mkdir(parents=True, exist_ok=True)
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    is_ours = True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.path.samestat(os.fstat(number), folder.stat())  # or another process has just finished it
    except FileNotFoundError:
        is_ours = False
    except OSError as error:  # some file systems have no locks
        is_ours = error.errno != EWOULDBLOCK
    if not is_ours:
        os.close(number)
        raise CheckpointError(f"{folder}: another process is writing it; wait for that, or give another TARGET")
    return number


def _empty(folder: Path) -> None:
    """Remove what is in a folder, not the folder, which is locked."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):
                path.unlink()
