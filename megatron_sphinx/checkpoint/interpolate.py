"""Weights between checkpoints, tensor by tensor: what a model learned of real and of synthetic captions in one.

Any format, the same out, its files as those of the first checkpoint. The bytes of a tensor pass through buffers that
stay in the processor's cache; several threads do that, each with a tensor of its own, while others hash the inputs.

Source: SPHINX, arXiv:2311.07575, equation 1.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_sphinx.checkpoint.convert import (
    ENCODERS,
    open_checkpoint,
    progress_bar,
    write_json,
)
from megatron_sphinx.checkpoint.digests import THREADS, Digests, sha256_of
from megatron_sphinx.checkpoint.formats.base import Opened
from megatron_sphinx.checkpoint.formats.huggingface import SPHINX
from megatron_sphinx.checkpoint.identity import differences, in_order
from megatron_sphinx.checkpoint.journal import Journal
from megatron_sphinx.checkpoint.manifest import MANIFEST, write_manifest
from megatron_sphinx.checkpoint.pieces import reason_of
from megatron_sphinx.checkpoint.stream import Entry, Maps, contiguous, create, read_safetensors, read_torch
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.unpickling import write_metadata

PROVENANCE = "interpolation"  # the key in a manifest of ours, and the name of a file elsewhere
_VISION = {rule.weights[0] for rule in SPHINX}
_COMPANIONS = (".json", ".jinja", ".md", ".model", ".py", ".txt")  # kinds of files beside the tensors that are copied
_BLOCK = 2**17  # elements that are mixed at a time: five fp32 buffers of them fit a cache of the second level

Scope = Literal["all", "language"]


@dataclass(frozen=True)
class Interpolated:
    """What has been made, in each target.

    Attributes:
        mixed: tensors of several checkpoints.
        copied: tensors of one, to the bit.
        parameters: in all of them.
    """

    mixed: int
    copied: int
    parameters: int


@dataclass(frozen=True)
class _Job:
    """A tensor to be made.

    Attributes:
        file: its file in every target.
        name: its key there.
        entries: it in each input; in the first one alone if it is copied from there.
    """

    file: str
    name: str
    entries: tuple[Entry, ...]


def shares_of(beta: float) -> tuple[float, float]:
    """The shares of two checkpoints.

    Raises:
        CheckpointError: beta is out of range.
    """
    if not 0 <= beta <= 1:
        raise CheckpointError(f"beta={beta}: is not from 0 to 1; give the share of REAL")
    return beta, 1 - beta


def sweep(target: Path, betas: Iterable[float]) -> dict[Path, tuple[float, float]]:
    """Folders in `target` for mixes of two checkpoints, with the shares of each."""
    return {target / f"beta_{beta:g}": shares_of(beta) for beta in betas}


def interpolate(
    inputs: Sequence[Path],
    targets: Mapping[Path, Sequence[float]],
    *,
    scope: Scope = "all",
    shape: LanguageConfig | None = None,
    digests: Digests | None = None,
    show: bool = False,
) -> Interpolated:
    """Write sums of the weights of checkpoints, each times its share: computed in fp32, rounded once.

    The inputs are read once for all targets. A run that was stopped goes on where it was, file by file. What a target
    says of itself it takes from the first input; it holds no optimizer state.

    Memory: buffers; of tensors that lie in several pieces, one of each input at a time.

    Args:
        inputs: checkpoints of one model in one format; of a run folder, its newest one.
        targets: folders to make, each with the inputs' shares, which sum to 1; one of share 1 is copied to the bit.
        scope: mix every tensor, or those of the language model only and take the others from the first input.
        shape: of the model, for the one format that does not tell it, torch_dist.
        digests: of the inputs' files, if they have been begun with.
        show: whether there is a progress bar.

    Raises:
        CheckpointError: shares are none, a target exists or cannot be written; an input is incomplete, damaged, or of
            another model, other encoders or another tokenizer than the first.

    Source: SPHINX, arXiv:2311.07575, equation 1.
    """
    _check_targets(inputs, targets)
    opened = [open_checkpoint(folder, shape) for folder in inputs]
    for other in opened[1:]:
        _compare(opened[0], other)
    jobs = _jobs(opened, scope)
    partials = [target.with_name(f".{target.name}.partial") for target in targets]
    try:
        task = [scope, *([str(target), *shares] for target, shares in targets.items())]
        journal = Journal(partials, task, [entry for one in opened for entry in one.source.entries.values()])
        writer = _Writer(jobs, partials, list(targets.values()), opened[0], journal)
        with digests or Digests() as started:
            hashes = [{name: started.of(one.folder / name) for name in _files(one)} for one in opened]
            writer.run(show)
            marks = [{name: value.result() for name, value in found.items()} for found in hashes]
        for one, mark in zip(opened, marks, strict=True):
            _check_sums(one, mark)
        for partial, target in zip(partials, targets, strict=True):
            _finish(partial, opened, jobs, marks, targets[target], scope)
        journal.end()
        for partial, target in zip(partials, targets, strict=True):
            os.replace(partial, target)
    except CheckpointError:  # of a damaged input nothing is kept
        for partial in partials:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        names = ", ".join(map(str, targets))
        raise CheckpointError(
            f"{names}: could not be written ({reason_of(error)}); put that right and run it again"
        ) from error
    mixes = sum(len(job.entries) > 1 for job in jobs) if any(max(shares) < 1 for shares in targets.values()) else 0
    parameters = sum(torch.Size(job.entries[0].shape).numel() for job in jobs)
    return Interpolated(mixes, len(jobs) - mixes, parameters)


def _check_targets(inputs: Sequence[Path], targets: Mapping[Path, Sequence[float]]) -> None:
    for target, shares in targets.items():
        for folder, share in zip(inputs, shares, strict=True):
            if not 0 <= share <= 1:
                raise CheckpointError(f"{folder}={share}: is not from 0 to 1; give the share of this checkpoint")
        if abs(sum(shares) - 1) > 1e-6:
            raise CheckpointError(f"{'+'.join(map(str, shares))}: sums to {sum(shares):g}; give shares that sum to 1")
        if os.path.lexists(target):
            raise CheckpointError(f"{target}: exists; give another target, or remove it")


# what belongs together


def _compare(first: Opened, other: Opened) -> None:
    """Check that two checkpoints are of one model in one format."""
    if other.format != first.format:
        raise CheckpointError(
            f"{other.folder}: is {other.format}, {first.folder} is {first.format}; convert one of them first"
        )
    ours, theirs = (dict(one.about.get("identity", {})) for one in (first, other))
    for identity in (ours, theirs):
        if "vision" in identity:
            identity["vision"] = in_order(identity["vision"])
    for name in ("model", "vision", "tokenizer"):
        if name in ours and name in theirs and ours[name] != theirs[name]:
            where, one, another = next(differences(ours[name], theirs[name], name))
            raise CheckpointError(
                f"{other.folder}: was made with {where}={another}, {first.folder} with {one}; "
                f"give checkpoints with the same model, encoders and tokenizer"
            )
    _compare_frozen(first, other)


def _compare_frozen(first: Opened, other: Opened) -> None:
    """Check that two checkpoints have the same frozen experts."""
    found = [
        {(expert, name): entry for expert, entries in one.encoders.items() for name, entry in entries.items()}
        for one in (first, other)
    ]
    for expert, name in sorted(found[0].keys() ^ found[1].keys()):
        one, another = (first, other) if (expert, name) in found[0] else (other, first)
        raise CheckpointError(
            f"{another.folder}: holds no {name} of {expert}, {one.folder} does; give checkpoints with the same encoders"
        )
    for (expert, name), entry in found[0].items():
        values = [one.source.maps.read(found[place][expert, name]) for place, one in enumerate((first, other))]
        is_same = entry.dtype == values[1].dtype and torch.equal(*(_raw(value) for value in values))
        for one in (first, other):
            one.source.maps.release()
        if not is_same:
            raise CheckpointError(
                f"{other.folder}: {name} of {expert} is frozen, but differs from that of {first.folder}; "
                f"give checkpoints with the same encoders"
            )


def _raw(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


def _jobs(opened: Sequence[Opened], scope: Scope) -> list[_Job]:
    """The tensors to be made, file by file.

    Raises:
        CheckpointError: an input lacks one, or has one of another shape or type.
    """
    first = opened[0]
    kept = {
        (item.file, item.name) for item in first.source.stored if scope != "all" and item.rule.weights[0] in _VISION
    }
    matches = [_Matches(first, other) for other in opened[1:]]
    entries = {
        key: (entry, *(match.of(key, entry) for match in matches)) for key, entry in first.source.entries.items()
    }
    entries |= {key: entries[key][:1] for key in kept}
    if _is_distributed(first):
        return [_Job(f"__0_{number}.distcp", name, found) for number, ((_, name), found) in enumerate(entries.items())]
    jobs = []
    for file in dict.fromkeys(file for file, _ in entries):
        path = first.folder / file
        read = read_safetensors if path.suffix == ".safetensors" else read_torch
        for name, entry in read(path).items():
            found = entries.get((file, name)) or entries.get((file, f"llma.{name}"))  # how `accessory` completes names
            jobs.append(_Job(file, name, found or (entry,)))
    return jobs


class _Matches:
    """Finds the tensors of the first input in another one: by file and name, or by a name that is in one file only."""

    def __init__(self, first: Opened, other: Opened) -> None:
        self._first, self._other = first.folder, other.folder
        self._entries = other.source.entries
        ranks = [Counter(name for _, name in one.source.entries) for one in (first, other)]
        is_whole = all(max(count.values()) == 1 for count in ranks)
        self._files = {name: file for file, name in self._entries} if is_whole else {}
        for file, name in sorted(self._entries):
            if (file, name) not in first.source.entries and name not in (ranks[0] if is_whole else ()):
                self._miss(self._first, self._other, file, name)

    def of(self, key: tuple[str, str], wanted: Entry) -> Entry:
        file, name = key
        found = self._entries.get((self._files.get(name, file), name))
        if found is None:
            self._miss(self._other, self._first, file, name)
        assert found is not None
        for what, one, other in (("shape", list(wanted.shape), list(found.shape)), ("type", wanted.dtype, found.dtype)):
            if one != other:
                raise CheckpointError(
                    f"{self._other}: {name} has {what} {other}, that of {self._first} has {one}; "
                    f"give checkpoints of the same model"
                )
        return found

    @staticmethod
    def _miss(folder: Path, has: Path, file: str, name: str) -> None:
        raise CheckpointError(
            f"{folder}: holds no {name} in {file}, {has} does; give checkpoints of the same model, divided alike"
        )


def _is_distributed(opened: Opened) -> bool:
    return opened.format in ("megatron", "torch_dist")


# hashes


def _files(opened: Opened) -> list[str]:
    """The files by whose hashes a checkpoint is known."""
    if opened.format == "megatron":
        return [*opened.about["files"], MANIFEST]
    return sorted({str(c.path.relative_to(opened.folder)) for e in opened.source.entries.values() for c in e.chunks})


def _check_sums(opened: Opened, mark: Mapping[str, str]) -> None:
    for name, wanted in opened.about.get("files", {}).items() if opened.format == "megatron" else ():
        if mark[name] != wanted:
            raise CheckpointError(
                f"{opened.folder}: {name} is damaged (its checksum differs); give an earlier checkpoint"
            )


# writing


class _File:
    """A file of each target: they are made when their first tensor comes, and closed behind their last."""

    def __init__(self, paths: Sequence[Path], jobs: Sequence[_Job], under: str | None) -> None:
        self._paths, self._under, self._lock, self._left = paths, under, Lock(), len(jobs)
        self._planned = {job.name: (job.entries[0].shape, job.entries[0].dtype) for job in jobs}
        self._files: list[Any] = []

    def begin_tensor(self) -> list[Any]:
        """A tensor comes; what its bytes are appended to, of each target."""
        with self._lock:
            self._files = self._files or [create(path, self._planned, under=self._under) for path in self._paths]
            return self._files

    def end_tensor(self) -> bool:
        """A tensor is complete; whether the files are."""
        with self._lock:
            self._left -= 1
            if self._left:
                return False
            for file in self._files:
                file.close()
            return True


class _Writer:
    """Makes the tensors of all targets.

    Args:
        jobs: the tensors.
        partials: a folder for each target.
        shares: of each target, those of the inputs.
        first: the input whose files the targets have.
        journal: of the files that are finished.
    """

    def __init__(
        self,
        jobs: Sequence[_Job],
        partials: Sequence[Path],
        shares: Sequence[Sequence[float]],
        first: Opened,
        journal: Journal,
    ) -> None:
        self._jobs, self._shares, self._journal = jobs, shares, journal
        self._used = {place for one in shares for place, share in enumerate(one) if share} | {0}
        of_file: dict[str, list[_Job]] = {}
        for job in jobs:
            of_file.setdefault(job.file, []).append(job)
        under = "model" if first.format == "accessory" else None
        self._files = {file: _File([path / file for path in partials], of_file[file], under) for file in of_file}
        self._maps, self._whole = Maps(), Lock()

    def run(self, show: bool) -> None:
        """Make them, in several threads."""
        left = [job for job in self._jobs if job.file not in self._journal.done]
        size = len(self._shares) * sum(job.entries[0].nbytes for job in left)
        # a thread's operations are too small to be divided further
        pool = ThreadPoolExecutor(THREADS, "mix", torch.set_num_threads, (1,))
        try:
            with progress_bar("mixing", size, show) as bar:
                for done in as_completed([pool.submit(self._make, job) for job in left]):
                    bar.update(done.result())
        finally:
            pool.shutdown(cancel_futures=True)

    def _make(self, job: _Job) -> int:
        """Make a tensor in all targets; the bytes written."""
        files = self._files[job.file].begin_tensor()
        used = [place for place in range(len(job.entries)) if place in self._used]
        with ExitStack() as stack:
            if any(not _is_run(job.entries[place]) for place in used):
                stack.enter_context(self._whole)  # one at a time
            reads = {place: stack.enter_context(self._bytes_of(job.entries[place])) for place in used}
            mixer = _Mixer(job.entries[0].dtype, used)
            shares = [one if len(job.entries) > 1 else (1.0,) for one in self._shares]
            for at in range(0, job.entries[0].nbytes, mixer.nbytes):
                count = min(mixer.nbytes, job.entries[0].nbytes - at)
                for place, read in reads.items():
                    read(mixer.raw(place, count), at)
                for file, of_target in zip(files, shares, strict=True):
                    file.append(job.name, mixer.mix(of_target, count))
        if self._files[job.file].end_tensor():
            self._journal.note(job.file)
        return len(files) * job.entries[0].nbytes

    @contextmanager
    def _bytes_of(self, entry: Entry) -> Iterator[Any]:
        """Reads the bytes of a tensor: into a buffer, from a place on."""
        if not _is_run(entry):
            whole = memoryview(_raw(self._maps.read(entry)).numpy())  # type: ignore[arg-type]
            self._maps.release()

            def copy(out: memoryview, at: int) -> None:
                out[:] = whole[at : at + len(out)]

            yield copy
            return
        chunk = entry.chunks[0]
        file = os.open(chunk.path, os.O_RDONLY)

        def read(out: memoryview, at: int) -> None:
            if os.preadv(file, [out], chunk.start + at) != len(out):
                raise CheckpointError(f"{chunk.path}: is cut off while it is read; give a whole checkpoint")

        try:
            yield read
        finally:
            os.close(file)


def _is_run(entry: Entry) -> bool:
    """Whether a tensor is one run of bytes in its file."""
    return len(entry.chunks) == 1 and entry.chunks[0].stride == contiguous(entry.shape)


class _Mixer:
    """Buffers in which blocks of a tensor are mixed.

    Args:
        dtype: of its elements.
        used: the inputs that are read.
    """

    def __init__(self, dtype: torch.dtype, used: Sequence[int]) -> None:
        self.nbytes = _BLOCK * dtype.itemsize
        wide = torch.promote_types(dtype, torch.float32)
        self._read = {place: torch.empty(_BLOCK, dtype=dtype) for place in used}
        self._bytes = {place: memoryview(_raw(value).numpy()) for place, value in self._read.items()}  # type: ignore[arg-type]
        self._sum, self._term = torch.empty(2, _BLOCK, dtype=wide)
        self._out = torch.empty(_BLOCK, dtype=dtype)
        self._itemsize = dtype.itemsize

    def raw(self, place: int, count: int) -> memoryview:
        """Where to read so many bytes of an input to."""
        return self._bytes[place][:count]

    def mix(self, shares: Sequence[float], count: int) -> memoryview:
        """So many bytes of the sum of what was read, each input times its share; one of a single input is copied."""
        taken = [(place, share) for place, share in enumerate(shares) if share]
        if len(taken) == 1:
            return self._bytes[taken[0][0]][:count]
        size = count // self._itemsize
        total, term, out = self._sum[:size], self._term[:size], self._out[:size]
        for number, (place, share) in enumerate(taken):
            if number == 0:
                total.copy_(self._read[place][:size]).mul_(share)
            else:
                total.add_(term.copy_(self._read[place][:size]).mul_(share))
        return memoryview(_raw(out.copy_(total)).numpy())  # type: ignore[arg-type]


def _finish(
    partial: Path,
    opened: Sequence[Opened],
    jobs: Sequence[_Job],
    marks: Sequence[Mapping[str, str]],
    shares: Sequence[float],
    scope: Scope,
) -> None:
    """Write what is beside the tensors: configuration, index, tokenizer, frozen experts, and where all comes from."""
    first = opened[0]
    says = {
        "scope": scope,
        "inputs": [
            {"path": str(one.folder.resolve()), "share": share, "sha256": dict(mark)}
            for one, mark, share in zip(opened, marks, shares, strict=True)
        ],
    }
    for path in _companions(first, jobs):
        shutil.copyfile(path, partial / path.name)
    if (first.folder / ENCODERS).is_dir():
        (partial / ENCODERS).mkdir()
        for name in (f"{expert}.safetensors" for expert in first.encoders):  # and nothing else that may lie there
            shutil.copyfile(first.folder / ENCODERS / name, partial / ENCODERS / name)
    if _is_distributed(first):
        shapes = {item.name: item.shape for item in first.source.stored}
        write_metadata(partial, {job.file: (job.name, shapes[job.name], job.entries[0].dtype) for job in jobs})
    if first.format == "megatron":
        names = [".metadata", *(job.file for job in jobs)]
        with ThreadPoolExecutor(THREADS) as pool:
            sums = dict(zip(names, pool.map(sha256_of, (partial / name for name in names)), strict=True))
        write_manifest(partial, {**first.about, PROVENANCE: says, "files": sums})
    else:
        write_json(partial / f"{PROVENANCE}.json", says)


def _companions(first: Opened, jobs: Sequence[_Job]) -> Iterator[Path]:
    """Files beside the tensors; no index of files that are not there."""
    kind = Path(jobs[0].file).suffix
    for path in sorted(first.folder.iterdir()):
        is_other_index = path.name.endswith(".index.json") and Path(path.stem.removesuffix(".index")).suffix != kind
        is_own = path.name in (MANIFEST, f"{PROVENANCE}.json")
        is_wanted = path.suffix in _COMPANIONS or path.name == "common.pt"
        if path.is_file() and is_wanted and not is_own and not is_other_index:
            yield path
