"""Weights between two checkpoints, tensor by tensor: what a model learned of real and of synthetic captions in one.

Source: SPHINX, arXiv:2311.07575, equation 1.
"""

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save
from tqdm import tqdm

from megatron_sphinx.checkpoint.store import (
    MANIFEST,
    WEIGHTS,
    first_difference,
    newest_of,
    read_manifest,
    read_tensors,
    reason_of,
    sha256_of,
    weight_shapes,
    write_manifest,
)
from megatron_sphinx.errors import CheckpointError

SCOPES = {"all": WEIGHTS, "language": f"{WEIGHTS}language."}  # how the names of the mixed tensors begin


@dataclass(frozen=True)
class Blended:
    """What a blend has made.

    Attributes:
        mixed: tensors of both sides.
        copied: tensors of one side, to the bit.
        parameters: in all of them.
    """

    mixed: int
    copied: int
    parameters: int


class _Side:
    """One of the two checkpoints; its shapes are read once they are known to be undamaged."""

    def __init__(self, key: str, folder: Path) -> None:
        self.path = newest_of(folder)
        self.title = f"{key}={self.path}"
        self.manifest = read_manifest(self.path, key)
        self.check(".metadata")
        self.shapes = weight_shapes(self.path)

    def check(self, name: str) -> None:
        """Compare a file with its checksum."""
        if sha256_of(self.path / name) != self.manifest["files"][name]:
            raise CheckpointError(f"{self.title}: {name} is damaged (its checksum differs); give an earlier one")

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return read_tensors(self.path, {name: self.shapes[name]})[name]

    def mark(self) -> dict[str, str]:
        """What a blend says of this side."""
        return {"path": str(self.path.resolve()), "sha256": sha256_of(self.path / MANIFEST)}


class _Mixer(DefaultSavePlanner):
    """Makes each tensor when it is written, so that no more than one is waiting."""

    def __init__(self, real: _Side, syn: _Side, shares: dict[str, float], bar: Any) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.real, self.syn, self.shares, self.bar = real, syn, shares, bar

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        tensor = self._mix(index.fqn, self.shares[index.fqn])
        self.bar.update(tensor.nbytes)
        return tensor

    def _mix(self, name: str, share: float) -> Tensor:
        if share in (0, 1):
            return (self.real if share else self.syn).read(name)
        return self.real.read(name).mul_(share).add_(self.syn.read(name).mul_(1 - share))


def blend(
    real: Path,
    syn: Path,
    target: Path,
    beta: float,
    *,
    scope: Literal["all", "language"] = "all",
    show: bool = False,
) -> Blended:
    """Write the weights `beta * real + (1 - beta) * syn`, in fp32, as a checkpoint to begin runs with.

    It takes what it says of itself from `real`, and holds no optimizer state. Needs memory for a few tensors.

    Args:
        real: checkpoint, or run folder, whose newest one it is.
        syn: the same, of the same model.
        target: folder to make; it is there when it is complete.
        beta: from 0 to 1; at the ends tensors are copied to the bit.
        scope: mix every tensor, or those of the language model only and take the others from `real`.
        show: whether there is a progress bar.

    Raises:
        CheckpointError: beta is out of range, the target exists or cannot be written; a side is incomplete or damaged,
            or is of another model, other encoders or another tokenizer than the other.

    Source: SPHINX, arXiv:2311.07575, equation 1.
    """
    if not 0 <= beta <= 1:
        raise CheckpointError(f"beta={beta}: is not from 0 to 1; give the share of REAL")
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists; give another TARGET, or remove it")
    sides = (_Side("REAL", real), _Side("SYN", syn))
    _compare(*sides)
    files = [(side, name) for side in sides for name in side.manifest["files"]]
    with _bar("checking", sum((side.path / name).stat().st_size for side, name in files), show) as bar:
        for side, name in files:
            side.check(name)
            bar.update((side.path / name).stat().st_size)
    shapes = sides[0].shapes
    shares = {name: beta if name.startswith(SCOPES[scope]) else 1.0 for name in shapes}
    parameters = sum(shape.numel() for shape in shapes.values())
    says = {"beta": beta, "scope": scope, "real": sides[0].mark(), "syn": sides[1].mark()}
    with _bar("mixing", parameters * torch.float32.itemsize, show) as bar:
        _write(target, _Mixer(*sides, shares, bar), sides[0].manifest | {"blend": says})
    mixed = sum(0 < share < 1 for share in shares.values())
    return Blended(mixed, len(shares) - mixed, parameters)


def _compare(real: _Side, syn: _Side) -> None:
    """Check that two checkpoints are of the same model."""
    ours, theirs = real.manifest["identity"], syn.manifest["identity"]
    for name in ("model", "vision", "tokenizer"):
        if ours.get(name) != theirs.get(name):
            where, one, other = first_difference(name, ours.get(name), theirs.get(name))
            raise CheckpointError(
                f"{syn.title}: was made with {where}={other}, REAL with {one}; "
                f"give two checkpoints with the same model, encoders and tokenizer"
            )
    for name in sorted(real.shapes.keys() ^ syn.shapes.keys()):
        title, other = (syn.title, "REAL") if name in real.shapes else (real.title, "SYN")
        raise CheckpointError(f"{title}: holds no {name}, {other} does; give two checkpoints of the same model")
    for name, shape in real.shapes.items():
        if (other := syn.shapes[name]) != shape:
            raise CheckpointError(
                f"{syn.title}: {name} has shape {list(other)}, REAL's has {list(shape)}; "
                f"give two checkpoints of the same model"
            )


def _write(target: Path, mixer: _Mixer, manifest: dict[str, Any]) -> None:
    """Write a checkpoint, a file for each tensor, under a hidden name until it is complete."""
    partial = target.with_name(f".{target.name}.partial")
    tensors = {name: torch.empty(shape, device="meta") for name, shape in mixer.real.shapes.items()}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        writer = FileSystemWriter(partial, single_file_per_rank=False)  # torch keeps all tensors of a file
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that other ranks are not asked
            save(tensors, storage_writer=writer, planner=mixer, no_dist=True)
        write_manifest(partial, manifest | {"files": {path.name: sha256_of(path) for path in partial.iterdir()}})
        os.replace(partial, target)
    except (OSError, CheckpointException) as error:
        raise CheckpointError(
            f"{target}: could not be written ({reason_of(error)}); put that right and run it again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _bar(what: str, size: int, show: bool) -> Any:
    return tqdm(desc=what, total=size, unit="B", unit_scale=True, disable=not show, dynamic_ncols=True, mininterval=1.0)
