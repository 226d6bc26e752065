"""Write an index of samples, see `pairs.py`: unit by unit in parallel, joined when all are there."""

import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from numpy.typing import NDArray

from megatron_sphinx.data import images
from megatron_sphinx.data.content import Gauge
from megatron_sphinx.data.files import is_url, open_file, remove_partial, renamed
from megatron_sphinx.data.pairs import Shard, split_name
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.workers import Report, in_parallel, write_json

PARTS = ".parts"  # what is done of an index is kept in this folder of it

Unit = TypeVar("Unit")
Quarantine = list[dict[str, Any]]


@dataclass(frozen=True)
class Image:
    """An image as it lies in a shard."""

    offset: int
    bytes: int
    header: int
    width: int
    height: int


@dataclass(frozen=True)
class Part:
    """What was made of a unit.

    Attributes:
        shard: path or URL of the shard that its images are in.
        bytes: of that; 0 where there is none.
        file: its samples, as `write_part` writes them.
    """

    shard: str
    bytes: int
    file: Path


def write_index(
    work: Callable[[Unit], Part],
    units: Sequence[Unit],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    of: str,
    held_out: float,
    workers: int,
    what: str,
    show: bool,
    nothing: str,
) -> Report:
    """Write an index from units that are worked on in parallel; killed, the same call goes on where it was.

    Args:
        work: makes the part of a unit in `folder / PARTS`, or finds it there.
        units: what there is to do.
        folder: of the index.
        tokenizer: of the model that will be trained.
        of: what the index is of: pairs or conversations.
        held_out: share of the samples whose index goes to `folder / "held_out"` instead.
        workers: processes at a time.
        what: the units' name beside the progress bar.
        show: whether there is one.
        nothing: the error where there is no sample.

    Raises:
        DataError: there is no sample, or `work` raises it.
    """
    parts = folder / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").unlink(missing_ok=True)
    for used in (folder, parts):
        remove_partial(used)
    done = list(in_parallel(work, units, workers=workers, what=what, show=show))
    report = Report()
    for part in done:
        report.reject(_quarantine(part.file))
    report.taken, report.tokens = _join(done, folder, tokenizer, of, held_out=False)
    if not report.taken:
        raise DataError(nothing + report.why())
    (folder / "held_out" / "index.json").unlink(missing_ok=True)
    if held_out:
        report.held_out, _ = _join(done, folder / "held_out", tokenizer, of, held_out=True)
    shutil.rmtree(parts)
    return report


def write_part(
    file: Path,
    tokenizer: Tokenizer,
    *,
    samples: NDArray[Any],
    captions: NDArray[np.int64],
    is_held_out: Sequence[bool],
    quarantine: Quarantine,
    answers: NDArray[np.bool_] | None = None,
) -> None:
    """Write the samples of a unit; `caption` of each counts from the unit's first token."""
    arrays = {
        "samples": samples,
        "captions": captions.astype(_token_type(tokenizer)),
        "is_held_out": np.array(is_held_out, np.bool_),
        "quarantine": np.frombuffer(json.dumps(quarantine).encode(), np.uint8),
    }
    if answers is not None:
        arrays["answers"] = answers
    with _whole(file) as whole:
        np.savez(whole, **arrays)  # type: ignore[arg-type]


def _token_type(tokenizer: Tokenizer) -> np.dtype[Any]:
    kind: np.dtype[Any] = np.dtype(DType.optimal_dtype(tokenizer.identity.vocabulary))
    return kind


def _quarantine(file: Path) -> Quarantine:
    with np.load(file) as arrays:
        lines: Quarantine = json.loads(arrays["quarantine"].tobytes())
    return lines


def _join(done: Sequence[Part], folder: Path, tokenizer: Tokenizer, of: str, *, held_out: bool) -> tuple[int, int]:
    """Join the parts of all units to one index; how many samples and tokens it has."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    gauge = Gauge()
    count = tokens = 0
    with ExitStack() as stack:
        names = ["captions.bin", "samples.bin"] + ["answers.bin"] * (of == "conversations")
        files = {name: stack.enter_context(_whole(folder / name)) for name in names}
        quarantine = stack.enter_context(_whole(folder / "quarantine.jsonl"))
        for number, part in enumerate(done):
            samples, captions, *answers = _chosen(part.file, held_out)
            samples["shard"] = number
            samples["caption"] += tokens
            for (name, file), array in zip(files.items(), (captions, samples, *answers), strict=True):
                array.tofile(file)
                gauge.add(name, array, are_tokens=name == "captions.bin")
            relative = part.shard if is_url(part.shard) else os.path.relpath(part.shard, folder)
            shards.append(Shard(relative, part.bytes, len(samples)))
            count, tokens = count + len(samples), tokens + len(captions)
            if not held_out:
                quarantine.writelines(json.dumps(line).encode() + b"\n" for line in _quarantine(part.file))
    content = {
        "of": of,
        "tokenizer": asdict(tokenizer.identity),
        "caption_type": _token_type(tokenizer).str,
        "shards": [asdict(shard) for shard in shards],
        "content": asdict(gauge.content()),
    }
    if count:
        write_json(folder / "index.json", content)
    return count, tokens


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that has its name when it is whole, and on the disk."""
    with renamed(path) as unfinished, unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _chosen(file: Path, held_out: bool) -> list[NDArray[Any]]:
    """Samples of a unit, those that are held out or the others, and what there is for each of their tokens."""
    with np.load(file) as arrays:
        samples, chosen = arrays["samples"], arrays["is_held_out"] == held_out
        kept = np.repeat(chosen, samples["tokens"])
        of_tokens = [arrays[name][kept] for name in ("captions", "answers") if name in arrays]
    samples = samples[chosen]
    samples["caption"] = np.cumsum(samples["tokens"], dtype=np.uint64) - samples["tokens"]
    return [samples, *of_tokens]


def members(path: str, leave_out: Callable[[str | None, str], None]) -> Iterator[tuple[str, int, bytes]]:
    """Name, offset of the content, and header and content of each regular file of a tar, as far as it can be read.

    What cannot is told to `leave_out`, as key and reason.
    """
    name = None
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = member.name
                if member.isreg():
                    file.seek(member.offset_data - tarfile.BLOCKSIZE)
                    block = file.read(tarfile.BLOCKSIZE + member.size)
                    if len(block) != tarfile.BLOCKSIZE + member.size:
                        raise tarfile.ReadError(f"it ends inside {name}")
                    yield member.name, member.offset_data, block
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it lacks the mark of its end")
    except OSError as error:  # of a network perhaps: nothing is known of the shard
        raise DataError(f"{path}: cannot be read ({error}); run this again: what is done is kept") from error
    except (tarfile.TarError, EOFError) as error:
        what = "not a tar file" if name is None else "the shard is cut short"
        leave_out(split_name(name)[0] if name else None, f"{what}: {error}")


def image_of(offset: int, block: bytes) -> Image:
    """What an index knows of an image; it is opened, not decoded.

    Args:
        offset: of the content in the shard.
        block: header and content.

    Raises:
        DataError: it is none that can be used.
    """
    content = block[tarfile.BLOCKSIZE :]
    width, height = images.size_of(content)
    images.check_size(width, height)
    return Image(offset, len(content), zlib.crc32(block[: tarfile.BLOCKSIZE]), width, height)
