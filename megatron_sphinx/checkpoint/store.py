"""Training states on disk: complete or invisible, and the same for every layout.

A checkpoint is a folder `step_<8 digits>`. Each rank writes the parts of the whole weights that it updates, through
torch.distributed.checkpoint, while the run goes on; the folder has a hidden name until every rank is done. A crash or a
full disk leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from socket import gethostname
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_sphinx.checkpoint.digests import sha256_of
from megatron_sphinx.checkpoint.identity import comparable, inherited, require_same
from megatron_sphinx.checkpoint.manifest import read_manifest, write_manifest
from megatron_sphinx.checkpoint.pieces import (
    WEIGHTS,
    CheckedReader,
    LoadPlanner,
    Piece,
    SavePlanner,
    copied,
    read_tensors,
    reason_of,
)
from megatron_sphinx.checkpoint.steps import (
    complete,
    name_of,
    newest_of,
    off_the_line,
    prune,
    publish,
    remove_remains,
    set_aside,
)
from megatron_sphinx.console import say
from megatron_sphinx.errors import CheckpointError, OtherDataError, SphinxError, writing
from megatron_sphinx.liveness.progress import Progress
from megatron_sphinx.unpickling import metadata_of, only_tensors

if TYPE_CHECKING:  # tools read checkpoints without megatron-core, whose import takes seconds
    from megatron_sphinx.parallel.groups import ProcessGroups

T = TypeVar("T")
_SEEN_SECONDS = 90.0  # a network's file system may show a new file after a minute


class Chosen(NamedTuple):
    """A checkpoint to go on from.

    Attributes:
        path: of it.
        manifest: what it says of itself.
        faults: why newer ones were passed over.
    """

    path: Path
    manifest: dict[str, Any]
    faults: list[str]


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        folder: where they are kept.
        keep: how many of the newest stay, beside the one that the run goes on from.
        identity: tells what a checkpoint must agree with to be resumed: model, encoders, tokenizer, data. It is asked
            again for each checkpoint: of data that is read in the background more is known later.
        about: what it says of itself beside that, for its reader.
        progress: where the thread that writes makes itself known.
        guard: raises where the run may not write its folder any more; asked on the first rank, before it does.

    Attributes:
        waiting_seconds: how long the run has waited for its checkpoints.
        newest: the newest one that this run has written or goes on from; None before.
    """

    def __init__(
        self,
        folder: Path,
        groups: ProcessGroups,
        *,
        keep: int,
        identity: Callable[[], dict[str, Any]],
        about: dict[str, Any],
        progress: Progress | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.groups, self.keep, self.about = folder, groups, keep, about
        self._identity = identity
        self._progress, self._guard = progress or Progress(), guard
        self.waiting_seconds = 0.0
        self.newest: Path | None = None
        self._chosen: Chosen | None = None
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._pool = ThreadPoolExecutor(1, "checkpoint", _stay_on, (gpu,))  # a thread would begin on the first GPU
        self._saving: Future[None] | None = None
        self._is_first = groups.seat.rank == 0

    @property
    def identity(self) -> dict[str, Any]:
        """What is known now of what a checkpoint must agree with."""
        return self._identity()

    # save

    def save(
        self,
        step: int,
        pieces: Iterable[Piece],
        objects: dict[str, Any],
        *,
        bad_pairs: int,
        divergence: dict[str, Any] | None = None,
    ) -> None:
        """Keep the state after `step` steps; every language rank calls this, together.

        Returns when the state is copied; it is written in the background. One save waits for the one before it.

        Args:
            step: steps done.
            pieces: what this rank updates; together the ranks' pieces must tile the whole tensors. Copies of a piece
                are written once.
            objects: what belongs to this rank alone, e.g. its random state.
            bad_pairs: of the run so far.
            divergence: what the run must remember to judge its losses.

        Raises:
            CheckpointError: the save before this one failed.
        """
        begin = time.perf_counter()
        self.finish()
        planner = SavePlanner([copied(piece) for piece in pieces], self._named(objects))
        self._saving = self._pool.submit(self._write, step, planner, {"bad_pairs": bad_pairs, "divergence": divergence})
        self.waiting_seconds += time.perf_counter() - begin

    @property
    def has_failed(self) -> bool:
        """Whether the last save has ended, and in failure; `finish` says why."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def finish(self) -> None:
        """Wait until what is being saved is complete.

        Raises:
            CheckpointError: a rank could not write, e.g. the disk is full; earlier checkpoints stay as they are.
        """
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def _named(self, objects: dict[str, Any]) -> dict[str, Any]:
        return {f"rank {self.groups.seat.rank}/{name}": value for name, value in objects.items()}

    def _write(self, step: int, planner: SavePlanner, history: dict[str, Any]) -> None:
        """Everything that is done in the background; the ranks talk over a group of its own."""
        self._progress.saver = get_ident()
        target = self.folder / name_of(step)
        partial = self.folder / f".{target.name}.partial"

        def finish(files: list[dict[str, str]]) -> None:
            sums = {name: value for part in files for name, value in part.items()}
            sums[".metadata"] = sha256_of(partial / ".metadata")
            made_of = inherited(self.identity, self._chosen.manifest["identity"] if self._chosen else {})
            manifest = {"step": step, **history, "identity": made_of, **self.about, "files": sums}
            write_manifest(partial, manifest)
            self._guard()
            publish(partial, target)
            read_manifest(target)
            metadata_of(target)
            for line in prune(target, keep=self.keep, protected=[self._chosen.path] if self._chosen else []):
                say(line)  # the checkpoint itself is there

        try:
            self._together(target, lambda: self._begin(partial) if self._is_first else None)
            writer = FileSystemWriter(partial, single_file_per_rank=True, sync_files=True, overwrite=True)
            self._together(target, lambda: self._write_pieces(writer, planner))
            own = dist.get_rank(self.groups.storage)
            files = self._together(
                target, lambda: {path.name: sha256_of(path) for path in partial.glob(f"__{own}_*.distcp")}
            )
            self._together(target, lambda: finish(files) if self._is_first else None)
            self.newest = target
        except CheckpointError:
            if self._is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _write_pieces(self, writer: FileSystemWriter, planner: SavePlanner) -> None:
        save({}, storage_writer=writer, planner=planner, process_group=self.groups.storage)

    def _begin(self, partial: Path) -> None:
        self._guard()
        remove_remains(self.folder)
        partial.mkdir(parents=True, exist_ok=True)

    def _agree(self, work: Callable[[], T]) -> T:
        """Do what may fail on one rank alone, and fail on every language rank then; what follows waits for all."""
        result, error = None, None
        try:
            result = work()
        except CheckpointError as raised:
            error = raised
        errors = [error] * self.groups.layout.language
        dist.all_gather_object(errors, error, group=self.groups.storage)
        if first := next(filter(None, errors), None):
            raise first
        return cast(T, result)

    def _together(self, target: Path, work: Callable[[], Any]) -> list[Any]:
        """Do this rank's part, and fail on every rank where one fails; else what each has returned."""
        result, reason = None, ""
        try:
            result = work()
        except SphinxError as error:
            reason = str(error)
        except (Exception, CheckpointException) as error:  # torch reports a full disk in errors of its own
            rank = self.groups.seat.rank
            reason = (
                f"{target}: rank {rank} could not write it ({reason_of(error)}); earlier checkpoints are untouched; "
                f"make room, then resume with checkpoint.resume=auto"
            )
        mine = (reason, result)
        found = [mine] * dist.get_world_size(self.groups.storage)
        dist.all_gather_object(found, mine, group=self.groups.storage)
        for text, _ in found:
            if text:
                failure = CheckpointError(text)
                failure.is_shared = True
                raise failure
        return [value for _, value in found]

    # load

    def choose(self, resume: str) -> Chosen | None:
        """Find the checkpoint to go on from, by `checkpoint.resume`; every language rank calls this, together.

        None for a fresh start.

        Raises:
            CheckpointError: it is incomplete or damaged, or of another model or other data; or all that there are are
                damaged.
        """
        if resume == "none":
            return None
        chosen = self._intact([Path(resume)]) if resume != "auto" else self._intact(self._known())
        if chosen is None:
            return None
        self.require_same(chosen)
        self.newest, self._chosen = chosen.path, chosen
        return chosen

    def require_same(self, chosen: Chosen) -> None:
        """Compare what a checkpoint was made with to what this run has, as far as both are known.

        Raises:
            CheckpointError: it is of another model or other data.
        """
        identity = chosen.manifest["identity"]
        if self.identity.keys() - identity.keys():  # as a converted one
            raise CheckpointError(
                f"checkpoint.resume={chosen.path}: holds only weights; begin a run with them: give it as model.weights"
            )
        made, here = comparable(identity, self.identity)
        way_out = "use the configuration and the data in its run folder, or start in another run.folder"
        require_same(f"checkpoint.resume={chosen.path}", made, here, way_out)

    def _known(self) -> list[Path]:
        """The complete checkpoints of the run as the first rank sees them, newest first."""
        found = [complete(self.folder)[::-1] if self._is_first else []]
        dist.broadcast_object_list(found, src=0, group=self.groups.storage)
        return found[0]

    def _intact(self, paths: Sequence[Path]) -> Chosen | None:
        """The first of some checkpoints that is as it was written.

        Raises:
            CheckpointError: none is, or a rank does not see what the first one sees.
        """
        faults: list[str] = []
        for path in paths:
            manifest, fault = self._manifest(path)
            if manifest is not None:
                unseen, fault = self._look(path, manifest)
                if unseen:
                    raise CheckpointError(unseen)
                if not fault:
                    return Chosen(path, manifest, faults)
            faults.append(fault)
        if faults:
            raise CheckpointError(faults[0] + (f"; {len(faults) - 1} earlier ones are no better" if faults[1:] else ""))
        return None

    def _manifest(self, path: Path) -> tuple[dict[str, Any] | None, str]:
        """What a checkpoint says of itself as the first rank reads it, or why it cannot."""
        found: list[tuple[dict[str, Any] | None, str]] = [(None, "")]
        if self._is_first:
            try:
                found = [(read_manifest(path), "")]
            except CheckpointError as error:
                found = [(None, str(error))]
        dist.broadcast_object_list(found, src=0, group=self.groups.storage)
        return found[0]

    def _look(self, path: Path, manifest: Mapping[str, Any]) -> tuple[str, str]:
        """What some rank does not see of a checkpoint that the first one sees, and what is damaged in it."""
        unseen = damaged = ""
        try:
            if _is_seen(path, manifest):
                self.verify(path, manifest)
            else:
                unseen = (
                    f"run.folder: rank {self.groups.seat.rank} on {gethostname()} does not see all files of {path}, "
                    f"which the first rank sees; give a folder on storage that all nodes share"
                )
        except CheckpointError as error:
            damaged = str(error)
        except OSError as error:
            damaged = f"checkpoint.resume={path}: cannot be read ({error}); give an earlier one"
        found = [(unseen, damaged)] * self.groups.layout.language
        dist.all_gather_object(found, (unseen, damaged), group=self.groups.storage)
        first = [next(filter(None, texts), "") for texts in zip(*found, strict=True)]
        return first[0], first[1]

    def require_same_data(self) -> None:
        """Compare once more, when all that is read in the background is known.

        Raises:
            OtherDataError: the data is not what the checkpoint was trained on that the run goes on from.
        """
        if self._chosen:
            try:
                self.require_same(self._chosen)
            except CheckpointError as error:
                raise OtherDataError(str(error)) from None

    def clear_the_way(self) -> Iterator[str]:
        """Move the steps in the folder that are later than where the run begins out of its way; the first rank does it.

        Yields:
            A line for each that was passed over since it is damaged, and one of what was moved where.
        """
        chosen = self._chosen
        self.newest = chosen.path if chosen else None
        for fault in chosen.faults if chosen else ():
            yield f"passed over: {fault}"
        done = int(chosen.manifest["step"]) if chosen else 0
        if steps := off_the_line(self.folder, chosen.path if chosen else None, done):
            self._guard()
            with writing(self.folder.parent):
                aside = set_aside(self.folder, steps)
            yield f"{', '.join(path.name for path in steps)}: this run does not go on from there, moved to {aside}"

    def verify(self, path: Path, manifest: Mapping[str, Any], key: str = "checkpoint.resume") -> None:
        """Compare the checksums of a checkpoint's files, this rank a share of them.

        Raises:
            CheckpointError: a file is damaged.
        """
        for number, (name, wanted) in enumerate(manifest["files"].items()):
            if number % self.groups.layout.language == self.groups.seat.rank and sha256_of(path / name) != wanted:
                raise CheckpointError(f"{key}={path}: {name} is damaged (its checksum differs); give an earlier one")

    def load(
        self, path: Path, pieces: Iterable[Piece], objects: Iterable[str] = (), key: str = "checkpoint.resume"
    ) -> dict[str, Any]:
        """Fill pieces from a checkpoint that was compared with the run; the objects of this rank that it has, by name.

        Every language rank calls this, together.

        Raises:
            CheckpointError: it lacks a tensor, or has one of another shape, and names it; or it cannot be read.
        """
        reader = self._agree(lambda: CheckedReader(path))
        known = reader.metadata.state_dict_metadata
        wanted = {name: None for name in self._named(dict.fromkeys(objects)) if name in known}
        planner = LoadPlanner(pieces, wanted, f"{key}={path}")
        try:
            with only_tensors():
                load(wanted, storage_reader=reader, planner=planner, process_group=self.groups.storage)
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            if isinstance(first, CheckpointError):
                raise first from None
            raise CheckpointError(f"{key}={path}: cannot be read ({reason_of(error)}); give an earlier one") from error
        return {name.partition("/")[2]: value for name, value in wanted.items()}


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The whole fp32 weights of the newest complete checkpoint of a folder, saved in any layout.

    Raises:
        CheckpointError: there is none.
    """
    newest = newest_of(folder)
    read_manifest(newest)
    whole = read_tensors(newest)
    return {name.removeprefix(WEIGHTS): weight for name, weight in whole.items()}


def _stay_on(gpu: int | None) -> None:
    """Let a thread use this rank's GPU, if it has one."""
    if gpu is not None:
        torch.cuda.set_device(gpu)


def _is_seen(path: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether this rank sees a checkpoint's files, a network's file system given time to show what is new."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while not all((path / name).is_file() for name in manifest["files"]):
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True
