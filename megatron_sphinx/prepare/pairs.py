"""Make an index of image-text pairs from WebDataset tars, as img2dataset writes them; and tars from a folder."""

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data import images
from megatron_sphinx.data.files import is_url, renamed, state_of
from megatron_sphinx.data.index import SAMPLE
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import files_in, inside, printable
from megatron_sphinx.prepare.index import PARTS, Quarantine, UnitResult, write_index, write_part
from megatron_sphinx.prepare.samples import CAPTION_ENDINGS, Draft, read_shard
from megatron_sphinx.prepare.shards import BLOCK, file_content
from megatron_sphinx.prepare.workers import Report, in_parallel, is_held_out, one_line

_TAR = re.compile(r"\.(tar|tar\.\w+|tgz)$", re.IGNORECASE)
_OWNER = "bigdata"  # of the files in a shard, as webdataset's writer has it
_RECORDS = 2  # version of what is kept of a shard while an index is made


def write_shards(
    folder: Path,
    target: Path,
    samples_per_shard: int = 1000,
    *,
    caption_key: str | None = None,
    workers: int = 1,
    follow_links: bool = False,
    left_out: Quarantine | None = None,
) -> list[Path]:
    """Pack a folder of images with captions (`x.png` and `x.txt`) into WebDataset shards.

    Names are read as those in tars are, but for dots: `a.b.png` and `a.b.txt` are a pair. A shard that already holds
    just these files is left as it is.

    Args:
        folder: of the images; those of folders in it too.
        target: folder of the shards, in that of the index; what is in these belongs to no pair.
        samples_per_shard: images that share a shard.
        caption_key: of captions in .json files; None where they may be in other files, or are `caption` there.
        workers: processes at a time.
        follow_links: whether links in the folder may lead out of it.
        left_out: gets an entry of the quarantine for each file, or files of one name, that cannot be used.

    Raises:
        DataError: no image in the folder has a caption; or a link leads out of it, and links are not followed.
    """
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard={samples_per_shard}: must be 1 or more; give some hundreds")
    names = _names_in(folder, target, follow_links)
    units = _units(names, samples_per_shard)
    if not units:
        raise DataError(f"{folder}: holds no image with a caption beside it; give x.png and x.txt, and so on")
    target.mkdir(parents=True, exist_ok=True)

    def pack(unit: _Unit) -> tuple[Path | None, Quarantine]:
        return _write_shard(folder, target, unit, caption_key)

    shards = []
    for shard, lines in in_parallel(pack, units, workers=workers, unit_name="shard"):
        shards += [shard] if shard else []
        if left_out is not None:
            left_out += lines
    if not shards:
        report = Report()
        report.reject(left_out or [])
        raise DataError(f"{folder}: holds no image with a caption that can be used{report.why()}")
    return shards


def shards_in(folder: Path, target: Path, left_out: Quarantine, *, follow_links: bool = False) -> list[Path]:
    """Return the tars in a folder, and in folders in it; none where it is a folder of images.

    Args:
        folder: of the tars.
        target: folder whose files are not looked at.
        left_out: gets an entry of the quarantine for what is there beside tars, but for img2dataset's own tables.
        follow_links: whether links in the folder may lead out of it.

    Raises:
        DataError: a link leads out of the folder, and links are not followed.
    """
    own = target.absolute()
    files = files_in(folder, None, follow_links=follow_links)
    files = [path for path in files if not path.absolute().is_relative_to(own)]
    tars = [path for path in files if _TAR.search(path.name)]
    stems = {path.parent / _TAR.sub("", path.name) for path in tars}
    for tar in tars:
        inside(folder, str(tar.relative_to(folder)), follow_links=follow_links)
    for path in files if tars else ():
        is_table = any(path.parent / path.name.removesuffix(end) in stems for end in (".parquet", "_stats.json"))
        if not is_table and path not in tars:
            reason = "beside tars: a folder of tars holds tars alone; give what else there is as another SOURCE"
            name = printable(str(path.relative_to(folder)))
            left_out.append({"shard": str(folder), "key": name, "reason": reason})
    return tars


def _names_in(folder: Path, target: Path, follow_links: bool) -> dict[str, list[Path]]:
    """Return the files of a folder by their paths in it, without endings; none of an index in it."""
    names: dict[str, list[Path]] = {}
    own = target.parent if folder.absolute() in target.parent.absolute().parents else target
    taken = set(files_in(folder, (*images.ENDINGS, *CAPTION_ENDINGS), follow_links=follow_links))
    for path in sorted(taken.union(files_in(folder, None, follow_links=follow_links))):
        if not path.absolute().is_relative_to(own.absolute()):
            names.setdefault(str(path.relative_to(folder).with_suffix("")), []).append(path)
    return names


@dataclass(frozen=True)
class _Unit:
    """Neighbouring files of a folder, of which the images with captions share a shard.

    Attributes:
        number: of the shard.
        first: number of its first image with a caption.
        names: files by their paths in the folder, without endings.
    """

    number: int
    first: int
    names: dict[str, list[Path]]


def _units(names: dict[str, list[Path]], size: int) -> list[_Unit]:
    """Divide files into units of `size` images that have a caption; none where no image has one."""
    units: list[_Unit] = []
    count = 0
    for name, paths in names.items():
        if not units or (_is_captioned(paths) and count and count % size == 0):
            units.append(_Unit(len(units), count, {}))
        units[-1].names[name] = paths
        count += _is_captioned(paths)
    return units if count else []


def _is_captioned(paths: Sequence[Path]) -> bool:
    endings = {_ending(path) for path in paths}
    return not endings.isdisjoint(images.ENDINGS) and not endings.isdisjoint(CAPTION_ENDINGS)


def _ending(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _write_shard(folder: Path, target: Path, unit: _Unit, caption_key: str | None) -> tuple[Path | None, Quarantine]:
    """Write a shard of images and captions; return its path, or None where there are none, and what is left out."""
    place, newest = unit.first - 1, 0.0
    samples: list[dict[str, Any]] = []
    left_out: Quarantine = []
    for name, paths in unit.names.items():
        place += _is_captioned(paths)
        draft, contents = Draft(printable(name), caption_key), {}
        for path in paths:
            ending = _ending(path)
            content, fault = file_content(path) if ending in (*images.ENDINGS, *CAPTION_ENDINGS) else (b"", "")
            if draft.add(path.name, ending, 0, bytes(BLOCK) + content, fault):
                contents[ending] = content
        for sample in draft.samples():
            if sample.fault:
                left_out.append({"shard": str(folder), "key": sample.key, "reason": one_line(sample.fault)})
            else:
                samples.append({"__key__": f"{place:09d}", **contents})
                newest = max(newest, *(path.stat().st_mtime for path in paths))
    if not samples:
        return None, left_out
    shard = target / f"{unit.number:06d}.tar"
    if not _holds(shard, samples):
        with renamed(shard) as partial_shard, tarfile.open(partial_shard, "w") as tar:
            for files in samples:
                for name, content in _files_of(files).items():
                    member = tarfile.TarInfo(name)
                    member.size, member.mtime, member.mode = len(content), newest, 0o444
                    member.uname = member.gname = _OWNER
                    tar.addfile(member, io.BytesIO(content))
    return shard, left_out


def _files_of(sample: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of a sample by their names, in the order in which a shard has them."""
    return {f"{sample['__key__']}.{ending}": sample[ending] for ending in sorted(sample) if ending != "__key__"}


def _holds(shard: Path, samples: Sequence[dict[str, Any]]) -> bool:
    """Say whether a shard is there already and holds just these samples."""
    if not shard.is_file():
        return False
    wanted = {name: content for sample in samples for name, content in _files_of(sample).items()}
    with suppress(tarfile.TarError), tarfile.open(shard, "r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar} == wanted  # type: ignore[union-attr]
    return False


def index_shards(
    shards: Sequence[str | Path],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    caption_key: str | None = None,
    held_out: float = 0.0,
    workers: int = 1,
    show: bool = False,
    left_out: Iterable[dict[str, Any]] = (),
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
        left_out: entries of the quarantine for what is in no shard.

    Raises:
        DataError: a shard is missing, or there is no pair in any of them; or the folder cannot be written.
    """
    paths = [str(shard) if is_url(str(shard)) else os.path.abspath(shard) for shard in shards]
    settings = (caption_key, held_out, tokenizer.identity)
    work = partial(_index_shard, parts=folder / PARTS, tokenizer=tokenizer, settings=settings)
    return write_index(
        work, paths, folder, tokenizer,
        sample_kind="pairs", held_out=held_out, workers=workers, unit_name="shard", show=show,
        empty_error=f"{', '.join(paths[:3])}: no image has a caption (.txt, or caption in .json)",
        left_out=left_out,
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
    name = hashlib.sha256(repr((_RECORDS, path, size, version, settings)).encode()).hexdigest()[:24]
    part = parts / f"{name}.npz"
    if part.is_file():
        return UnitResult(path, size, part)
    caption_key, held_out, _ = settings
    quarantine: Quarantine = []
    samples, is_held = [], []
    tokens: list[NDArray[np.integer]] = [np.zeros(0, np.int64)]
    count = 0
    found = list(read_shard(path, caption_key))
    encoded = tokenizer.encode_batch([sample.caption for sample in found])  # of one with a fault it is empty
    for sample, ids in zip(found, encoded, strict=True):
        key, image, fault = sample.key, sample.image, sample.fault
        if key is None or image is None or not len(ids):
            reason = one_line(fault or "no caption: no token comes of it")
            quarantine.append({"shard": path, "key": None if key is None else printable(key), "reason": reason})
            continue
        shape = image.width, image.height, image.orientation
        samples.append((0, image.offset, image.bytes, image.header, *shape, count, len(ids)))
        tokens.append(ids)
        is_held.append(is_held_out(key, held_out))
        count += len(ids)
    write_part(
        part, tokenizer,
        samples=np.array(samples, SAMPLE), captions=np.concatenate(tokens), is_held_out=is_held, inputs=len(found),
        quarantine=quarantine,
    )  # fmt: skip
    return UnitResult(path, size, part)
