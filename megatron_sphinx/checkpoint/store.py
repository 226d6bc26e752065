"""Training states on disk: complete or invisible, and the same for every layout.

A checkpoint is a folder `step_<8 digits>`. Each rank writes the slices of the whole weights that it updates, through
torch.distributed.checkpoint, while the run goes on; the folder has a hidden name until every rank is done. A crash or a
full disk leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_sphinx.checkpoint.collective import all_or_none, from_first, write_together
from megatron_sphinx.checkpoint.digests import digest_of
from megatron_sphinx.checkpoint.identity import comparable, inherited, require_same
from megatron_sphinx.checkpoint.intact import SavedStep, first_intact
from megatron_sphinx.checkpoint.manifest import read_manifest, write_manifest
from megatron_sphinx.checkpoint.slices import (
    CheckedReader,
    LoadPlanner,
    SavePlanner,
    TensorSlice,
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
from megatron_sphinx.checkpoint.weight_names import MASTER
from megatron_sphinx.console import say
from megatron_sphinx.errors import CheckpointError, OtherDataError, writing
from megatron_sphinx.liveness.progress import Progress
from megatron_sphinx.unpickling import metadata_of, only_tensors

if TYPE_CHECKING:  # tools read checkpoints without megatron-core, whose import takes seconds
    from megatron_sphinx.parallel.groups import ProcessGroups


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        folder: where they are kept.
        groups: of this rank; only language ranks have a store.
        keep: how many of the newest stay, beside the one that the run goes on from.
        identity: tells what a checkpoint must agree with to be resumed: model, encoders, tokenizer, data. It is asked
            again for each checkpoint: of data that is read in the background more is known later.
        about: what a checkpoint says of itself beside that, for its reader.
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
        self._chosen: SavedStep | None = None
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
        slices: Iterable[TensorSlice],
        objects: dict[str, Any],
        *,
        bad_pairs: int,
        divergence: dict[str, Any] | None = None,
    ) -> None:
        """Keep the state after `step` steps; every language rank calls this, together.

        Returns when the state is copied; it is written in the background. One save waits for the one before it.

        Args:
            step: steps done.
            slices: what this rank updates; together the ranks' slices must tile the whole tensors. Copies of a slice
                are written once.
            objects: what belongs to this rank alone, e.g. its random state.
            bad_pairs: pairs that could not be read in the run so far.
            divergence: what the run must remember to judge its losses.

        Raises:
            CheckpointError: the save before this one failed.
        """
        begin = time.perf_counter()
        self.finish()
        planner = SavePlanner([copied(one) for one in slices], self._named(objects))
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
            sums = {name: digest for of_rank in files for name, digest in of_rank.items()}
            sums[".metadata"] = digest_of(partial / ".metadata")
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
            files = self._together(  # torch names a file by the rank in the group, and a number
                target, lambda: {path.name: digest_of(path) for path in partial.glob(f"__{own}_*.distcp")}
            )
            self._together(target, lambda: finish(files) if self._is_first else None)
            self.newest = target
        except CheckpointError:
            if self._is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _together(self, target: Path, work: Callable[[], Any]) -> list[Any]:
        return write_together(self.groups, target, work)

    def _write_pieces(self, writer: FileSystemWriter, planner: SavePlanner) -> None:
        save({}, storage_writer=writer, planner=planner, process_group=self.groups.storage)

    def _begin(self, partial: Path) -> None:
        self._guard()
        remove_remains(self.folder)
        partial.mkdir(parents=True, exist_ok=True)

    # load

    def choose(self, resume: str) -> SavedStep | None:
        """Find the checkpoint to go on from, by `checkpoint.resume`; every language rank calls this, together.

        Returns:
            The checkpoint; None for a fresh start.

        Raises:
            CheckpointError: it is incomplete or damaged, or of another model or other data; or all that there are are
                damaged.
        """
        if resume == "none":
            return None
        known = from_first(self.groups, lambda: complete(self.folder)[::-1]) if resume == "auto" else [Path(resume)]
        chosen = first_intact(self.groups, known)
        if chosen is None:
            return None
        self.require_same(chosen)
        self.newest, self._chosen = chosen.path, chosen
        return chosen

    def require_same(self, chosen: SavedStep) -> None:
        """Compare what a checkpoint was made with to what this run has, as far as both are known.

        Raises:
            CheckpointError: it is of another model or other data.
        """
        identity = chosen.manifest["identity"]
        if self.identity.keys() - identity.keys():  # as a converted one
            raise CheckpointError(
                f"checkpoint.resume={chosen.path}: holds only weights; begin a run with them: give it as model.weights"
            )
        made, current = comparable(identity, self.identity)
        way_out = "use the configuration and the data in its run folder, or start in another run.folder"
        order = made["data"].get("text_order")
        if order != current["data"].get("text_order"):
            way_out = f"give data.text_order={order} to go on in the order that it began with, or {way_out}"
        require_same(f"checkpoint.resume={chosen.path}", made, current, way_out)

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

    def load(
        self, path: Path, slices: Iterable[TensorSlice], objects: Iterable[str] = (), key: str = "checkpoint.resume"
    ) -> dict[str, Any]:
        """Fill slices from a checkpoint that was compared with the run; every language rank calls this, together.

        Args:
            path: the checkpoint.
            slices: what is filled.
            objects: names of objects that belong to this rank alone.
            key: the configuration key that the checkpoint was given by, for messages.

        Returns:
            The objects that the checkpoint has, by name.

        Raises:
            CheckpointError: it lacks a tensor, or has one of another shape, and names it; or it cannot be read.
        """
        reader = all_or_none(self.groups, lambda: CheckedReader(path))
        known = reader.metadata.state_dict_metadata
        state = {name: None for name in self._named(dict.fromkeys(objects)) if name in known}
        planner = LoadPlanner(slices, state, f"{key}={path}")
        try:
            with only_tensors():
                load(state, storage_reader=reader, planner=planner, process_group=self.groups.storage)
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            if isinstance(first, CheckpointError):
                raise first from None
            raise CheckpointError(f"{key}={path}: cannot be read ({reason_of(error)}); give an earlier one") from error
        return {name.partition("/")[2]: value for name, value in state.items()}


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read the whole fp32 weights of the newest complete checkpoint of a folder, saved in any layout.

    Raises:
        CheckpointError: there is none.
    """
    newest = newest_of(folder)
    read_manifest(newest)
    whole = read_tensors(newest)
    return {name.removeprefix(MASTER): weight for name, weight in whole.items()}


def _stay_on(gpu: int | None) -> None:
    """Let a thread use this rank's GPU, if it has one."""
    if gpu is not None:
        torch.cuda.set_device(gpu)
