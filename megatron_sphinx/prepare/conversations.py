"""Make an index of conversations from JSON, with the images that they are about in shards beside it."""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_sphinx.data.files import renamed
from megatron_sphinx.data.index import CONVERSATION
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import inside, printable
from megatron_sphinx.prepare.index import PARTS, Quarantine, UnitResult, write_index, write_part
from megatron_sphinx.prepare.json_files import Items, read_items
from megatron_sphinx.prepare.shards import BLOCK, ShardImage, file_content, image_of, members
from megatron_sphinx.prepare.template import Conversation, parse
from megatron_sphinx.prepare.workers import (
    Report,
    check_share,
    check_workers,
    is_held_out,
    one_line,
    target_folder,
)

_NO_IMAGE = ShardImage(0, 0, 0, 0, 0, 0)
_RECORDS = 3  # version of what is kept of a unit while an index is made
_MOST_KEY = 200  # characters of an id in the quarantine


@dataclass(frozen=True)
class _Unit:
    """Neighbouring conversations of a file, whose images share a shard.

    Attributes:
        number: of the unit, and of its shard.
        items: the conversations.
    """

    number: int
    items: Items


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
    check_share("held_out", held_out)
    check_workers(workers)
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard={samples_per_shard}: must be 1 or more; give some hundreds")
    groups = [items for source in sources for items in read_items(source, samples_per_shard)]
    units = [_Unit(number, items) for number, items in enumerate(groups)]

    def work(number: int) -> UnitResult:
        unit = units[number]
        return _index_unit(unit, images or unit.items.source.parent, folder, tokenizer, (held_out, follow_links))

    with target_folder(folder):
        (folder / "shards").mkdir(exist_ok=True)
        report = write_index(
            work, range(len(units)), folder, tokenizer,
            sample_kind="conversations", held_out=held_out, workers=workers, unit_name="shard", show=show,
            empty_error=f"{', '.join(map(str, sources[:3]))}: holds no conversation that can be used",
        )  # fmt: skip
        for shard in (folder / "shards").glob("*.tar"):  # of another run
            if not shard.stem.isdecimal() or int(shard.stem) >= len(units):
                shard.unlink()
    return report


def _index_unit(unit: _Unit, root: Path, folder: Path, tokenizer: Tokenizer, options: tuple[float, bool]) -> UnitResult:
    """Copy the images of a unit to a shard, and index its conversations, if that is not done yet.

    Args:
        unit: the conversations.
        root: folder that the paths of images are relative to.
        folder: of the index.
        tokenizer: of the model that will be trained.
        options: held-out share, and whether links are followed; what is made depends on them.
    """
    items = unit.items
    state = items.source.stat()
    place = (unit.number, items.first, items.end, str(items.source))
    settings = (_RECORDS, *place, state.st_size, state.st_mtime_ns, str(root))
    name = hashlib.sha256(repr((settings, options, tokenizer.identity)).encode()).hexdigest()[:24]
    part, shard = folder / PARTS / f"{name}.npz", folder / "shards" / f"{unit.number:06d}.tar"
    if part.is_file():
        return _result(shard, part)
    held_out, follow_links = options
    usable, contents, quarantine = _usable(items, root, follow_links)
    images = dict(zip(contents, _write_shard(shard, contents), strict=True))
    samples, tokens, answers, is_held = [], [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)], []
    count = 0
    for key, conversation in usable:
        image = images[conversation.image] if conversation.image is not None else _NO_IMAGE
        ids, is_answer = conversation.encode(tokenizer)
        samples.append((0, *astuple(image), count, len(ids), int(is_answer.sum()) + 1))  # EOS too
        tokens.append(np.array(ids, np.int64))
        answers.append(is_answer)
        is_held.append(is_held_out(conversation.image or key, held_out))
        count += len(ids)
    write_part(
        part, tokenizer,
        samples=np.array(samples, CONVERSATION), captions=np.concatenate(tokens), answers=np.concatenate(answers),
        is_held_out=is_held, inputs=len(usable) + len(quarantine), quarantine=quarantine,
    )  # fmt: skip
    return _result(shard, part)


def _usable(
    items: Items, root: Path, follow_links: bool
) -> tuple[list[tuple[str, Conversation]], dict[str, bytes], Quarantine]:
    """Sort records into conversations that can be trained on, with their images, and entries of the quarantine.

    Args:
        items: the conversations, as their file has them.
        root: folder that the paths of images are relative to.
        follow_links: whether links in that folder may lead out of it.

    Returns:
        Those that can be used, each behind its key; the files of their images, by their normalised paths from `root`;
        and what is left out.
    """
    usable: list[tuple[str, Conversation]] = []
    contents: dict[str, bytes] = {}
    quarantine: Quarantine = []
    for number, item in enumerate(items.read(), items.first):
        known = item.content.get("id") if isinstance(item.content, dict) else None
        key = printable(str(number if known is None else known)[:_MOST_KEY])
        try:
            conversation = parse(item.checked())
            if conversation.image is not None:
                path = inside(root, conversation.image, follow_links=follow_links)
                conversation = replace(conversation, image=path)
                if path not in contents:
                    contents[path] = _content(root / path)
        except DataError as error:
            entry = {"shard": str(items.source), "key": key, "place": item.place, "reason": one_line(str(error))}
            quarantine.append(entry)
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
    content, fault = file_content(path)
    if fault:
        raise DataError(f"image cannot be read: {path} ({fault})")
    image_of(0, bytes(BLOCK) + content)
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
    return [image_of(member.offset, member.block) for member in members(str(shard), _refuse)]


def _refuse(key: str | None, reason: str) -> None:
    raise DataError(f"{key}: {reason}; the disk does not keep what is written to it")
