"""Make token files from text as people have it: parquet, jsonl (plain, .zst or .gz), or plain files."""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_sphinx.data.files import open_file, remove_partial, renamed, state_of
from megatron_sphinx.data.text import content_of
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.workers import Report, in_parallel, is_held_out, write_json

PART_BYTES = 64 * 2**20
_COMPRESSED = {".zst": "zstd", ".gz": "gzip"}


class TokenWriter:
    """Writes a token file; its files appear at the end, or not at all."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        self.prefix = prefix
        self._partial = prefix.with_name(f".{prefix.name}.{os.getpid()}.partial")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._builder = IndexedDatasetBuilder(
            f"{self._partial}.bin", dtype=DType.optimal_dtype(tokenizer.identity.vocabulary)
        )

    def __enter__(self) -> "TokenWriter":
        return self

    def add(self, tokens: list[int]) -> None:
        """Append one document."""
        self._builder.add_document(torch.tensor(tokens, dtype=torch.int64), [len(tokens)])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        files = {ending: Path(f"{self._partial}{ending}") for ending in (".bin", ".idx")}
        self._builder.finalize(str(files[".idx"]))
        for ending, path in files.items():
            if kind is None:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(path, self.prefix.with_name(self.prefix.name + ending))
            else:
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Part:
    """A part of the input: bytes of a .jsonl, row groups of a .parquet, or a whole file."""

    number: int
    path: str
    begin: int
    end: int


def write_text(
    paths: Sequence[str | Path],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    key: str = "content",
    held_out: float = 0.0,
    workers: int = 1,
    part_bytes: int = PART_BYTES,
    show: bool = False,
) -> Report:
    """Tokenise files to a folder of token files, `[BOS] text [EOS]` a document; see `text.py`.

    Empty texts are left out; documents that cannot be read too, and listed in `quarantine.jsonl`. A part of the input
    that is done stays so: killed, this goes on where it was.

    Args:
        paths: of .parquet and .jsonl (also .jsonl.zst, .jsonl.gz), each row or line a document; any other file is one.
            URLs that fsspec knows will do.
        folder: of the token files.
        tokenizer: of the model that will be trained.
        key: column or key of the text; RefinedWeb's is `content`.
        held_out: share of the documents that goes to `folder / "held_out"` instead, chosen by their text.
        workers: processes at a time.
        part_bytes: larger files are divided.
        show: whether to show progress.

    Raises:
        DataError: a file is missing or is not what its name says, or there is no text in any of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = list(_parts(paths, key, part_bytes))
    marks = [_mark(part, (key, held_out, part_bytes, tokenizer.identity)) for part in parts]
    work = partial(_write_part, folder=folder, tokenizer=tokenizer, key=key, held_out=held_out)
    targets = [folder, *([folder / "held_out"] if held_out else [])]
    for target in (folder, folder / "held_out"):
        (target / "index.json").unlink(missing_ok=True)
        remove_partial(target)
    jobs = list(zip(parts, marks, strict=True))
    done = list(in_parallel(work, jobs, workers=workers, what="part", show=show))
    report = Report()
    for about in done:
        report.reject(about["quarantine"])
    sums = [[sum(about["written"][which][what] for about in done) for what in (0, 1)] for which in range(len(targets))]
    report.taken, report.tokens = sums[0]
    report.held_out = sums[1][0] if held_out else 0
    if not report.taken:
        raise DataError(f"{', '.join(map(str, paths[:3]))}: no text{report.why()}; name its column or key by --key")
    with renamed(folder / "quarantine.jsonl") as unfinished, unfinished.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for about in done for line in about["quarantine"])
    for which, target in enumerate(targets):
        _write_index(target, tokenizer, [_entry(part, about, which) for part, about in zip(parts, done, strict=True)])
    return report


def _entry(part: _Part, about: dict[str, Any], which: int) -> dict[str, Any]:
    """What the index says of the token file of a part, in the folder or in that of the held-out share."""
    documents, tokens = about["written"][which]
    entry = {"name": f"{part.number:06d}", "documents": documents, "tokens": tokens}
    return entry | ({"content": about["contents"][which]} if tokens else {})


def _write_index(folder: Path, tokenizer: Tokenizer, files: Sequence[dict[str, Any]]) -> None:
    """Remove what is left of an earlier call with more files, and write the index if there is a document."""
    known = {entry["name"] for entry in files}
    for path in folder.iterdir():
        if re.fullmatch(r"\d{6}\.(bin|idx|json|content\.json)", path.name) and path.name[:6] not in known:
            path.unlink()
    if any(entry["documents"] for entry in files):
        write_json(folder / "index.json", {"tokenizer": asdict(tokenizer.identity), "files": files})


def _parts(paths: Sequence[str | Path], key: str, part_bytes: int) -> Iterator[_Part]:
    """The input, divided."""
    number = 0
    for path in map(str, paths):
        try:
            size, _ = state_of(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        bounds = [0, size]
        if path.endswith(".jsonl"):
            bounds = [*range(0, max(size, 1), part_bytes), size]
        elif path.endswith(".parquet"):
            bounds = _row_groups(path, key, part_bytes)
        for begin, end in pairwise(bounds):
            yield _Part(number, path, begin, end)
            number += 1


def _row_groups(path: str, key: str, part_bytes: int) -> list[int]:
    """Where a parquet file is divided, in row groups."""
    from pyarrow import ArrowException, parquet

    try:
        with open_file(path) as file:
            about = parquet.ParquetFile(file)
            names = about.schema_arrow.names
            sizes = [about.metadata.row_group(group).total_byte_size for group in range(about.num_row_groups)]
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({' '.join(str(error).split())[:200]}); copy it again") from error
    if key not in names:
        raise DataError(f"{path}: has no column {key!r}, but {names}; give --key")
    bounds, so_far = [0], 0
    for group, size in enumerate(sizes):
        if so_far and so_far + size > part_bytes:
            bounds.append(group)
            so_far = 0
        so_far += size
    return [*bounds, len(sizes)]


def _mark(part: _Part, settings: tuple[Any, ...]) -> str:
    """Differs where what is written for a part would differ."""
    return hashlib.sha256(repr((part, state_of(part.path), settings)).encode()).hexdigest()


def _write_part(
    job: tuple[_Part, str], *, folder: Path, tokenizer: Tokenizer, key: str, held_out: float
) -> dict[str, Any]:
    """Write the token file of one part, if it is not there yet; what its own .json says of it."""
    part, mark = job
    name = f"{part.number:06d}"
    done = folder / f"{name}.json"
    targets = [folder, *([folder / "held_out"] if held_out else [])]
    if done.is_file() and all((target / f"{name}.idx").is_file() for target in targets):
        about: dict[str, Any] = json.loads(done.read_text())
        if about["mark"] == mark:
            return about if "contents" in about else about | _contents(targets, name, about["written"])
    done.unlink(missing_ok=True)
    quarantine: list[dict[str, Any]] = []
    written = [[0, 0] for _ in targets]
    writers = [TokenWriter(target / name, tokenizer) for target in targets]
    try:
        for text in _documents(part, key, quarantine):
            ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
            which = int(is_held_out(text, held_out))
            writers[which].add(ids)
            written[which][0] += 1
            written[which][1] += len(ids)
    except BaseException as error:
        for writer in writers:
            writer.__exit__(type(error), error, None)
        raise
    for writer in writers:
        writer.__exit__(None, None, None)
    about = {"mark": mark, "written": written, "quarantine": quarantine, **_contents(targets, name, written)}
    write_json(done, about)
    return about


def _contents(targets: Sequence[Path], name: str, written: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the token files of a part hold; None of one without tokens."""
    found: list[dict[str, Any] | None] = []
    for target, (_, tokens) in zip(targets, written, strict=True):
        content = content_of(target / name) if tokens else None
        found.append(asdict(content) if content else None)
    return {"contents": found}


def _documents(part: _Part, key: str, quarantine: list[dict[str, Any]]) -> Iterator[str]:
    """The texts of a part that hold something."""
    for place, value in _values(part, key):
        if isinstance(value, DataError):
            quarantine.append({"shard": part.path, "key": place, "reason": str(value)})
        elif isinstance(value, str) and "\0" in value:
            quarantine.append({"shard": part.path, "key": place, "reason": "holds a NUL character"})
        elif isinstance(value, str) and value.strip():
            yield value


def _values(part: _Part, key: str) -> Iterator[tuple[str, object]]:
    """Where each document of a part stands, and what stands there: text, or the reason why not."""
    kind = Path(part.path).suffix
    with open_file(part.path) as file:
        if part.path.endswith((".jsonl", *(f".jsonl{ending}" for ending in _COMPRESSED))):
            for at, line in _lines(file, part, kind):
                try:
                    yield f"byte {at}", json.loads(line)[key]
                except (ValueError, KeyError, TypeError):
                    yield f"byte {at}", DataError(f"not a JSON object with the key {key!r}")
        elif kind == ".parquet":
            from pyarrow import parquet

            table = parquet.ParquetFile(file)
            rows = count()
            for batch in table.iter_batches(columns=[key], row_groups=range(part.begin, part.end)):
                for value in batch.column(0).to_pylist():
                    yield f"row {next(rows)} from row group {part.begin}", value
        else:
            yield "whole", file.read().decode(errors="replace")


def _lines(file: Any, part: _Part, kind: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a .jsonl that begin in a part, and where."""
    if kind in _COMPRESSED:
        from pyarrow import input_stream

        at = 0
        try:
            for line in io.BufferedReader(input_stream(file, compression=_COMPRESSED[kind])):
                yield at, line
                at += len(line)
        except OSError as error:
            raise DataError(f"{part.path}: does not decompress ({error}); copy it again") from error
        return
    at = part.begin
    if at:
        file.seek(at - 1)
        at += len(file.readline()) - 1
    while at < part.end and (line := file.readline()):
        if line.strip():
            yield at, line
        at += len(line)
