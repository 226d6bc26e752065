"""Write an index of samples (`data/index.py` says what is in one): unit by unit in parallel, joined at the end."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data.content import Gauge
from megatron_sphinx.data.files import is_url, remove_partial, renamed
from megatron_sphinx.data.index import UPRIGHT, Shard
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.workers import Report, check_share, in_parallel, target_folder, write_json

PARTS = ".parts"  # what is done of an index is kept in this folder of it

Unit = TypeVar("Unit")
Quarantine = list[dict[str, Any]]


@dataclass(frozen=True)
class UnitResult:
    """What was made of a unit of the work.

    Attributes:
        shard: path or URL of the shard that its images are in.
        bytes: size of that shard; 0 where there is none.
        file: its samples, in the form that `write_part` writes.
    """

    shard: str
    bytes: int
    file: Path


def write_index(
    work: Callable[[Unit], UnitResult],
    units: Sequence[Unit],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    sample_kind: str,
    held_out: float,
    workers: int,
    unit_name: str,
    show: bool,
    empty_error: str,
    left_out: Iterable[dict[str, Any]] = (),
) -> Report:
    """Write an index from units that are worked on in parallel; killed, the same call goes on where it was.

    Args:
        work: makes the result of a unit in `folder / PARTS`, or finds it there.
        units: what there is to do.
        folder: of the index.
        tokenizer: of the model that will be trained.
        sample_kind: what the index has: pairs or conversations.
        held_out: share of the samples whose index goes to `folder / "held_out"` instead.
        workers: processes at a time.
        unit_name: what a unit is called beside the progress bar.
        show: whether there is a progress bar.
        empty_error: the message of the error where there is no sample.
        left_out: entries of the quarantine for what is in no unit.

    Raises:
        DataError: there is no sample, the folder cannot be written, another process writes it, or `work` raises it.
    """
    check_share("held_out", held_out)
    with target_folder(folder):
        parts = folder / PARTS
        parts.mkdir(exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
        for written in (folder, parts):
            remove_partial(written)
        results = list(in_parallel(work, units, workers=workers, unit_name=unit_name, show=show))
        quarantine = [*left_out]
        report = Report(inputs=len(quarantine))
        for result in results:
            lines, inputs = _left_out(result.file)
            quarantine += lines
            report.inputs += inputs
        report.reject(quarantine)
        with _whole(folder / "quarantine.jsonl") as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in quarantine)
        report.taken, report.tokens = _join(results, folder, tokenizer, sample_kind, held_out=False)
        if not report.taken:
            raise DataError(empty_error + report.why())
        (folder / "held_out" / "index.json").unlink(missing_ok=True)
        if held_out:
            report.held_out, _ = _join(results, folder / "held_out", tokenizer, sample_kind, held_out=True)
        shutil.rmtree(parts)
    return report


def write_part(
    file: Path,
    tokenizer: Tokenizer,
    *,
    samples: NDArray[Any],
    captions: NDArray[np.int64],
    is_held_out: Sequence[bool],
    inputs: int,
    quarantine: Quarantine,
    answers: NDArray[np.bool_] | None = None,
) -> None:
    """Write the samples of a unit to a file.

    Args:
        file: .npz file.
        tokenizer: of the model that will be trained.
        samples: a SAMPLE or CONVERSATION for each sample; its `caption` counts from the unit's first token.
        captions: token ids of all samples, one behind the other.
        is_held_out: for each sample.
        inputs: how many samples came in, good and bad.
        quarantine: what was left out.
        answers: for each token whether it belongs to an answer; None of pairs.
    """
    arrays = {
        "samples": samples,
        "captions": captions.astype(tokenizer.identity.token_type),
        "is_held_out": np.array(is_held_out, np.bool_),
        "inputs": np.array(inputs, np.int64),
        "quarantine": np.frombuffer(json.dumps(quarantine).encode(), np.uint8),
    }
    if answers is not None:
        arrays["answers"] = answers
    with _whole(file) as whole:
        np.savez(whole, **arrays)  # type: ignore[arg-type]


def _left_out(file: Path) -> tuple[Quarantine, int]:
    """Return what was left out of a unit, and how many samples came in."""
    with np.load(file) as arrays:
        lines: Quarantine = json.loads(arrays["quarantine"].tobytes())
        return lines, int(arrays["inputs"])


def _join(
    results: Sequence[UnitResult], folder: Path, tokenizer: Tokenizer, sample_kind: str, *, held_out: bool
) -> tuple[int, int]:
    """Join the results of all units to one index, and return how many samples and tokens it has."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    gauge = Gauge()
    count = tokens = 0
    with ExitStack() as stack:
        names = ["captions.bin", "samples.bin"] + ["answers.bin"] * (sample_kind == "conversations")
        files = {name: stack.enter_context(_whole(folder / name)) for name in names}
        for number, result in enumerate(results):
            samples, captions, *answers = _chosen(result.file, held_out)
            samples["shard"] = number
            samples["caption"] += tokens
            for (name, file), array in zip(files.items(), (captions, samples, *answers), strict=True):
                array.tofile(file)
                gauge.add(name, array, are_tokens=name == "captions.bin")
            relative = result.shard if is_url(result.shard) else os.path.relpath(result.shard, folder)
            shards.append(Shard(relative, result.bytes, len(samples)))
            count, tokens = count + len(samples), tokens + len(captions)
    content = {
        "format": 1,
        "of": sample_kind,
        "sizes": UPRIGHT,
        "tokenizer": asdict(tokenizer.identity),
        "caption_type": tokenizer.identity.token_type.str,
        "shards": [asdict(shard) for shard in shards],
        "content": asdict(gauge.content()),
    }
    if count:
        write_json(folder / "index.json", content)
    return count, tokens


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write, which gets its name when it is whole and on the disk."""
    with renamed(path) as unfinished, unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _chosen(file: Path, held_out: bool) -> list[NDArray[Any]]:
    """Return the samples of a unit that are held out, or those that are not, then the arrays with an item a token."""
    with np.load(file) as arrays:
        samples, chosen = arrays["samples"], arrays["is_held_out"] == held_out
        kept = np.repeat(chosen, samples["tokens"])
        token_arrays = [arrays[name][kept] for name in ("captions", "answers") if name in arrays]
    samples = samples[chosen]
    samples["caption"] = np.cumsum(samples["tokens"], dtype=np.uint64) - samples["tokens"]
    return [samples, *token_arrays]
