"""Which files of a folder that is being made are finished, so that a tool that was killed goes on where it was."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_sphinx.tensors.entries import Entry


class Journal:
    """The finished files of a folder; what a run before this one has left of another task is removed.

    Args:
        folders: to be made, or made in part; the first one holds the journal.
        task: plain values that tell what is made.
        inputs: what it is made of: the task is another one when their files have changed.

    Attributes:
        done: finished files, with a word on each: its sha256, or "-".

    Raises:
        OSError: a folder cannot be made.
    """

    def __init__(self, folders: Iterable[Path], task: Any, inputs: Iterable[Entry]) -> None:
        first, *_ = folders = list(folders)
        paths = {path for entry in inputs for path in entry.paths}
        states = sorted(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)
        digest = hashlib.sha256(json.dumps([states, task]).encode()).hexdigest()
        self._path, self._lock = first / ".files", Lock()
        text = self._path.read_text() if self._path.is_file() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # the last one may be cut off
        self.done: dict[str, str] = {}
        if lines[:1] == [digest] and all(folder.is_dir() for folder in folders):
            self.done = dict(line.split(" ", 1)[::-1] for line in lines[1:])
        else:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            lines = [digest]
        self._path.write_text("".join(f"{line}\n" for line in lines))
        self._file = self._path.open("a", buffering=1)

    def note(self, name: str, word: str = "-") -> None:
        """Note that a file is finished."""
        with self._lock:
            self.done[name] = word
            self._file.write(f"{word} {name}\n")

    def end(self) -> None:
        """Remove the journal, since all files are finished."""
        self._file.close()
        self._path.unlink()
