"""Make an index of image-text pairs from WebDataset tars, as img2dataset writes them; and tars from a folder."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sphinx.data.files import is_url, renamed, state_of
from megatron_sphinx.data.index import SAMPLE
from megatron_sphinx.data.pairs import split_name
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import files_in
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
from megatron_sphinx.prepare.workers import Report, in_parallel, is_held_out

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
CAPTION_ENDINGS = ("txt", "caption")
MOST_CAPTION_BYTES = 8192  # a longer one is no caption of a picture


def write_shards(
    folder: Path, target: Path, samples_per_shard: int = 1000, *, workers: int = 1, follow_links: bool = False
) -> list[Path]:
    """Pack a folder of images with captions (`x.png` and `x.txt`) into WebDataset shards.

    A shard that already holds just these files is left as it is.

    Args:
        folder: of the images; those of folders in it too.
        target: folder of the shards.
        samples_per_shard: images that share a shard.
        workers: processes at a time.
        follow_links: whether links in the folder may lead out of it.

    Raises:
        DataError: no image in the folder has a caption; or a link leads out of it, and links are not followed.
    """
    files = files_in(folder, (*IMAGE_ENDINGS, "txt"), follow_links=follow_links)
    captioned = [path for path in files if path.suffix.lower() != ".txt" and path.with_suffix(".txt").is_file()]
    if not captioned:
        raise DataError(f"{folder}: holds no image with a caption beside it; give x.png and x.txt, and so on")
    target.mkdir(parents=True, exist_ok=True)
    firsts = range(0, len(captioned), samples_per_shard)

    def pack(first: int) -> Path:
        return _write_shard(target, captioned[first : first + samples_per_shard], first, first // samples_per_shard)

    return list(in_parallel(pack, firsts, workers=workers, unit_name="shard"))


def _write_shard(target: Path, images: Sequence[Path], first: int, number: int) -> Path:
    """Write a shard of images and captions whose keys count from `first`; return its path."""
    from webdataset import TarWriter

    shard, samples = target / f"{number:06d}.tar", []
    for name, image in enumerate(images, first):
        kind = image.suffix.lower().removeprefix(".")
        content = {kind: image.read_bytes(), "txt": image.with_suffix(".txt").read_bytes()}
        samples.append({"__key__": f"{name:09d}", **content})
    content_of = {
        f"{sample['__key__']}.{kind}": sample[kind] for sample in samples for kind in sample if kind[0] != "_"
    }
    if shard.is_file():
        try:
            with tarfile.open(shard, "r:") as tar:
                if {member.name: tar.extractfile(member).read() for member in tar} == content_of:  # type: ignore[union-attr]
                    return shard
        except tarfile.TarError:
            pass
    newest = max(path.stat().st_mtime for image in images for path in (image, image.with_suffix(".txt")))
    with renamed(shard) as partial_shard, TarWriter(str(partial_shard), encoder=False, mtime=newest) as tar:
        for sample in samples:
            tar.write(sample)
    return shard


def index_shards(
    shards: Sequence[str | Path],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    caption_key: str | None = None,
    held_out: float = 0.0,
    workers: int = 1,
    show: bool = False,
) -> Report:
    """Write the index of WebDataset or img2dataset shards, which stay where they are.

    Images are opened, not decoded. What cannot be used is left out, and listed in `quarantine.jsonl`. What is done is
    kept in `.parts` until the index is whole: killed, this goes on where it was.

    Args:
        shards: paths, or URLs that fsspec knows.
        folder: of the index.
        tokenizer: of the model that will be trained.
        caption_key: the captions are under this key of the .json; else they are the .txt, or `caption` of the .json.
        held_out: share of the pairs whose index goes to `folder / "held_out"` instead, chosen by their keys.
        workers: processes at a time.
        show: whether to show progress.

    Raises:
        DataError: a shard is missing, or there is no pair in any of them.
    """
    paths = [str(shard) if is_url(str(shard)) else os.path.abspath(shard) for shard in shards]
    settings = (caption_key, held_out, tokenizer.identity)
    work = partial(_index_shard, parts=folder / PARTS, tokenizer=tokenizer, settings=settings)
    return write_index(
        work, paths, folder, tokenizer,
        sample_kind="pairs", held_out=held_out, workers=workers, unit_name="shard", show=show,
        empty_error=f"{', '.join(paths[:3])}: no image has a caption (.txt, or caption in .json)",
    )  # fmt: skip


def _index_shard(path: str, *, parts: Path, tokenizer: Tokenizer, settings: tuple[Any, ...]) -> UnitResult:
    """Index one shard to a file of its own, if that is not there yet.

    Args:
        path: of the shard, or its URL.
        parts: folder of the file.
        tokenizer: of the model that will be trained.
        settings: key of the captions, held-out share, and the tokenizer's identity; what is made depends on them.
    """
    try:
        size, version = state_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    name = hashlib.sha256(repr((path, size, version, settings)).encode()).hexdigest()[:24]
    part = parts / f"{name}.npz"
    if part.is_file():
        return UnitResult(path, size, part)
    caption_key, held_out, _ = settings
    quarantine: Quarantine = []
    samples, tokens, is_held = [], [np.zeros(0, np.int64)], []
    count = 0
    for key, image, caption in _pairs_of(path, caption_key, quarantine):
        ids = tokenizer.encode(caption)
        samples.append((0, image.offset, image.bytes, image.header, image.width, image.height, count, len(ids)))
        tokens.append(np.array(ids, np.int64))
        is_held.append(is_held_out(key, held_out))
        count += len(ids)
    write_part(
        part, tokenizer,
        samples=np.array(samples, SAMPLE), captions=np.concatenate(tokens), is_held_out=is_held, quarantine=quarantine,
    )  # fmt: skip
    return UnitResult(path, size, part)


def _pairs_of(path: str, caption_key: str | None, quarantine: Quarantine) -> Iterator[tuple[str, ShardImage, str]]:
    """Yield key, image and caption of each pair of a shard, in the order of its images.

    Args:
        path: of the shard, or its URL; its members may be in any order.
        caption_key: of captions in the .json files.
        quarantine: gets an entry for what is left out.
    """
    images: dict[str, ShardImage] = {}
    captions: dict[str, str] = {}
    bad: set[str] = set()  # keys that have a reason already

    def leave_out(key: str | None, reason: str) -> None:
        quarantine.append({"shard": path, "key": key, "reason": " ".join(reason.split())})

    for name, offset, block in members(path, leave_out):
        key, ending = split_name(name)
        if ending in IMAGE_ENDINGS and key in images:
            leave_out(key, f"duplicate key: {name} comes after another image of that name")
            continue
        try:
            if ending in IMAGE_ENDINGS:
                images[key] = image_of(offset, block)
            elif (caption := _caption(ending, block, caption_key)) and (ending != "json" or key not in captions):
                captions[key] = caption
        except DataError as error:
            leave_out(key, str(error))
            bad.add(key)
    for key, image in images.items():
        if captions.get(key) and key not in bad:
            yield key, image, captions[key]
    for key in sorted((images.keys() ^ captions.keys()) - bad):
        leave_out(key, "no caption" if key in images else "no image")


def _caption(ending: str, block: bytes, caption_key: str | None) -> str:
    """Return the caption that a member of a tar holds; empty where it holds none.

    Args:
        ending: of the member's name.
        block: its header and content.
        caption_key: of captions in the .json files; None where they may be in .txt files.

    Raises:
        DataError: there is a caption that cannot be used.
    """
    content = block[tarfile.BLOCKSIZE :]
    caption: object = None
    if ending == "json":
        with suppress(ValueError, AttributeError):
            caption = json.loads(content).get(caption_key or "caption")
    elif ending in CAPTION_ENDINGS and caption_key is None:
        try:
            caption = content.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"caption is not UTF-8: {error.reason} at byte {error.start}") from error
    if not isinstance(caption, str):
        return ""
    if "\0" in caption:
        raise DataError("caption with a NUL character")
    if len(content) > MOST_CAPTION_BYTES and len(caption.encode(errors="replace")) > MOST_CAPTION_BYTES:
        raise DataError(f"caption too long: more than {MOST_CAPTION_BYTES} bytes")
    return caption.strip()
