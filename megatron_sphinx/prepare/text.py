"""Make token files from text as people have it: JSON, parquet or plain files (see `text_formats.py`)."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from megatron_sphinx.data.files import open_file, remove_partial, renamed, state_of
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import printable
from megatron_sphinx.prepare.crew import Crew
from megatron_sphinx.prepare.text_formats import TextFormat, TextSettings, format_of
from megatron_sphinx.prepare.text_items import Item, items_of, parquet_format
from megatron_sphinx.prepare.token_writer import TokenWriter
from megatron_sphinx.prepare.workers import (
    Report,
    check_share,
    check_workers,
    in_parallel,
    is_held_out,
    target_folder,
    write_json,
)

PART_BYTES = 64 * 2**20


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


Job: TypeAlias = tuple[InputRange, TextFormat, str]  # what becomes a token file, how, and its digest


def write_text(
    paths: Sequence[str | Path],
    folder: Path,
    tokenizer: Tokenizer,
    settings: TextSettings | None = None,
    *,
    held_out: float = 0.0,
    workers: int = 1,
    part_bytes: int = PART_BYTES,
    show: bool = False,
) -> Report:
    """Tokenise files to a folder of token files, in which a document is `[BOS] text [EOS]`.

    Each document of a file is written, or listed in `quarantine.jsonl` with its place and a reason. A part of the input
    that is done stays so: killed, this goes on where it was.

    Args:
        paths: of JSON, parquet and plain text, each also compressed (see `text_formats.py`). URLs that fsspec knows
            will do.
        folder: of the token files.
        tokenizer: of the model that will be trained.
        settings: what the user says of the files.
        held_out: share of the documents that goes to `folder / "held_out"` instead, chosen by their text.
        workers: processes at a time.
        part_bytes: larger files are divided.
        show: whether to show progress.

    Raises:
        DataError: a file is missing, nothing tells its format, or it has no such key; or there is no text in any.
    """
    settings = settings or TextSettings()
    settings.check([str(path) for path in paths])
    check_share("held_out", held_out)
    check_workers(workers)
    parts = list(_divide(paths, settings, part_bytes))
    more = (held_out, part_bytes, settings.most_characters, tokenizer.identity)
    jobs = [(part, form, digest_of(part, state_of(part.path), (form, *more))) for part, form in parts]
    work = partial(
        _write_part, folder=folder, tokenizer=tokenizer, held_out=held_out, most=settings.most_characters,
        crew=Crew(tokenizer, workers),
    )  # fmt: skip
    with target_folder(folder):
        for target in (folder, folder / "held_out"):
            (target / "index.json").unlink(missing_ok=True)
            remove_partial(target)
        summaries = list(in_parallel(work, jobs, workers=workers, unit_name="part", show=show))
        report = _report(summaries, is_divided=bool(held_out))
        _write_quarantine(folder, jobs, summaries)
        if not report.taken:
            names = ", ".join(printable(str(path)) for path in paths[:3])
            raise DataError(f"{names}: no text{report.why()}; see {folder / 'quarantine.jsonl'}, or give another --key")
        for number, target in enumerate([folder, *([folder / "held_out"] if held_out else [])]):
            entries = [_entry(part, summary, number) for (part, _), summary in zip(parts, summaries, strict=True)]
            _write_index(target, tokenizer, entries)
    return report


def _report(summaries: Sequence[dict[str, Any]], *, is_divided: bool) -> Report:
    """Add up what was taken of all parts, and what not."""
    report = Report()
    for summary in summaries:
        report.inputs += summary["documents"]
        report.first = report.first or summary["first"]
        for reason, documents in summary["rejected"].items():
            report.rejected[reason] = report.rejected.get(reason, 0) + documents
    report.taken = sum(summary["written"][0][0] for summary in summaries)
    report.tokens = sum(summary["written"][0][1] for summary in summaries)
    report.held_out = sum(summary["written"][1][0] for summary in summaries) if is_divided else 0
    return report


def _write_quarantine(folder: Path, jobs: Sequence[Job], summaries: Sequence[dict[str, Any]]) -> None:
    """Join the quarantines of all parts; lines, which parts count from their begin, become those of the file."""
    lines = 0
    with renamed(folder / "quarantine.jsonl") as unfinished, unfinished.open("w") as whole:
        for (part, _, _), summary in zip(jobs, summaries, strict=True):
            lines = lines if part.begin else 0
            if summary["rejected"]:
                with _quarantine_of(folder, part).open() as file:
                    for entry in map(json.loads, file):
                        whole.write(
                            json.dumps(entry | ({"line": entry["line"] + lines} if "line" in entry else {})) + "\n"
                        )
            lines += summary["lines"]


def _quarantine_of(folder: Path, part: InputRange) -> Path:
    """Return where a part keeps its own quarantine."""
    return folder / f"{part.number:06d}.quarantine.jsonl"


def _entry(part: InputRange, summary: dict[str, Any], target: int) -> dict[str, Any]:
    """Return what an index says of the token file of a part: 0 for the folder's, 1 for that of the held-out share."""
    documents, tokens = summary["written"][target]
    entry = {"name": f"{part.number:06d}", "documents": documents, "tokens": tokens}
    return entry | ({"content": summary["contents"][target]} if tokens else {})


def _write_index(folder: Path, tokenizer: Tokenizer, files: Sequence[dict[str, Any]]) -> None:
    """Remove what is left of an earlier call with more files, and write the index if there is a document."""
    known = {entry["name"] for entry in files}
    for path in folder.iterdir():
        if (
            re.fullmatch(r"\d{6}\.(bin|idx|json|content\.json|quarantine\.jsonl)", path.name)
            and path.name[:6] not in known
        ):
            path.unlink()
    if any(entry["documents"] for entry in files):
        write_json(folder / "index.json", {"format": 1, "tokenizer": asdict(tokenizer.identity), "files": files})


def _divide(
    paths: Sequence[str | Path], settings: TextSettings, part_bytes: int
) -> Iterator[tuple[InputRange, TextFormat]]:
    """Divide the input into parts of about so many bytes, as far as its files can be read from the middle."""
    number = 0
    for path in map(str, paths):
        try:
            bounds, form = _bounds(path, settings, part_bytes)
        except OSError as error:
            raise DataError(f"{printable(path)}: cannot be read ({error.strerror or error}); check its path") from error
        for begin, end in pairwise(bounds):
            yield InputRange(number, path, begin, end), form
            number += 1


def _bounds(path: str, settings: TextSettings, part_bytes: int) -> tuple[list[int], TextFormat]:
    """Return where a file is divided, in row groups of parquet, else in bytes; and how it is read.

    Raises:
        OSError: the file cannot be read.
        DataError: it is not what can be read.
    """
    size, _ = state_of(path)
    form = format_of(path, settings)
    if form.kind == "parquet":
        try:
            with open_file(path) as file:
                form, sizes = parquet_format(path, file, settings)
        except DataError:  # which is a ValueError
            raise
        except ValueError as error:
            return [0, size], TextFormat("nothing", reason=str(error))
        return _grouped(sizes, part_bytes), form
    return ([*range(0, size, part_bytes), size] if form.is_plain else [0, size]), form


def _grouped(sizes: Sequence[int], part_bytes: int) -> list[int]:
    """Return where row groups of so many bytes are divided: 0, the cuts, and how many there are."""
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
    return hashlib.sha256(f"({part!r}, {state!r}, {settings!r})".encode(errors="surrogateescape")).hexdigest()


def _write_part(
    job: Job, *, folder: Path, tokenizer: Tokenizer, held_out: float, most: int, crew: Crew
) -> dict[str, Any]:
    """Write the token file of one part, if it is not there yet; return what its own .json says of it.

    Args:
        job: the part, how it is read, and its digest.
        folder: of the token files.
        tokenizer: of the model that will be trained.
        held_out: share of the documents that goes to another folder.
        most: characters of a document.
        crew: tokenises.
    """
    part, form, digest = job
    name = f"{part.number:06d}"
    done = folder / f"{name}.json"
    targets = [folder, *([folder / "held_out"] if held_out else [])]
    if done.is_file() and all((target / f"{name}.idx").is_file() for target in targets):
        known: dict[str, Any] = json.loads(done.read_text())
        if known["mark"] == digest:
            return known
    done.unlink(missing_ok=True)
    summary: dict[str, Any] = {"mark": digest, "written": [[0, 0] for _ in targets], "documents": 0, "lines": 0}
    rejected = Report()

    def count_lines(lines: int) -> None:
        summary["lines"] += lines

    writers = [TokenWriter(target / name, tokenizer) for target in targets]
    try:
        with renamed(_quarantine_of(folder, part)) as unfinished, unfinished.open("w") as quarantine:
            items = items_of(part.path, form, most, part.begin, part.end, count_lines=count_lines)
            for item, ids in crew.encoded(items):
                summary["documents"] += item.documents
                if item.text is None or ids is None:
                    entry = _quarantined(part.path, item)
                    rejected.reject([entry])
                    quarantine.write(json.dumps(entry) + "\n")
                else:
                    target = int(is_held_out(item.text, held_out))
                    writers[target].add(ids)
                    summary["written"][target][0] += 1
                    summary["written"][target][1] += len(ids)
    except BaseException as error:
        for writer in writers:
            writer.__exit__(type(error), error, None)
        raise
    for writer in writers:
        writer.__exit__(None, None, None)
    contents = [content and asdict(content) for content in (writer.content() for writer in writers)]
    summary |= {"rejected": rejected.rejected, "first": rejected.first, "contents": contents}
    write_json(done, summary)
    return summary


def _quarantined(path: str, item: Item) -> dict[str, Any]:
    """Return the line of the quarantine for what cannot be used."""
    entry: dict[str, Any] = {"shard": printable(path), "key": item.place, "reason": item.reason}
    if item.line is not None:
        entry["line"] = item.line
    if item.documents != 1:
        entry["documents"] = item.documents
    return entry
