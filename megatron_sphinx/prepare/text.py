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

import numpy as np

from megatron_sphinx.data.files import open_file, remove_partial, renamed, state_of
from megatron_sphinx.data.text import content_of
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.workers import Report, in_parallel, is_held_out, write_json

PART_BYTES = 64 * 2**20
_COMPRESSED = {".zst": "zstd", ".gz": "gzip"}


class TokenWriter:
    """Writes a token file, whose two files appear at the end, or not at all."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # here, since it takes seconds

        self.prefix = prefix
        self._partial = prefix.with_name(f".{prefix.name}.{os.getpid()}.partial")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._builder = IndexedDatasetBuilder(f"{self._partial}.bin", dtype=tokenizer.identity.token_type.type)

    def __enter__(self) -> "TokenWriter":
        return self

    def add(self, tokens: list[int]) -> None:
        """Append one document, given by its token ids."""
        # By its type it takes a tensor; it takes whatever numpy copies.
        self._builder.add_document(np.array(tokens, np.int64), [len(tokens)])

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
class InputRange:
    """What becomes one token file: bytes of a .jsonl, row groups of a .parquet, or a whole file.

    Attributes:
        number: of the token file.
        path: of the input, or its URL.
        begin: first byte or row group.
        end: behind the last byte or row group.
    """

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
    """Tokenise files to a folder of token files, in which a document is `[BOS] text [EOS]`.

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
    import megatron.core.datasets.indexed_dataset  # noqa: F401 (before workers are forked, so that none has to)

    folder.mkdir(parents=True, exist_ok=True)
    ranges = list(_divide(paths, key, part_bytes))
    settings = (key, held_out, part_bytes, tokenizer.identity)
    digests = [digest_of(part, state_of(part.path), settings) for part in ranges]
    work = partial(_write_part, folder=folder, tokenizer=tokenizer, key=key, held_out=held_out)
    targets = [folder, *([folder / "held_out"] if held_out else [])]
    for target in (folder, folder / "held_out"):
        (target / "index.json").unlink(missing_ok=True)
        remove_partial(target)
    jobs = list(zip(ranges, digests, strict=True))
    summaries = list(in_parallel(work, jobs, workers=workers, unit_name="part", show=show))
    report = Report()
    for summary in summaries:
        report.reject(summary["quarantine"])
    report.taken = sum(summary["written"][0][0] for summary in summaries)
    report.tokens = sum(summary["written"][0][1] for summary in summaries)
    report.held_out = sum(summary["written"][1][0] for summary in summaries) if held_out else 0
    if not report.taken:
        raise DataError(f"{', '.join(map(str, paths[:3]))}: no text{report.why()}; name its column or key by --key")
    with renamed(folder / "quarantine.jsonl") as unfinished, unfinished.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for summary in summaries for line in summary["quarantine"])
    for number, target in enumerate(targets):
        entries = [_entry(part, summary, number) for part, summary in zip(ranges, summaries, strict=True)]
        _write_index(target, tokenizer, entries)
    return report


def _entry(part: InputRange, summary: dict[str, Any], target: int) -> dict[str, Any]:
    """Return what an index says of the token file of a part: 0 for the folder's, 1 for that of the held-out share."""
    documents, tokens = summary["written"][target]
    entry = {"name": f"{part.number:06d}", "documents": documents, "tokens": tokens}
    return entry | ({"content": summary["contents"][target]} if tokens else {})


def _write_index(folder: Path, tokenizer: Tokenizer, files: Sequence[dict[str, Any]]) -> None:
    """Remove what is left of an earlier call with more files, and write the index if there is a document."""
    known = {entry["name"] for entry in files}
    for path in folder.iterdir():
        if re.fullmatch(r"\d{6}\.(bin|idx|json|content\.json)", path.name) and path.name[:6] not in known:
            path.unlink()
    if any(entry["documents"] for entry in files):
        write_json(folder / "index.json", {"format": 1, "tokenizer": asdict(tokenizer.identity), "files": files})


def _divide(paths: Sequence[str | Path], key: str, part_bytes: int) -> Iterator[InputRange]:
    """Divide the input into parts of about so many bytes, as far as its files can be read from the middle."""
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
            yield InputRange(number, path, begin, end)
            number += 1


def _row_groups(path: str, key: str, part_bytes: int) -> list[int]:
    """Return where a parquet file is divided, in row groups: 0, the cuts, and how many there are."""
    from pyarrow import ArrowException, parquet

    try:
        with open_file(path) as file:
            table = parquet.ParquetFile(file)
            names = table.schema_arrow.names
            sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
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


def digest_of(part: InputRange, state: tuple[int, str], settings: tuple[Any, ...]) -> str:
    """Return a digest that differs where what is written for a part would differ.

    Args:
        part: of the input.
        state: size and version of the file that it is in.
        settings: whatever else decides what is written.
    """
    values = ", ".join(f"{name}={value!r}" for name, value in vars(part).items())
    # the class was called _Part when the first folders were made, whose parts must still be known
    return hashlib.sha256(f"(_Part({values}), {state!r}, {settings!r})".encode()).hexdigest()


def _write_part(
    job: tuple[InputRange, str], *, folder: Path, tokenizer: Tokenizer, key: str, held_out: float
) -> dict[str, Any]:
    """Write the token file of one part, if it is not there yet; return what its own .json says of it."""
    part, digest = job
    name = f"{part.number:06d}"
    done = folder / f"{name}.json"
    targets = [folder, *([folder / "held_out"] if held_out else [])]
    if done.is_file() and all((target / f"{name}.idx").is_file() for target in targets):
        known: dict[str, Any] = json.loads(done.read_text())
        if known["mark"] == digest:
            return known if "contents" in known else known | _contents(targets, name, known["written"])
    done.unlink(missing_ok=True)
    quarantine: list[dict[str, Any]] = []
    written = [[0, 0] for _ in targets]
    writers = [TokenWriter(target / name, tokenizer) for target in targets]
    try:
        for text in _documents(part, key, quarantine):
            ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
            target = int(is_held_out(text, held_out))
            writers[target].add(ids)
            written[target][0] += 1
            written[target][1] += len(ids)
    except BaseException as error:
        for writer in writers:
            writer.__exit__(type(error), error, None)
        raise
    for writer in writers:
        writer.__exit__(None, None, None)
    summary = {"mark": digest, "written": written, "quarantine": quarantine, **_contents(targets, name, written)}
    write_json(done, summary)
    return summary


def _contents(targets: Sequence[Path], name: str, written: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return what the token files of a part hold, under `contents`; None for a file without tokens."""
    contents: list[dict[str, Any] | None] = []
    for target, (_, tokens) in zip(targets, written, strict=True):
        content = content_of(target / name) if tokens else None
        contents.append(asdict(content) if content else None)
    return {"contents": contents}


def _documents(part: InputRange, key: str, quarantine: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the texts of a part that hold something; those that cannot be used get an entry of the quarantine."""
    for place, value in _values(part, key):
        if isinstance(value, DataError):
            quarantine.append({"shard": part.path, "key": place, "reason": str(value)})
        elif isinstance(value, str) and "\0" in value:
            quarantine.append({"shard": part.path, "key": place, "reason": "holds a NUL character"})
        elif isinstance(value, str) and value.strip():
            yield value


def _values(part: InputRange, key: str) -> Iterator[tuple[str, object]]:
    """Yield where each document of a part stands, and what stands there: text, or the reason why not."""
    kind = Path(part.path).suffix
    with open_file(part.path) as file:
        if part.path.endswith((".jsonl", *(f".jsonl{ending}" for ending in _COMPRESSED))):
            for offset, line in _lines(file, part, kind):
                try:
                    yield f"byte {offset}", json.loads(line)[key]
                except (ValueError, KeyError, TypeError):
                    yield f"byte {offset}", DataError(f"not a JSON object with the key {key!r}")
        elif kind == ".parquet":
            from pyarrow import parquet

            table = parquet.ParquetFile(file)
            rows = count()
            for batch in table.iter_batches(columns=[key], row_groups=range(part.begin, part.end)):
                for value in batch.column(0).to_pylist():
                    yield f"row {next(rows)} from row group {part.begin}", value
        else:
            yield "whole", file.read().decode(errors="replace")


def _lines(file: Any, part: InputRange, kind: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a .jsonl that begin in a part, each behind the offset of its first byte."""
    if kind in _COMPRESSED:
        from pyarrow import input_stream

        offset = 0
        try:
            for line in io.BufferedReader(input_stream(file, compression=_COMPRESSED[kind])):
                yield offset, line
                offset += len(line)
        except OSError as error:
            raise DataError(f"{part.path}: does not decompress ({error}); copy it again") from error
        return
    offset = part.begin
    if offset:  # a line that begins before belongs to the part before
        file.seek(offset - 1)
        offset += len(file.readline()) - 1
    while offset < part.end and (line := file.readline()):
        if line.strip():
            yield offset, line
        offset += len(line)
