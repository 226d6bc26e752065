"""Rows of files of benchmarks, whatever the form of the file; a field that is missing or odd is named."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from string import Formatter
from typing import Any, ParamSpec

from megatron_sphinx.errors import DataError, shortened
from megatron_sphinx.evaluation.samples import Sample
from megatron_sphinx.parsing import JSON_BYTES, ParseError, parse_json, read_json
from megatron_sphinx.paths import relative
from megatron_sphinx.prepare.json_files import check_plain
from megatron_sphinx.prepare.texts import check_text

_MOST_OF_A_CELL = 2**27  # characters: a picture in base64
_MOST_OF_A_LINE = 2**27  # bytes
_LONGEST_ROW = 2**22  # bytes of a line that is looked at to see whether lines are rows
_ROWS_AT_ONCE = 16  # of a parquet file, whose rows hold pictures
_BOM = b"\xef\xbb\xbf"
_READER = "give the file as its authors distribute it"
_Parameters = ParamSpec("_Parameters")


@dataclass(frozen=True)
class Row:
    """A row of a file: an object of JSON, or a line of a table.

    Attributes:
        file: where it is from.
        place: which of the file, such as `line 3` or `item 3`, counted from 1, or the key that it has there.
        number: how many rows of the file are before it.
        key: what it is called in a file that is one object; empty in others.
        content: its fields by name.
    """

    file: Path
    place: str
    number: int
    key: str
    content: Mapping[str, Any]

    def fault(self, fault: str, remedy: str = _READER) -> DataError:
        """Return the error that names this row, what is wrong with it, and what to do."""
        return DataError(f"{self.file}: {self.place}: {fault}; {remedy}")

    def has(self, field: str) -> bool:
        """Say whether the row has a field that holds something."""
        return self.content.get(field) not in (None, "")

    def text(self, field: str, default: str | None = None) -> str:
        """Return a text, or a number as text.

        Args:
            field: its name.
            default: what stands for one that is missing or null; without it, that is a fault.

        Raises:
            DataError: there is none.
        """
        value = self.content.get(field)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self._no(field, value, "text")
        try:
            check_text(str(value), field)
        except DataError as error:
            raise DataError(f"{self.file}: {self.place}: {error}") from error
        return str(value)

    def filled(self, field: str) -> str:
        """Return a text that is not blank; raise DataError where there is none."""
        text = self.text(field)
        if not text.strip():
            raise self._no(field, text, "text")
        return text

    def integer(self, field: str) -> int:
        """Return a whole number, which may be written as text; raise DataError where there is none."""
        value = self.content.get(field)
        try:
            if isinstance(value, str | int) and not isinstance(value, bool):
                return int(value)
        except ValueError:
            pass
        raise self._no(field, value, "whole number")

    def listed(self, field: str) -> list[Any]:
        """Return a list, which may be empty; raise DataError where there is none."""
        value = self.content.get(field)
        if not isinstance(value, list):
            raise self._no(field, value, "list")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """Return a list of texts; raise DataError where there is none, or one of them is no text."""
        return tuple(self.within(field, value).text(field) for value in self.listed(field))

    def inner(self, field: str) -> "Row":
        """Return an object that the row holds; raise DataError where there is none."""
        value = self.content.get(field)
        if not isinstance(value, Mapping):
            raise self._no(field, value, "object")
        return Row(self.file, f"{self.place}: {field}", self.number, self.key, value)

    def within(self, field: str, value: Any) -> "Row":
        """Return a row of one value, called like the field that it is part of; an object is a row by itself."""
        content = value if isinstance(value, Mapping) else {field: value}
        return Row(self.file, self.place, self.number, self.key, content)

    def path(self, template: str, folder: Path, root: str = "") -> Path:
        """Return where a picture is, which need not be there.

        Args:
            template: path from the folder, with fields of the row in braces.
            folder: that of the benchmark.
            root: a folder that the path may begin with, which is that of the benchmark and is left out.

        Raises:
            DataError: a field is missing, or leads out of the folder.
        """
        name = self._inside(self.formed(template))
        return folder / (name.removeprefix(f"{root}/") if root else name)

    def formed(self, template: str, **others: str) -> str:
        """Return a template with fields of the row in its places; `key`, `number` and others may stand there, too.

        Raises:
            DataError: the row has no such field, or one of another kind.
        """
        known = {**self.content, "key": self.key, "number": self.number, **others}
        for _, field, _, _ in Formatter().parse(template):
            value = known.get(field or "", "")
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise self._no(str(field), value, "text")
        try:
            return template.format_map(known)
        except KeyError as error:
            raise self.fault(f"no {error.args[0]}") from error
        except (ValueError, TypeError) as error:
            raise self.fault(f"{shortened(template)} cannot be made of it ({error})") from error

    def _inside(self, name: str) -> str:
        try:
            return relative(name)
        except DataError as error:
            raise DataError(f"{self.file}: {self.place}: {error}") from error

    def _no(self, field: str, value: Any, kind: str) -> DataError:
        return self.fault(f"no {field}: {shortened(value, 80)!r} is no {kind}")


def checked(read: Callable[_Parameters, Iterable[Sample]]) -> Callable[_Parameters, Iterator[Sample]]:
    """Make a reader refuse two samples of one id, and files without any sample.

    Args:
        read: yields samples; its first argument is the folder of the benchmark.
    """

    @wraps(read)
    def checking(*arguments: _Parameters.args, **named: _Parameters.kwargs) -> Iterator[Sample]:
        seen: set[str] = set()
        for sample in read(*arguments, **named):
            if sample.id in seen:
                raise DataError(f"{arguments[0]}: two questions have the id {shortened(sample.id)}; {_READER}")
            seen.add(sample.id)
            yield sample
        if not seen:
            raise DataError(f"{arguments[0]}: its files hold no question; {_READER}")

    return checking


def rows_of(path: Path, key: str = "") -> Iterator[Row]:
    """Yield the rows of a file, in its order, by the ending of its name: json, jsonl, csv, tsv or parquet.

    Args:
        path: the file.
        key: of JSON: where in an object its list or object of rows is; empty where the file itself is that.

    Raises:
        DataError: it cannot be read, or a row is no object.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            yield from _parquet(path)
            return
        with path.open("rb") as file:
            head = file.read(8)
        check_plain(path, head)
        if kind in (".csv", ".tsv"):
            yield from _table(path, "\t" if kind == ".tsv" else ",")
        elif kind == ".jsonl" or (not key and _is_lines(path)):
            yield from _lines(path)
        elif path.stat().st_size <= JSON_BYTES:
            yield from _small(path, key)
        else:
            yield from _large(path, key)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {_READER}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); {_READER}") from error


def object_of(path: Path) -> Row:
    """Return the object that a small file of JSON holds.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        return _row(path, "its object", 0, "", read_json(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {_READER}") from error
    except ParseError as error:
        raise DataError(f"{path}: {error}; {_READER}") from error


def _row(path: Path, place: str, number: int, key: str, content: Any) -> Row:
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: {place}: {shortened(content, 80)!r} is no object; {_READER}")
    return Row(path, place, number, key, content)


def _is_lines(path: Path) -> bool:
    """Say whether the first line that is not blank is a row by itself: more lines follow, or it holds plain values."""
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(_LONGEST_ROW), b"")
        first = next((line for line in lines if line.strip()), b"").removeprefix(_BOM)
        if not (first.startswith(b"{") and first.rstrip().endswith(b"}")):
            return False
        follows = any(line.strip() for line in lines)
    content = _line(path, "line 1", first)
    return isinstance(content, dict) and (follows or not all(isinstance(value, dict) for value in content.values()))


def _lines(path: Path) -> Iterator[Row]:
    number = 0
    with path.open("rb") as file:
        for count, line in enumerate(iter(lambda: file.readline(_MOST_OF_A_LINE), b""), 1):
            if count == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                place = f"line {count}"
                yield _row(path, place, number, "", _line(path, place, line))
                number += 1


def _line(path: Path, place: str, line: bytes) -> Any:
    try:
        return parse_json(line.decode())
    except ParseError as error:
        raise DataError(f"{path}: {place}: {error}; {_READER}") from error


def _small(path: Path, key: str) -> Iterator[Row]:
    try:
        content = read_json(path)
    except ParseError as error:
        raise DataError(f"{path}: {error}; {_READER}") from error
    if key:
        content = content.get(key) if isinstance(content, Mapping) else None
    if isinstance(content, Mapping):
        pairs = enumerate(content.items())
        yield from (_row(path, f"{name!r}", number, name, value) for number, (name, value) in pairs)
    elif isinstance(content, list):
        yield from (_row(path, f"item {number + 1}", number, "", value) for number, value in enumerate(content))
    else:
        what = f"{key} is no list or object" if key else "is no list or object"
        raise DataError(f"{path}: {what}; {_READER}")


def _large(path: Path, key: str) -> Iterator[Row]:
    """Read a file of JSON that is too large to be held: only one of its rows is, at a time."""
    import ijson

    try:
        with path.open("rb") as file:
            if file.read(3) != _BOM:
                file.seek(0)
            start = file.tell()
            kinds = (event for prefix, event, _ in ijson.parse(file) if prefix == key and event.startswith("start_"))
            kind = next(kinds, "")
            file.seek(start)
            if kind == "start_array":
                items = ijson.items(file, f"{key}.item".lstrip("."), use_float=True)
                yield from (_row(path, f"item {number + 1}", number, "", item) for number, item in enumerate(items))
            elif kind == "start_map":
                pairs = ijson.kvitems(file, key, use_float=True)
                yield from (_row(path, f"{name!r}", number, name, item) for number, (name, item) in enumerate(pairs))
            else:
                what = f"{key} is no list or object" if key else "is no list or object"
                raise DataError(f"{path}: {what}; {_READER}")
    except ijson.JSONError as error:
        raise DataError(f"{path}: not JSON: {shortened(error)}; {_READER}") from error


def _table(path: Path, separator: str) -> Iterator[Row]:
    csv.field_size_limit(_MOST_OF_A_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=separator, strict=True)
        try:
            for number, content in enumerate(reader):
                place = f"line {reader.line_num}"
                if None in content or None in content.values():
                    columns = len(reader.fieldnames or ())
                    raise DataError(f"{path}: {place}: has not {columns} cells as the first line has; {_READER}")
                yield Row(path, place, number, "", content)
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: is no row of a table ({error}); {_READER}") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for content in batch.to_pylist():
                    yield Row(path, f"row {number + 1}", number, "", content)
                    number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is no parquet file ({shortened(error, 80)}); {_READER}") from error


def first_there(folder: Path, candidates: Iterable[str]) -> Path:
    """Return the first of some folders that is there, else the first; `../coco` is the folder that benchmarks share.

    Args:
        folder: that of the benchmark.
        candidates: paths from it.
    """
    places = [folder / candidate for candidate in candidates]
    return next((place for place in places if place.is_dir()), places[0])


def located(folder: Path, forms: str) -> Path:
    """Return the first of some files that is there, else the first.

    Args:
        folder: that of the benchmark.
        forms: paths from it with ` or ` between them, which may hold `*`.
    """
    names = forms.split(" or ")
    found = (path for name in names for path in (sorted(folder.glob(name)) if "*" in name else [folder / name]))
    return next((path for path in found if path.exists()), folder / names[0])


def quoted(value: object) -> str:
    """Return a value as JSON, as files for servers have it."""
    return json.dumps(value, ensure_ascii=False)
