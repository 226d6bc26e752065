"""Rows of questions as they come in: JSON, tables, folders of pictures, tars; a bad row costs itself alone."""

import csv
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sphinx.data.files import state_of
from megatron_sphinx.data.images import ENDINGS
from megatron_sphinx.data.pairs import split_name
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import files_in, printable
from megatron_sphinx.prepare.json_files import read_items
from megatron_sphinx.prepare.shards import BLOCK, Member, members

_GROUP = 1000  # rows that are read at once
_TABLES = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".ndjson", ".json")
_TAKEN = ".jsonl, .json, .csv, .tsv, .parquet, .tar, or a folder of pictures, tars or parquet files"


@dataclass(frozen=True)
class Row:
    """A row of an input.

    Attributes:
        columns: names and values, as the input has them.
        root: what paths in it are relative to.
        content: of its picture's file, where the input holds that; None where it does not.
        fault: why it cannot be read; empty where it can.
    """

    columns: Mapping[str, Any]
    root: Path
    content: bytes | None = None
    fault: str = ""


@dataclass(frozen=True)
class Source:
    """A file of rows, or a folder of pictures.

    Attributes:
        path: of the file or folder.
        pictures: files of the folder, in the order of their paths; empty where it is a file.
    """

    path: Path
    pictures: tuple[Path, ...] = ()

    def rows(self) -> Iterator[Row]:
        """Yield the rows in their order.

        Raises:
            DataError: the file cannot be read.
        """
        root, suffix = self.path.parent, self.path.suffix.lower()
        try:
            if self.pictures:
                yield from (Row({"image": str(path.relative_to(self.path))}, self.path) for path in self.pictures)
            elif suffix == ".tar":
                yield from _rows_of_tar(self.path)
            elif suffix in _JSON:
                yield from _rows_of_json(self.path)
            else:
                rows = _rows_of_parquet(self.path) if suffix == ".parquet" else _rows_of_table(self.path)
                yield from (Row(columns, root) for columns in rows)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error}); check the file") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self.path}: is no table ({error}); save it as UTF-8 with a line of names") from error

    def count(self) -> int | None:
        """Return how many rows there are, for a progress bar; None where only reading them all would tell."""
        if self.path.suffix.lower() == ".parquet":
            return int(_parquet(self.path).metadata.num_rows)
        return None if self.path.suffix.lower() == ".tar" else sum(1 for _ in self.rows())

    def state(self) -> str:
        """Return what differs when the rows have changed: of text a digest, of pictures and large files less."""
        digest = hashlib.sha256()
        if self.pictures:
            for path in self.pictures:
                digest.update(f"{printable(str(path.relative_to(self.path)))} {path.stat().st_size}\n".encode())
        elif self.path.suffix.lower() in (".tar", ".parquet"):
            digest.update(repr(state_of(str(self.path))).encode())
        else:
            with self.path.open("rb") as file:
                while part := file.read(2**20):
                    digest.update(part)
        return digest.hexdigest()


def sources_of(paths: Sequence[Path], *, follow_links: bool = False) -> list[Source]:
    """Return the files and folders that inputs are; of a folder with tars or parquet files, those.

    Args:
        paths: of the inputs.
        follow_links: whether links may lead out of a folder.

    Raises:
        DataError: an input does not exist, is of no known kind, or is a folder without anything to take.
    """
    sources = []
    for path in paths:
        if path.is_dir():
            sources += _in_folder(path, follow_links)
        elif not path.is_file():
            raise DataError(f"{path}: no such file or folder; give {_TAKEN}")
        elif path.suffix.lower() not in (*_JSON, *_TABLES, ".parquet", ".tar"):
            raise DataError(f"{path}: of no known kind; give {_TAKEN}")
        else:
            sources.append(Source(path))
    return sources


def _in_folder(folder: Path, follow_links: bool) -> list[Source]:
    """Return what a folder holds: tars, else parquet files, else pictures, in the order of their paths."""
    for ending in ("tar", "parquet"):
        if files := files_in(folder, (ending,), follow_links=follow_links):
            return [Source(path) for path in files]
    pictures = files_in(folder, ENDINGS, follow_links=follow_links)
    if not pictures:
        raise DataError(f"{folder}: holds nothing to ask about; give {_TAKEN}")
    return [Source(folder, tuple(pictures))]


def _rows_of_json(path: Path) -> Iterator[Row]:
    for items in read_items(path, _GROUP, are_lines=True):
        for item in items.read():
            if item.fault:
                yield Row({"place": item.place}, path.parent, fault=item.fault)
            elif not isinstance(item.content, dict):
                yield Row({"place": item.place}, path.parent, fault="no row: must be a JSON object")
            else:
                yield Row(item.content, path.parent)


def _rows_of_table(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        for columns in csv.DictReader(file, delimiter=_TABLES[path.suffix.lower()]):
            yield {name: value for name, value in columns.items() if name is not None}


def _parquet(path: Path) -> Any:
    """Open a parquet file; raise DataError where it is none."""
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise DataError(f"{path}: is no parquet file ({error}); check the file") from error


def _rows_of_parquet(path: Path) -> Iterator[dict[str, Any]]:
    for batch in _parquet(path).iter_batches(batch_size=_GROUP):
        yield from batch.to_pylist()


@dataclass
class _Sample:
    """Files of a tar that have one key.

    Attributes:
        columns: those of its .json, and its picture's name.
        content: of its picture; None where it has none.
        fault: why it cannot be used; empty where it can.
    """

    columns: dict[str, Any] = field(default_factory=dict)
    content: bytes | None = None
    fault: str = ""

    def add(self, member: Member) -> None:
        """Take a file of the sample."""
        content, ending = member.block[BLOCK:], _ending(member.name)
        if member.fault:
            self.fault = f"{printable(member.name)}: {member.fault}"
        elif ending in ENDINGS:
            self.columns.setdefault("image", printable(member.name))
            self.content = content
        else:
            try:
                self.columns = {**json.loads(content), **self.columns}
            except (ValueError, TypeError, RecursionError) as error:
                self.fault = f"{printable(member.name)}: not a JSON object: {error}"


def _ending(name: str) -> str:
    return split_name(name)[1].rpartition(".")[2]


def _rows_of_tar(path: Path) -> Iterator[Row]:
    """Yield the samples of a tar of pictures, each with the columns of the .json beside it."""
    torn: list[Row] = []

    def leave_out(key: str | None, reason: str) -> None:
        torn.append(Row({"key": printable(key)} if key else {}, path.parent, fault=reason))

    def key_of(member: Member) -> tuple[int, str]:
        return member.part, split_name(member.name)[0]

    files = members(str(path), leave_out, lambda name: _ending(name) in (*ENDINGS, "json"))
    wanted = (member for member in files if _ending(member.name) in (*ENDINGS, "json"))
    for (_, key), group in itertools.groupby(wanted, key_of):
        sample = _Sample()
        for member in group:
            sample.add(member)
        yield Row({"key": printable(key), **sample.columns}, path.parent, sample.content, sample.fault)
        yield from map(partial(_beside, path), torn)
        torn.clear()
    yield from map(partial(_beside, path), torn)


def _beside(path: Path, row: Row) -> Row:
    """Name the tar in a row that says what of it cannot be read."""
    return Row({"tar": path.name, **row.columns}, row.root, fault=row.fault)
