"""A file of answers that is being made: what is answered is kept through a kill, and the whole appears at the end.

Beside x.jsonl there is x.jsonl.settings.json, which says what it is made of and stays, and until the end
x.jsonl.partial, with a line for each answer as soon as it is there: its number, a tab, and the line of x.jsonl.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from megatron_sphinx.checkpoint.identity import differences
from megatron_sphinx.data.files import renamed
from megatron_sphinx.errors import DataError, remedy_of, shortened
from megatron_sphinx.parsing import ParseError, read_json
from megatron_sphinx.prepare.workers import write_json


class _Place(NamedTuple):
    """Where the line of an answer is in the journal, in bytes."""

    begin: int
    end: int


class AnswerFile:
    """A file of answers, a JSON line each, in the order of the questions, whatever the order in which they come.

    Args:
        path: of the file.
        settings: plain values that say what is asked, and how: with others it is another file.

    Attributes:
        is_whole: whether it is finished.
        errors: how many of the lines say an error instead of an answer.

    Raises:
        DataError: it was begun with other settings, or with unknown ones; another process writes it; or it cannot be
            written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._places: dict[int, _Place] = {}
        self._journal: BinaryIO | None = None
        self.errors = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._journal = self._locked()
            self._agree(path.with_name(f"{path.name}.settings.json"), json.loads(json.dumps(settings)))
            self.is_whole = path.exists()
            if self.is_whole:
                self._count()
            else:
                self._read()
        except OSError as error:
            self._abandon()
            raise self._refused(error) from error
        except BaseException:
            self._abandon()
            raise

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, number: int, line: Mapping[str, Any]) -> None:
        """Keep the line of an answer; a process that is killed behind this has it.

        Args:
            number: of the question, counted from 0.
            line: plain values; it says an error where it has one under `error`.

        Raises:
            DataError: it cannot be written.
        """
        assert self._journal is not None, "the file is closed"
        begin = self._journal.seek(0, os.SEEK_END)
        try:
            self._journal.write(b"%d\t%s" % (number, encoded(line)))
            self._journal.flush()
        except OSError as error:
            raise self._refused(error) from error
        self._places[number] = _Place(begin, self._journal.tell())
        self.errors += "error" in line

    def finish(self) -> None:
        """Write the whole file, in the order of the numbers, and remove the journal.

        Raises:
            DataError: it cannot be written.
        """
        assert self._journal is not None, "the file is closed"
        try:
            if not self.is_whole:
                with renamed(self._path) as partial, partial.open("wb") as file:
                    for number in sorted(self._places):
                        begin, end = self._places[number]
                        self._journal.seek(begin)
                        file.write(self._journal.read(end - begin).partition(b"\t")[2])
                    file.flush()
                    os.fsync(file.fileno())
            self._partial.unlink()
        except OSError as error:
            raise self._refused(error) from error
        self.is_whole = True

    def close(self) -> None:
        """Let other processes have the file."""
        if self._journal is not None:
            with suppress(OSError):  # of what could not be written before, which has been told
                self._journal.close()
            self._journal = None

    def _abandon(self) -> None:
        """Close what cannot be gone on with, without an empty journal left behind."""
        if self._journal is not None and not os.fstat(self._journal.fileno()).st_size:
            self._partial.unlink(missing_ok=True)
        self.close()

    def _locked(self) -> BinaryIO:
        """Open the journal, for this process alone; a file system without locks has it without."""
        file = self._partial.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(file.fileno()), self._partial.stat())
        except (BlockingIOError, FileNotFoundError):  # or another process has just finished it
            is_ours = False
        except OSError:
            is_ours = True
        if not is_ours:
            file.close()
            raise DataError(f"{self._path}: another process writes it; wait for that, or give another --output")
        return file

    def _agree(self, place: Path, settings: dict[str, Any]) -> None:
        """Compare with the settings of what is there, or write them down where nothing is."""
        assert self._journal is not None
        away = f"give another --output, or remove {self._path.name} and what is beside it to begin anew"
        if not place.exists():
            if self._path.exists() or self._journal.seek(0, os.SEEK_END):
                raise DataError(f"{self._path}: is there, and {place.name} is not, which says what made it; {away}")
            write_json(place, settings)
            return
        try:
            made = read_json(place)
        except (ParseError, OSError) as error:
            raise DataError(f"{place}: cannot be read ({error}); {away}") from error
        for key, one, other in differences(made, settings):
            raise DataError(
                f"{self._path}: was begun with {key}={shortened(one, 80)}, not {shortened(other, 80)}; {away}"
            )

    def _read(self) -> None:
        """Find the lines of the journal; the last one is cut off where a kill has left half of it."""
        assert self._journal is not None
        self._journal.seek(0)
        whole = 0
        for line in self._journal:
            if not line.endswith(b"\n"):
                break
            number, separator, text = line.partition(b"\t")
            begin, whole = whole, whole + len(line)
            try:
                content = json.loads(text)
            except ValueError:  # a machine that lost its power leaves anything
                continue
            if separator and number.isdigit() and isinstance(content, dict):
                self._places[int(number)] = _Place(begin, whole)
                self.errors += "error" in content
        self._journal.truncate(whole)

    def _count(self) -> None:
        """Count the lines of the finished file."""
        with self._path.open("rb") as file:
            for number, line in enumerate(file):
                self._places[number] = _Place(0, 0)
                try:
                    self.errors += "error" in json.loads(line)
                except (ValueError, TypeError) as error:
                    fault = f"line {number + 1} is not a JSON object ({error})"
                    raise DataError(
                        f"{self._path}: {fault}, though it was finished; remove it to have it anew"
                    ) from error

    def _refused(self, error: OSError) -> DataError:
        return DataError(f"{self._path}: cannot be written ({error.strerror or error}); {remedy_of(error)}")


def encoded(line: Mapping[str, Any]) -> bytes:
    """Return a line of JSON as people read it; by escapes alone where a text is not Unicode."""
    try:
        return f"{json.dumps(line, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(line)}\n".encode()
