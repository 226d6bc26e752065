"""Training states on disk: complete or invisible.

A checkpoint is a folder `step_<8 digits>`. It is written under a hidden name, each rank its own files, and renamed
when every rank is done; a crash or a full disk leaves the ones before it as they were.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.parallel.groups import ProcessGroups

_MANIFEST = "checkpoint.json"


class CheckpointStore:
    """The checkpoints of a run, in one layout.

    Args:
        folder: where they are kept.
        keep: how many of the newest stay.
        identity: what a checkpoint must agree with to be resumed: model, encoders, tokenizer, layout, data.
    """

    def __init__(self, folder: Path, groups: ProcessGroups, *, keep: int, identity: dict[str, Any]) -> None:
        self.folder, self.groups, self.keep, self.identity = folder, groups, keep, identity

    def save(self, step: int, state: dict[str, Any], model: dict[str, Any]) -> Path:
        """Keep the state after `step` steps; every language rank calls this, together.

        Args:
            step: steps done.
            state: this rank's own: optimizer, random state.
            model: this rank's shard of the weights; written once per tensor rank.

        Raises:
            CheckpointError: a rank could not write, e.g. the disk is full; earlier checkpoints stay as they are.
        """
        target = self.folder / f"step_{step:08d}"
        partial = self.folder / f".{target.name}.partial"
        if self.groups.seat.rank == 0:
            self._together(target, lambda: self._begin(partial))
        else:
            self._together(target, lambda: None)
        self._together(target, lambda: self._write(partial, state, model), clean=partial)
        self._together(target, lambda: self._publish(partial, target, step), clean=partial)
        return target

    def _begin(self, partial: Path) -> None:
        for left_behind in self.folder.glob(".step_*.partial"):
            shutil.rmtree(left_behind)
        partial.mkdir(parents=True)

    def _write(self, partial: Path, state: dict[str, Any], model: dict[str, Any]) -> None:
        seat = self.groups.seat
        _save(state, partial / f"state_{seat.rank:05d}.pt")
        if seat.data == 0:
            _save(model, partial / f"model_tensor_{seat.tensor:03d}.pt")

    def _publish(self, partial: Path, target: Path, step: int) -> None:
        if self.groups.seat.rank != 0:
            return
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        with (partial / _MANIFEST).open("w") as file:
            json.dump({"step": step, "identity": self.identity, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        for old in complete(self.folder)[: -self.keep]:
            shutil.rmtree(old)

    def _together(self, target: Path, work: Callable[[], None], clean: Path | None = None) -> None:
        """Do this rank's part, and fail on every rank where one fails."""
        reason = ""
        try:
            work()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            reason = " ".join(str(error).split())[:200]
        reasons: list[str] = [reason] * dist.get_world_size(self.groups.language)
        dist.all_gather_object(reasons, reason, group=self.groups.language)
        if not any(reasons):
            return
        if clean is not None and self.groups.seat.rank == 0:
            shutil.rmtree(clean, ignore_errors=True)
        rank, reason = next((rank, text) for rank, text in enumerate(reasons) if text)
        raise CheckpointError(
            f"{target}: rank {rank} could not write it ({reason}); earlier checkpoints are untouched; "
            f"make room, then resume with checkpoint.resume=auto"
        )

    def load(self, path: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Steps done, this rank's state and its shard of the weights, from a checkpoint.

        Raises:
            CheckpointError: it is incomplete, or of another model, data or layout.
        """
        manifest = read_manifest(path)
        for name, wanted in self.identity.items():
            if (found := manifest["identity"].get(name)) != wanted:
                raise CheckpointError(
                    f"checkpoint.resume={path}: was made with {_difference(name, found, wanted)}; "
                    f"resume with the configuration in its run folder, or start in another run.folder"
                )
        seat = self.groups.seat
        state = torch.load(path / f"state_{seat.rank:05d}.pt", map_location="cpu", weights_only=True)
        model = torch.load(path / f"model_tensor_{seat.tensor:03d}.pt", map_location="cpu", weights_only=True)
        return manifest["step"], state, model

    def find(self, resume: str) -> Path | None:
        """The checkpoint to go on from, by `checkpoint.resume`; None for a fresh start."""
        if resume == "none":
            return None
        if resume != "auto":
            return Path(resume)
        return next(reversed(complete(self.folder)), None)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{_MANIFEST}"))


def load_weights(folder: Path) -> dict[str, Any]:
    """The weights of the newest complete checkpoint of a folder, saved by a run with parallel.tensor=1.

    Raises:
        CheckpointError: there is none, or its weights are in shards.
    """
    newest = next(reversed(complete(folder)), None)
    if newest is None:
        raise CheckpointError(f"{folder}: holds no complete checkpoint; train first")
    if (tensor := read_manifest(newest)["identity"]["parallel"]["tensor"]) != 1:
        raise CheckpointError(f"{newest}: holds its weights in {tensor} shards; use a run with parallel.tensor=1")
    weights: dict[str, Any] = torch.load(newest / "model_tensor_000.pt", map_location="cpu", weights_only=True)
    return weights


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, its files' sizes checked.

    Raises:
        CheckpointError: it is missing or incomplete.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint.resume={path}: not a complete checkpoint; give a step_... folder") from error
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(
                f"checkpoint.resume={path}: {name} is missing or not {size} bytes long; resume from an earlier one"
            )
    return manifest


def _save(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _difference(name: str, found: Any, wanted: Any) -> str:
    """The first difference of two plain values, named by its path."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                return _difference(f"{name}.{key}", found.get(key), wanted.get(key))
    return f"{name}={found}, this run has {wanted}"
