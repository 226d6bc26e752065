"""Make an index of conversations from JSON, with the images that they are about in shards beside it."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sphinx.data.files import renamed
from megatron_sphinx.data.index import CONVERSATION
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import inside
from megatron_sphinx.prepare.index import (
    PARTS,
    Quarantine,
    ShardImage,
    UnitResult,
    image_of,
    members,
    write_index,
    write_part,
)
from megatron_sphinx.prepare.template import Conversation, parse
from megatron_sphinx.prepare.workers import Report, is_held_out

_NO_IMAGE = ShardImage(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class _Unit:
    """Neighbouring conversations of a file, whose images share a shard.

    Attributes:
        number: of the unit, and of its shard.
        source: the file.
        first: number of its first conversation in the file.
        items: the conversations; None where they are the lines of the file from byte `begin` to `end`.
        begin: first byte.
        end: behind the last byte.
    """

    number: int
    source: Path
    first: int
    items: Sequence[Any] | None
    begin: int = 0
    end: int = 0

    def read(self) -> Iterator[tuple[str, Any]]:
        """Yield each conversation as the file has it, behind a name for it; it is None where a line is not JSON."""
        if self.items is not None:
            items = list(self.items)
        else:
            with self.source.open("rb") as file:
                file.seek(self.begin)
                items = [_json(line) for line in file.read(self.end - self.begin).splitlines()]
        for number, item in enumerate(items, self.first):
            known = item.get("id") if isinstance(item, dict) else None
            yield str(number if known is None else known), item


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def index_conversations(
    sources: Sequence[Path],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    images: Path | None = None,
    follow_links: bool = False,
    samples_per_shard: int = 1000,
    held_out: float = 0.0,
    workers: int = 1,
    show: bool = False,
) -> Report:
    """Write the index of conversations; their images are copied to `folder / "shards"`.

    What cannot be used is left out, and listed in `quarantine.jsonl`. What is done is kept in `.parts` until the index
    is whole: killed, this goes on where it was.

    Args:
        sources: .json files, each a list of what `template.parse` takes, or .jsonl files with one a line.
        folder: of the index.
        tokenizer: of the model that will be trained.
        images: folder that the paths of images are relative to, and must stay in; without it, each source's own.
        follow_links: whether links in that folder may lead out of it.
        samples_per_shard: conversations whose images share a shard.
        held_out: share of the conversations whose index goes to `folder / "held_out"` instead, chosen by image, or by
            id where there is none.
        workers: processes at a time.
        show: whether to show progress.

    Raises:
        DataError: a source cannot be read, or there is no conversation in any of them.
    """
    units: list[_Unit] = []
    for source in sources:
        units += _units(source, len(units), samples_per_shard)
    (folder / "shards").mkdir(parents=True, exist_ok=True)

    def work(number: int) -> UnitResult:
        unit = units[number]
        return _index_unit(unit, images or unit.source.parent, folder, tokenizer, (held_out, follow_links))

    report = write_index(
        work, range(len(units)), folder, tokenizer,
        sample_kind="conversations", held_out=held_out, workers=workers, unit_name="shard", show=show,
        empty_error=f"{', '.join(map(str, sources[:3]))}: holds no conversation that can be used",
    )  # fmt: skip
    used = {unit.number for unit in units}
    for shard in (folder / "shards").glob("*.tar"):  # of another run
        if int(shard.stem) not in used:
            shard.unlink()
    return report


def _units(source: Path, first: int, size: int) -> Iterator[_Unit]:
    """Divide a file into units of `size` conversations, whose numbers count from `first`."""
    try:
        if source.suffix == ".jsonl":
            ends = [0]
            with source.open("rb") as file:
                for line in file:
                    ends.append(ends[-1] + len(line))
            cuts = [*range(0, len(ends) - 1, size), len(ends) - 1]
            for number, (begin, end) in enumerate(pairwise(cuts), first):
                yield _Unit(number, source, begin, None, ends[begin], ends[end])
            return
        items = json.loads(source.read_bytes())
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{source}: not JSON ({error}); give a list of conversations, or .jsonl") from error
    if not isinstance(items, list):
        raise DataError(f"{source}: must hold a list of conversations")
    for number, begin in enumerate(range(0, len(items), size), first):
        yield _Unit(number, source, begin, items[begin : begin + size])


def _index_unit(unit: _Unit, root: Path, folder: Path, tokenizer: Tokenizer, options: tuple[float, bool]) -> UnitResult:
    """Copy the images of a unit to a shard, and index its conversations, if that is not done yet.

    Args:
        unit: the conversations.
        root: folder that the paths of images are relative to.
        folder: of the index.
        tokenizer: of the model that will be trained.
        options: held-out share, and whether links are followed; what is made depends on them.
    """
    state = unit.source.stat()
    settings = (unit.number, unit.first, unit.end, str(unit.source), state.st_size, state.st_mtime_ns, str(root))
    name = hashlib.sha256(repr((settings, options, tokenizer.identity)).encode()).hexdigest()[:24]
    part, shard = folder / PARTS / f"{name}.npz", folder / "shards" / f"{unit.number:06d}.tar"
    if part.is_file():
        return _result(shard, part)
    held_out, follow_links = options
    usable, contents, quarantine = _usable(unit, root, follow_links)
    images = dict(zip(contents, _write_shard(shard, contents), strict=True))
    samples, tokens, answers, is_held = [], [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)], []
    count = 0
    for key, conversation in usable:
        image = images[conversation.image] if conversation.image is not None else _NO_IMAGE
        ids, is_answer = conversation.encode(tokenizer)
        located = (0, image.offset, image.bytes, image.header, image.width, image.height)
        samples.append((*located, count, len(ids), int(is_answer.sum()) + 1))  # EOS too
        tokens.append(np.array(ids, np.int64))
        answers.append(is_answer)
        is_held.append(is_held_out(conversation.image or key, held_out))
        count += len(ids)
    write_part(
        part, tokenizer,
        samples=np.array(samples, CONVERSATION), captions=np.concatenate(tokens), answers=np.concatenate(answers),
        is_held_out=is_held, quarantine=quarantine,
    )  # fmt: skip
    return _result(shard, part)


def _usable(
    unit: _Unit, root: Path, follow_links: bool
) -> tuple[list[tuple[str, Conversation]], dict[str, bytes], Quarantine]:
    """Read the conversations of a unit.

    Args:
        unit: the conversations.
        root: folder that the paths of images are relative to.
        follow_links: whether links in that folder may lead out of it.

    Returns:
        Those that can be used, each behind its key; the files of their images, by their normalised paths from `root`;
        and what is left out.
    """
    usable: list[tuple[str, Conversation]] = []
    contents: dict[str, bytes] = {}
    quarantine: Quarantine = []
    for key, item in unit.read():
        try:
            conversation = parse(item)
            if conversation.image is not None:
                path = inside(root, conversation.image, follow_links=follow_links)
                conversation = replace(conversation, image=path)
                if path not in contents:
                    contents[path] = _content(root / path)
        except DataError as error:
            quarantine.append({"shard": str(unit.source), "key": key, "reason": " ".join(str(error).split())})
        else:
            usable.append((key, conversation))
    return usable, contents, quarantine


def _result(shard: Path, file: Path) -> UnitResult:
    return UnitResult(str(shard), shard.stat().st_size if shard.is_file() else 0, file)


def _content(path: Path) -> bytes:
    """Read the file of an image.

    Raises:
        DataError: the file cannot be read, or is no image that can be used.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"image cannot be read: {path} ({error.strerror})") from error
    image_of(0, bytes(tarfile.BLOCKSIZE) + content)
    return content


def _write_shard(shard: Path, contents: dict[str, bytes]) -> list[ShardImage]:
    """Write a tar of images under their normalised paths, and return where each is; without images there is no tar."""
    shard.unlink(missing_ok=True)
    if not contents:
        return []
    with renamed(shard) as unfinished, tarfile.open(unfinished, "w", format=tarfile.GNU_FORMAT) as tar:
        for path, content in contents.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return [image_of(offset, block) for _, offset, block in members(str(shard), _refuse)]


def _refuse(key: str | None, reason: str) -> None:
    raise DataError(f"{key}: {reason}; the disk does not keep what is written to it")
